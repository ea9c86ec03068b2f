"""Reasons why a run ends early: errors, changed settings, a full disk, Ctrl-C."""

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

# How the writers of PyTorch and safetensors report a full disk.
_FULL = ("PytorchStreamWriter", "unexpected pos", "No space left", "os error 28")
_REPEAT_SECONDS = 1.0  # launchers repeat Ctrl-C; a later one comes from the user


class TrainingError(CosettleError, ValueError):
    """Training cannot start or continue."""


class NonFiniteLossError(TrainingError):
    """A loss or gradient is not finite; the weights are unchanged."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be read or belongs to a different run."""


class WorkerEndedError(TrainingError):
    """A worker process died: a video crashed its decoder, or memory ran out."""


class DiskFullError(CosettleError, OSError):
    """A file could not be written for lack of space; existing files are intact."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; progress is saved, and the message says how to continue."""


@contextlib.contextmanager
def disk_full(message: str) -> Iterator[None]:
    """Raise :class:`DiskFullError` with ``message`` if the block runs out of disk space."""
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
    """Describe the differences between two mappings of plain values; ``""`` if they are equal."""
    changes: list[str] = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            nested = differences(old, new)
            changes += [f"{name}.{change}" for change in nested.split("; ") if change]
        elif old != new:
            changes.append(f"{name} was {old!r}, is {new!r}")
    return "; ".join(changes)


def keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Record a folder's settings in a file, or refuse a folder with different settings."""
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
    """Catch SIGINT and SIGTERM, except a second Ctrl-C; yields a function: was one received?"""
    first: list[float] = []

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        if not first:
            first.append(time.monotonic())
            logger.warning("finishing this step, then saving; press Ctrl-C again to stop at once")
        elif number == signal.SIGINT and time.monotonic() - first[0] > _REPEAT_SECONDS:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    kinds = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {kind: signal.signal(kind, receive) for kind in kinds}
    try:
        yield lambda: bool(first)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler or signal.SIG_DFL)
