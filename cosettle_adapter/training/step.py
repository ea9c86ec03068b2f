"""One optimiser step: encode, compute losses, agree with the other processes, update the head."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.training.cached_views import CachedViews
from cosettle_adapter.training.checkpoint import StepReport
from cosettle_adapter.training.data import Batch, Key, Plan, TrainingPairs
from cosettle_adapter.training.encoding import encode
from cosettle_adapter.training.errors import NonFiniteLossError, TrainingError
from cosettle_adapter.training.head import Head, make_optimizer
from cosettle_adapter.training.losses import Losses, objective
from cosettle_adapter.training.processes import gather
from cosettle_adapter.training.settings import TrainSettings, learning_rate

if TYPE_CHECKING:
    from accelerate import Accelerator

_MAX_NAMES = 8  # clips named in an error message


class Stepper:
    """Runs steps on the accelerator's device; ``skipped`` collects unreadable videos."""

    def __init__(
        self,
        accelerator: Accelerator,
        backbone: Backbone,
        data: TrainingPairs,
        plan: Plan,
        settings: TrainSettings,
        head: Head,
    ) -> None:
        self._accelerator, self._backbone, self._data = accelerator, backbone, data
        self._plan, self._settings, self._head = plan, settings, head
        self._grid = backbone.grid(settings.size, settings.size)
        self._lr = functools.partial(
            learning_rate,
            steps=plan.steps,
            warmup=settings.warmup * plan.steps_per_epoch,
            highest=settings.highest_lr(plan.samples_per_step, plan.steps),
            lowest=settings.min_lr,
        )
        self._wrapped: nn.Module = accelerator.prepare(head)
        self._optimizer: Any = accelerator.prepare(make_optimizer(head, settings))
        self.skipped: dict[str, str] = {}

    def run(
        self, step: int, batches: Iterator[Batch], *, stop: bool = False, save: bool = False
    ) -> tuple[StepReport, bool, bool]:
        """Run step ``step`` (0-based) on the next batches.

        If one process cannot read its samples or has a loss that is not finite, all raise the same
        message before weights change. Returns the figures of the step, and whether any process was
        asked to ``stop`` and to ``save``.
        """
        accelerator, plan, start = self._accelerator, self._plan, time.monotonic()
        parts = plan.keys(step, accelerator.process_index)
        sums = torch.zeros(4, device=accelerator.device)
        failure: Exception | None = None
        losses: Losses | None = None
        for number, keys in enumerate(parts, start=1):
            last = number == len(parts)
            # Only the backward pass of the last part synchronises gradients.
            sync: Any = contextlib.nullcontext() if last else accelerator.no_sync(self._wrapped)
            with sync:
                try:
                    losses = self._losses(step, keys, next(batches))
                except (CosettleError, OSError) as error:
                    failure = error
                    break
                sums += torch.stack([loss.detach().float() for loss in losses]) / len(parts)
                if not last:
                    accelerator.backward(losses.total / len(parts))
        flags = torch.tensor([failure is not None, stop, save], device=sums.device)
        agreed = accelerator.reduce(torch.cat([sums, flags.to(sums)]), "sum").tolist()
        if agreed[4] or losses is None:
            messages = gather(accelerator, None if failure is None else str(failure))
            raise failure or TrainingError(next(message for message in messages if message))
        accelerator.backward(losses.total / len(parts))
        lr = self._lr(step)
        norm = self._update(step, parts, lr)
        loss, cycle, separability, accuracy = (
            value / accelerator.num_processes for value in agreed[:4]
        )
        speed = plan.samples_per_step / max(time.monotonic() - start, 1e-9)
        epoch = step // plan.steps_per_epoch + 1
        means = (loss, cycle, separability, accuracy)
        report = StepReport(step + 1, plan.steps, epoch, *means, lr, norm, speed)
        return report, bool(agreed[5]), bool(agreed[6])

    def _losses(self, step: int, keys: Sequence[Key], batch: Batch) -> Losses:
        self.skipped.update(batch.skipped)
        if isinstance(self._data, CachedViews):
            tokens = batch.data.to(self._accelerator.device, non_blocking=True).float()
        else:
            tokens = encode(self._backbone, self._settings, batch.data, batch.seeds, step=step)
        losses = objective(self._wrapped, tokens, self._grid, self._settings)
        total = float(losses.total.detach())
        if math.isfinite(total):
            return losses
        names = []
        for row, (_, index) in enumerate(keys):
            with torch.no_grad():
                own = objective(self._head, tokens[[row]], self._grid, self._settings)
            if not math.isfinite(float(own.total)):
                names.append(self._data.name(index))
        advice = "Remove the clip, or use --precision float32"
        if len(names) == len(keys) > 1:
            advice = (
                "The weights have diverged, or the encoder overflows: lower --base-lr, or use "
                "--precision float32"
            )
        raise NonFiniteLossError(
            f"the loss of {self._named(step)} is not finite ({total}) because of {len(names)} of "
            f"the {len(keys)} samples in a batch ({_join(names)}); weights are unchanged. {advice}"
        )

    def _update(self, step: int, parts: Sequence[Sequence[Key]], lr: float) -> float:
        """Step the optimiser unless the gradient, equal in all processes, is not finite."""
        norm = float(nn.utils.clip_grad_norm_(self._head.parameters(), math.inf))
        if not math.isfinite(norm):
            mine = [self._data.name(index) for part in parts for _, index in part]
            names = [name for theirs in gather(self._accelerator, mine) for name in theirs]
            raise NonFiniteLossError(
                f"the gradient of {self._named(step)} is not finite ({norm}) on {_join(names)}; "
                "weights are unchanged. Lower --base-lr"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _named(self, step: int) -> str:
        return f"step {step + 1} (epoch {step // self._plan.steps_per_epoch + 1})"


def _join(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    shown = ", ".join(unique[:_MAX_NAMES])
    return shown + (f" and {len(unique) - _MAX_NAMES} more" if len(unique) > _MAX_NAMES else "")
