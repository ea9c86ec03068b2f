"""Runs that were killed or interrupted go on, and what they write is that of an unbroken run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.correspondence import fusion
from cosettle_adapter.errors import FrameError
from cosettle_adapter.extraction import extract
from cosettle_adapter.extraction.errors import OutputBusyError, OutputExistsError
from cosettle_adapter.extraction.formats import FORMATS
from cosettle_adapter.feature_file import read_features
from cosettle_adapter.locking import exclusive

from helpers import write_video

TESTS = Path(__file__).parents[1]
NAMES = {"safetensors": "f.safetensors", "zarr": "f.zarr", "npy-memmap": "f.npy"}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4", frames=40, height=48, width=64, fps=20)


def in_a_process(*arguments: str) -> dict[str, dict[str, int]]:
    finished = subprocess.run(
        [sys.executable, str(TESTS / "extraction_processes.py"), *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        check=True,
        timeout=600,
    )
    told: dict[str, dict[str, int]] = json.loads(finished.stdout)
    return told


def content(output: Path) -> dict[str, bytes]:
    """All bytes of an output and its sidecar."""
    files = [file for file in output.rglob("*") if file.is_file()] if output.is_dir() else [output]
    said = output.with_name(f"{output.name}.json").read_bytes()
    return {str(file.relative_to(output)): file.read_bytes() for file in files} | {"": said}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    told = in_a_process("kill", str(tmp_path), *NAMES)
    for name, result in told.items():
        suffix = FORMATS[name].suffix
        assert result["signal"] == 9
        assert not result["there"], "nothing has the final name before it is whole"
        assert 8 <= result["found"] <= 20
        assert result["found"] + result["encoded"] == result["frames"] == 50
        whole, broken = tmp_path / f"whole{suffix}", tmp_path / f"broken{suffix}"
        assert content(whole) == content(broken)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes there")
@pytest.mark.parametrize(
    ("format", "frames"),
    [
        ("safetensors", 700),
        pytest.param("safetensors", 5000, marks=pytest.mark.slow),
        pytest.param("zarr", 5000, marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_the_video(format: str, frames: int, tmp_path: Path) -> None:
    peaks = in_a_process("memory", str(tmp_path), format, "100", str(frames))
    assert peaks[str(frames)] <= 1.05 * peaks["100"]


def interrupted(
    adapter: CoSettleAdapter, clip: Path, destination: Path, error: BaseException, **options: object
) -> None:
    def on_chunk(frames: int) -> None:
        if frames >= 12:
            raise error

    with pytest.raises(type(error)):
        extract(adapter, clip, destination, batch_size=4, on_chunk=on_chunk, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES.values())
def test_an_interrupt_keeps_what_is_written_and_an_earlier_file(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path, name: str
) -> None:
    if name.endswith("zarr"):
        pytest.importorskip("zarr")
    destination = tmp_path / name
    extract(small_adapter, clip, destination, batch_size=4, max_frames=2)
    before = content(destination)
    interrupted(small_adapter, clip, destination, KeyboardInterrupt(), overwrite=True)
    assert content(destination) == before
    result = extract(small_adapter, clip, destination, batch_size=4, overwrite=True)
    assert (result.frames, result.found) == (40, 12)
    assert len(read_features(destination).features) == 40
    assert not list(tmp_path.glob(".*"))


def test_frames_that_are_written_are_not_encoded_again(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    options = {"every": 2, "start": 0.2, "max_frames": 15}
    destination, unbroken = tmp_path / "f.safetensors", tmp_path / "u.safetensors"
    interrupted(small_adapter, clip, destination, RuntimeError("out of memory"), **options)
    encoded: list[int] = []
    handle = small_adapter.projection.register_forward_hook(
        lambda _module, inputs, _output: encoded.append(len(inputs[0]))
    )
    result = extract(small_adapter, clip, destination, batch_size=4, **options)  # type: ignore[arg-type]
    handle.remove()
    assert (result.found, sum(encoded)) == (12, 3)
    extract(small_adapter, clip, unbroken, batch_size=4, **options)  # type: ignore[arg-type]
    assert content(destination)[""] == content(unbroken)[""]
    assert destination.read_bytes() == unbroken.read_bytes()


def damage_features(partial: Path) -> None:
    features = partial / "features"
    written = bytearray(features.read_bytes())
    written[-5] ^= 1
    features.write_bytes(written)


def cut_features(partial: Path) -> None:
    features = partial / "features"
    features.write_bytes(features.read_bytes()[:-5])


def tear_journal(partial: Path) -> None:
    journal = partial / "journal"
    journal.write_text(journal.read_text()[:-7])


def replace_journal(partial: Path) -> None:
    (partial / "journal").write_text('{"written_by": "another version"}\n')


def lose_features(partial: Path) -> None:
    (partial / "features").unlink()


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (damage_features, 8),
        (cut_features, 8),
        (tear_journal, 8),
        (replace_journal, 0),
        (lose_features, 0),
    ],
)
def test_what_a_crash_damaged_is_written_again(
    small_adapter: CoSettleAdapter,
    clip: Path,
    tmp_path: Path,
    harm: Callable[[Path], None],
    found: int,
) -> None:
    destination, unbroken = tmp_path / "f.safetensors", tmp_path / "u.safetensors"
    interrupted(small_adapter, clip, destination, KeyboardInterrupt())
    harm(tmp_path / ".f.safetensors.partial")
    assert extract(small_adapter, clip, destination, batch_size=4).found == found
    extract(small_adapter, clip, unbroken, batch_size=4)
    assert destination.read_bytes() == unbroken.read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 64}, "size was not given and is 64"),
        ({"every": 2}, "every was 1 and is 2"),
        ({"temporal_fusion": "causal"}, "temporal-fusion was not given and is causal"),
        ({"storage": torch.float16}, "storage was float32 and is float16"),
        ({"batch_size": 8}, "batch-size was 4 and is 8"),
    ],
)
def test_a_started_run_of_other_settings_is_refused_or_begun_anew(
    small_adapter: CoSettleAdapter,
    clip: Path,
    tmp_path: Path,
    changed: dict[str, object],
    message: str,
) -> None:
    destination = tmp_path / "f.safetensors"
    interrupted(small_adapter, clip, destination, KeyboardInterrupt())
    options = {"batch_size": 4, **changed}
    with pytest.raises(OutputExistsError, match=message):
        extract(small_adapter, clip, destination, **options)  # type: ignore[arg-type]
    result = extract(small_adapter, clip, destination, overwrite=True, **options)  # type: ignore[arg-type]
    assert result.found == 0


def test_another_model_or_video_is_refused(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    destination = tmp_path / "f.safetensors"
    interrupted(small_adapter, clip, destination, KeyboardInterrupt())
    raw = small_adapter.without_projection()
    with pytest.raises(OutputExistsError, match="projection kind was linear and is identity"):
        extract(raw, clip, destination, batch_size=4)
    write_video(clip, frames=41, height=48, width=64, fps=20)
    with pytest.raises(OutputExistsError, match="the source's content has changed"):
        extract(small_adapter, clip, destination, batch_size=4)
    assert (tmp_path / ".f.safetensors.partial" / "journal").exists(), "nor is it thrown away"


def test_finished_files_are_left_unless_told_otherwise(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    destination = tmp_path / "f.safetensors"
    first = extract(small_adapter, clip, destination, max_frames=5)
    assert first.found == 0
    again = extract(small_adapter, clip.rename(tmp_path / "renamed.mp4"), destination, max_frames=5)
    assert (again.found, again.frames, again.shape) == (5, 5, first.shape)
    clip = tmp_path / "renamed.mp4"
    with pytest.raises(OutputExistsError, match="max-frames was 5 and is 6"):
        extract(small_adapter, clip, destination, max_frames=6)
    assert extract(small_adapter, clip, destination, max_frames=6, overwrite=True).frames == 6
    destination.with_name("f.safetensors.json").unlink()
    with pytest.raises(OutputExistsError, match=r"without f\.safetensors\.json"):
        extract(small_adapter, clip, destination, max_frames=6)


@pytest.mark.parametrize("name", ["f.safetensors", "f.zarr"])
def test_a_kill_between_the_last_two_steps_is_made_good(
    small_adapter: CoSettleAdapter,
    clip: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name.endswith("zarr"):
        pytest.importorskip("zarr")
    destination = tmp_path / name
    extract(small_adapter, clip, destination, max_frames=2, batch_size=4)
    replace = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.name == "sidecar.json":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(small_adapter, clip, destination, batch_size=4, overwrite=True)
    result = extract(small_adapter, clip, destination, batch_size=4)
    assert (result.frames, result.found) == (40, 40)
    assert len(read_features(destination).timestamps) == 40
    assert not list(tmp_path.glob(".*"))


def test_a_broken_source_and_frames_in_memory_leave_nothing(
    small_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    frames = [torch.zeros(3, 48, 64, dtype=torch.uint8)] * 10
    with pytest.raises(FrameError, match="the first frame is"):
        extract(small_adapter, [*frames, frames[0][:, :32]], tmp_path / "f.npy", batch_size=4)
    with pytest.raises(OSError, match="gone"):
        extract(small_adapter, iter([*frames, OSError]), tmp_path / "f.npy", on_chunk=_gone)
    assert not list(tmp_path.iterdir())


def _gone(frames: int) -> None:
    raise OSError("gone")


@pytest.mark.parametrize(
    ("options", "encoded_again"),
    [
        ({"settle": True}, 12),
        ({"temporal_fusion": "symmetric"}, 4),
        ({"temporal_fusion": "causal"}, 4),
        ({"settle": True, "temporal_fusion": "symmetric"}, 12),
    ],
)
def test_features_that_depend_on_earlier_frames_go_on_with_the_same_bytes(
    small_adapter: CoSettleAdapter,
    clip: Path,
    tmp_path: Path,
    options: dict[str, object],
    encoded_again: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fusion, "CUT", 0.0)  # features of random weights
    destination, unbroken = tmp_path / "f.safetensors", tmp_path / "u.safetensors"
    interrupted(small_adapter, clip, destination, KeyboardInterrupt(), **options)
    encoded: list[int] = []
    handle = small_adapter.projection.register_forward_hook(
        lambda _module, inputs, _output: encoded.append(len(inputs[0]))
    )
    result = extract(small_adapter, clip, destination, batch_size=4, **options)  # type: ignore[arg-type]
    handle.remove()
    assert result.found == 12
    assert sum(encoded) == 40 - 12 + encoded_again
    extract(small_adapter, clip, unbroken, batch_size=4, **options)  # type: ignore[arg-type]
    assert content(destination)[""] == content(unbroken)[""]
    assert destination.read_bytes() == unbroken.read_bytes()
    plain = [chunk.features for chunk in small_adapter.stream(clip, batch_size=4)]
    assert not torch.equal(read_features(destination).features, torch.cat(plain))


def test_two_runs_do_not_write_one_file(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    pytest.importorskip("fcntl", reason="no such locks here")
    partial = tmp_path / ".f.npy.partial"
    partial.mkdir()
    with (
        exclusive(partial, refusal=ValueError("the test holds it")),
        pytest.raises(OutputBusyError, match=r"another run is writing .*f\.npy"),
    ):
        extract(small_adapter, clip, tmp_path / "f.npy")


def test_a_run_that_finds_its_folder_gone_makes_it_again(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[Path] = []

    def just_finished(
        folder: Path, *, refusal: Exception
    ) -> contextlib.AbstractContextManager[None]:
        if not lost:
            lost.append(folder)
            folder.rmdir()
            raise FileNotFoundError
        return exclusive(folder, refusal=refusal)

    monkeypatch.setattr("cosettle_adapter.extraction.work.exclusive", just_finished)
    assert extract(small_adapter, clip, tmp_path / "f.npy", max_frames=2).frames == 2
    assert lost
    assert not list(tmp_path.glob(".*"))


def test_a_broken_run_over_a_truncated_video_says_what_an_unbroken_one_says(
    small_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    whole = write_video(tmp_path / "w.mkv", frames=80, height=48, width=64, fps=20, noisy=True)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    destination, unbroken = tmp_path / "f.npy", tmp_path / "u.npy"
    interrupted(small_adapter, cut, destination, KeyboardInterrupt())
    result = extract(small_adapter, cut, destination, batch_size=4)
    assert result.found == 12
    assert result.truncated is not None
    extract(small_adapter, cut, unbroken, batch_size=4)
    assert content(destination)[""] == content(unbroken)[""]
    assert destination.read_bytes() == unbroken.read_bytes()
    assert extract(small_adapter, cut, destination, batch_size=4).truncated == result.truncated
