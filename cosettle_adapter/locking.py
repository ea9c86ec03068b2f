"""One writer at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = ".lock"

logger = logging.getLogger(__name__)

_HELD: set[int] = set()


@contextlib.contextmanager
def exclusive(folder: Path, *, refusal: Exception) -> Iterator[None]:
    """Keep other processes out of ``folder`` while the block runs.

    The lock is the system's: it ends with the process, however that ends, and the file is removed
    by whoever held it last. Windows and disks without locks go without.

    Args:
        folder: existing folder.
        refusal: what to raise where another process is in.

    Raises:
        Exception: ``refusal``, where another process is in.
    """
    if sys.platform == "win32":
        yield
        return
    handle = _acquire(folder / LOCK_FILE, refusal)
    _HELD.add(handle)
    try:
        yield
    finally:
        # Removed before it is given up, so that nobody takes a lock on a file that is going.
        (folder / LOCK_FILE).unlink(missing_ok=True)
        _HELD.discard(handle)
        os.close(handle)


def _acquire(path: Path, refusal: Exception) -> int:
    import fcntl  # Windows has none

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(handle)
                raise refusal from error
            logger.debug("no lock in %s: %s", path.parent, error)
            return handle
        # Its last holder may have removed the file since it was opened.
        if _is_file(path, handle):
            return handle
        os.close(handle)


def _is_file(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """Close what a forked worker inherits: it would hold the lock after this process died."""
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
