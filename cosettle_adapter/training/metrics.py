"""What a run measures while it goes: JSON lines always, TensorBoard on request."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosettle_adapter.imports import require
from cosettle_adapter.io import atomic_path
from cosettle_adapter.training.checkpoint import METRICS_FILE, room_for_run


@dataclasses.dataclass(frozen=True)
class StepReport:
    """How a run is doing after a step.

    Attributes:
        step: steps done.
        steps: of the whole run.
        epoch: 1-based epoch of the step.
        loss: mean total over the step's samples.
        cycle: its cycle-consistency part.
        kl: its separability part, before its weight.
        accuracy: share of cycles that end where they began, in [0, 1].
        lr: learning rate of the step.
        grad_norm: length of the gradient.
        clips_per_second: samples over seconds, of this step alone.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    cycle: float
    kl: float
    accuracy: float
    lr: float
    grad_norm: float
    clips_per_second: float


class MetricsLog:
    """Appends a line per logged step to ``metrics.jsonl``, and the same to TensorBoard.

    Args:
        folder: of the run.
        step: steps done. Lines that will come again are removed: those of later steps, and at
            step 0, which is measured anew, all of them.
        tensorboard: write event files into ``folder/tensorboard`` as well.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool = False) -> None:
        self._folder = folder
        first = step + 1 if step else 0
        self._tracker: Any = None
        if tensorboard:
            purpose = "writing TensorBoard files"
            require("torch.utils.tensorboard", extra="tensorboard", purpose=purpose)
            tracking = require("accelerate.tracking", extra="train", purpose=purpose)
            self._tracker = tracking.TensorBoardTracker("tensorboard", folder, purge_step=first)
            self._tracker.start()
        file = folder / METRICS_FILE
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        kept = "".join(f"{line}\n" for line in lines if _step_of(line) < first)
        with room_for_run(folder), atomic_path(file) as path:
            path.write_text(kept, encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a line; numbers that are not finite become null.

        Raises:
            DiskFullError: no space left.
        """
        line = {"step": step, **values}
        text = json.dumps({key: _finite(value) for key, value in line.items()})
        with room_for_run(self._folder):
            with (self._folder / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")
            if self._tracker is not None:
                self._tracker.log({k: v for k, v in values.items() if k != "epoch"}, step=step)

    def write_report(self, report: StepReport) -> None:
        """Add the line of a step."""
        values = dataclasses.asdict(report)
        self.write(values.pop("step"), {k: v for k, v in values.items() if k != "steps"})

    def close(self) -> None:
        """Finish TensorBoard's file."""
        if self._tracker is not None:
            self._tracker.finish()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``."""
    text = (Path(folder) / METRICS_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def last_epoch_means(folder: Path) -> dict[str, float]:
    """Return the means of what was logged over the last epoch of ``metrics.jsonl``."""
    lines = [line for line in read_metrics(folder) if "loss" in line]
    last = [line for line in lines if line["epoch"] == lines[-1]["epoch"]]
    names = ("loss", "cycle", "kl", "accuracy") if last else ()
    return {name: round(sum(line[name] for line in last) / len(last), 4) for name in names}


def _step_of(line: str) -> float:
    """Step of a line; a line that was cut off belongs to no step that was saved."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
