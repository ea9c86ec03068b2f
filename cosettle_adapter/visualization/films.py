"""Films and pictures on disk, complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import FrameError
from cosettle_adapter.imports import require
from cosettle_adapter.io import atomic_path
from cosettle_adapter.visualization.drawing import to_image

_SUFFIXES = (".mp4", ".gif", ".png", ".webp")
_CRF = "18"  # visually lossless H.264
_PALETTE_FRAMES = 8  # frames a GIF's one palette is chosen from


def write_film(
    frames: Tensor | Iterable[Tensor],
    path: str | os.PathLike[str],
    *,
    fps: float = 12,
    palette: bool = False,
) -> Path:
    """Write frames as an H.264 film or an animated picture, by the suffix of ``path``.

    An error or an interrupt leaves whatever stood there before.

    Args:
        frames: ``(T, 3, H, W)`` uint8, or an iterable of ``(3, H, W)`` uint8 frames, all of one
            size. For ``.mp4`` they are encoded one by one as they come; an odd last row or
            column is doubled, because H.264 wants even sides.
        path: ``.mp4`` (needs PyAV), ``.gif``, ``.webp`` or ``.png`` (animated when there is more
            than one frame). Missing folders are created.
        fps: frames per second.
        palette: write a ``.png`` in the 256 colours that suit all frames, as every ``.gif`` is:
            a third of the size.

    Raises:
        ValueError, FrameError: a suffix, frame rate or frame that no film can have, or no frames.
        MissingExtraError: PyAV is not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(
            f"got {path.name!r}, whose suffix {path.suffix!r} is not a film format; use one of "
            f"{', '.join(_SUFFIXES)}."
        )
    if not fps > 0:
        raise ValueError(f"got fps={fps}, expected a positive number of frames per second.")
    checked = _checked(frames)
    with atomic_path(path) as temporary:
        if suffix == ".mp4":
            _write_h264(checked, temporary, fps)
        else:
            images = [to_image(frame) for frame in checked]
            if suffix == ".gif" or (palette and suffix == ".png"):
                images = _in_one_palette(images)
            options: dict[str, Any] = {"format": suffix[1:].upper()}
            if len(images) > 1:
                options |= {"save_all": True, "append_images": images[1:]}
                options |= {"duration": round(1000 / fps), "loop": 0}
            if suffix == ".webp":
                options |= {"quality": 90, "method": 4}
            images[0].save(temporary, **options)
    return path


def _checked(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the frames, each checked when it is taken."""
    shape: torch.Size | None = None
    for index, frame in enumerate(frames):
        if frame.ndim != 3 or len(frame) != 3 or frame.dtype != torch.uint8:
            raise FrameError(
                f"got frame {index} of shape {tuple(frame.shape)} and dtype {frame.dtype}, "
                "expected (3, H, W) uint8 in [0, 255]."
            )
        if frame.shape != (shape or frame.shape):
            raise FrameError(
                f"got frame {index} of shape {tuple(frame.shape)} after frames of shape "
                f"{tuple(shape or ())}; all frames of a film must have one size."
            )
        shape = frame.shape
        yield frame
    if shape is None:
        raise FrameError("got no frames to write; a film needs at least one.")


def _write_h264(frames: Iterator[Tensor], path: Path, fps: float) -> None:
    av = require("av", extra="viz", purpose="writing .mp4 films")
    first = next(frames)
    height, width = first.shape[1:]
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": _CRF})
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        # players guess the matrix of untagged films by their size; saying it keeps the colours
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
    """Reduce colours by one palette for all frames: one a frame would make still ones flicker."""
    chosen = images[:: max(1, len(images) // _PALETTE_FRAMES)]
    width, height = images[0].size
    mosaic = Image.new("RGB", (width, height * len(chosen)))
    for index, image in enumerate(chosen):
        mosaic.paste(image, (0, index * height))
    colours = mosaic.quantize(256, kmeans=1)  # median cut alone leaves gaps
    plain = Image.Dither.NONE  # dithering noise would flicker
    return [image.quantize(palette=colours, dither=plain) for image in images]
