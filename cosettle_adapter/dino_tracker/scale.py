"""How long features are to be, so that the residual DINO-Tracker adds is small beside them."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cosettle_adapter.dino_tracker.errors import DinoTrackerError

# Of a token of 1024 channels behind a layer norm. The residual begins with a length of up to
# 0.05 * sqrt(1024) = 1.6, the gain its last normalisation starts from.
_USUAL = 32.0
# as many frames of a baseline tell a mean length
_SAMPLE = 8
_REMEDY = "delete it, or leave the features as long as they are (rescale=False, --no-rescale)"


@dataclass(frozen=True)
class Scale:
    """A factor for all features of a clip.

    Attributes:
        factor: what they are multiplied by.
        reason: why.
    """

    factor: float
    reason: str


def choose_scale(features: Tensor, baseline: Path) -> Scale:
    """Choose a factor by the mean length of the features of one frame.

    Features get the mean length of DINO-Tracker's own where there is a file of them, and a usual
    one otherwise: the blocks of backbones and their projections differ tenfold, the residual of
    DINO-Tracker would swamp the shortest, and what is to be compared should be as long.

    Args:
        features: ``(N, C, h, w)``.
        baseline: where DINO-Tracker's own features would be.

    Raises:
        DinoTrackerError: the baseline cannot be read.
    """
    own = _mean_norm(features)
    wanted, why = _USUAL, "as of tokens behind a layer norm"
    if baseline.is_file():
        wanted, why = _baseline_norm(baseline), f"that of {baseline}"
    return Scale(wanted / own, f"mean length {own:.2f}, scaled to {wanted:.2f}, {why}")


def _baseline_norm(path: Path) -> float:
    try:
        features = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise DinoTrackerError(f"{path} cannot be read; {_REMEDY}") from error
    norm = float("nan")
    if isinstance(features, Tensor) and features.ndim == 4 and features.numel():
        step = max(1, len(features) // _SAMPLE)
        norm = _mean_norm(features[index].float() for index in range(0, len(features), step))
    if not 0 < norm < float("inf"):
        raise DinoTrackerError(f"{path} does not hold features (T, C, h, w); {_REMEDY}")
    return norm


def _mean_norm(maps: Iterable[Tensor]) -> float:
    """Mean length of the feature of a cell, over maps ``(..., C, h, w)`` of one size."""
    return float(torch.stack([cells.norm(dim=-3).double().mean() for cells in maps]).mean())
