"""The folder of a run: its lock, its checkpoints, its result.

A checkpoint is what Accelerate's ``save_state`` writes (``model.safetensors``, ``optimizer.bin``,
the random states of every process), with ``run.json`` and the best projection so far beside it. It
is written under a hidden name and renamed once it is complete; then the one before it is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cosettle_adapter.cards import model_card
from cosettle_adapter.io import atomic_path, exclusive
from cosettle_adapter.projection import CONFIG_FILE, WEIGHTS_FILE, Projection
from cosettle_adapter.training.distribution import everywhere, on_main
from cosettle_adapter.training.errors import CheckpointError, TrainingError, disk_full

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"
CARD_FILE = "README.md"

_FORMAT_VERSION = 2
_RUN_FILE, _BEST_FILE = "run.json", "best.safetensors"
_OLD_CHECKPOINT = "checkpoint.pt"  # of version 0.1


@dataclasses.dataclass
class RunState:
    """A run between two steps, beside its weights; plain data.

    Attributes:
        config: what decides the result, and must be the same on resuming: settings, backbone, data.
        step: steps done.
        command: words of the command line that began the run.
        skipped: videos that could not be read so far, and why.
        figures: validation figures: of the backbone's own tokens, the first and the last head.
        best: step and figures of the best projection so far by validation.
    """

    config: dict[str, Any]
    step: int = 0
    command: list[str] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    figures: dict[str, dict[str, float | None]] = dataclasses.field(default_factory=dict)
    best: dict[str, Any] | None = None


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint in a run's folder, or ``None``."""
    return max((folder / CHECKPOINTS).glob("step_*"), default=None)


def read_run(folder: Path) -> RunState:
    """Read the latest checkpoint of a run, its weights aside.

    Raises:
        CheckpointError: there is none, or it is not one that this version reads.
    """
    checkpoint = latest(folder)
    if checkpoint is None:
        old = ""
        if (folder / _OLD_CHECKPOINT).exists():
            old = f" (its {_OLD_CHECKPOINT} is version 0.1's, which can finish it)"
        raise CheckpointError(
            f"{folder} holds no checkpoint, so there is no run to resume{old}; "
            "leave --resume away to begin one"
        )
    try:
        content = json.loads((checkpoint / _RUN_FILE).read_text("utf-8"))
        version = content.pop("format_version")
        state = RunState(**content) if version == _FORMAT_VERSION else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(checkpoint, error) from error
    if state is None:
        raise CheckpointError(
            f"{checkpoint} has format_version {version!r}, and this version of cosettle-adapter "
            f"reads {_FORMAT_VERSION}"
        )
    return state


def save(
    accelerator: Accelerator, folder: Path, state: RunState, best: Mapping[str, Tensor] | None
) -> None:
    """Write a checkpoint of what ``accelerator`` prepared; all processes call it.

    Raises:
        DiskFullError: it could not be written; the checkpoint that was there is still complete.
    """
    final = folder / CHECKPOINTS / f"step_{state.step:08d}"
    part = final.with_name(f".{final.name}")

    def begin() -> None:
        remove_unfinished(folder)
        part.mkdir(parents=True)

    def end() -> None:
        if best is not None:
            save_file(dict(best), part / _BEST_FILE)
        content = {"format_version": _FORMAT_VERSION, **dataclasses.asdict(state)}
        (part / _RUN_FILE).write_text(json.dumps(content, indent=1), "utf-8")
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
            on_main(accelerator, begin)
            everywhere(accelerator, lambda: accelerator.save_state(str(part)))
            on_main(accelerator, end)
        except BaseException:
            if accelerator.is_main_process:
                shutil.rmtree(part, ignore_errors=True)
            raise


def restore(
    accelerator: Accelerator, folder: Path, config: Mapping[str, Any]
) -> tuple[RunState, dict[str, Tensor] | None]:
    """Load the latest checkpoint into what ``accelerator`` prepared.

    Returns:
        The run's state, and the best projection so far by validation.

    Raises:
        CheckpointError: there is none, it is damaged, or it belongs to a run with other settings.
    """
    state = read_run(folder)
    faults = differences(state.config, config)
    if faults:
        raise CheckpointError(
            f"{folder} holds another run: {'; '.join(faults)}. Resume it with the settings it "
            "began with, or begin again with --overwrite"
        )
    checkpoint = latest(folder)
    if checkpoint is None:
        raise CheckpointError(f"{folder} holds no checkpoint to resume from")
    try:
        with _whole_model(accelerator):
            accelerator.load_state(str(checkpoint))
        best = load_file(checkpoint / _BEST_FILE) if state.best else None
    except Exception as error:  # PyTorch and safetensors raise many kinds on damaged files
        raise _damaged(checkpoint, error) from error
    return state, best


@contextlib.contextmanager
def _whole_model(accelerator: Accelerator) -> Iterator[None]:
    """Save and load models without their data-parallel wrappers: the processes may be others."""

    def unwrapped(models: list[Any], weights: list[Any], folder: str) -> None:
        weights[:] = [accelerator.unwrap_model(model).state_dict() for model in models]

    def unwrap(models: list[Any], folder: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    hooks = [
        accelerator.register_save_state_pre_hook(unwrapped),
        accelerator.register_load_state_pre_hook(unwrap),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _damaged(checkpoint: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint} is damaged or not a checkpoint ({type(error).__name__}); "
        "--overwrite begins the run again"
    )


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name what differs between two configs, nested ones by their path."""
    faults: list[str] = []
    for name in sorted(saved.keys() | now.keys()):
        before, after = saved.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            faults += [f"{name}.{fault}" for fault in differences(before, after)]
        elif before != after:
            faults.append(f"{name} was {before!r}, is {after!r}")
    return faults


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left of a checkpoint that it was writing."""
    for part in (folder / CHECKPOINTS).glob(".step_*"):
        shutil.rmtree(part, ignore_errors=True)


def room_for_run(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Raise :class:`DiskFullError` where a block runs out of space below a run's folder."""
    return disk_full(
        f"no space left to write into {folder}; the last checkpoint there is complete. Free some "
        f"space, then continue with --resume {folder}"
    )


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that holds something, unless the caller said what to do with it.

    Raises:
        TrainingError: it holds a run that did a step, or a projection, and neither ``resume`` nor
            ``overwrite`` was asked for; or both were; or it is a file.
    """
    if resume and overwrite:
        raise TrainingError("--resume continues a run and --overwrite removes it: give one")
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is a file; the output is a folder")
    if resume or overwrite:
        return
    resumable = _did_a_step(folder)
    if resumable or (folder / WEIGHTS_FILE).exists():
        held = "checkpoint" if resumable else WEIGHTS_FILE
        remedy = f"continue with --resume {folder}, or " if resumable else ""
        raise TrainingError(
            f"{folder} already holds a {held}: {remedy}begin again with --overwrite, which "
            "removes it"
        )


def _did_a_step(folder: Path) -> bool:
    """Tell whether ``folder`` holds a run that did a step; without one there is nothing to lose."""
    try:
        return read_run(folder).step > 0
    except CheckpointError:  # none, or of another version: not ours to throw away
        return latest(folder) is not None or (folder / _OLD_CHECKPOINT).exists()


@contextlib.contextmanager
def claimed_folder(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Make the output folder ready for a run, and keep others out of it while the block runs.

    Raises:
        TrainingError: as :func:`check_folder`, or another process is writing into it.
    """
    check_folder(folder, resume=resume, overwrite=overwrite)
    with room_for_run(folder):
        folder.mkdir(parents=True, exist_ok=True)
    refusal = f"another run is writing into {folder}: wait until it ends, or use another folder"
    with exclusive(folder, refusal=TrainingError(refusal)):
        # A run that ended since the first look left something.
        check_folder(folder, resume=resume, overwrite=overwrite)
        if overwrite:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            for name in (_OLD_CHECKPOINT, METRICS_FILE, CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
                (folder / name).unlink(missing_ok=True)
        remove_unfinished(folder)
        yield


def write_result(folder: Path, projection: Projection) -> None:
    """Write the projection, its config and its card, each completely or not at all.

    Raises:
        DiskFullError: no space left.
    """
    with room_for_run(folder):
        projection.save(folder)
        with atomic_path(folder / CARD_FILE) as path:
            path.write_text(model_card(projection.config), encoding="utf-8")


def shown_command(words: Sequence[str]) -> list[str]:
    """Return the words of a command line without where things lie on somebody's machine."""
    return [Path(word).name if Path(word).expanduser().is_absolute() else word for word in words]
