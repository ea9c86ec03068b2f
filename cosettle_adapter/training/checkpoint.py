"""The folder of a run: lock, checkpoints, metrics and result.

A checkpoint consists of the files of Accelerate's ``save_state``, ``run.json`` and the best
projection so far. It is written under a hidden name and renamed when complete; then the previous
checkpoint is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from cosettle_adapter.cards import model_card
from cosettle_adapter.imports import require
from cosettle_adapter.io import atomic_path, exclusive
from cosettle_adapter.projection import CONFIG_FILE, WEIGHTS_FILE, Projection
from cosettle_adapter.training.errors import CheckpointError, TrainingError, differences, disk_full
from cosettle_adapter.training.processes import everywhere, on_main

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"
CARD_FILE = "README.md"

_RUN_FILE, _BEST_FILE = "run.json", "best.safetensors"


@dataclasses.dataclass
class RunState:
    """State of a run between two steps, without its weights; plain data."""

    config: dict[str, Any]  # everything that decides the result; must not change on resuming
    step: int = 0  # steps done
    began: dict[str, Any] = dataclasses.field(default_factory=dict)  # command and options
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)  # unreadable videos: reason
    # validation figures: "raw" (the backbone's tokens), "first" and "last" (the projection)
    figures: dict[str, dict[str, float | None]] = dataclasses.field(default_factory=dict)
    best: dict[str, Any] | None = None  # step and figures of the best projection by validation


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint in a run's folder, or ``None``."""
    return max((folder / CHECKPOINTS).glob("step_*"), default=None)


def read_run(folder: Path) -> RunState:
    """Read the latest checkpoint of a run without weights; :class:`CheckpointError` if none."""
    checkpoint = latest(folder)
    if checkpoint is None:
        raise CheckpointError(
            f"{folder} holds no checkpoint, so there is no run to resume; omit --resume to start "
            "a new run"
        )
    try:
        return RunState(**json.loads((checkpoint / _RUN_FILE).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(checkpoint, error) from error


def save(
    accelerator: Accelerator, folder: Path, state: RunState, best: Mapping[str, Tensor] | None
) -> None:
    """Write a checkpoint of the objects that ``accelerator`` prepared; all processes call it."""
    final = folder / CHECKPOINTS / f"step_{state.step:08d}"
    part = final.with_name(f".{final.name}")

    def complete() -> None:
        if best is not None:
            save_file(dict(best), part / _BEST_FILE)
        (part / _RUN_FILE).write_text(json.dumps(dataclasses.asdict(state), indent=1), "utf-8")
        for path in part.iterdir():
            with path.open("rb") as written:
                os.fsync(written.fileno())
        if final.exists():
            shutil.rmtree(final)
        part.replace(final)
        for older in (folder / CHECKPOINTS).glob("step_*"):
            if older != final:
                shutil.rmtree(older)

    with _whole_model(accelerator), room_for_run(folder):
        try:
            on_main(accelerator, lambda: part.mkdir(parents=True))
            everywhere(accelerator, lambda: accelerator.save_state(str(part)))
            on_main(accelerator, complete)
        except BaseException:
            if accelerator.is_main_process:
                shutil.rmtree(part, ignore_errors=True)
            raise


def restore(
    accelerator: Accelerator, folder: Path, config: Mapping[str, Any]
) -> tuple[RunState, dict[str, Tensor] | None]:
    """Load the latest checkpoint; returns the run's state and its best projection, if any."""
    state = read_run(folder)
    if differing := differences(state.config, config):
        raise CheckpointError(
            f"{folder} holds a different run: {differing}. Resume it with its own settings, or "
            "start again with --overwrite"
        )
    checkpoint = folder / CHECKPOINTS / f"step_{state.step:08d}"
    try:
        with _whole_model(accelerator):
            accelerator.load_state(str(checkpoint))
        best = load_file(checkpoint / _BEST_FILE) if state.best else None
    except Exception as error:  # PyTorch and safetensors raise many kinds on damaged files
        raise _damaged(checkpoint, error) from error
    return state, best


@contextlib.contextmanager
def _whole_model(accelerator: Accelerator) -> Iterator[None]:
    """Save and load models without data-parallel wrappers: the number of processes may change."""

    def unwrapped(models: list[Any], weights: list[Any], folder: str) -> None:
        weights[:] = [accelerator.unwrap_model(model).state_dict() for model in models]

    def unwrap(models: list[Any], folder: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    with contextlib.ExitStack() as hooks:
        hooks.callback(accelerator.register_save_state_pre_hook(unwrapped).remove)
        hooks.callback(accelerator.register_load_state_pre_hook(unwrap).remove)
        yield


def _damaged(checkpoint: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint} is damaged or not a checkpoint of this version ({type(error).__name__}); "
        "start the run again with --overwrite"
    )


def room_for_run(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Raise :class:`DiskFullError` if the block runs out of disk space in a run's folder."""
    return disk_full(
        f"no space left in {folder}; its last checkpoint is complete. Free some space, then "
        f"continue with --resume {folder}"
    )


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder with a started run or a projection, unless it is to be resumed or removed."""
    if resume and overwrite:
        raise TrainingError(
            "got --resume, which continues a run, and --overwrite, which removes it: give only one"
        )
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is a file; the output must be a folder")
    checkpoint = latest(folder)
    resumable = checkpoint is not None and not checkpoint.name.endswith("_00000000")
    if not (resume or overwrite) and (resumable or (folder / WEIGHTS_FILE).exists()):
        content = "a checkpoint" if resumable else WEIGHTS_FILE
        remedy = f"continue with --resume {folder}, or " if resumable else ""
        raise TrainingError(
            f"{folder} already holds {content}: {remedy}start again with --overwrite, which "
            "removes it"
        )


@contextlib.contextmanager
def claimed_folder(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Prepare the output folder for a run and lock it while the block runs."""
    check_folder(folder, resume=resume, overwrite=overwrite)
    with room_for_run(folder):
        folder.mkdir(parents=True, exist_ok=True)
    refusal = f"another run is writing into {folder}: wait until it ends, or use another folder"
    with exclusive(folder, refusal=TrainingError(refusal)):
        # Checked again under the lock: another run may have ended meanwhile.
        check_folder(folder, resume=resume, overwrite=overwrite)
        if overwrite:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            for name in (METRICS_FILE, CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
                (folder / name).unlink(missing_ok=True)
        for part in (folder / CHECKPOINTS).glob(".step_*"):  # of a process that was killed
            shutil.rmtree(part, ignore_errors=True)
        yield


def write_result(folder: Path, projection: Projection) -> None:
    """Write the projection, its config and its card, each atomically."""
    with room_for_run(folder):
        projection.save(folder)
        with atomic_path(folder / CARD_FILE) as path:
            path.write_text(model_card(projection.config), encoding="utf-8")


class StepReport(NamedTuple):
    """Figures of a step: means over its samples; ``separability`` is not weighted."""

    step: int
    steps: int
    epoch: int
    loss: float
    cycle: float
    separability: float
    accuracy: float
    lr: float
    grad_norm: float
    clips_per_second: float


class MetricsLog:
    """Writes ``metrics.jsonl`` and TensorBoard files; drops old lines after ``step``."""

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
        kept = [line for line in read_metrics(folder) if line["step"] < first]
        with room_for_run(folder), atomic_path(folder / METRICS_FILE) as path:
            path.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")

    def write_step(self, report: StepReport) -> None:
        """Add the line of a step."""
        values = report._asdict()
        del values["steps"]
        self.write(values.pop("step"), values)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a line; numbers that are not finite become null."""
        line = {"step": step, **values}
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None
        with room_for_run(self._folder):
            with (self._folder / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")
            if self._tracker is not None:
                self._tracker.log({k: v for k, v in values.items() if k != "epoch"}, step=step)

    def close(self) -> None:
        """Finish TensorBoard's file."""
        if self._tracker is not None:
            self._tracker.finish()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``, without a truncated last one."""
    file = folder / METRICS_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
