"""Affine maps of tokens, the result of every closed form."""

from __future__ import annotations

import dataclasses

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True, eq=False)
class AffineMap:
    """``y = W x + b``."""

    weight: Tensor  # (C', C) float64
    bias: Tensor  # (C',) float64

    @classmethod
    def identity(cls, width: int) -> AffineMap:
        """Return the identity map."""
        eye = torch.eye(width, dtype=torch.float64)
        return cls(eye, torch.zeros(width, dtype=torch.float64))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(..., C)`` to ``(..., C')``, in their own dtype and on their device."""
        return F.linear(tokens, self.weight.to(tokens), self.bias.to(tokens))

    def to(self, device: torch.device | str) -> AffineMap:
        """Return the same map on a device."""
        return AffineMap(self.weight.to(device), self.bias.to(device))

    def after(self, first: AffineMap) -> AffineMap:
        """Return the map that applies ``first`` and then this one."""
        return AffineMap(self.weight @ first.weight, self.weight @ first.bias + self.bias)


def apply_to_maps(affine: AffineMap, features: Tensor) -> Tensor:
    """Apply an affine map to features ``(N, C, h, w)`` in float32; the dtype is kept."""
    mapped = affine(rearrange(features.float(), "n c h w -> n h w c"))
    return rearrange(mapped, "n h w c -> n c h w").to(features.dtype).contiguous()


def exact(tokens: Tensor) -> Tensor:
    """Return tokens in float64, on their device if it supports that."""
    device = "cpu" if tokens.device.type == "mps" else tokens.device
    return tokens.to(device, torch.float64)
