"""Panels, time slices and comparisons; films and pictures on disk, whole or as they were before."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from einops import rearrange
from pictures import film, uneven
from PIL import Image

from cosettle_adapter import visualization
from cosettle_adapter.errors import FrameError
from cosettle_adapter.visualization import pca_film, side_by_side, time_slice, write_film

av = pytest.importorskip("av")


def decoded(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return rearrange([torch.from_numpy(frame) for frame in frames], "t h w c -> t c h w")


def test_a_film_comes_back_as_it_was_written(tmp_path: Path) -> None:
    frames = film(6, 33, 47)
    path = write_film(iter(frames), tmp_path / "new" / "film.mp4", fps=12.5)
    back = decoded(path).float()
    assert back.shape == (6, 3, 34, 48)
    here, *shifted = (
        (back[..., y : y + 33, x : x + 47] - frames).abs().mean()
        for y, x in ((0, 0), (0, 1), (1, 0))
    )
    assert here < min(6, *shifted)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(12.5)
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert int(stream.codec_context.colorspace) == 1  # BT.709
    assert [file.name for file in path.parent.iterdir()] == ["film.mp4"]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".PNG"])
def test_pictures_move_when_there_is_more_than_one_frame(tmp_path: Path, suffix: str) -> None:
    with Image.open(write_film(film(5), tmp_path / f"film{suffix}", fps=10)) as image:
        assert (image.n_frames, image.size) == (5, (48, 32))
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


@pytest.mark.parametrize(("name", "error"), [("a.mp4", KeyboardInterrupt), ("a.gif", RuntimeError)])
def test_an_interrupt_leaves_what_was_there_before(
    tmp_path: Path, name: str, error: type[BaseException]
) -> None:
    def breaking() -> Iterator[torch.Tensor]:
        yield from film(3)
        raise error("stop")

    (tmp_path / name).write_bytes(b"an earlier film")
    with pytest.raises(error):
        write_film(breaking(), tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"an earlier film"
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_panels_stand_side_by_side_untouched_on_even_sides() -> None:
    left, right = film(2, 33, 41), film(2, 33, 30).flip(-1)
    joined = side_by_side({"left": left, "right": right})
    assert joined.dtype == torch.uint8
    assert joined.shape[-2] % 2 == joined.shape[-1] % 2 == 0
    strip = next(y for y in range(60) if torch.equal(joined[:, :, y : y + 33, :41], left))
    assert torch.equal(joined[:, :, strip : strip + 33, 49:79], right)


@pytest.mark.parametrize("height", [None, 14, 3])
def test_a_time_slice_stacks_one_row_over_time(height: int | None) -> None:
    clip = film(7)
    picture = time_slice(clip, 5, height=height)
    assert (picture.shape, picture.dtype) == ((3, height or 7, 48), torch.uint8)
    for y in range(picture.shape[1]):
        assert torch.equal(picture[:, y], clip[y * 7 // picture.shape[1], :, 5])


def test_a_comparison_shows_moments_and_a_row_over_time() -> None:
    clip = film(8)
    panels, notes = {"frame": clip, "again": clip}, {"again": "a\nb"}
    picture = visualization.comparison_picture(panels, row=5, notes={})
    assert torch.equal(picture[:, -48:, :48], time_slice(clip, 5, height=48))
    assert torch.equal(picture[:, -48:, :48], picture[:, -48:, 56:104])
    marked = clip.clone()
    marked[:, :, 5] = 255
    stills = picture[:, : -48 - 28, :48]
    for number, t in enumerate((7, 4, 0)):  # from the bottom
        bottom = stills.shape[1] - 40 * number
        assert torch.equal(stills[:, bottom - 32 : bottom], marked[t])
    noted = visualization.comparison_picture(panels, row=5, notes=notes)
    assert torch.equal(noted[:, -48 - 56 : -56, :48], time_slice(clip, 5, height=48))
    assert (noted[:, -56:, :48] == noted[:, -1:, :1]).all()
    assert not (noted[:, -56:, 56:] == noted[:, -1:, :1]).all()


def test_feature_panels_share_the_colours_of_shared_structure(tmp_path: Path) -> None:
    frames, raw = film(3, 24, 28), uneven(3)
    features = {"raw": raw, "turned": raw.flip(1)}
    panels = visualization.feature_panels(frames, features)
    assert list(panels) == ["frame", "raw", "turned"]
    assert panels["frame"] is frames
    assert panels["raw"].shape == frames.shape
    assert (panels["raw"].int() - panels["turned"].int()).abs().max() <= 1
    with Image.open(pca_film(frames, features, tmp_path / "film.png", fps=5)) as image:
        assert image.n_frames == 3
        assert image.size == tuple(side_by_side(panels).shape[:-3:-1])
    smooth = pca_film(frames, raw, tmp_path / "smooth.png", mode="bilinear")
    assert smooth.read_bytes() != (tmp_path / "film.png").read_bytes()


def test_errors_say_what_was_got_and_what_to_do(tmp_path: Path) -> None:
    mp4 = tmp_path / "film.mp4"
    for error, message, draw, *arguments in (
        (ValueError, r"'film\.avi'.*\.mp4, \.gif, \.png, \.webp", write_film, film(), "film.avi"),
        (ValueError, "fps=0", lambda frames: write_film(frames, mp4, fps=0), film()),
        (FrameError, "no frames", write_film, [], mp4),
        (FrameError, r"frame 0 .*torch\.float32", write_film, film() / 255, mp4),
        (
            *(FrameError, r"frame 6 of shape \(3, 32, 40\)"),
            *(write_film, itertools.chain(film(), film(1, 32, 40)), mp4),
        ),
        (FrameError, "no panels", side_by_side, {}),
        (FrameError, r"'a': \(2, 32\), 'b': \(3, 32\)", side_by_side, {"a": film(2), "b": film(3)}),
        (FrameError, r"'a'.*torch\.float32", side_by_side, {"a": film(2) / 255}),
        (FrameError, r"\(3, 32, 48\), expected \(T, C, H, W\)", time_slice, film()[0], 0),
        (ValueError, "row=-1, expected 0 to 31", time_slice, film(), -1),
        (ValueError, "row=32, expected 0 to 31", time_slice, film(), 32),
        (FrameError, r"\(3, 24, 28\)", pca_film, film(1, 24, 28)[0], uneven(3), mp4),
    ):
        with pytest.raises(error, match=message):
            draw(*arguments)
    assert list(tmp_path.iterdir()) == []
