"""The training objective: cycles that close, on tokens that stay close to the backbone's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.training.encoding import Views, encode_views
from cosettle_adapter.training.losses import multi_frame_cycle_loss, semantic_separability_loss
from cosettle_adapter.training.seeds import generator_of

__all__ = ["Losses", "ObjectiveSettings", "Views", "draw_offsets", "encode_views", "objective"]

Perturbation = Literal["batch", "sample", "off"]


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """What is minimised: ``cycle + separability_weight * separability``.

    Crops are placed alike either way, so ``sample`` and ``batch`` estimate the same loss, at the
    same cost. With a place for each sample the gradient varies less from step to step: by 9 to
    13 % at 32 clips and by half at 256, and losses on other clips come out alike (3.42 and 3.45
    after 60 steps; DINOv2-S on rendered clips: ``pytest tests/training/test_pea_modes.py
    --run-slow -s``). Hence the default.

    Attributes:
        temperatures: of the softmaxes in the cycle; its loss and accuracy are means over them.
        separability_weight: the paper's lambda.
        pea_ratio: by how much more than once the grid of positions is zoomed.
        pea: where the zoomed grid is cropped: at a place of its own for each ``sample``, at one
            place a step for the whole ``batch``, as in the official code, or ``off``.
        pool: cells averaged along each side before cycles are walked.
    """

    temperatures: tuple[float, ...] = (0.03,)
    separability_weight: float = 3.0
    pea_ratio: float = 10.0
    pea: Perturbation = "sample"
    pool: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        if not self.temperatures or not all(
            math.isfinite(temperature) and temperature > 0 for temperature in self.temperatures
        ):
            raise ValueError(
                f"temperatures must be one or more positive numbers, got {self.temperatures}"
            )
        for name in ("separability_weight", "pea_ratio"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if self.pea not in get_args(Perturbation):
            raise ValueError(f"pea must be batch, sample or off, got {self.pea!r}")
        if not isinstance(self.pool, int) or self.pool < 1:
            raise ValueError(f"pool must be a whole number of cells, 1 or more, got {self.pool!r}")


@dataclasses.dataclass(frozen=True)
class Losses:
    """Scalars of one batch, float32.

    Attributes:
        total: what is minimised; the only one to call ``backward`` on.
        cycle: the cycle-consistency loss.
        separability: the separability loss before it is weighted.
        accuracy: the share of cycles that come back to where they set out, in [0, 1].
    """

    total: Tensor
    cycle: Tensor
    separability: Tensor
    accuracy: Tensor


def draw_offsets(
    settings: ObjectiveSettings, *, seed: int, step: int, sample_seeds: Tensor
) -> Tensor:
    """Draw where the zoomed grid of positions is cropped.

    One place a step is a function of ``seed`` and ``step``; one a sample is a function of that
    sample's own seed alone. So neither depends on how samples are spread over processes,
    accumulated or resumed.

    Args:
        settings: ``pea`` decides which; ``off`` draws as ``batch`` does, for nothing.
        seed: of the run.
        step: optimiser steps taken so far.
        sample_seeds: ``(B,)`` int64, the seed of each sample.

    Returns:
        ``(1, 2)``, or ``(B, 2)`` for ``sample``: float64 in [0, 1), on the CPU.
    """
    if settings.pea == "sample":
        generators = [generator_of("pea", int(sample)) for sample in sample_seeds]
    else:
        generators = [generator_of("pea", seed, step)]
    return torch.stack([torch.rand(2, generator=g, dtype=torch.float64) for g in generators])


def objective(
    project: Callable[[Tensor], Tensor], views: Views, settings: ObjectiveSettings
) -> Losses:
    """Compute the losses of a head on a batch of views.

    All views are projected in one call (so that a module wrapped for data-parallel training is
    called once a step), scaled to unit length and compared in float32, under autocast as well.
    Gradients reach what ``project`` is made of, never the tokens.

    Args:
        project: the head: tokens ``(..., C)`` to ``(..., C')``.
        views: from :func:`encode_views`.
        settings: see :class:`ObjectiveSettings`.

    Returns:
        The losses; ``separability`` is 0 where its weight is 0 and the head changes the width,
        for it has no meaning there.

    Raises:
        ValueError: views of other shapes than :class:`Views` says, or a head that changes the
            width while the separability loss has a weight.
    """
    with torch.autocast(views.forward.device.type, enabled=False):
        tokens = torch.cat([views.forward, views.backward], dim=1)
        # Tensors made in inference mode cannot take part in a backward pass.
        tokens = (tokens.clone() if tokens.is_inference() else tokens.detach()).float()
        projected = F.normalize(project(tokens).float(), dim=-1)
        frames = views.forward.shape[1]
        forward, backward = projected[:, :frames], projected[:, frames:]
        cycles = [
            multi_frame_cycle_loss(
                forward, backward, views.grid, temperature, settings.pool, normalised=True
            )
            for temperature in settings.temperatures
        ]
        cycle, accuracy = (torch.stack(each).mean() for each in zip(*cycles, strict=True))
        separability = _separability(tokens, projected, settings.separability_weight)
        total = cycle + settings.separability_weight * separability
    return Losses(total, cycle, separability, accuracy)


def _separability(tokens: Tensor, projected: Tensor, weight: float) -> Tensor:
    width, projected_width = tokens.shape[-1], projected.shape[-1]
    if width == projected_width:
        original = F.normalize(tokens, dim=-1)
        return semantic_separability_loss(original, projected, normalised=True)
    if weight:
        raise ValueError(
            f"the separability loss compares channels one by one, but the head makes "
            f"{projected_width} of {width}: keep the width, or set separability_weight=0"
        )
    return projected.new_zeros(())
