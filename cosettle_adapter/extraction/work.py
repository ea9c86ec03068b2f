"""An output under construction, in a folder beside it that survives interruptions."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from cosettle_adapter.extraction.errors import ExtractionError, OutputBusyError
from cosettle_adapter.extraction.record import RunRecord, sidecar_path
from cosettle_adapter.extraction.stores import Store, as_bytes

_WINDOWS = os.name == "nt"

logger = logging.getLogger(__name__)


class Work:
    """The unfinished features, their journal and, at the end, their sidecar.

    All lie in ``.NAME.partial`` beside the output. The features get the output's name in one step,
    once they are whole, and the sidecar right after; a run that is killed in between is completed
    by the next one.

    Attributes:
        folder: where it lies.
        record: of what is written; ``None`` before the first batch.
        kept: whether the folder is kept after a failure.
    """

    def __init__(self, output: Path, form: type[Store]) -> None:
        """Name the output and its format; nothing is touched."""
        self.folder = output.with_name(f".{output.name}.partial")
        self.record: RunRecord | None = None
        self.kept = True
        self._output, self._form = output, form
        self._features, self._sidecar, self._journal, self._lock = (
            self.folder / name for name in ("features", "sidecar.json", "journal", ".lock")
        )
        self._store: Store | None = None

    @property
    def frames(self) -> int:
        """Number of frames written."""
        return 0 if self.record is None else len(self.record.timestamps)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other runs from this output while the block runs.

        Raises:
            OutputBusyError: another run is writing it.
        """
        lock = self._acquire()
        try:
            yield
        finally:
            self._close()
            # what was not resumed may be the work of another run, with other settings
            empty = self._store is not None and not self.frames
            if not self.kept or empty or not self._journal.exists():
                self.discard()
            if not _WINDOWS:  # where an open file cannot be removed, and filelock removes it
                self._lock.unlink(missing_ok=True)  # now, so that nobody locks a removed file
            lock.release()
            with contextlib.suppress(OSError):  # not empty, or locked by another run already
                self.folder.rmdir()

    def _acquire(self) -> FileLock:
        lock = FileLock(self._lock)
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise OutputBusyError(
                    f"another run is writing {self._output}: wait until it ends, or use another "
                    "name"
                ) from None
            except FileNotFoundError:
                continue  # the run that held it has just finished and removed the folder
            except (OSError, NotImplementedError) as error:
                logger.debug("no locks in %s: %s", self.folder, error)
                return lock
            if self._lock.exists():
                return lock
            lock.release()

    def started(self) -> Mapping[str, Any] | None:
        """Return what the run was asked for that left something here, if one did."""
        record = RunRecord.read_journal(self._journal)
        return None if record is None else record.asked

    def discard(self) -> None:
        """Remove everything but the lock."""
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry != self._lock:
                entry.unlink()

    def resume(self) -> None:
        """Continue what an earlier run left, after its last whole and undamaged batch."""
        record = RunRecord.read_journal(self._journal)
        if record is None or not self._features.exists():
            self.discard()
            return
        store = self._form(self._features, record)
        frames = whole = 0
        for checksum, timestamps in record.batches:
            try:
                features = store.read_back(frames, frames + len(timestamps))
            except (OSError, ValueError):
                break
            if zlib.crc32(as_bytes(features)) != checksum:
                break
            frames += len(timestamps)
            whole += 1
        store.keep(frames)
        del record.batches[whole:]
        record.write_journal(self._journal)
        self.record, self._store = record, store

    def append(self, record: RunRecord, features: Tensor, timestamps: Tensor) -> None:
        """Write ``(N, C, h, w)`` features on the CPU; ``record`` is used for the first batch."""
        features = features.contiguous()
        with self._naming_errors():
            if self.record is None or self._store is None:
                self.record, self._store = record, self._form(self._features, record)
                record.write_journal(self._journal)
            self._store.append(features)
            checksum = zlib.crc32(as_bytes(features))
            self.record.add_batch(self._journal, checksum, timestamps.tolist())

    def finish(self, *, truncated: str | None) -> RunRecord:
        """Make the output whole, give it its name, and return its record."""
        if self.record is None or self._store is None:
            raise ExtractionError(f"{self.folder} cannot be finished: no features were added")
        unfinished = self.folder / "sidecar.new"
        with self._naming_errors():
            self._store.finish(torch.tensor(self.record.timestamps, dtype=torch.float64))
            self._close()
            unfinished.write_text(self.record.sidecar(truncated=truncated))
            for path in self.folder.rglob("*"):
                if path.is_file() and path != self._lock:
                    with path.open("rb+") as file:
                        os.fsync(file.fileno())
        unfinished.replace(self._sidecar)
        self.publish()
        return self.record

    def publish(self) -> bool:
        """Give finished work its name, or complete that; tell whether there was any."""
        if not self._sidecar.exists():
            return False
        if self._features.exists():
            if self._output.is_dir():  # a folder does not replace another one by itself
                self._output.replace(self.folder / "replaced")
            sidecar_path(self._output).unlink(missing_ok=True)
            self._features.replace(self._output)
        self._sidecar.replace(sidecar_path(self._output))
        self.kept = False
        return True

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """Add the output's name to errors of the disk that name no file."""
        try:
            yield
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(self._output)) from error
