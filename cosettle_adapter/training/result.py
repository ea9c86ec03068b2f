"""The folder a run leaves: a projection that ``from_pretrained`` loads, and how it came about."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cosettle_adapter.cards import model_card
from cosettle_adapter.files import atomic_path
from cosettle_adapter.locking import exclusive
from cosettle_adapter.projection import CONFIG_FILE, WEIGHTS_FILE, Projection
from cosettle_adapter.training.checkpoint import (
    CHECKPOINT_FILE,
    disk_full_in_a_sentence,
    has_checkpoint,
    remove_unfinished,
)
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.metrics_log import METRICS_FILE, read_metrics

CARD_FILE = "README.md"
_FILES = (CHECKPOINT_FILE, METRICS_FILE, CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
_MEASURED = ("loss", "cycle", "kl", "accuracy")
_SKIPPED_NAMED = 20


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder with something in it that nobody said what to do with.

    Raises:
        TrainingError: it holds a run that did a step, or a projection, and neither ``resume`` nor
            ``overwrite`` was asked for; or both were; or it is a file.
    """
    if resume and overwrite:
        raise TrainingError("--resume goes on with a run and --overwrite removes it: give one")
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is a file; the output is a folder")
    if resume or overwrite:
        return
    resumable = has_checkpoint(folder)
    if resumable or (folder / WEIGHTS_FILE).exists():
        held = CHECKPOINT_FILE if resumable else WEIGHTS_FILE
        way_on = f"go on with --resume {folder}, or " if resumable else ""
        raise TrainingError(
            f"{folder} already holds a {held}: {way_on}begin anew with --overwrite, "
            "which removes it"
        )


@contextlib.contextmanager
def prepared_folder(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Make the output folder ready for a run, and keep others out of it while the block runs.

    Raises:
        TrainingError: as :func:`check_folder`, or another process is writing into it.
    """
    check_folder(folder, resume=resume, overwrite=overwrite)
    with disk_full_in_a_sentence(folder):
        folder.mkdir(parents=True, exist_ok=True)
    refusal = f"another run is writing into {folder}: wait until it ends, or use another folder"
    with exclusive(folder, refusal=TrainingError(refusal)):
        # A run that ended since the first look left something.
        check_folder(folder, resume=resume, overwrite=overwrite)
        for name in _FILES if overwrite else ():
            (folder / name).unlink(missing_ok=True)
        remove_unfinished(folder)
        yield


def write_result(folder: Path, projection: Projection) -> None:
    """Write the projection, its config and its card, each whole or not at all.

    Raises:
        DiskFullError: no space left.
    """
    with disk_full_in_a_sentence(folder):
        projection.save(folder)
        with atomic_path(folder / CARD_FILE) as path:
            path.write_text(model_card(projection.config), encoding="utf-8")


def last_epoch_means(folder: Path) -> dict[str, float]:
    """Return the means of what was logged over the last epoch of ``metrics.jsonl``."""
    lines = [line for line in read_metrics(folder) if "loss" in line]
    if not lines:
        return {}
    last = [line for line in lines if line["epoch"] == lines[-1]["epoch"]]
    return {name: round(sum(line[name] for line in last) / len(last), 4) for name in _MEASURED}


def skipped_record(skipped: Mapping[str, str]) -> dict[str, Any]:
    """Return how many videos could not be read, and the names of the first."""
    if not skipped:
        return {}
    names = sorted(Path(name).name for name in skipped)
    return {"skipped": len(names), "skipped_clips": names[:_SKIPPED_NAMED]}


def versions() -> dict[str, str]:
    """Return the versions of the packages that the weights depend on."""
    return {
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in ("timm", "accelerate")},
    }


def command_line(words: Sequence[str]) -> str:
    """Return a command line as text, without where things lie on somebody's machine."""
    shown = [Path(word).name if Path(word).expanduser().is_absolute() else word for word in words]
    return shlex.join(["cosettle-adapter", *shown]) if words else ""
