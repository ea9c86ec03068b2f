"""What cameras add to a scene over time: drifting gain, brightness and sharpness, and noise."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def finish_like_a_camera(clip: Tensor, photometric: float, generator: torch.Generator) -> Tensor:
    """Round to uint8, after adding what a real camera would.

    Args:
        clip: (T, 3, H, W) float32 in [0, 255]; overwritten.
        photometric: strength, from 0 for nothing to 1.
        generator: source of phases and noise.

    Returns:
        (T, 3, H, W) uint8.
    """
    if photometric > 0:
        time = torch.linspace(0, 1, len(clip), dtype=torch.float64)
        phases = 2 * math.pi * torch.rand(3, generator=generator, dtype=torch.float64)
        gain, brightness, softness = torch.sin(
            rearrange(phases, "k -> k 1") + 1.5 * math.pi * time
        ).tolist()
        for t, frame in enumerate(clip):
            frame = _blur(frame, photometric * (0.6 + 0.4 * softness[t]))
            frame = frame * (1 + 0.15 * photometric * gain[t]) + 12 * photometric * brightness[t]
            clip[t] = frame + 4 * photometric * torch.randn(frame.shape, generator=generator)
    return clip.round_().clamp_(0, 255).to(torch.uint8)


def _blur(frame: Tensor, sigma: float) -> Tensor:
    taps = torch.exp(-0.5 * (torch.arange(-3.0, 4.0) / max(sigma, 1e-3)) ** 2)
    taps = taps / taps.sum()
    padded = F.pad(rearrange(frame, "c h w -> c 1 h w"), (3, 3, 3, 3), mode="replicate")
    blurred = F.conv2d(padded, rearrange(taps, "k -> 1 1 1 k"))
    return rearrange(F.conv2d(blurred, rearrange(taps, "k -> 1 1 k 1")), "c 1 h w -> c h w")
