"""What ends a run early: errors, other settings than before, a full disk, Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError

from cosettle_adapter.errors import CosettleError
from cosettle_adapter.io import atomic_path

logger = logging.getLogger(__name__)

# PyTorch's and safetensors' own writers report a full disk in their own ways
_FULL = ("PytorchStreamWriter", "unexpected pos", "No space left", "os error 28")
_IMPATIENT_AFTER = 1.0  # seconds after which another Ctrl-C is meant; launchers repeat the first


class TrainingError(CosettleError, ValueError):
    """Training that cannot begin or continue."""


class NonFiniteLossError(TrainingError):
    """A loss or gradient that is not finite; the weights were not changed by it."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be read, or belongs to another run."""


class WorkerEndedError(TrainingError):
    """A process that decodes videos ended: one crashed its decoder, or memory ran out."""


class DiskFullError(CosettleError, OSError):
    """A file that could not be written for lack of space; what was there before is complete."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; what was done is saved, and the message says how to continue."""


@contextlib.contextmanager
def disk_full(message: str) -> Iterator[None]:
    """Raise :class:`DiskFullError` with ``message`` where a block runs out of disk space."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(message) from error
    except (RuntimeError, SafetensorError) as error:
        if not any(sign in str(error) for sign in _FULL):
            raise
        raise DiskFullError(message) from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name what differs between two sets of plain values, nested ones by their path."""
    faults: list[str] = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            nested = differences(old, new)
            faults += [f"{name}.{fault}" for fault in nested.split("; ") if fault]
        elif old != new:
            faults.append(f"{name} was {old!r}, is {new!r}")
    return "; ".join(faults)


def keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write what a folder is made with into it, and refuse a folder made with something else."""
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1), "utf-8")
        return
    remedy = f"use another folder, or delete {path.parent}"
    try:
        differing = differences(json.loads(path.read_text("utf-8")), settings)
    except (OSError, ValueError, AttributeError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); {remedy}") from error
    if differing:
        raise TrainingError(f"{path.parent} was made with other settings: {differing}; {remedy}")


@contextlib.contextmanager
def stop_request() -> Iterator[Callable[[], bool]]:
    """Catch SIGINT and SIGTERM, but a second Ctrl-C; yields what tells whether one came."""
    first: list[float] = []

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        if not first:
            first.append(time.monotonic())
            logger.warning("finishing this step, then saving; Ctrl-C again stops at once")
        elif number == signal.SIGINT and time.monotonic() - first[0] > _IMPATIENT_AFTER:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    kinds = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {kind: signal.signal(kind, receive) for kind in kinds}
    try:
        yield lambda: bool(first)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler or signal.SIG_DFL)
