"""Features and frames that pictures are made of in several tests."""

from __future__ import annotations

import torch
from einops import rearrange

from helpers import noise


def uneven(frames: int = 3, h: int = 6, w: int = 7, channels: int = 8) -> torch.Tensor:
    """Features whose channels vary by 8, 7, ... 1, turned so that no channel is a component."""
    features = noise(frames, channels, h, w)
    scaled = features * rearrange(torch.arange(channels, 0, -1.0), "c -> c 1 1")
    turn = torch.linalg.qr(noise(channels, channels, seed=1))[0]
    return torch.einsum("dc,tchw->tdhw", turn, scaled) + 5


def film(frames: int = 6, height: int = 32, width: int = 48) -> torch.Tensor:
    """Smooth, moving colours that a codec keeps well."""
    t, y, x = torch.meshgrid(
        torch.arange(frames) * 4, torch.arange(height), torch.arange(width), indexing="ij"
    )
    colours = torch.stack([(x + t) * 4, y * 6, 250 - (x + t) * 2], dim=1)
    return colours.clamp(0, 255).to(torch.uint8)
