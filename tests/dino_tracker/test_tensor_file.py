from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosettle_adapter.dino_tracker import write_tensor


def write(path: Path, tensor: torch.Tensor, *, piece: int = 2, location: str = "cpu") -> Path:
    with write_tensor(path, tuple(tensor.shape[1:]), location=location) as writer:
        for items in tensor.split(piece):
            writer.append(items)
    return path


@settings(max_examples=20)
@given(st.integers(1, 7), st.lists(st.integers(1, 5), max_size=4), st.integers(1, 4))
def test_torch_loads_what_was_appended(
    tmp_path_factory: pytest.TempPathFactory, count: int, item: list[int], piece: int
) -> None:
    tensor = torch.randn(count, *item)
    path = write(tmp_path_factory.mktemp("t") / "t.pt", tensor, piece=piece)
    for options in ({"weights_only": True}, {"mmap": True}, {"weights_only": False}):
        loaded = torch.load(path, **options)
        assert type(loaded) is torch.Tensor
        assert loaded.dtype == torch.float32
        assert loaded.is_contiguous()
        torch.testing.assert_close(loaded, tensor, rtol=0, atol=0)


@pytest.mark.parametrize("location", ["cpu", "cuda:0"])
def test_its_description_is_byte_for_byte_that_of_torch_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    tensor = torch.randn(3, 4, 5, 6)
    ours = write(tmp_path / "ours.pt", tensor, location=location)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: location)
    torch.save(tensor, tmp_path / "theirs.pt")
    contents = []
    for path, name in ((ours, "archive"), (tmp_path / "theirs.pt", "theirs")):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            contents.append(
                [
                    archive.read(f"{name}/{entry}")
                    for entry in ("data.pkl", "data/0", "byteorder", "version")
                ]
            )
    assert contents[0] == contents[1]


def test_it_is_loaded_to_the_device_it_names(tmp_path: Path) -> None:
    path = write(tmp_path / "t.pt", torch.randn(2, 3), location="cuda:0")
    seen: list[str] = []

    def note(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        seen.append(location)
        return storage

    torch.load(path, map_location=note)
    assert seen == ["cuda:0"]
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path)


@pytest.mark.gpu
def test_it_is_loaded_to_the_gpu(tmp_path: Path) -> None:
    tensor = torch.randn(2, 3)
    loaded = torch.load(write(tmp_path / "t.pt", tensor, location="cuda:0"))
    assert loaded.device == torch.device("cuda:0")
    torch.testing.assert_close(loaded.cpu(), tensor)


def test_the_numbers_are_aligned_and_the_bytes_repeatable(tmp_path: Path) -> None:
    tensor = torch.randn(3, 5)
    first, second = (write(tmp_path / f"{n}.pt", tensor, piece=n).read_bytes() for n in (1, 3))
    assert first == second
    assert first.index(tensor.numpy().tobytes()) % 64 == 0


def test_other_shapes_and_dtypes_are_refused(tmp_path: Path) -> None:
    with write_tensor(tmp_path / "t.pt", (2, 3), location="cpu") as writer:
        with pytest.raises(ValueError, match=r"expected float32 \(N, 2, 3\), got .*\(1, 3, 2\)"):
            writer.append(torch.zeros(1, 3, 2))
        with pytest.raises(ValueError, match=r"torch\.float16"):
            writer.append(torch.zeros(1, 2, 3, dtype=torch.float16))
        writer.append(torch.zeros(4, 2, 3))
        assert writer.shape == (4, 2, 3)


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(b"earlier")

    def interrupted() -> None:
        with write_tensor(path, (2,), location="cpu") as writer:
            writer.append(torch.zeros(1, 2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]
