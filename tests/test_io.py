from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import filelock
import pytest

from cosettle_adapter.io import LOCK_FILE, atomic_path, exclusive


class BusyError(Exception):
    pass


BUSY = BusyError("busy")


def test_a_finished_file_replaces_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "new" / "file.txt"
    before = os.umask(0o027)
    try:
        for text in ("one", "two"):
            with atomic_path(final) as path:
                assert (path.suffix, path.parent) == (".txt", final.parent)
                path.write_text(text)
    finally:
        os.umask(before)
    assert final.read_text() == "two"
    if os.name == "posix":
        assert stat.S_IMODE(final.stat().st_mode) == 0o640, "as the umask says"
    assert [path.name for path in final.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, error: BaseException) -> None:
    final = tmp_path / "file.txt"
    final.write_text("old")

    def write() -> None:
        with atomic_path(final) as path:
            path.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert final.read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_one_process_at_a_time_and_no_lock_file_is_left(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()  # of a process that was killed
    for _ in range(2):
        with exclusive(tmp_path, refusal=BUSY):
            with pytest.raises(BusyError, match="busy"), exclusive(tmp_path, refusal=BUSY):
                pass
            assert (tmp_path / LOCK_FILE).exists(), "the second did not remove the first one's lock"
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("code", "refused"), [(errno.ENOLCK, False), (errno.EIO, True)])
def test_a_file_system_without_locks_goes_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, refused: bool
) -> None:
    def unsupported(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock.FileLock, "acquire", unsupported)
    if refused:
        with pytest.raises(OSError, match=os.strerror(code)), exclusive(tmp_path, refusal=BUSY):
            pass
        return
    with exclusive(tmp_path, refusal=BUSY), exclusive(tmp_path, refusal=BUSY):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.skipif(filelock.__version__ < "4", reason="this filelock keeps locks over a fork")
def test_a_worker_does_not_keep_the_lock_of_a_killed_run(tmp_path: Path) -> None:
    """The run holds the lock, forks a worker and is killed; the worker lives on."""
    read, write = os.pipe()
    run = os.fork()
    if not run:
        with exclusive(tmp_path, refusal=BUSY):
            worker = os.fork()
            if worker:
                os.write(write, b"%d" % worker)
                os._exit(0)
            time.sleep(60)
            os._exit(0)
    os.waitpid(run, 0)
    worker = int(os.read(read, 20))
    try:
        with exclusive(tmp_path, refusal=BUSY):
            pass
    finally:
        os.kill(worker, 9)
        os.close(read)
        os.close(write)
