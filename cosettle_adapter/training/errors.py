"""Errors of training."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from safetensors import SafetensorError

from cosettle_adapter.errors import CosettleError

# PyTorch's and safetensors' own writers report a full disk in their own ways
_FULL = ("PytorchStreamWriter", "unexpected pos", "No space left", "os error 28")


class TrainingError(CosettleError, ValueError):
    """Training that cannot begin, or cannot continue."""


class NonFiniteLossError(TrainingError):
    """A loss or gradient that is not finite; the weights were not changed by it."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be read, or belongs to another run."""


class DiskFullError(CosettleError, OSError):
    """A file that could not be written for lack of space; what was there before is complete."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; what was done is saved, and the message says how to continue."""


@contextlib.contextmanager
def disk_full(message: str) -> Iterator[None]:
    """Raise :class:`DiskFullError` with ``message`` where a block runs out of disk space."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        else:
            full = any(sign in str(error) for sign in _FULL)
        if not full:
            raise
        raise DiskFullError(message) from error
