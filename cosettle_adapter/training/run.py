"""A run between its steps: saving, going on, validating, and writing the result."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from cosettle_adapter.projection import Projection
from cosettle_adapter.training.checkpoint import (
    Checkpoint,
    differences,
    random_state,
    restore_random_state,
)
from cosettle_adapter.training.distribution import from_main, gather, on_main
from cosettle_adapter.training.errors import CheckpointError
from cosettle_adapter.training.head import Head
from cosettle_adapter.training.result import (
    command_line,
    last_epoch_means,
    skipped_record,
    versions,
    write_result,
)
from cosettle_adapter.training.setup import Setup
from cosettle_adapter.training.validation import CRITERION, Figures, Validation
from cosettle_adapter.version import __version__

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 300.0


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training returns.

    Attributes:
        projection: the result, as it was written: the last one, or the best by validation.
        steps: of the whole run.
        chosen_step: steps after which the projection was what it is.
        figures: validation figures of the backbone's own tokens (``raw``), of the ``first``, the
            ``last`` and the ``chosen`` projection; empty without validation.
        skipped: videos that could not be read, and why.
    """

    projection: Projection
    steps: int
    chosen_step: int
    figures: dict[str, dict[str, float | None]]
    skipped: dict[str, str]


class Run:
    """The head and what trains it, after ``step`` steps."""

    def __init__(
        self, setup: Setup, head: Head, optimizer: torch.optim.Optimizer, scheduler: LambdaLR
    ) -> None:
        """Begin at step 0 with a head on its device."""
        self.setup, self.head = setup, head
        self._optimizer, self._scheduler = optimizer, scheduler
        self._validation: Validation | None = None
        self._best: dict[str, Any] | None = None
        self.figures: dict[str, dict[str, float | None]] = {}
        self._saved_at = time.monotonic()
        self._command = list(setup.command)
        self.step, self.saved_step = 0, -1
        self.skipped: dict[str, str] = {}

    def restore(self) -> None:
        """Go on from the checkpoint in the folder.

        Raises:
            CheckpointError: there is none, or it belongs to a run with other settings.
        """
        accelerator = self.setup.accelerator
        saved: Checkpoint = from_main(accelerator, on_main(accelerator, self._load))
        self.head.projection.load_state_dict(saved.projection)
        self._optimizer.load_state_dict(saved.optimizer)
        self._scheduler.load_state_dict(saved.scheduler)
        self.step = self.saved_step = saved.step
        self._best, self.figures = saved.best, saved.figures
        self.skipped.update(saved.skipped)
        self._command = saved.command or self._command
        if len(saved.rng) == accelerator.num_processes:
            restore_random_state(saved.rng[accelerator.process_index])

    def _load(self) -> Checkpoint:
        saved = Checkpoint.load(self.setup.folder)
        faults = differences(saved.config, self.setup.config())
        if faults:
            raise CheckpointError(
                f"{self.setup.folder} holds another run: {'; '.join(faults)}. Go on with what it "
                f"began with, or begin anew with --overwrite"
            )
        return saved

    def wants_save(self) -> bool:
        """Tell whether the last checkpoint is so old that another is due."""
        return time.monotonic() - self._saved_at > _SAVE_SECONDS

    def save(self) -> None:
        """Write the checkpoint, in the main process; all processes call it.

        Raises:
            DiskFullError: no space left.
        """
        setup = self.setup
        accelerator = setup.accelerator
        states = gather(accelerator, (random_state(), self.skipped))
        for _, skipped in states:
            self.skipped.update(skipped)
        checkpoint = Checkpoint(
            step=self.step,
            steps=setup.plan.steps,
            projection=self.head.projection.state_dict(),
            optimizer=self._optimizer.state_dict(),
            scheduler=self._scheduler.state_dict(),
            rng=[state for state, _ in states],
            config=setup.config(),
            best=self._best,
            figures=self.figures,
            skipped=self.skipped,
            command=self._command,
        )
        on_main(accelerator, lambda: checkpoint.save(setup.folder))
        self.saved_step, self._saved_at = self.step, time.monotonic()

    def begin_validation(self, make: Callable[[], Validation]) -> None:
        """Encode the validation clips, in the main process, and measure the backbone's tokens."""

        def begin() -> Validation:
            validation = make()
            self.figures.setdefault("raw", validation.measure(None).to_json())
            for name, reason in validation.skipped.items():
                logger.warning("validation without %s: %s", name, reason)
            return validation

        self._validation = on_main(self.setup.accelerator, begin)

    def validate(self) -> dict[str, float | None]:
        """Measure the projection as it is now, and keep it if it is the best so far.

        Returns:
            The figures in the main process; nothing elsewhere, or without validation.
        """

        def measure() -> Figures | None:
            validation = self._validation
            return None if validation is None else validation.measure(self.head.projection)

        found = on_main(self.setup.accelerator, measure)
        if found is None:
            return {}
        figures = found.to_json()
        self.figures.setdefault("first", figures)
        self.figures["last"] = figures
        if self._best is None or getattr(found, CRITERION) > self._best["figures"][CRITERION]:
            self._best = {"step": self.step, "figures": figures, "projection": self._tensors()}
        return figures

    def finish(self) -> Trained:
        """Write the result, in the main process; all processes call it and get the projection."""
        accelerator = self.setup.accelerator
        best = from_main(accelerator, self._best)
        figures = dict(from_main(accelerator, self.figures))
        chosen, tensors = self.step, self._tensors()
        if best is not None:
            chosen, tensors = best["step"], best["projection"]
            figures["chosen"] = best["figures"]
        fit = on_main(accelerator, lambda: self._record(chosen, figures))
        config = dataclasses.replace(
            self.head.projection.config, fit=from_main(accelerator, fit) or {}
        )
        with torch.random.fork_rng(devices=[]):
            projection = Projection(config)
        projection.load_state_dict(tensors)
        projection.requires_grad_(False).eval()
        on_main(accelerator, lambda: write_result(self.setup.folder, projection))
        return Trained(projection, self.step, chosen, figures, dict(self.skipped))

    def _tensors(self) -> dict[str, Tensor]:
        state = self.head.projection.state_dict()
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def _record(self, chosen: int, figures: dict[str, dict[str, float | None]]) -> dict[str, Any]:
        """Return ``config.fit``: how the projection was found."""
        setup, plan = self.setup, self.setup.plan
        record: dict[str, Any] = {
            "method": "train",
            "data": setup.about_data,
            "clips": setup.data.clips,
            **skipped_record(self.skipped),
            "samples_per_epoch": plan.samples,
            "steps": plan.steps,
            "samples_per_step": plan.samples_per_step,
            "processes": setup.accelerator.num_processes,
            "device": setup.accelerator.device.type,
            "stride": setup.backbone.stride,
            "settings": setup.settings.record(),
            "last_epoch": last_epoch_means(setup.folder),
        }
        if figures:
            record["validation"] = {
                name: {key: _rounded(value) for key, value in measured.items()}
                for name, measured in figures.items()
            }
            record["chosen_by"] = f"{CRITERION} of propagated masks on rendered clips"
            record["chosen_step"] = chosen
        record |= {"versions": versions(), "cosettle_adapter": __version__}
        command = command_line(self._command)
        return record | ({"command": command} if command else {})


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
