"""How much a projection stretches or shrinks a step along a direction."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

_ROWS = 4096  # pairs of token and direction that a projection sees at a time


def directional_gain(
    projection: Callable[[Tensor], Tensor], tokens: Tensor, directions: Tensor
) -> Tensor:
    """Return how much longer small steps along directions become.

    Args:
        projection: maps ``(N, C)`` to ``(N, C')``, row by row.
        tokens: ``(N, C)`` where it is differentiated.
        directions: ``(K, C)`` unit vectors.

    Returns:
        ``(K,)`` float64, root mean square over tokens of the length of Jacobian times direction.
    """
    device, dtype = _like(projection, tokens)
    tokens, directions = tokens.to(device, dtype), directions.to(device, dtype)
    gains = []
    for block in torch.split(directions, max(1, _ROWS // len(tokens))):
        at = repeat(tokens, "n c -> (k n) c", k=len(block))
        along = repeat(block, "k c -> (k n) c", n=len(tokens))
        with warnings.catch_warnings():
            # torch's own forward mode compiles a few rules when it is first used
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
            moved: Tensor = torch.func.jvp(projection, (at,), (along,))[1]
        squared = rearrange(moved.double().square().sum(-1), "(k n) -> k n", k=len(block))
        gains.append(reduce(squared, "k n -> k", "mean").sqrt().cpu())
    return torch.cat(gains)


def _like(
    projection: Callable[[Tensor], Tensor], tokens: Tensor
) -> tuple[torch.device, torch.dtype]:
    """Where a projection's weights are, if it is a module's method with weights."""
    module = getattr(projection, "__self__", projection)
    if isinstance(module, torch.nn.Module):
        for parameter in module.parameters():
            return parameter.device, parameter.dtype
    return tokens.device, tokens.dtype
