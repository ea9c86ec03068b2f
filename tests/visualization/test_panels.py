"""Panels side by side, time slices and the picture that compares clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pictures import film, uneven
from PIL import Image

from cosettle_adapter.errors import FrameError
from cosettle_adapter.visualization import (
    comparison_picture,
    feature_panels,
    pca_film,
    side_by_side,
    time_slice,
)

from helpers import noise


def test_panels_stand_side_by_side_untouched_on_even_sides() -> None:
    left, right = film(2, 33, 41), film(2, 33, 30).flip(-1)
    joined = side_by_side({"left": left, "right": right})
    assert joined.dtype == torch.uint8
    assert joined.shape[-2] % 2 == joined.shape[-1] % 2 == 0
    strip = next(y for y in range(60) if torch.equal(joined[:, :, y : y + 33, :41], left))
    assert torch.equal(joined[:, :, strip : strip + 33, 49:79], right)


def test_captions_are_drawn_and_shrink_to_their_panel() -> None:
    panel = film(1, 64, 96)
    blank, short, long = (
        side_by_side({caption: panel})[0, :, :-64] for caption in ("", "frame", "frame " * 4)
    )
    assert blank.shape == short.shape == long.shape
    assert (short != blank).any()
    assert (long[:, :, -4:] == blank[:, :, -4:]).all()


@pytest.mark.parametrize("height", [None, 14, 3])
def test_a_time_slice_stacks_one_row_over_time(height: int | None) -> None:
    clip = film(7)
    picture = time_slice(clip, 5, height=height)
    assert (picture.shape, picture.dtype) == ((3, height or 7, 48), torch.uint8)
    for y in range(picture.shape[1]):
        assert torch.equal(picture[:, y], clip[y * 7 // picture.shape[1], :, 5])
    flickering = film(1).expand(9, -1, -1, -1).float() + noise(9, 1, 1, 1)
    assert time_slice(flickering, 3).std(dim=1).min() > 0.1


def test_a_comparison_shows_moments_and_a_row_over_time() -> None:
    clip = film(8)
    panels, notes = {"frame": clip, "again": clip}, {"again": "a\nb"}
    picture = comparison_picture(panels, row=5, notes={})
    assert torch.equal(picture[:, -48:, :48], time_slice(clip, 5, height=48))
    assert torch.equal(picture[:, -48:, :48], picture[:, -48:, 56:104])
    marked = clip.clone()
    marked[:, :, 5] = 255
    stills = picture[:, : -48 - 28, :48]
    for number, t in enumerate((7, 4, 0)):  # from the bottom
        bottom = stills.shape[1] - 40 * number
        assert torch.equal(stills[:, bottom - 32 : bottom], marked[t])
    noted = comparison_picture(panels, row=5, notes=notes)
    assert torch.equal(noted[:, -48 - 56 : -56, :48], time_slice(clip, 5, height=48))
    assert (noted[:, -56:, :48] == noted[:, -1:, :1]).all()
    assert not (noted[:, -56:, 56:] == noted[:, -1:, :1]).all()


def test_feature_panels_share_the_colours_of_shared_structure(tmp_path: Path) -> None:
    frames, raw = film(3, 24, 28), uneven(3)
    features = {"raw": raw, "turned": raw.flip(1)}
    panels = feature_panels(frames, features)
    assert list(panels) == ["frame", "raw", "turned"]
    assert panels["frame"] is frames
    assert panels["raw"].shape == frames.shape
    assert (panels["raw"].int() - panels["turned"].int()).abs().max() <= 1
    with Image.open(pca_film(frames, features, tmp_path / "film.png", fps=5)) as image:
        assert image.n_frames == 3
        assert image.size == tuple(side_by_side(panels).shape[:-3:-1])
    smooth = pca_film(frames, raw, tmp_path / "smooth.png", mode="bilinear")
    assert smooth.read_bytes() != (tmp_path / "film.png").read_bytes()


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="no panels"):
        side_by_side({})
    with pytest.raises(FrameError, match=r"'a': \(2, 32\), 'b': \(3, 32\)"):
        side_by_side({"a": film(2), "b": film(3)})
    with pytest.raises(FrameError, match=r"'a'.*torch\.float32"):
        side_by_side({"a": film(2) / 255})
    with pytest.raises(FrameError, match=r"\(3, 32, 48\), expected \(T, C, H, W\)"):
        time_slice(film()[0], 0)
    for row in (-1, 32):
        with pytest.raises(ValueError, match=f"row={row}, expected 0 to 31"):
            time_slice(film(), row)
    with pytest.raises(FrameError, match=r"\(3, 24, 28\)"):
        pca_film(film(1, 24, 28)[0], uneven(3), tmp_path / "film.mp4")
