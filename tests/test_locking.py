from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

import pytest

from cosettle_adapter.locking import exclusive

fcntl = pytest.importorskip("fcntl", reason="no such locks here")


class BusyError(Exception):
    pass


BUSY = BusyError("busy")


def test_one_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    for _ in range(2):
        with exclusive(tmp_path, refusal=BUSY):
            with pytest.raises(BusyError, match="busy"), exclusive(tmp_path, refusal=BUSY):
                pass
            assert list(tmp_path.iterdir()), "the second did not remove the first one's lock"
        assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with exclusive(tmp_path, refusal=BUSY):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = fcntl.flock, []

    def last_holder_leaves(handle: int, how: int) -> None:
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(how)
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", last_holder_leaves)
    with exclusive(tmp_path, refusal=BUSY):
        assert len(calls) == 2
        with pytest.raises(BusyError), exclusive(tmp_path, refusal=BUSY):
            pass


def test_a_disk_without_locks_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with exclusive(tmp_path, refusal=BUSY), exclusive(tmp_path, refusal=BUSY):
        pass


def test_windows_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with exclusive(tmp_path, refusal=BUSY):
        assert not list(tmp_path.iterdir())


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
