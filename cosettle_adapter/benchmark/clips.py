"""Clips that benchmarks make for themselves: a camera over a texture, written as films."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.video import open_frames, render_clip
from cosettle_adapter.visualization import write_film

FPS = 25
_LOOP = 48  # different frames of a clip; longer ones go back and forth


def frames_of(count: int, size: tuple[int, int], *, seed: int = 0) -> Tensor:
    """Render a clip.

    Returns:
        ``(count, 3, H, W)`` uint8.
    """
    clip = render_clip(
        _texture(size, seed), frames=min(count, _LOOP), size=size, motion="mixed", seed=seed
    ).frames
    return torch.stack(list(islice(_back_and_forth(clip), count)))


def film(path: Path, count: int, size: tuple[int, int], *, seed: int = 0) -> Path:
    """Write a clip of any length as an H.264 film."""
    clip = frames_of(min(count, _LOOP), size, seed=seed)
    return write_film(islice(_back_and_forth(clip), count), path, fps=FPS)


def read_film(path: Path) -> Tensor:
    """Decode a whole film into memory: ``(T, 3, H, W)`` uint8."""
    return torch.cat([chunk.frames for chunk in open_frames(path)])


def _back_and_forth(clip: Tensor) -> Iterator[Tensor]:
    while True:
        yield from clip
        yield from clip.flip(0)


def _texture(size: tuple[int, int], seed: int) -> Tensor:
    """Noise of several scales, which takes a film's encoder about what a photograph does."""
    generator = torch.Generator().manual_seed(seed)
    canvas = torch.zeros(1, 3, *size)
    for cell, weight in ((64, 0.5), (16, 0.3), (4, 0.1)):
        sides = [max(2, side // cell) for side in size]
        noise = torch.rand(1, 3, *sides, generator=generator)
        canvas += weight * F.interpolate(noise, size=size, mode="bicubic")
    return (canvas[0].clamp(0, 1) * 255).to(torch.uint8)
