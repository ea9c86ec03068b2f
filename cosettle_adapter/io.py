"""Atomic file writes and exclusive folder locks."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".lock"

_WAIT = 0.2  # seconds, for a process that is about to release its lock
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to ``final`` on success and remove it on failure."""
    final.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept, because some writers take the format from it.
    temporary = final.with_name(f".{final.stem}.{secrets.token_hex(8)}.part{final.suffix}")
    # Not by tempfile, which creates private files; here the kernel applies the umask.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        with temporary.open("r+b") as written:
            os.fsync(written.fileno())
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(folder: Path, *, refusal: Exception) -> Iterator[None]:
    """Lock ``folder`` while the block runs; raise ``refusal`` if another process holds the lock."""
    path = folder / LOCK_FILE
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_WAIT)
    except Timeout as error:
        raise refusal from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.debug("no lock in %s: %s", folder, error)
    try:
        yield
    finally:
        # Removed before the release, so that no process locks a file that is about to be deleted.
        # Windows cannot remove an open file; there the release removes it.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
