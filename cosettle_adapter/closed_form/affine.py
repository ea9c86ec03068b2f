"""Affine maps of tokens: what every closed form comes down to."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True, eq=False)
class AffineMap:
    """``y = W x + b``.

    Attributes:
        weight: ``(C', C)`` float64.
        bias: ``(C',)`` float64.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def identity(cls, width: int) -> AffineMap:
        """Return the map that changes nothing."""
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
