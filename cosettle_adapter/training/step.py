"""One optimiser step: encode, compare, agree with the other processes, update the head."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.training.batches import Plan, TrainingData
from cosettle_adapter.training.data import Batch, Key
from cosettle_adapter.training.distribution import gather
from cosettle_adapter.training.encoding import Views, draw_offsets, encode_views
from cosettle_adapter.training.errors import NonFiniteLossError, TrainingError
from cosettle_adapter.training.head import Head
from cosettle_adapter.training.losses import Losses, objective
from cosettle_adapter.training.metrics import StepReport
from cosettle_adapter.training.settings import TrainSettings, learning_rate_factor

if TYPE_CHECKING:
    from accelerate import Accelerator

_NAMED = 8
"""Clips that an error names before it counts the rest."""


class Stepper:
    """Runs steps; holds everything that one needs and nothing that outlives it.

    The backbone and the head are on the accelerator's device; the head is wrapped here for the
    processes there are. Videos that could not be read are noted in ``skipped``.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        backbone: Backbone,
        data: TrainingData,
        plan: Plan,
        settings: TrainSettings,
        head: Head,
        optimizer: torch.optim.Optimizer,
        skipped: dict[str, str],
    ) -> None:
        self._accelerator, self._backbone, self._data = accelerator, backbone, data
        self._plan, self._settings, self._head = plan, settings, head
        self._wrapped: nn.Module = accelerator.prepare(head)
        self._optimizer: torch.optim.Optimizer = accelerator.prepare(optimizer)
        self._skipped = skipped
        self._autocast = torch.autocast(
            accelerator.device.type,
            dtype=getattr(torch, settings.precision),
            enabled=settings.precision != "float32",
        )

    def run(
        self, step: int, batches: Iterator[Batch], *, stop: bool = False, save: bool = False
    ) -> tuple[StepReport, bool, bool]:
        """Do step ``step`` (0-based) on the next batches.

        All processes agree before the weights change: if one could not read its samples, or has a
        loss that is not finite, all raise the same message. ``stop`` and ``save`` are what this
        process was asked.

        Returns:
            How the step went, the same in every process; whether some process was asked to stop,
            and whether the main process wants a checkpoint.

        Raises:
            NonFiniteLossError: naming the step, the epoch and the clips.
            CosettleError: samples that cannot be read.
        """
        accelerator, began = self._accelerator, time.monotonic()
        parts = self._plan.keys(step, accelerator.process_index)
        sums = torch.zeros(4, device=accelerator.device)
        failure: Exception | None = None
        losses: Losses | None = None
        for number, keys in enumerate(parts, start=1):
            last = number == len(parts)
            # only the last part's backward pass sends gradients to the other processes
            wait: Any = contextlib.nullcontext() if last else accelerator.no_sync(self._wrapped)
            with wait:
                try:
                    losses = self._losses(step, keys, next(batches))
                except (CosettleError, OSError) as error:
                    failure = error
                    break
                values = (losses.total, losses.cycle, losses.separability, losses.accuracy)
                sums += torch.stack([each.detach().float() for each in values]) / len(parts)
                if not last:
                    accelerator.backward(losses.total / len(parts))
        flags = torch.tensor([failure is not None, stop, save], device=sums.device)
        agreed = accelerator.reduce(torch.cat([sums, flags.to(sums)]), "sum").tolist()
        if agreed[4] or losses is None:
            messages = gather(accelerator, None if failure is None else str(failure))
            raise failure or TrainingError(next(message for message in messages if message))
        accelerator.backward(losses.total / len(parts))
        lr = self._learning_rate(step)
        norm = self._update(step, parts, lr)
        loss, cycle, separability, accuracy = (
            value / accelerator.num_processes for value in agreed[:4]
        )
        report = StepReport(
            step=step + 1,
            steps=self._plan.steps,
            epoch=step // self._plan.steps_per_epoch + 1,
            loss=loss,
            cycle=cycle,
            kl=separability,
            accuracy=accuracy,
            lr=lr,
            grad_norm=norm,
            clips_per_second=self._plan.samples_per_step / max(time.monotonic() - began, 1e-9),
        )
        return report, bool(agreed[5]), bool(agreed[6])

    def _losses(self, step: int, keys: Sequence[Key], batch: Batch) -> Losses:
        self._skipped.update(batch.skipped)
        views = self._views(step, batch)
        losses = objective(self._wrapped, views, self._settings)
        total = float(losses.total.detach())
        if not math.isfinite(total):
            raise NonFiniteLossError(self._blame(step, keys, views, total))
        return losses

    def _views(self, step: int, batch: Batch) -> Views:
        device, settings = self._accelerator.device, self._settings
        if batch.views is not None:
            forward, backward = (
                tokens.to(device, non_blocking=True).float() for tokens in batch.views[:2]
            )
            return Views(forward, backward, batch.views.grid)
        if batch.frames is None:
            raise TrainingError("a batch has neither frames nor views")
        config = self._head.projection.config
        with torch.no_grad(), self._autocast:
            return encode_views(
                self._backbone,
                batch.frames.to(device, non_blocking=True),
                layers=config.layers,
                norm=config.norm,
                settings=settings,
                offsets=draw_offsets(
                    settings, seed=settings.seed, step=step, sample_seeds=batch.seeds
                ),
            )

    def _learning_rate(self, step: int) -> float:
        plan, settings = self._plan, self._settings
        warmup = settings.warmup * plan.steps_per_epoch
        factor = learning_rate_factor(step, steps=plan.steps, warmup=warmup)
        return settings.highest_lr(plan.samples_per_step, plan.steps) * factor

    def _update(self, step: int, parts: Sequence[Sequence[Key]], lr: float) -> float:
        """Step the optimiser unless the gradient, equal in all processes, is not finite."""
        norm = float(nn.utils.clip_grad_norm_(self._head.parameters(), math.inf))
        if not math.isfinite(norm):
            mine = [self._data.name(index) for part in parts for _, index in part]
            names = [name for theirs in gather(self._accelerator, mine) for name in theirs]
            raise NonFiniteLossError(
                f"the gradient of {self._named(step)} is not finite ({norm}) on {_some(names)}; "
                "that step was not made. Lower --base-lr"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _blame(self, step: int, keys: Sequence[Key], views: Views, loss: float) -> str:
        """Name the samples whose own loss is not finite."""
        names = []
        for row, (_, index) in enumerate(keys):
            one = slice(row, row + 1)
            own = views._replace(forward=views.forward[one], backward=views.backward[one])
            if not math.isfinite(float(objective(self._head, own, self._settings).total)):
                names.append(self._data.name(index))
        what = f"the loss of {self._named(step)} is not finite ({loss})"
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

    def _named(self, step: int) -> str:
        return f"step {step + 1} (epoch {step // self._plan.steps_per_epoch + 1})"


def _some(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    shown = ", ".join(unique[:_NAMED])
    return shown + (f" and {len(unique) - _NAMED} more" if len(unique) > _NAMED else "")
