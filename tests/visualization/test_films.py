"""Films and pictures on disk, read back by others; whole, or as they were before."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from einops import rearrange
from pictures import film
from PIL import Image

from cosettle_adapter.errors import FrameError
from cosettle_adapter.visualization import write_film

av = pytest.importorskip("av")


def decoded(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return rearrange([torch.from_numpy(frame) for frame in frames], "t h w c -> t c h w")


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_a_film_comes_back_as_it_was_written(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = film(6, *size)
    path = write_film(iter(frames), tmp_path / "new" / "film.mp4", fps=12.5)
    back = decoded(path)
    assert back.shape[0] == 6
    assert all(side % 2 == 0 for side in back.shape[-2:])
    assert (back[..., : size[0], : size[1]].float() - frames.float()).abs().mean() < 6
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(12.5)
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert int(stream.codec_context.colorspace) == 1  # BT.709
    assert [file.name for file in path.parent.iterdir()] == ["film.mp4"]


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".PNG"])
def test_pictures_move_when_there_is_more_than_one_frame(tmp_path: Path, suffix: str) -> None:
    with Image.open(write_film(film(5), tmp_path / f"film{suffix}", fps=10)) as image:
        assert image.n_frames == 5
        image.seek(3)
        assert image.size == (48, 32)
    with Image.open(write_film(film(1), tmp_path / f"still{suffix}")) as image:
        assert getattr(image, "n_frames", 1) == 1


def test_a_png_keeps_colours_and_a_palette_nearly_does(tmp_path: Path) -> None:
    frame = film(1, 64, 96)
    assert torch.equal(decoded(write_film(frame, tmp_path / "still.png")), frame)
    with Image.open(write_film(frame, tmp_path / "small.png", palette=True)) as image:
        assert image.mode == "P"
    assert (decoded(tmp_path / "small.png").float() - frame.float()).abs().mean() < 6


def test_still_colours_of_a_gif_stay_still(tmp_path: Path) -> None:
    frames = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    frames[:, 0, :, :8] = torch.arange(8, dtype=torch.uint8) * 30  # a ramp that does not change
    frames[:, 1, :, 8:] = rearrange(torch.arange(6) * 40, "t -> t 1 1").to(torch.uint8)
    with Image.open(write_film(frames, tmp_path / "film.gif")) as image:
        left = []
        for index in range(image.n_frames):
            image.seek(index)
            left.append(image.convert("RGB").crop((0, 0, 8, 16)).tobytes())
    assert (len(left), len(set(left))) == (6, 1)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupt_leaves_what_was_there_before(
    tmp_path: Path, suffix: str, error: type[BaseException]
) -> None:
    def breaking() -> Iterator[torch.Tensor]:
        yield from film(3)
        raise error("stop")

    path = tmp_path / f"film{suffix}"
    with pytest.raises(error):
        write_film(breaking(), path)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"an earlier film")
    with pytest.raises(error):
        write_film(breaking(), path)
    assert path.read_bytes() == b"an earlier film"
    assert list(tmp_path.iterdir()) == [path]


def test_film_errors_say_what_was_got_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'film\.avi'.*\.mp4, \.gif, \.png, \.webp"):
        write_film(film(), tmp_path / "film.avi")
    with pytest.raises(ValueError, match="fps=0"):
        write_film(film(), tmp_path / "film.mp4", fps=0)
    for frames, message in (
        ([], "no frames"),
        (film() / 255, r"frame 0 .*torch\.float32"),
        (itertools.chain(film(), film(1, 32, 40)), r"frame 6 of shape \(3, 32, 40\)"),
    ):
        with pytest.raises(FrameError, match=message):
            write_film(frames, tmp_path / "film.mp4")
    assert list(tmp_path.iterdir()) == []
