"""Files that are complete or absent, and folders with one writer at a time."""

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

_WAIT = 0.2  # seconds, for a process that is just leaving
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``final`` and rename it into place when the block succeeds.

    Whatever ends the block early (an error, Ctrl-C, a full disk) removes the temporary file and
    leaves an earlier file of that name untouched. The suffix is kept, because writers read it.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.stem}.{secrets.token_hex(8)}.part{final.suffix}")
    # Created here rather than by tempfile, whose files are private: the kernel applies the umask.
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
    """Keep other processes out of ``folder`` while the block runs; raise ``refusal`` if one is in.

    The lock belongs to the operating system and ends with the process, however that ends. File
    systems without locks go without.
    """
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
        # Removed before it is released, so that nobody takes a lock on a file about to go; on
        # Windows an open file stays, and the release removes it.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
