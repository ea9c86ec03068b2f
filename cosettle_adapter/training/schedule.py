"""AdamW with decay on matrices only, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from cosettle_adapter.training.settings import LR_SAMPLES, TrainSettings

PAPER_BASE_LR = 1e-4
PAPER_TRAVEL = 2344 * 2e-4  # steps (five epochs of 240,000 clips by 512) times highest rate
SHORT_RUN_LR = 1e-3


def learning_rate(settings: TrainSettings, samples: int, steps: int) -> float:
    """Return the highest learning rate of a run: ``base_lr * samples / 256``.

    Where ``base_lr`` is not given it is the paper's 1e-4. That belongs to a corpus of 240,000
    clips: on a few thousand samples the head would end about where it began. So a run of fewer
    steps gets a higher rate, by which steps times rate is what it is in the paper, up to 1e-3.

    Args:
        settings: with ``base_lr``.
        samples: samples a step, over all processes and accumulated batches.
        steps: of the whole run.
    """
    if settings.base_lr is not None:
        return settings.base_lr * samples / LR_SAMPLES
    return max(PAPER_BASE_LR * samples / LR_SAMPLES, min(PAPER_TRAVEL / steps, SHORT_RUN_LR))


def learning_rate_factor(step: int, *, steps: int, warmup: float) -> float:
    """Return the share of the highest learning rate that a step uses.

    From 0 in a straight line over the warm-up, then half a cosine to 0 (``util/lr_sched.py`` of
    the official code, in steps in place of fractions of an epoch).

    Args:
        step: 0-based.
        steps: of the whole run.
        warmup: steps of warm-up; need not be whole.
    """
    if step < warmup:
        return step / warmup
    if step >= steps:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float
) -> list[dict[str, list[Tensor] | float]]:
    """Split parameters into matrices, which decay, and biases and norms, which do not."""
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def make_optimizer(
    module: nn.Module, settings: TrainSettings, *, samples: int, steps_per_epoch: int
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Return the optimiser of a head and the scheduler that is stepped with it.

    Args:
        module: whose parameters are trained, on the device where they will stay.
        settings: rate, decay, betas, epochs and warm-up.
        samples: samples a step.
        steps_per_epoch: steps of one pass over the samples.
    """
    steps, warmup = settings.epochs * steps_per_epoch, settings.warmup * steps_per_epoch
    optimizer = torch.optim.AdamW(
        parameter_groups(module.parameters(), settings.weight_decay),
        lr=learning_rate(settings, samples, steps),
        betas=settings.betas,
    )
    scheduler = LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps=steps, warmup=warmup)
    )
    return optimizer, scheduler
