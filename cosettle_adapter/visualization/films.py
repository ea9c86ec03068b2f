"""Arrange clips side by side with captions, and write films and pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import FrameError
from cosettle_adapter.imports import require
from cosettle_adapter.io import atomic_path
from cosettle_adapter.video.arrays import image_to_frame
from cosettle_adapter.visualization.drawing import check_frames, to_image
from cosettle_adapter.visualization.pca import fit_alike, pca_frames

_SUFFIXES = (".mp4", ".gif", ".png", ".webp")
_CRF = "18"  # visually lossless H.264
_PALETTE_FRAMES = 8  # frames that determine the palette of a GIF
_BACKGROUND, _TEXT = (18, 20, 24), (236, 238, 241)
_MARGIN = 8  # pixels between panels and around captions
_NOTE = 28  # pixels, height of a line of text
_STILLS = 3  # frames shown in a comparison picture


def write_film(
    frames: Tensor | Iterable[Tensor],
    path: str | os.PathLike[str],
    *,
    fps: float = 12,
    palette: bool = False,
) -> Path:
    """Write frames as an H.264 film or an animated picture, by the suffix of ``path``.

    An error or interrupt leaves an existing file unchanged.

    Args:
        frames: ``(T, 3, H, W)`` uint8, or an iterable of ``(3, H, W)`` uint8 frames, all of one
            size. An ``.mp4`` file is encoded frame by frame; odd sides are made even, as H.264
            requires, by repeating the last row or column.
        path: ``.mp4`` (needs PyAV), ``.gif``, ``.webp`` or ``.png`` (animated when there is more
            than one frame). Missing folders are created.
        fps: frames per second.
        palette: reduce a ``.png`` to 256 colours for all frames, as in every ``.gif``, which
            takes a third of the space.

    Raises:
        ValueError: unknown suffix, or a frame rate that is not positive.
        FrameError: frames of another shape, dtype or size, or no frames.
        MissingExtraError: PyAV is not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES or not fps > 0:
        raise ValueError(
            f"got {path.name!r} at fps={fps}, expected a name that ends in one of "
            f"{', '.join(_SUFFIXES)} and a positive number of frames per second"
        )
    checked = _checked(frames)
    with atomic_path(path) as temporary:
        if suffix == ".mp4":
            _write_h264(checked, temporary, fps)
            return path
        images = [to_image(frame) for frame in checked]
        if suffix == ".gif" or (palette and suffix == ".png"):
            images = _in_one_palette(images)
        options: dict[str, Any] = {"format": suffix[1:].upper()}
        if len(images) > 1:
            duration = round(1000 / fps)
            options.update(save_all=True, append_images=images[1:], duration=duration, loop=0)
        if suffix == ".webp":
            options.update(quality=90, method=4)
        images[0].save(temporary, **options)
    return path


def pca_film(
    frames: Tensor,
    features: Tensor | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    fps: float = 12,
    mode: str = "nearest",
) -> Path:
    """Write a film of a clip side by side with the PCA colours of its features.

    ``features`` are ``(T, C, h, w)`` floats, or several by caption:
    ``{"raw": raw, "adapted": features}``. Other arguments and errors are those of
    :func:`feature_panels` and :func:`write_film`.
    """
    check_frames(frames)
    named = {"features": features} if isinstance(features, Tensor) else features
    return write_film(side_by_side(feature_panels(frames, named, mode=mode)), path, fps=fps)


def feature_panels(
    frames: Tensor, features: Mapping[str, Tensor], *, mode: str = "nearest"
) -> dict[str, Tensor]:
    """Return a clip and the PCA colours of its features, ready for :func:`side_by_side`.

    Every panel has one basis for the whole clip. The colours of the first features are their
    principal components; the others are rotated to agree with the first.

    ``frames`` are ``(T, 3, H, W)`` uint8, and so are the results for ``"frame"`` and each caption;
    ``features`` are ``(T, C, h, w)`` floats by caption, all on one grid; the mode ``"bilinear"``
    interpolates between patches.
    """
    height, width = frames.shape[-2:]
    return {"frame": frames} | {
        caption: pca_frames(features[caption], basis, size=(height, width), mode=mode)
        for caption, basis in fit_alike(features).items()
    }


def side_by_side(panels: Mapping[str, Tensor]) -> Tensor:
    """Place clips side by side, each below its caption.

    ``panels`` are clips by caption, ``(T, 3, H, W)`` uint8 with equal ``T`` and ``H``; others are a
    :class:`FrameError`. Returns ``(T, 3, H', W')`` uint8 with even sides, as codecs require.
    """
    if not panels:
        raise FrameError("got no panels; give a mapping such as {'frame': frames, 'PCA': colours}")
    for caption, clip in panels.items():
        check_frames(clip, name=f"panel {caption!r}")
    sizes = {caption: (len(clip), clip.shape[2]) for caption, clip in panels.items()}
    if len(set(sizes.values())) > 1:
        raise FrameError(
            f"got panels of different length or height, as (T, H): {sizes}. Cut them to the same "
            "frames and resize them to the same height"
        )
    length, _, height, first_width = next(iter(panels.values())).shape
    strip = max(10, min(28, min(height, first_width) // 10)) + 2 * _MARGIN
    width = sum(clip.shape[-1] for clip in panels.values()) + _MARGIN * (len(panels) - 1)
    canvas = _plain(length, strip + height + (strip + height) % 2, width + width % 2)
    left = 0
    for caption, clip in panels.items():
        right = left + clip.shape[-1]
        canvas[:, :, :strip, left:right] = _caption(caption, strip, right - left)
        canvas[:, :, strip : strip + height, left:right] = clip.cpu()
        left = right + _MARGIN
    return canvas


def time_slice(clip: Tensor, row: int, *, height: int | None = None) -> Tensor:
    """Stack one row of every frame: an x-t slice with time from top to bottom.

    Smooth motion appears as smooth stripes, flicker as texture.

    Args:
        clip: ``(T, C, H, W)`` pictures or maps of any dtype, such as those of :func:`pca_frames`.
        row: index of the row, from the top.
        height: number of rows of the result, to which frames are resampled; by default ``T``.

    Returns:
        ``(C, height, W)`` in the dtype of ``clip``.
    """
    if clip.ndim != 4:
        raise FrameError(f"got a clip of shape {tuple(clip.shape)}, expected (T, C, H, W)")
    if not 0 <= row < clip.shape[2]:
        raise ValueError(f"got row={row}, expected 0 to {clip.shape[2] - 1}")
    height = height or len(clip)
    times = torch.arange(height) * len(clip) // height
    return rearrange(clip[times, :, row], "t c w -> c t w")


def comparison_picture(
    panels: Mapping[str, Tensor], *, row: int, notes: Mapping[str, str]
) -> Tensor:
    """Arrange clips in one picture: a column per clip, three frames above a row over time.

    ``panels`` are those of :func:`side_by_side`; ``row`` is marked in each frame; ``notes`` are
    lines of text, by caption, below the columns. Returns ``(3, H', W')`` uint8.
    """
    texts = {caption: notes.get(caption, "").splitlines() for caption in panels}
    lines = max(map(len, texts.values()))
    columns = {}
    for caption, clip in panels.items():
        length, _, height, width = clip.shape
        times = torch.linspace(0, length - 1, min(_STILLS, length)).round().long()
        stills = clip.cpu()[times]
        stills[:, :, row] = 255
        stacked = torch.cat([stills, _plain(len(stills), _MARGIN, width)], dim=2)
        stretched = length * max(1, round(1.5 * height / length))
        text = texts[caption] + [""] * (lines - len(texts[caption]))
        parts = [
            rearrange(stacked, "t c h w -> c (t h) w")[:, :-_MARGIN],
            _caption("the marked row over time, downwards", _NOTE, width),
            time_slice(clip.cpu(), row, height=stretched),
            *(_caption(line, _NOTE, width) for line in text),
        ]
        columns[caption] = rearrange(torch.cat(parts, dim=1), "c h w -> 1 c h w")
    return side_by_side(columns)[0]


def _plain(length: int, height: int, width: int) -> Tensor:
    colour = rearrange(torch.tensor(_BACKGROUND, dtype=torch.uint8), "c -> c 1 1")
    return colour.expand(length, 3, height, width).clone()


def _caption(text: str, height: int, width: int) -> Tensor:
    """``(3, height, width)`` uint8 strip of left-aligned text, reduced in size until it fits."""
    strip = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(strip)
    size = height - 2 * _MARGIN
    while size > 6 and draw.textlength(text, font_size=size) > width - 2 * _MARGIN:
        size -= 1
    font = ImageFont.load_default(size)
    draw.text((_MARGIN, height / 2), text, fill=_TEXT, font=font, anchor="lm")
    return image_to_frame(strip)


def _checked(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """Check each frame when it is requested."""
    shape: tuple[int, ...] = ()
    for index, frame in enumerate(frames):
        valid = frame.ndim == 3 and len(frame) == 3 and frame.dtype == torch.uint8
        if not valid or tuple(frame.shape) != (shape or tuple(frame.shape)):
            raise FrameError(
                f"got frame {index} of shape {tuple(frame.shape)} and dtype {frame.dtype}, "
                f"expected {shape or '(3, H, W)'} uint8 in [0, 255], all of one size"
            )
        shape = tuple(frame.shape)
        yield frame
    if not shape:
        raise FrameError("got no frames to write; a film needs at least one")


def _write_h264(frames: Iterator[Tensor], path: Path, fps: float) -> None:
    av = require("av", extra="viz", purpose="writing .mp4 films")
    first = next(frames)
    height, width = first.shape[1:]
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": _CRF})
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        # players guess the colour matrix of untagged films from their size
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709
        codec.color_range = 1  # limited
        for frame in chain([first], frames):
            even = F.pad(frame[None].float(), (0, width % 2, 0, height % 2), mode="replicate")[0]
            picture = av.VideoFrame.from_image(to_image(even.to(torch.uint8)))
            converted = picture.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(converted))
        container.mux(stream.encode())


def _in_one_palette(images: list[Image.Image]) -> list[Image.Image]:
    """Reduce all frames to one palette; a palette per frame would flicker."""
    chosen = images[:: max(1, len(images) // _PALETTE_FRAMES)]
    width, height = images[0].size
    mosaic = Image.new("RGB", (width, height * len(chosen)))
    for index, image in enumerate(chosen):
        mosaic.paste(image, (0, index * height))
    colours = mosaic.quantize(256, kmeans=1)  # median cut alone leaves gaps
    plain = Image.Dither.NONE  # dithering noise would flicker
    return [image.quantize(palette=colours, dither=plain) for image in images]
