"""An output under construction: features, journal and sidecar in a folder beside it."""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosettle_adapter.extraction.errors import ExtractionError, OutputBusyError
from cosettle_adapter.extraction.formats.base import Format, Layout, Store
from cosettle_adapter.extraction.formats.flat import as_bytes
from cosettle_adapter.extraction.journal import Entry, Journal, Notes
from cosettle_adapter.extraction.sidecar import sidecar_path, sidecar_text
from cosettle_adapter.locking import LOCK_FILE, exclusive

_FEATURES, _SIDECAR, _JOURNAL, _REPLACED = "features", "sidecar.json", "journal", "replaced"


class Work:
    """What exists of an output before it is whole.

    Everything lies in ``.NAME.partial`` beside the output. The features come under the output's
    name in one step, when they are whole, and their sidecar right after; a run that is killed
    between the two does the second when it is started again.

    Attributes:
        frames: number of frames written.
        kept: whether the folder outlives a failure.
    """

    def __init__(self, output: Path, row: Format) -> None:
        """Name the output; nothing is touched."""
        self._output, self._row = output, row
        self.folder = output.with_name(f".{output.name}.partial")
        self._journal = Journal(self.folder / _JOURNAL)
        self._layout: Layout | None = None
        self._store: Store | None = None
        self._timestamps: list[float] = []
        self.kept = True

    @property
    def frames(self) -> int:
        """Number of frames written."""
        return len(self._timestamps)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` of one frame."""
        if self._layout is None:
            raise ExtractionError(f"nothing was written to {self._output}")
        return self._layout.shape

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other runs from this output while the block runs.

        Raises:
            OutputBusyError: another run is writing it.
        """
        refusal = OutputBusyError(
            f"another run is writing {self._output}: wait until it ends, or use another name"
        )
        with contextlib.ExitStack() as stack:
            stack.callback(self._leave)  # once the lock is given up
            while True:
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(exclusive(self.folder, refusal=refusal))
                    break
                except FileNotFoundError:
                    continue  # who had it has just finished and removed the folder
            try:
                yield
            finally:
                self.close()
                if not self.kept or self._is_empty():
                    self.discard()

    def started(self) -> Mapping[str, Any] | None:
        """Return the record of the run that left something here, if one did."""
        notes = self._journal.read()
        return None if notes is None else notes.layout.metadata

    def discard(self) -> None:
        """Remove everything that is here but the lock."""
        for entry in self.folder.iterdir():
            if entry.name != LOCK_FILE:
                _remove(entry)

    def go_on(self) -> None:
        """Take up what an earlier run left, up to its last batch that is whole and undamaged."""
        notes = self._journal.read()
        if notes is None or not (self.folder / _FEATURES).exists():
            self.discard()
            return
        self._layout = notes.layout
        self._store = self._row.open(self.folder / _FEATURES, notes.layout)
        whole: list[Entry] = []
        for entry in notes.entries:
            stop = self.frames + len(entry.timestamps)
            if not self._holds(entry, self.frames, stop):
                break
            whole.append(entry)
            self._timestamps += entry.timestamps
        self._store.keep(self.frames)
        self._journal.begin(Notes(notes.layout, whole))

    def begin(self, layout: Layout) -> None:
        """Say what the features are like, before the first batch or on going on.

        Raises:
            ExtractionError: they are not like those already there.
        """
        if self._store is None:
            self._layout = layout
            self._store = self._row.open(self.folder / _FEATURES, layout)
            self._journal.begin(Notes(layout, []))
        elif self._layout is None or (layout.shape, layout.dtype) != (
            self._layout.shape,
            self._layout.dtype,
        ):
            raise ExtractionError(
                f"the started run of {self._output} has other features, "
                f"{self.shape} in place of {layout.shape}; begin anew with --overwrite "
                "(overwrite=True)"
            )

    def append(self, features: Tensor, timestamps: Tensor) -> None:
        """Write ``(N, C, h, w)`` features in the layout's dtype, on the CPU, and note them."""
        if self._store is None:
            raise ExtractionError("append comes after begin")
        features = features.contiguous()
        entry = Entry(zlib.crc32(as_bytes(features)), timestamps.tolist())
        with self._errors_named():
            self._store.append(features)
            self._store.flush()
            self._journal.append(entry)
        self._timestamps += entry.timestamps

    def finish(self, *, truncated: str | None) -> None:
        """Make the output whole and give it its name."""
        if self._store is None or self._layout is None:
            raise ExtractionError("finish comes after begin")
        text = sidecar_text(self._layout, self._timestamps, truncated=truncated)
        unfinished = self.folder / f"{_SIDECAR}.new"
        with self._errors_named():
            self._store.finish(torch.tensor(self._timestamps, dtype=torch.float64))
            self.close()
            unfinished.write_text(text)
            _sync(self.folder)
        unfinished.replace(self.folder / _SIDECAR)
        self.publish()

    def publish(self) -> bool:
        """Give finished work its name, or finish doing so; tell whether there was any."""
        features, sidecar = self.folder / _FEATURES, self.folder / _SIDECAR
        if not sidecar.exists():
            return False
        if features.exists():
            if self._output.is_dir():  # a folder takes no other one's place by itself
                self._output.replace(self.folder / _REPLACED)
            sidecar_path(self._output).unlink(missing_ok=True)
            features.replace(self._output)
        sidecar.replace(sidecar_path(self._output))
        self.kept = False
        return True

    def close(self) -> None:
        """Release what is open."""
        if self._store is not None:
            self._store.close()

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Have an error of the disk say which output it is about."""
        try:
            yield
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(self._output)) from error

    def _leave(self) -> None:
        with contextlib.suppress(OSError):  # there is work in it, or another run
            self.folder.rmdir()

    def _is_empty(self) -> bool:
        # what was not taken up may be another run's, which was refused and not asked to go
        taken_up = self._store is not None
        return not self.frames if taken_up else self._journal.read() is None

    def _holds(self, entry: Entry, start: int, stop: int) -> bool:
        if self._store is None:
            return False
        try:
            features = self._store.read(start, stop)
        except (OSError, ValueError):
            return False
        return zlib.crc32(as_bytes(features)) == entry.checksum


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(folder: Path) -> None:
    """Have everything in a folder on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
