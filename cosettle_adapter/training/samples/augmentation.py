"""The crop and flip that all frames of a cycle share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import FrameError

SCALE = (0.5, 1.0)
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Crop:
    """A rectangle of a frame in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw_crop(
    height: int,
    width: int,
    *,
    generator: torch.Generator,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> Crop:
    """Draw a random-resized crop as the paper's code does: one draw, cut to the frame.

    The area is drawn uniformly, the ratio of width to height uniformly in its logarithm, and a
    side that is longer than the frame's becomes the frame's. (torchvision draws again instead.)

    Args:
        height: of the frame, in pixels.
        width: of the frame, in pixels.
        generator: source of randomness.
        scale: range of the share of the frame's area.
        ratio: range of the ratio of width to height.
    """
    share, shape, down, across, flip = torch.rand(
        5, generator=generator, dtype=torch.float64
    ).tolist()
    area = height * width * (scale[0] + share * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = math.exp(low + shape * (high - low))
    rows = min(height, max(1, round(math.sqrt(area / aspect))))
    columns = min(width, max(1, round(math.sqrt(area * aspect))))
    # draws are below 1, so the largest place is the last that fits
    top, left = int(down * (height - rows + 1)), int(across * (width - columns + 1))
    return Crop(top, left, rows, columns, flip < 0.5)


def apply_crop(frames: Tensor, crop: Crop, size: int) -> Tensor:
    """Cut, resize and perhaps mirror frames, all alike.

    Resizing is bicubic with antialiasing in float32 and is not clamped, so values overshoot [0, 1]
    a little beside sharp edges, as they do in the paper's code.

    Args:
        frames: (T, 3, H, W) uint8 in [0, 255] or float in [0, 1].
        crop: a rectangle inside the frames.
        size: side of the result in pixels.

    Returns:
        (T, 3, size, size) float32, about [0, 1].
    """
    rows = slice(crop.top, crop.top + crop.height)
    columns = slice(crop.left, crop.left + crop.width)
    pixels = frames[..., rows, columns]
    pixels = pixels.to(torch.float32) / 255 if frames.dtype == torch.uint8 else pixels.float()
    if (crop.height, crop.width) != (size, size):
        pixels = F.interpolate(
            pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False
        )
    return (pixels.flip(-1) if crop.flip else pixels).contiguous()


def squash(frames: Tensor, size: int) -> Tensor:
    """Resize whole frames to a square, bilinearly with antialiasing, rounded to 8 bits.

    Args:
        frames: (T, 3, H, W) uint8.
        size: side of the square.

    Returns:
        (T, 3, size, size) uint8.
    """
    if tuple(frames.shape[-2:]) == (size, size):
        return frames
    resized = F.interpolate(
        frames.to(torch.float32), size=(size, size), mode="bilinear", antialias=True
    )
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def augment(
    frames: Tensor, size: int, *, generator: torch.Generator, squash_first: bool = False
) -> Tensor:
    """Give all frames of a cycle the same random-resized crop and the same flip.

    The paper's code squashes every frame to the square before it crops, so that what the encoder
    sees of a 16:9 video is narrowed by 1.3 to 2.4. Here the crop is cut from the frame as it is,
    which narrows by at most 1.54 (4/3 for frames up to 4:3) and keeps the pixels of the crop;
    ``squash_first`` does as the paper's code.

    Args:
        frames: (T, 3, H, W) uint8.
        size: side of the result in pixels.
        generator: source of randomness; the same number of draws whatever the frames.
        squash_first: resize whole frames to the square before cropping.

    Returns:
        (T, 3, size, size) float32 in about [0, 1]; bicubic overshoot is not clamped.

    Raises:
        FrameError: the frames are no uint8 clip.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
        raise FrameError(
            f"got frames {tuple(frames.shape)} of {frames.dtype}, expected (T, 3, H, W) of uint8"
        )
    if squash_first:
        frames = squash(frames, size)
    height, width = frames.shape[-2:]
    crop = draw_crop(height, width, generator=generator)
    return apply_crop(frames, crop, size)
