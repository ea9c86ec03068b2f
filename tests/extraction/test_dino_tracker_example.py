"""The example that prepares a folder for an unmodified checkout of DINO-Tracker."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dino_tracker_interface import (
    PREPROCESSING,
    TRAIN,
    best_buddies,
    make_checkout,
    make_clip,
    small_adapter,
    with_dot,
)
from einops import rearrange
from PIL import Image
from torchvision import transforms

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.extraction.settings import DinoTrackerError

SCRIPT = Path(__file__).parents[2] / "examples" / "dino_tracker_features.py"
FEATURES = Path("dino_embeddings", "dino_embed_video.pt")

Prepare = Callable[..., Path]
_raw = CoSettleAdapter.raw


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "their code")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    frames = [with_dot(100 + 14 * t, 90) for t in range(3)]
    return make_clip(tmp_path / "my clips" / "a dot", frames)


@pytest.fixture
def example() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def prepare(
    example: dict[str, Any], repo: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> Prepare:
    """Its main function on a small adapter."""
    adapters = {stride: small_adapter(14, stride) for stride in (7, 14)}

    def load(name: str, *, device: str, stride: int | None = None) -> CoSettleAdapter:
        return adapters[stride or 14]

    monkeypatch.setattr(CoSettleAdapter, "from_pretrained", load)

    def run(**options: Any) -> Path:
        output = clip.with_name("out put")
        example["main"](
            **{"repo": repo, "data": clip, "output": output, "stride": 14, "raw": True} | options
        )
        return options.get("output", output)

    return run


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    return {**names, **{str(path): (b"", 0) for path in folder.rglob("*") if path.is_dir()}}


def features_of(folder: Path) -> torch.Tensor:
    features: torch.Tensor = torch.load(folder / FEATURES, map_location="cpu")
    return features


@pytest.mark.parametrize(("stride", "grid"), [(7, (67, 121)), (14, (34, 61))])
def test_the_folder_it_makes(
    prepare: Prepare, repo: Path, clip: Path, stride: int, grid: tuple[int, int]
) -> None:
    (clip / "models" / "dino_tracker").mkdir(parents=True)
    (clip / "models" / "dino_tracker" / "delta_dino_2500.pt").write_text("left behind")
    (repo / "config" / "train.yaml").write_bytes(TRAIN.replace("\n", "\r\n").encode())
    before = tree(repo), tree(clip)
    made = prepare(stride=stride, temporal_fusion="symmetric")
    assert (tree(repo), tree(clip)) == before
    expected = {"video", "masks", "dino_embeddings"} | ({"config"} if stride == 14 else set())
    assert {path.name for path in made.iterdir()} == expected
    assert (made / "video").resolve() == clip / "video"
    features = features_of(made)
    assert features.shape == (3, 1024, *grid)
    assert float(features[0].norm(dim=0).mean()) == pytest.approx(32, rel=1e-3)
    if stride == 14:
        source, target = best_buddies(features, 0, 1, stride)
        dot = (source == torch.tensor([105.0, 91.0])).all(dim=1)  # the patch nearly at the dot
        assert (target - source)[dot].tolist() in ([[14.0, 0.0]], [])
        configs = {path.name: path.read_bytes().decode() for path in (made / "config").iterdir()}
        assert configs == {
            "preprocessing.yaml": PREPROCESSING.replace("\ndino_stride: 7", "\ndino_stride: 14"),
            "train.yaml": TRAIN.replace("\nstride: 7", "\nstride: 14").replace("\n", "\r\n"),
        }


def run_commands(printed: str, tmp_path: Path) -> list[list[str]]:
    """What a python is called with, that only records where it is and what it was given."""
    (tmp_path / "bin").mkdir()
    fake, record = tmp_path / "bin" / "python", tmp_path / "record"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$PYTHONPATH" "$@" "---" >> "$RECORD"\n')
    fake.chmod(0o755)
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RECORD": str(record)}
    script = printed.partition("environment:\n")[2]
    subprocess.run(["sh", "-eu", "-c", script], check=True, env=environment)
    return [call.strip().splitlines() for call in record.read_text().split("---\n") if call]


def test_the_commands_it_prints(
    prepare: Prepare, repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = prepare()
    printed = capsys.readouterr().out
    assert "out put: features (3, 1024, 34, 61), scaled by" in printed
    calls = run_commands(printed, tmp_path)
    assert all(call[:2] == [str(repo), str(repo)] for call in calls)
    assert [call[2] for call in calls] == [
        "preprocessing/extract_trajectories.py",
        "preprocessing/split_trajectories_to_fg_bg.py",
        "preprocessing_dino_bb/main_dino_bb_preprocessing.py",
        "train.py",
        "inference_grid.py",
        "visualization/visualize_rainbow.py",
    ]
    flow = " ".join(calls[0])
    assert "--min-trajectory-length 2 --infer-res-size 476 854 --filter-using-direct-flow" in flow
    assert "--threshold 1.5" in flow
    assert calls[2][3:] == [
        "--config", str(made / "config" / "preprocessing.yaml"), "--data-path", str(made),
    ]  # fmt: skip
    assert str(made / "config" / "train.yaml") in calls[3]
    assert str(made / "of_trajectories" / "fg_trajectories.pt") in calls[1]


def test_commands_without_masks_and_direct_flow(
    prepare: Prepare,
    repo: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("a privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    config = repo / "config" / "preprocessing.yaml"
    config.write_text(PREPROCESSING.replace("direct_flow: true", "direct_flow: false"))
    shutil.rmtree(clip / "masks")
    made = prepare(stride=7, rescale=False)
    assert len(list((made / "video").iterdir())) == 3, "copies"
    masks, threshold, flow, *_ = run_commands(capsys.readouterr().out, tmp_path)
    assert masks[2:4] == ["preprocessing/save_dino_embed_video.py", "--config"]
    assert str(made / "dino_embeddings" / "dino_embed_video-layer=23.pt") in threshold
    assert "--filter-using-direct-flow" not in flow
    assert not (made / "masks").exists()


def test_refusals_leave_nothing(prepare: Prepare, repo: Path, clip: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)

    def refused(message: str, error: type[Exception] = DinoTrackerError, **options: object) -> None:
        with pytest.raises(error, match=message):
            prepare(**options)

    refused(r"is not a checkout of DINO-Tracker", repo=tmp_path)
    for taken in (clip, clip / "new", repo):
        refused("exists or lies inside --data", output=taken)
    refused(r"video holds 0 \.jpg or \.png frames.*mp4_to_frames", data=repo)
    assert tree(tmp_path) == before
    frame = (clip / "video" / "00002.png").read_bytes()
    Image.new("RGBA", (20, 10)).save(clip / "video" / "00002.png")
    refused(r"00002\.png is an image of mode RGBA.*RGB", FrameError)
    (clip / "video" / "00002.png").write_bytes(b"broken")
    refused(r"00002\.png cannot be read", FrameError)
    (clip / "video" / "00002.png").write_bytes(frame)
    (clip / "masks" / "00002.png").unlink()
    refused("3 frames in video/ and 2 masks")
    shutil.rmtree(clip / "masks")
    (repo / "config" / "train.yaml").write_text(TRAIN.replace("\nstride:", "\nvit_stride:"))
    refused(r"has 0 lines 'stride: \.\.\.'")
    assert [path.name for path in clip.parent.iterdir()] == ["a dot"]


def test_frames_are_those_of_load_video(example: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "video").mkdir()
    for seed, name in enumerate(["2.png", "10.png", "1.jpg", ".0.png", "3.jpeg", "4.PNG"]):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randint(0, 256, (120, 160, 3), generator=generator).to(torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / "video" / name)
    files, masks = example["find_inputs"](tmp_path, tmp_path.with_name("out"))
    assert [path.name for path in files] == [".0.png", "1.jpg", "10.png", "2.png"]
    assert not masks
    for path, frame in zip(files, example["read_frames"](files), strict=True):
        with Image.open(path) as image:
            expected = transforms.ToTensor()(image.resize((854, 476), Image.Resampling.LANCZOS))
        torch.testing.assert_close(frame / 255, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("facet", ["tokens", "queries", "keys", "values"])
def test_layers_are_those_of_its_extractor(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch, layer: int, facet: str
) -> None:
    """It hooks blocks, for their outputs, and their layers qkv; no norm is applied to either."""
    adapter, hooked = small_adapter(14, 14), []
    monkeypatch.setattr(
        CoSettleAdapter, "raw", lambda _, device, stride, **reads: _raw(adapter.backbone, **reads)
    )
    block = adapter.backbone.vit.blocks[layer]
    source = block if facet == "tokens" else block.attn.qkv
    handle = source.register_forward_hook(lambda _, inputs, output: hooked.append(output))
    features = features_of(prepare(raw=False, layer=layer, facet=facet, rescale=False))
    handle.remove()
    output = torch.cat(hooked)[:, 1:]  # without the class token
    if facet != "tokens":
        part = {"queries": 0, "keys": 1, "values": 2}[facet]
        output = rearrange(output, "t n (part c) -> part t n c", part=3)[part]
    expected = rearrange(output, "t (h w) c -> t c h w", h=34)
    torch.testing.assert_close(features[:, : expected.shape[1]], expected, rtol=0, atol=0)
    assert not features[:, expected.shape[1] :].any()


def test_facets_of_other_backbones_are_refused(prepare: Prepare) -> None:
    adapter = small_adapter(14)
    adapter.backbone.vit.blocks[1].attn = torch.nn.Identity()
    with pytest.raises(DinoTrackerError, match="small-vit14 does not compute its keys in one"):
        runpy.run_path(str(SCRIPT))["read_facet"](adapter, "keys")
    with pytest.raises(DinoTrackerError, match="--facet keys needs a --layer"):
        prepare(facet="keys")


def test_the_command_line(
    repo: Path,
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[dict[str, Any]] = []
    adapter = small_adapter(14)

    def raw(name: str, **options: Any) -> CoSettleAdapter:
        asked.append(options)
        if "stride" in options:
            raise GeometryError("feature maps have no stride to choose")
        return adapter

    monkeypatch.setattr(CoSettleAdapter, "raw", raw)
    monkeypatch.chdir(tmp_path)
    arguments = ["--repo", str(repo), "--data", str(clip), "--layer", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--stride", "14"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    options = {"layer": 1, "norm": False, "device": "cpu"}
    assert asked == [options | {"stride": 14}, options]
    assert features_of(tmp_path / "a dot-raw").shape == (3, 1024, 34, 61)
    assert "3 of 3 frames" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"error: .*a dot-raw exists"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
