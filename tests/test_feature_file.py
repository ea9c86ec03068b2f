from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cosettle_adapter.errors import CorruptWeightsError
from cosettle_adapter.feature_file import read_features, write_features
from cosettle_adapter.frames import plan_geometry

GEOMETRY = plan_geometry(30, 45, patch=15)


@given(
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    channels=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_what_was_appended_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, parts: list[int], channels: int, dtype: torch.dtype
) -> None:
    path = tmp_path_factory.mktemp("features") / "clip.safetensors"
    chunks = [torch.randn(count, channels, 2, 3).to(dtype) for count in parts]
    times = torch.arange(sum(parts)).double() / 24
    with write_features(path, GEOMETRY, {"model": "é"}) as writer:
        for chunk, time in zip(chunks, times.split(parts), strict=True):
            writer.append(chunk, time)
        assert writer.frames == sum(parts)
    read = read_features(path)
    assert torch.equal(read.features, torch.cat(chunks))
    assert torch.equal(read.timestamps, times)
    assert read.geometry == GEOMETRY
    assert read.metadata["model"] == "é"
    assert torch.equal(load_file(path)["features"], read.features)


def append_all(path: Path, *chunks: torch.Tensor, error: Exception | None = None) -> None:
    with write_features(path, GEOMETRY, {}) as writer:
        for chunk in chunks:
            writer.append(chunk, torch.zeros(len(chunk)))
        if error is not None:
            raise error


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"):
        append_all(tmp_path / "f", torch.zeros(1, 2, 2, 3), error=OSError("disk full"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", [torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 3).half()])
def test_one_file_holds_one_shape(tmp_path: Path, other: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one file holds one shape"):
        append_all(tmp_path / "f", torch.zeros(1, 2, 2, 3), other)


def test_integers_are_no_features(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"features are torch\.int64"):
        append_all(tmp_path / "f", torch.zeros(1, 2, 2, 3, dtype=torch.long))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    with write_features(path, GEOMETRY, {}) as writer:
        writer.append(torch.zeros(1, 2, 2, 3), torch.zeros(1))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptWeightsError, match=r"clip\.safetensors is truncated or not"):
        read_features(path)
