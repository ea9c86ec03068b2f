"""What one kind of features gains over another, clip by clip, and how sure that is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from cosettle_adapter.analysis import CENTRED
from cosettle_adapter.evaluation.tasks.base import mean

if TYPE_CHECKING:
    from cosettle_adapter.evaluation.run import Evaluation

RESAMPLES = 10_000
_SEED = 0
_CONFIDENCE = (0.025, 0.975)


@dataclasses.dataclass(frozen=True)
class Gain:
    """Differences by clip, summed up.

    Attributes:
        mean: over the clips.
        low: lower end of its 95 % interval.
        high: upper end of it.
        clip: the clip that gains least; empty without clips.
        worst: what that clip gains; negative is a loss.
    """

    mean: float
    low: float
    high: float
    clip: str
    worst: float


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile interval of a mean by the bootstrap (Efron, 1979).

    The differences are drawn anew, as many as there are and with replacement, 10,000 times with a
    fixed seed. NaN without differences.
    """
    if not differences:
        return float("nan"), float("nan")
    values = torch.tensor(differences, dtype=torch.float64)
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = torch.quantile(values[drawn].mean(1), torch.tensor(_CONFIDENCE).double()).tolist()
    return low, high


def gain(result: Evaluation, kind: str, against: str | Mapping[str, str]) -> Gain:
    """Compare a kind of features by the first measure with another one.

    Args:
        result: scores by clip.
        kind: the one that gains or loses.
        against: the other one, or clip to the other one; clips that lack either do not count.
    """
    others = dict.fromkeys(result.clips, against) if isinstance(against, str) else against
    scores = {other: result.first(other) for other in {*others.values()}}
    differences = {
        clip: value - scores[others[clip]][clip]
        for clip, value in result.first(kind).items()
        if clip in others and clip in scores[others[clip]]
    }
    if not differences:
        nothing = float("nan")
        return Gain(nothing, nothing, nothing, "", nothing)
    worst = min(differences, key=lambda clip: differences[clip])
    values = list(differences.values())
    return Gain(mean(values), *paired_interval(values), worst, differences[worst])


def best_layers(result: Evaluation) -> dict[str, str]:
    """Choose for every clip the best raw single layer centred.

    It is the one with the highest mean of the first measure over the clips of the other parts of
    the data, so that no clip has a say in what it is compared with; over all clips where the data
    has a single part.

    Returns:
        Clip to kind of features; empty where no single layer was scored.
    """
    single = {CENTRED} if len(result.settings["layers"]) == 1 else set()
    layers = [
        kind for kind in result.kinds if kind in single or re.fullmatch(r"centred layer \d+", kind)
    ]
    chosen: dict[str, str] = {}
    for part in sorted({part_of(result, clip) for clip in result.clips}):
        own = {clip for clip in result.clips if part_of(result, clip) == part}
        judges = set(result.clips) - own or own
        by_layer = {
            kind: mean(value for clip, value in result.first(kind).items() if clip in judges)
            for kind in layers
        }
        known = {kind: value for kind, value in by_layer.items() if value == value}
        if known:
            chosen |= dict.fromkeys(own, max(known, key=lambda kind: known[kind]))
    return chosen


def part_of(result: Evaluation, clip: str) -> str:
    """Return the part of the data that a clip belongs to; empty where it has no parts."""
    return clip.split("/")[0] if result.settings.get("parts") else ""
