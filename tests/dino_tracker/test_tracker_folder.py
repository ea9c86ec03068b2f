from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dino_tracker_interface import (
    PREPROCESSING,
    TRAIN,
    best_buddies,
    flat,
    make_checkout,
    make_clip,
    small_adapter,
    with_dot,
)
from torch.nn import functional as F

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.dino_tracker import DinoTrackerError, Prepared, prepare, write_tensor
from cosettle_adapter.errors import FrameError

FEATURES = Path("dino_embeddings", "dino_embed_video.pt")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def adapter() -> CoSettleAdapter:
    return small_adapter(14)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "their code")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make_clip(
        tmp_path / "my clips" / "a dot", [with_dot(100 + 14 * t, 90) for t in range(3)]
    )


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    return {**names, **{str(path): (b"", 0) for path in folder.rglob("*") if path.is_dir()}}


def run(adapter: CoSettleAdapter, repo: Path, clip: Path, **options: object) -> Prepared:
    destination = options.pop("destination", clip.with_name("out put"))
    options = {"stride": 14, **options}
    return prepare(adapter, repo, clip, destination, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("stride", "grid"), [(7, (67, 121)), (14, (34, 61))])
def test_the_folder_it_makes(
    adapter: CoSettleAdapter, repo: Path, clip: Path, stride: int, grid: tuple[int, int]
) -> None:
    (clip / "models" / "dino_tracker").mkdir(parents=True)
    (clip / "models" / "dino_tracker" / "delta_dino_2500.pt").write_text("left behind")
    before = tree(repo), tree(clip)
    seen: list[tuple[int, int]] = []
    made = run(
        adapter, repo, clip, stride=stride, on_frame=lambda done, count: seen.append((done, count))
    )
    assert (tree(repo), tree(clip)) == before
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert made.path == clip.with_name("out put")
    expected = {"video", "masks", "dino_embeddings"} | ({"config"} if stride == 14 else set())
    assert {path.name for path in made.path.iterdir()} == expected
    assert (made.path / "video").resolve() == clip / "video"
    features = torch.load(made.path / FEATURES, map_location="cpu")
    assert features.shape == made.shape == (3, 1024, *grid)
    assert features.dtype == torch.float32
    assert features.is_contiguous()
    lengths = features.norm(dim=1)
    assert float(lengths.min()) > 0
    assert float((lengths - 1).abs().min()) > 0.1
    if stride == 14:
        source, target = best_buddies(features, 0, 1, stride)
        dot = (source == torch.tensor([105.0, 91.0])).all(dim=1)  # the cell that is nearly the dot
        assert (target - source)[dot].tolist() in ([[14.0, 0.0]], [])
        assert len(source) > 0


def test_configs_change_where_they_must_and_nowhere_else(
    adapter: CoSettleAdapter, repo: Path, clip: Path
) -> None:
    (repo / "config" / "train.yaml").write_bytes(TRAIN.replace("\n", "\r\n").encode())
    made = run(adapter, repo, clip)
    written = {path.name: path.read_bytes().decode() for path in (made.path / "config").iterdir()}
    assert written == {
        "preprocessing.yaml": PREPROCESSING.replace("\ndino_stride: 7", "\ndino_stride: 14"),
        "train.yaml": TRAIN.replace("\nstride: 7", "\nstride: 14").replace("\n", "\r\n"),
    }
    for command in made.commands:
        for name in written:
            assert str(repo / "config" / name) not in command.arguments


def test_the_checkouts_own_configs_are_used_where_they_do(
    adapter: CoSettleAdapter, repo: Path, clip: Path
) -> None:
    made = run(adapter, repo, clip, stride=7)
    used = [word for command in made.commands for word in command.arguments if ".yaml" in word]
    assert used == [
        str(repo / "config" / name) for name in ("preprocessing.yaml", "train.yaml", "train.yaml")
    ]


def test_a_config_of_another_version(adapter: CoSettleAdapter, repo: Path, clip: Path) -> None:
    (repo / "config" / "train.yaml").write_text(TRAIN.replace("\nstride:", "\nvit_stride:"))
    with pytest.raises(DinoTrackerError, match=r"train\.yaml has 0 lines 'stride: \.\.\.'"):
        run(adapter, repo, clip)
    assert not clip.with_name("out put").exists()


def test_what_is_printed_runs(
    adapter: CoSettleAdapter, repo: Path, clip: Path, tmp_path: Path
) -> None:
    made = run(adapter, repo, clip)
    quoted = [shlex.split(line, comments=True) for line in made.script.splitlines()]
    expected = [list(command.arguments) for command in made.commands]
    assert [words for words in quoted[2:] if words] == expected
    # a python that only tells where it is and what it was given
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$PYTHONPATH" "$@" "---" >> "$RECORD"\n')
    fake.chmod(0o755)
    record = tmp_path / "record"
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["sh", "-eu", "-c", made.script],
        check=True,
        env={**os.environ, "PATH": path, "RECORD": str(record)},
    )
    runs = [text.strip().splitlines() for text in record.read_text().split("---\n") if text]
    assert runs == [[str(repo), str(repo), *words[1:]] for words in expected]
    scripts = [words[1] for words in expected]
    assert scripts == [
        "preprocessing/extract_trajectories.py",
        "preprocessing/split_trajectories_to_fg_bg.py",
        "preprocessing_dino_bb/main_dino_bb_preprocessing.py",
        "train.py",
        "inference_grid.py",
        "visualization/visualize_rainbow.py",
    ]
    assert shlex.join(expected[0]).endswith(
        "--min-trajectory-length 2 --threshold 1.5 --infer-res-size 476 854 "
        "--filter-using-direct-flow --direct-flow-threshold 2.5"
    )


def test_a_clip_without_masks_gets_them_from_the_tracker(
    adapter: CoSettleAdapter, repo: Path, tmp_path: Path
) -> None:
    config = repo / "config" / "preprocessing.yaml"
    config.write_text(PREPROCESSING.replace("direct_flow: true", "direct_flow: false"))
    clip = make_clip(tmp_path / "bare", [flat(), with_dot(300, 200)], masks=False)
    made = run(adapter, repo, clip)
    first, second, flow, *_ = (list(command.arguments) for command in made.commands)
    assert first[1:] == [
        "preprocessing/save_dino_embed_video.py", "--config",
        str(made.path / "config" / "preprocessing.yaml"), "--data-path", str(made.path),
        "--for-mask",
    ]  # fmt: skip
    assert str(made.path / "dino_embeddings" / "dino_embed_video-layer=23.pt") in second
    assert "0.6" in second
    assert "--filter-using-direct-flow" not in flow
    assert not (made.path / "masks").exists()


def test_flow_that_is_there_is_copied(adapter: CoSettleAdapter, repo: Path, clip: Path) -> None:
    (clip / "of_trajectories").mkdir()
    for half in ("fg", "bg"):
        (clip / "of_trajectories" / f"{half}_trajectories.pt").write_text("flow")
    made = run(adapter, repo, clip)
    copied = made.commands[0].arguments
    subprocess.run(copied, check=True)
    assert (made.path / "of_trajectories" / "bg_trajectories.pt").read_text() == "flow"


def test_a_file_for_no_gpu_tells_its_conversion(
    adapter: CoSettleAdapter, repo: Path, clip: Path
) -> None:
    made = run(adapter, repo, clip, location="cpu")
    torch.load(made.path / FEATURES)
    conversion = made.commands[0].arguments
    assert conversion[:2] == ("python", "-c")
    compile(conversion[2], "conversion", "exec")
    assert str(made.path / FEATURES) in conversion[2]
    assert ".cuda()" in conversion[2]


def test_lengths_follow_a_baseline(adapter: CoSettleAdapter, repo: Path, clip: Path) -> None:
    theirs = F.normalize(torch.randn(3, 1024, 4, 5), dim=1) * 53
    with write_tensor(clip / FEATURES, (1024, 4, 5), location="cuda:0") as writer:
        writer.append(theirs)
    made = run(adapter, repo, clip)
    features = torch.load(made.path / FEATURES, map_location="cpu")
    assert float(features[0].norm(dim=0).mean()) == pytest.approx(53, rel=1e-4)
    assert "scaled to 53.00" in made.scale.reason
    left = run(adapter, repo, clip, rescale=False, destination=clip.with_name("left"))
    assert left.scale.factor == 1
    unscaled = torch.load(left.path / FEATURES, map_location="cpu")
    torch.testing.assert_close(features, made.scale.factor * unscaled)


def test_a_baseline_that_is_none(adapter: CoSettleAdapter, repo: Path, clip: Path) -> None:
    (clip / FEATURES).parent.mkdir()
    (clip / FEATURES).write_bytes(b"not a tensor")
    with pytest.raises(DinoTrackerError, match=r"cannot be read.*--no-rescale"):
        run(adapter, repo, clip)
    torch.save(torch.zeros(3), clip / FEATURES)
    with pytest.raises(DinoTrackerError, match=r"does not hold features \(T, C, h, w\)"):
        run(adapter, repo, clip)
    assert not clip.with_name("out put").exists()


def test_lengths_are_alike_without_a_baseline(
    adapter: CoSettleAdapter, repo: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = adapter.stream
    monkeypatch.setattr(adapter, "stream", lambda *a, **o: stream(*a, **o, normalize=True))
    made = run(adapter, repo, clip)
    features = torch.load(made.path / FEATURES, map_location="cpu")
    assert float(features[0].norm(dim=0).mean()) == pytest.approx(32, rel=1e-3)
    assert "mean length 1.00, scaled to 32.00" in made.scale.reason


def test_links_that_cannot_be_made_are_copies(
    adapter: CoSettleAdapter, repo: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("a privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    made = run(adapter, repo, clip)
    assert not (made.path / "video").is_symlink()
    assert len(list((made.path / "video").iterdir())) == 3


def test_refusals(adapter: CoSettleAdapter, repo: Path, clip: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)

    def refused(message: str, **options: object) -> None:
        with pytest.raises(DinoTrackerError, match=message):
            run(adapter, **{"repo": repo, "clip": clip, **options})  # type: ignore[arg-type]

    refused("stride must be 7 or 14", stride=8)
    refused(r"no checkout of DINO-Tracker: it lacks train\.py", repo=tmp_path)
    refused("is the data folder itself", destination=clip)
    refused("lies in the data folder", destination=clip / "new")
    refused("exists already", destination=repo)
    refused(r"video holds no \.jpg or \.png frames.*mp4_to_frames", clip=repo)
    refused(r"video holds no \.jpg or \.png frames", clip=tmp_path / "nowhere")
    assert tree(tmp_path) == before


def test_checkpoints_are_not_trained_on(
    adapter: CoSettleAdapter, repo: Path, clip: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "trained" / "models" / "dino_tracker"
    trained.mkdir(parents=True)
    (trained / "tracker_head_2500.pt").write_text("weights")
    with pytest.raises(DinoTrackerError, match=r"holds checkpoints.*would go on"):
        run(adapter, repo, clip, destination=tmp_path / "trained")
    assert (trained / "tracker_head_2500.pt").read_text() == "weights"


def test_clips_it_could_not_use(adapter: CoSettleAdapter, repo: Path, clip: Path) -> None:
    (clip / "masks" / "00002.png").unlink()
    with pytest.raises(DinoTrackerError, match="3 frames in video/ and 2 masks"):
        run(adapter, repo, clip)
    shutil.rmtree(clip / "masks")
    (clip / "masks").mkdir()
    with pytest.raises(DinoTrackerError, match="masks of its own only where there is no masks/"):
        run(adapter, repo, clip)
    (clip / "masks").rmdir()
    (clip / "video" / "00002.png").write_bytes(b"broken")
    with pytest.raises(FrameError, match=r"00002\.png cannot be read"):
        run(adapter, repo, clip)
    for name in ("00001.png", "00002.png"):
        (clip / "video" / name).unlink()
    with pytest.raises(DinoTrackerError, match="a single frame"):
        run(adapter, repo, clip)
    assert [path.name for path in clip.parent.iterdir()] == ["a dot"]


def test_a_full_disk_is_known_beforehand(
    adapter: CoSettleAdapter, repo: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cosettle_adapter.dino_tracker.folders.shutil.disk_usage",
        lambda path: shutil._ntuple_diskusage(1, 1, 10**6),
    )
    with pytest.raises(DinoTrackerError, match=r"take 0\.03 GB, and .* has 0\.00 GB free"):
        run(adapter, repo, clip)


def test_an_interrupt_leaves_nothing(adapter: CoSettleAdapter, repo: Path, clip: Path) -> None:
    def interrupt(done: int, count: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(adapter, repo, clip, on_frame=interrupt)
    assert [path.name for path in clip.parent.iterdir()] == ["a dot"]


KILLED = """
import os, signal, sys
from cosettle_adapter.dino_tracker import prepare
from dino_tracker_interface import small_adapter

def kill(done, count):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

prepare(small_adapter(14), *sys.argv[1:], stride=14, on_frame=kill)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_kill_leaves_nothing_under_the_final_name(
    adapter: CoSettleAdapter, repo: Path, clip: Path
) -> None:
    destination = clip.with_name("out put")
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(repo), str(clip), str(destination)],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert killed.returncode == -9
    assert not destination.exists()
    assert run(adapter, repo, clip).shape == (3, 1024, 34, 61)


def test_the_example(
    repo: Path,
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[tuple[object, ...]] = []
    small = small_adapter(14, 14)

    def load(name: str, *, device: str, stride: int) -> CoSettleAdapter:
        asked.append((name, device, stride))
        return small

    monkeypatch.setattr(CoSettleAdapter, "from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    script = ROOT / "examples" / "dino_tracker_features.py"
    arguments = ["--repo", str(repo), "--data", str(clip), "--stride", "14", "--raw"]
    arguments += ["--device", "cpu", "--temporal-fusion", "symmetric"]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    assert asked == [("dinov2-vits14-pypi", "cpu", 14)]
    printed = capsys.readouterr()
    assert "a dot-raw: features (3, 1024, 34, 61), mean length" in printed.out
    assert f"cd '{repo}'" in printed.out
    assert "3 of 3 frames" in printed.err
    with pytest.raises(SystemExit, match=r"error: .*a dot-raw exists already"):
        runpy.run_path(str(script), run_name="__main__")
    assert len(script.read_text().splitlines()) < 120
