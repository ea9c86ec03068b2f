"""Interrupted and killed runs are resumed, and write what an uninterrupted run writes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

from cosettle_adapter import CoSettleAdapter, FrameSelection
from cosettle_adapter.correspondence import fusion
from cosettle_adapter.extraction import FORMATS, extract, read_features
from cosettle_adapter.extraction.settings import OutputBusyError, OutputExistsError
from cosettle_adapter.video.decoder import Video

from helpers import write_video

TESTS = Path(__file__).parents[1]


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
    files = [file for file in output.rglob("*") if file.is_file()] or [output]
    said = output.with_name(f"{output.name}.json").read_bytes()
    return {str(file.relative_to(output)): file.read_bytes() for file in files} | {"": said}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "tokens",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("symmetric", "settle")),
    ],
)
def test_a_killed_run_is_resumed_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    pytest.importorskip("pyarrow")
    several = {"plain": ["zarr", "npy-memmap"], "tokens": ["zarr", "parquet"]}
    formats = ["safetensors", *several.get(kind, [])]
    told = in_a_process("kill", str(tmp_path), kind, *formats)
    assert list(told) == formats
    for name, result in told.items():
        suffix = FORMATS[name].suffix
        assert result["signal"] == 9
        assert not result["there"], "nothing has the final name before it is whole"
        assert 8 <= result["found"] <= 20
        again = {"symmetric": 4, "settle": result["found"]}.get(kind, 0)
        assert result["encoded"] == 50 - result["found"] + again
        whole, broken = tmp_path / f"whole{suffix}", tmp_path / f"broken{suffix}"
        assert content(whole) == content(broken)
        assert len(read_features(broken).timestamps) == 50
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "options",
    [{}, {"settle": True}, {"temporal_fusion": "causal"}],
    ids=["plain", "settle", "fuse"],
)
def test_a_source_that_broke_off_within_a_batch_is_resumed(
    small_adapter: CoSettleAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    clip = write_video(tmp_path / "clip.mp4", frames=30, height=32, width=48)
    decoded = Video.items

    def breaks_off(video: Video) -> Iterator[Any]:
        yield from itertools.islice(decoded(video), 18)
        raise ConnectionError("it broke off")

    output, whole = tmp_path / "f.npy", tmp_path / "whole.npy"
    with monkeypatch.context() as patched:
        patched.setattr(Video, "items", breaks_off)
        with pytest.raises(ConnectionError):
            extract(small_adapter, clip, output, batch_size=8, **options)
    result = extract(small_adapter, clip, output, batch_size=8, **options)
    assert (result.found, result.frames) == (18, 30)
    extract(small_adapter, clip, whole, batch_size=8, **options)
    torch.testing.assert_close(read_features(output).features, read_features(whole).features)
    assert torch.equal(read_features(output).timestamps, read_features(whole).timestamps)


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
    adapter: CoSettleAdapter,
    clip: Path,
    output: Path,
    error: type = KeyboardInterrupt,
    **how: object,
) -> None:
    """Run an extraction that ends after 12 frames."""

    def on_chunk(frames: int) -> None:
        if frames >= 12:
            raise error

    with pytest.raises(error):
        extract(adapter, clip, output, batch_size=4, on_chunk=on_chunk, **how)  # type: ignore[arg-type]


def assert_as_unbroken(adapter: CoSettleAdapter, clip: Path, output: Path, **how: object) -> None:
    unbroken = output.with_name(f"unbroken{output.suffix}")
    extract(adapter, clip, unbroken, batch_size=4, **how)  # type: ignore[arg-type]
    assert output.read_bytes() == unbroken.read_bytes()
    assert content(output)[""] == content(unbroken)[""]


@pytest.mark.parametrize("name", ["f.safetensors", "f.zarr", "f.npy"])
def test_an_interrupt_keeps_what_is_written_and_an_earlier_file(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path, name: str
) -> None:
    if name.endswith("zarr"):
        pytest.importorskip("zarr")
    output = tmp_path / name
    extract(small_adapter, clip, output, batch_size=4, select=FrameSelection(max_frames=2))
    before = content(output)
    interrupted(small_adapter, clip, output, overwrite=True)
    assert content(output) == before
    result = extract(small_adapter, clip, output, batch_size=4, overwrite=True)
    assert (result.frames, result.found) == (40, 12)
    assert len(read_features(output).features) == 40
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "encoded_again"),
    [
        ({}, 0),
        ({"settle": True}, 12),
        ({"temporal_fusion": "symmetric"}, 4),
        ({"temporal_fusion": "causal"}, 4),
        ({"settle": True, "temporal_fusion": "symmetric"}, 12),
    ],
)
def test_no_more_is_encoded_again_than_later_frames_depend_on(
    small_adapter: CoSettleAdapter,
    clip: Path,
    tmp_path: Path,
    options: dict[str, object],
    encoded_again: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fusion, "CUT", 0.0)  # features of random weights
    options = {**options, "select": FrameSelection(start=0.2, every=2, max_frames=15)}
    output, encoded = tmp_path / "f.safetensors", []
    interrupted(small_adapter, clip, output, RuntimeError, **options)
    handle = small_adapter.projection.register_forward_hook(
        lambda _module, inputs, _output: encoded.append(len(inputs[0]))
    )
    result = extract(small_adapter, clip, output, batch_size=4, **options)  # type: ignore[arg-type]
    handle.remove()
    assert (result.found, sum(encoded)) == (12, 15 - 12 + encoded_again)
    assert_as_unbroken(small_adapter, clip, output, **options)


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def harm(partial: Path) -> None:
        (partial / name).write_bytes(change((partial / name).read_bytes()))

    return harm


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (damage("features", lambda numbers: numbers[:-5] + b"x" + numbers[-4:]), 8),
        (damage("features", lambda numbers: numbers[:-5]), 8),
        (damage("mean", lambda numbers: numbers[:-1] + b"x"), 8),
        (damage("journal", lambda lines: lines[:-7]), 8),
        (damage("journal", lambda lines: b'{"written_by": "another version"}\n'), 0),
        (lambda partial: (partial / "features").unlink(), 0),
    ],
    ids=["damaged", "cut", "second array", "torn journal", "another journal", "lost"],
)
def test_what_a_crash_damaged_is_written_again(
    small_adapter: CoSettleAdapter,
    clip: Path,
    tmp_path: Path,
    harm: Callable[[Path], None],
    found: int,
) -> None:
    output = tmp_path / "f.safetensors"
    interrupted(small_adapter, clip, output, tokens="patch,mean")
    harm(tmp_path / ".f.safetensors.partial")
    result = extract(small_adapter, clip, output, batch_size=4, tokens="patch,mean")
    assert result.found == found
    assert_as_unbroken(small_adapter, clip, output, tokens="patch,mean")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 64}, "size was not given and is 64"),
        ({"select": FrameSelection(every=2)}, "every was 1 and is 2"),
        ({"temporal_fusion": "causal"}, "temporal-fusion was not given and is causal"),
        ({"storage": torch.float16}, "storage was float32 and is float16"),
        ({"batch_size": 8}, "batch-size was 4 and is 8"),
    ],
)
def test_a_run_started_with_other_settings_is_refused_or_overwritten(
    small_adapter: CoSettleAdapter,
    clip: Path,
    tmp_path: Path,
    changed: dict[str, object],
    message: str,
) -> None:
    output = tmp_path / "f.safetensors"
    interrupted(small_adapter, clip, output)
    options = {"batch_size": 4, **changed}
    with pytest.raises(OutputExistsError, match=message):
        extract(small_adapter, clip, output, **options)  # type: ignore[arg-type]
    result = extract(small_adapter, clip, output, overwrite=True, **options)  # type: ignore[arg-type]
    assert result.found == 0


def test_another_model_or_video_is_refused(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    output = tmp_path / "f.safetensors"
    interrupted(small_adapter, clip, output)
    raw = small_adapter.without_projection()
    with pytest.raises(OutputExistsError, match="projection kind was linear and is identity"):
        extract(raw, clip, output, batch_size=4)
    write_video(clip, frames=41, height=48, width=64, fps=20)
    with pytest.raises(OutputExistsError, match="the source's content has changed"):
        extract(small_adapter, clip, output, batch_size=4)
    assert (tmp_path / ".f.safetensors.partial" / "journal").exists(), "nor is it thrown away"


@pytest.mark.parametrize("name", ["f.safetensors", "f.zarr"])
@pytest.mark.parametrize("at", ["sidecar", "output"])
def test_a_kill_in_the_last_steps_is_completed(
    small_adapter: CoSettleAdapter,
    clip: Path,
    tmp_path: Path,
    name: str,
    at: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name.endswith("zarr"):
        pytest.importorskip("zarr")
    output = tmp_path / name
    extract(small_adapter, clip, output, batch_size=4, select=FrameSelection(max_frames=2))
    replace = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if target == (output if at == "output" else output.with_name(f"{name}.json")):
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(small_adapter, clip, output, batch_size=4, overwrite=True)
    result = extract(small_adapter, clip, output, batch_size=4)
    assert (result.frames, result.found) == (40, 40)
    assert len(read_features(output).timestamps) == 40
    assert not list(tmp_path.glob(".*"))


def test_a_run_over_a_truncated_video_is_resumed(
    small_adapter: CoSettleAdapter, cut: Path, tmp_path: Path
) -> None:
    output = tmp_path / "f.npy"
    interrupted(small_adapter, cut, output)
    result = extract(small_adapter, cut, output, batch_size=4)
    assert result.found == 12
    assert result.frames + len(result.lost) == 80
    assert_as_unbroken(small_adapter, cut, output)
    assert extract(small_adapter, cut, output, batch_size=4).lost == result.lost


def test_two_runs_do_not_write_one_file(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    partial, few = tmp_path / ".f.npy.partial", FrameSelection(max_frames=2)
    partial.mkdir()
    with (
        filelock.FileLock(partial / ".lock"),
        pytest.raises(OutputBusyError, match=r"another run is writing .*f\.npy"),
    ):
        extract(small_adapter, clip, tmp_path / "f.npy", select=few)
    assert extract(small_adapter, clip, tmp_path / "f.npy", select=few).frames == 2
    assert not partial.exists()
