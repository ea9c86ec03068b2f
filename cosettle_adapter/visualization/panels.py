"""Clips and their features beside one another under captions, as films and as one picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.arrays import image_to_frame
from cosettle_adapter.visualization.drawing import check_frames
from cosettle_adapter.visualization.films import write_film
from cosettle_adapter.visualization.pca import fit_pca, pca_frames

_BACKGROUND = (18, 20, 24)
_TEXT = (236, 238, 241)
_MARGIN = 8  # pixels between panels and around captions
_NOTE = 28  # pixels, height of a line of small text
_MOMENTS = 3  # frames of a still picture


def feature_panels(
    frames: Tensor, features: Mapping[str, Tensor], *, mode: str = "nearest"
) -> dict[str, Tensor]:
    """Return a clip and the PCA colours of its features, ready for :func:`side_by_side`.

    Every panel has its own basis for the whole clip. The colours of the first features are their
    principal components; those of the others are turned to agree with the first.

    Args:
        frames: ``(T, 3, H, W)`` uint8.
        features: caption to ``(T, C, h, w)`` floats; all on one grid, widths ``C`` may differ.
        mode: ``"nearest"`` or ``"bilinear"``, as in :func:`pca_frames`.

    Returns:
        ``(T, 3, H, W)`` uint8 for ``"frame"`` and each caption, in this order.
    """
    height, width = frames.shape[-2:]
    panels = {"frame": frames}
    reference: Tensor | None = None
    for caption, maps in features.items():
        basis = fit_pca(maps, align_to=reference)
        if reference is None:
            reference = basis.scores(maps)
        panels[caption] = pca_frames(maps, basis, size=(height, width), mode=mode)
    return panels


def pca_film(
    frames: Tensor,
    features: Tensor | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    fps: float = 12,
    mode: str = "nearest",
) -> Path:
    """Write a film of a clip beside the PCA colours of its features.

    Args and errors are those of :func:`feature_panels` and :func:`write_film`; ``features`` are
    ``(T, C, h, w)`` floats, or several by caption: ``{"raw": raw, "adapted": features}``.
    """
    check_frames(frames)
    named = {"features": features} if isinstance(features, Tensor) else features
    return write_film(side_by_side(feature_panels(frames, named, mode=mode)), path, fps=fps)


def time_slice(clip: Tensor, row: int, *, height: int | None = None) -> Tensor:
    """Stack one row of every frame: an x-t slice, time from top to bottom.

    What moves smoothly draws smooth stripes; what flickers is texture.

    Args:
        clip: ``(T, C, H, W)`` pictures of any dtype, such as those of :func:`pca_frames`, or maps.
        row: the row, counted from the top.
        height: rows of the result, over which the frames are spread evenly; by default ``T``.

    Returns:
        ``(C, height, W)`` in the dtype of ``clip``.

    Raises:
        FrameError: a clip that is not ``(T, C, H, W)``.
        ValueError: a row that there is not.
    """
    if clip.ndim != 4:
        raise FrameError(f"got a clip of shape {tuple(clip.shape)}, expected (T, C, H, W).")
    if not 0 <= row < clip.shape[2]:
        raise ValueError(f"got row={row}, expected 0 to {clip.shape[2] - 1}.")
    height = height or len(clip)
    times = torch.arange(height) * len(clip) // height
    return rearrange(clip[times, :, row], "t c w -> c t w")


def comparison_picture(
    panels: Mapping[str, Tensor], *, row: int, notes: Mapping[str, str]
) -> Tensor:
    """Lay out clips as one picture: a column each, with three moments above a row over time.

    Args:
        panels: as in :func:`side_by_side`.
        row: row of pixels, marked in each moment, whose :func:`time_slice` is shown.
        notes: caption to lines of text below its column.

    Returns:
        ``(3, H', W')`` uint8.
    """
    _check_panels(panels)
    texts = {caption: notes.get(caption, "").splitlines() for caption in panels}
    lines = max(map(len, texts.values()))
    columns = {}
    for caption, clip in panels.items():
        length, _, height, width = clip.shape
        times = torch.linspace(0, length - 1, min(_MOMENTS, length)).round().long()
        stretched = length * max(1, round(1.5 * height / length))
        over_time = time_slice(clip.cpu(), row, height=stretched)
        stills = clip.cpu()[times]
        stills[:, :, row] = 255
        stacked = torch.cat([stills, _plain(len(stills), _MARGIN, width)], dim=2)
        parts = [
            rearrange(stacked, "t c h w -> c (t h) w")[:, :-_MARGIN],
            _caption("the marked row over time, downwards", _NOTE, width),
            over_time,
        ]
        text = texts[caption] + [""] * (lines - len(texts[caption]))
        parts += [_caption(line, _NOTE, width) for line in text]
        columns[caption] = rearrange(torch.cat(parts, dim=1), "c h w -> 1 c h w")
    return side_by_side(columns)[0]


def side_by_side(panels: Mapping[str, Tensor]) -> Tensor:
    """Place clips beside one another, each with its caption on a strip above.

    Args:
        panels: caption to clip, each ``(T, 3, H, W)`` uint8 with the same ``T`` and ``H``; widths
            may differ.

    Returns:
        ``(T, 3, H', W')`` uint8, both sides even (video codecs want them so).

    Raises:
        FrameError: no panels, or panels of another kind, length or height.
    """
    _check_panels(panels)
    clips = [clip.cpu() for clip in panels.values()]
    length, _, height, first_width = clips[0].shape
    strip = max(10, min(28, min(height, first_width) // 10)) + 2 * _MARGIN
    width = sum(clip.shape[-1] for clip in clips) + _MARGIN * (len(clips) - 1)
    canvas = _plain(length, strip + height + (strip + height) % 2, width + width % 2)
    left = 0
    for caption, clip in zip(panels, clips, strict=True):
        right = left + clip.shape[-1]
        canvas[:, :, :strip, left:right] = _caption(caption, strip, right - left)
        canvas[:, :, strip : strip + height, left:right] = clip
        left = right + _MARGIN
    return canvas


def _check_panels(panels: Mapping[str, Tensor]) -> None:
    if not panels:
        raise FrameError("got no panels; give a mapping such as {'frame': frames, 'PCA': colours}.")
    for caption, clip in panels.items():
        if clip.ndim != 4 or clip.shape[1] != 3 or clip.dtype != torch.uint8:
            raise FrameError(
                f"got panel {caption!r} of shape {tuple(clip.shape)} and dtype {clip.dtype}, "
                "expected (T, 3, H, W) uint8."
            )
    sizes = {caption: (len(clip), clip.shape[2]) for caption, clip in panels.items()}
    if len(set(sizes.values())) > 1:
        raise FrameError(
            f"got panels of different length or height, as (T, H): {sizes}. Cut them to the same "
            "frames and resize them to the same height."
        )


def _plain(length: int, height: int, width: int) -> Tensor:
    colour = rearrange(torch.tensor(_BACKGROUND, dtype=torch.uint8), "c -> c 1 1")
    return colour.expand(length, 3, height, width).clone()


def _caption(text: str, height: int, width: int) -> Tensor:
    """``(3, height, width)`` uint8 strip with the text left-aligned, shrunk until it fits."""
    strip = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(strip)
    size = height - 2 * _MARGIN
    while size > 6 and draw.textlength(text, font_size=size) > width - 2 * _MARGIN:
        size -= 1
    font = ImageFont.load_default(size)
    draw.text((_MARGIN, height / 2), text, fill=_TEXT, font=font, anchor="lm")
    return image_to_frame(strip)
