"""The checkpoint of a run: one file, whole or not there, that continues it bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosettle_adapter.files import atomic_path
from cosettle_adapter.training.errors import CheckpointError, DiskFullError

CHECKPOINT_FILE = "checkpoint.pt"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A run between two steps; plain data and CPU tensors, read without running anything.

    Attributes:
        step: steps done.
        steps: steps of the whole run.
        projection: the head's tensors.
        optimizer: AdamW's state.
        scheduler: the learning rate's state.
        rng: state of the random generators of every process, in order of rank.
        config: what decides the result, and must be the same to go on: settings, backbone, data.
        best: the best projection so far by validation: ``{"step", "figures", "projection"}``.
        figures: validation figures: of the backbone's own tokens, the first and the last head.
        skipped: videos that could not be read so far, and why.
        command: words of the command line that began the run.
        scaler: always ``None``: no gradient passes through half precision.
        format_version: version of this format.
    """

    step: int
    steps: int
    projection: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    rng: list[dict[str, Any]]
    config: dict[str, Any]
    best: dict[str, Any] | None = None
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    command: list[str] = dataclasses.field(default_factory=list)
    scaler: None = None
    format_version: int = FORMAT_VERSION

    def save(self, folder: Path) -> None:
        """Write ``checkpoint.pt`` atomically.

        Raises:
            DiskFullError: no space left; the checkpoint that was there is still whole.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # Through memory: PyTorch's own writer reports a full disk as an internal failure.
        buffer = io.BytesIO()
        torch.save(_on_cpu(fields), buffer)
        with disk_full_in_a_sentence(folder), atomic_path(folder / CHECKPOINT_FILE) as path:
            path.write_bytes(buffer.getbuffer())

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Read the checkpoint of a run.

        Raises:
            CheckpointError: there is none, or it is not one that this version reads.
        """
        file = folder / CHECKPOINT_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{folder} holds no {CHECKPOINT_FILE}, so there is no run to resume; "
                "leave --resume away to begin one"
            )
        try:
            # One read: the archive reader sometimes reports a truncated file as missing.
            state = torch.load(io.BytesIO(file.read_bytes()), map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{file} is truncated or not a checkpoint ({type(error).__name__}); "
                "--overwrite begins the run again"
            ) from error
        version = state.get("format_version") if isinstance(state, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{file} has format_version {version!r}, and this version of cosettle-adapter "
                f"reads {FORMAT_VERSION}"
            )
        return cls(**state)


def has_checkpoint(folder: Path) -> bool:
    """Tell whether ``folder`` holds a run that did a step; without one there is nothing to lose."""
    if not (folder / CHECKPOINT_FILE).is_file():
        return False
    try:
        return Checkpoint.load(folder).step > 0
    except CheckpointError:  # of another version, say: not ours to throw away
        return True


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left of a checkpoint that it was writing."""
    stem, suffix = CHECKPOINT_FILE.split(".")
    for path in folder.glob(f".{stem}.*.part.{suffix}"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_full_in_a_sentence(folder: Path) -> Iterator[None]:
    """Raise :class:`DiskFullError` where a block runs out of space below ``folder``."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"no space left to write into {folder}; the last checkpoint there is whole. Free some "
            f"space, then go on with --resume {folder}"
        ) from error


def random_state() -> dict[str, Any]:
    """Return the state of this process's random generators."""
    version, internal, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": [version, internal, gauss]}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put this process's random generators into a saved state."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


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


def _on_cpu(value: Any) -> Any:
    """Copy nested containers with their tensors on the CPU, each with its own small storage."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value
