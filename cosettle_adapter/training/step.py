"""One optimiser step: encode, compare, agree with the other processes, update the head."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from cosettle_adapter.errors import CosettleError
from cosettle_adapter.training.batches import Key
from cosettle_adapter.training.distribution import gather
from cosettle_adapter.training.errors import NonFiniteLossError, TrainingError
from cosettle_adapter.training.head import Head
from cosettle_adapter.training.objective import Losses, Views, draw_offsets, encode_views, objective
from cosettle_adapter.training.setup import Setup

_NAMED = 8
"""Clips that an error names before it counts the rest."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step did, the same in every process.

    Attributes:
        loss: mean total over the step's samples.
        cycle: its cycle-consistency part.
        separability: its KL part, before its weight.
        accuracy: share of nodes whose cycle ends where it began, in [0, 1].
        grad_norm: length of the gradient.
        lr: learning rate that was used.
        stop: some process was asked to stop.
        save: the main process wants a checkpoint.
    """

    loss: float
    cycle: float
    separability: float
    accuracy: float
    grad_norm: float
    lr: float
    stop: bool
    save: bool


class Stepper:
    """Runs steps; holds everything that one needs and nothing that outlives it."""

    def __init__(
        self,
        setup: Setup,
        head: Head,
        optimizer: torch.optim.Optimizer,
        scheduler: LambdaLR,
        skipped: dict[str, str],
    ) -> None:
        """Wrap the head for the processes there are; optimiser and encoder stay as they are.

        Args:
            setup: of the run.
            head: on its device.
            optimizer: of the head's parameters.
            scheduler: of the optimiser.
            skipped: where to note videos that could not be read.
        """
        self._accelerator, self._backbone = setup.accelerator, setup.backbone
        self._data, self._plan, self._settings = setup.data, setup.plan, setup.settings
        self._head, self._optimizer, self._scheduler = head, optimizer, scheduler
        self._skipped = skipped
        self._wrapped: nn.Module = self._accelerator.prepare(head)
        self._autocast = torch.autocast(
            self._accelerator.device.type,
            dtype=getattr(torch, self._settings.precision),
            enabled=self._settings.precision != "float32",
        )

    def run(
        self, step: int, batches: Iterator[Any], *, stop: bool = False, save: bool = False
    ) -> StepResult:
        """Do step ``step`` (0-based) on the next batches.

        All processes agree before the weights are touched: if one could not read its samples, or
        has a loss that is not finite, all raise the same sentence.

        Args:
            step: whose positions and learning rate are used.
            batches: of this process.
            stop: whether this process was asked to stop.
            save: whether the main process wants a checkpoint.

        Raises:
            NonFiniteLossError: naming the step, the epoch and the clips.
            CosettleError: samples that cannot be read.
        """
        parts = self._plan.keys(step, self._accelerator.process_index)
        sums = torch.zeros(4, device=self._accelerator.device)
        failure: Exception | None = None
        losses: Losses | None = None
        for number, keys in enumerate(parts, start=1):
            last = number == len(parts)
            with self._without_sync(last):
                try:
                    losses = self._losses(step, keys, next(batches))
                except (CosettleError, OSError) as error:
                    failure = error
                    break
                sums += _as_vector(losses) / len(parts)
                if not last:
                    self._accelerator.backward(losses.total / len(parts))
        flags = torch.tensor([failure is not None, stop, save], device=sums.device)
        agreed = self._accelerator.reduce(torch.cat([sums, flags.to(sums)]), "sum").tolist()
        if agreed[4]:
            self._raise_together(failure)
        if losses is None:  # a step has at least one part
            raise TrainingError(f"step {step + 1} has no samples")
        self._accelerator.backward(losses.total / len(parts))
        norm = self._update(step, parts)
        loss, cycle, separability, accuracy = (
            value / self._accelerator.num_processes for value in agreed[:4]
        )
        lr = float(self._scheduler.get_last_lr()[0])
        self._scheduler.step()
        return StepResult(
            loss, cycle, separability, accuracy, norm, lr, bool(agreed[5]), bool(agreed[6])
        )

    def _without_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Only the last part's backward pass sends gradients to the other processes."""
        if last:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[None] = self._accelerator.no_sync(self._wrapped)
        return context

    def _losses(self, step: int, keys: Sequence[Key], batch: Any) -> Losses:
        self._skipped.update(batch.skipped)
        views = self._views(step, batch)
        losses = objective(self._wrapped, views, self._settings.objective)
        total = float(losses.total.detach())
        if not math.isfinite(total):
            raise NonFiniteLossError(self._blame(step, keys, views, total))
        return losses

    def _views(self, step: int, batch: Any) -> Views:
        device = self._accelerator.device
        kept: Views | None = getattr(batch, "views", None)
        if kept is not None:
            return dataclasses.replace(
                kept,
                forward=kept.forward.to(device, non_blocking=True).float(),
                backward=kept.backward.to(device, non_blocking=True).float(),
            )
        settings = self._settings
        offsets = draw_offsets(
            settings.objective, seed=settings.seed, step=step, sample_seeds=batch.seeds
        )
        with torch.no_grad(), self._autocast:
            return encode_views(
                self._backbone,
                batch.frames.to(device, non_blocking=True),
                layers=self._head.projection.config.layers,
                norm=self._head.projection.config.norm,
                settings=settings.objective,
                offsets=offsets,
            )

    def _update(self, step: int, parts: Sequence[Sequence[Key]]) -> float:
        """Step the optimiser unless the gradient, equal in all processes, is not finite."""
        norm = float(nn.utils.clip_grad_norm_(self._head.parameters(), math.inf))
        if not math.isfinite(norm):
            mine = [self._data.name(index) for part in parts for _, index in part]
            names = [name for theirs in gather(self._accelerator, mine) for name in theirs]
            raise NonFiniteLossError(
                f"the gradient of step {step + 1} ({self._epoch(step)}) is not finite ({norm}) "
                f"on {_some(names)}; that step was not made. Lower --base-lr"
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _blame(self, step: int, keys: Sequence[Key], views: Views, loss: float) -> str:
        """Name the samples whose own loss is not finite."""
        names = []
        for row, (_, index) in enumerate(keys):
            one = slice(row, row + 1)
            own = dataclasses.replace(
                views, forward=views.forward[one], backward=views.backward[one]
            )
            if not math.isfinite(float(objective(self._head, own, self._settings.objective).total)):
                names.append(self._data.name(index))
        what = f"the loss of step {step + 1} ({self._epoch(step)}) is not finite ({loss})"
        if len(names) == len(keys) > 1:
            return (
                f"{what} on all {len(keys)} samples of a batch ({_some(names)}); that step was "
                "not made. The weights have diverged, or the encoder overflows: lower --base-lr, "
                "or use --precision float32"
            )
        return (
            f"{what} because of {_some(names)}, of {len(keys)} samples in the batch; that step "
            "was not made. Leave the clip out, or use --precision float32"
        )

    def _epoch(self, step: int) -> str:
        return f"epoch {step // self._plan.steps_per_epoch + 1}"

    def _raise_together(self, failure: Exception | None) -> None:
        sentences = gather(self._accelerator, None if failure is None else str(failure))
        if failure is not None:
            raise failure
        raise TrainingError(next(sentence for sentence in sentences if sentence is not None))


def _as_vector(losses: Losses) -> Tensor:
    parts = (losses.total, losses.cycle, losses.separability, losses.accuracy)
    return torch.stack([part.detach().float() for part in parts])


def _some(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    shown = ", ".join(unique[:_NAMED])
    return shown + (f" and {len(unique) - _NAMED} more" if len(unique) > _NAMED else "")
