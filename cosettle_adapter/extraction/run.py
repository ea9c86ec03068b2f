"""One source through an adapter into one feature file, at constant memory."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosettle_adapter.adapter import DEFAULT_BATCH_SIZE, CoSettleAdapter, FeatureChunk, Size
from cosettle_adapter.correspondence.fusion import WINDOW, FusionMode
from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.extraction.background import in_background
from cosettle_adapter.extraction.errors import OutputExistsError
from cosettle_adapter.extraction.finished import (
    ANEW,
    Extraction,
    check_recipe,
    find_finished,
    listed,
)
from cosettle_adapter.extraction.formats import Format, Layout, choose_format, storage_dtype
from cosettle_adapter.extraction.record import differences, make_record
from cosettle_adapter.extraction.settings import Settings
from cosettle_adapter.extraction.transfer import Transfer
from cosettle_adapter.extraction.work import Work
from cosettle_adapter.video.geometry import Fit

logger = logging.getLogger(__name__)


def extract(
    adapter: CoSettleAdapter,
    source: Any,
    destination: str | Path,
    *,
    format: str | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    size: Size | None = None,
    fit: Fit = "resize",
    start: float | None = None,
    end: float | None = None,
    every: int = 1,
    max_frames: int | None = None,
    fps: float | None = None,
    settle: bool | None = None,
    temporal_fusion: FusionMode | None = None,
    storage: torch.dtype | None = None,
    overwrite: bool = False,
    on_chunk: Callable[[int], None] = lambda frames: None,
) -> Extraction:
    """Write the features of a video of any length to a file, and a JSON sidecar beside it.

    Decoding runs ahead in a thread, writing behind in another. The file appears whole or not at
    all. Until then the work lies in ``.NAME.partial`` beside it; when a run is killed, the same
    call goes on behind its last whole batch, and the file is the same, byte for byte, as that of
    a run that was never broken. Frames that later ones depend on are encoded again: one or two
    batches for temporal fusion, all where features are settled. Those of arrays and iterators
    begin anew. What is finished already is left as it is. When the source breaks off, the features
    of its readable frames are kept and the result says so.

    Args:
        adapter: what computes the features.
        source: as in :meth:`CoSettleAdapter.stream`, like the options up to ``settle``.
        destination: the file to write.
        format: ``safetensors``, ``zarr``, ``npy-memmap`` or ``dino-tracker``; by default what the
            suffix of ``destination`` tells.
        batch_size: frames a forward pass.
        size: what frames are resized to.
        fit: what happens to sides that are not whole patches.
        start: first second to read.
        end: second to stop before.
        every: keep every n-th frame.
        max_frames: keep at most this many frames.
        fps: frames per second of sources without timestamps.
        settle: settle each frame by the statistics of those before it.
        temporal_fusion: ``"symmetric"`` or ``"causal"``.
        storage: dtype of the stored features; the adapter's by default.
        overwrite: replace what is there under that name once the new file is whole.
        on_chunk: called with the number of frames done so far after every batch.

    Raises:
        FrameError: not a single frame could be read, or frames cannot be used.
        FormatError: no such format, or it cannot store that dtype.
        OutputExistsError: there is another file of that name, or the started run of other
            settings, and ``overwrite`` is not given.
        OutputBusyError: another run is writing this file.
        ValueError: another ``temporal_fusion``.
        OSError: the file could not be written; an earlier one of that name is left as it was.
    """
    path = Path(destination)
    row = choose_format(path, format)
    settings = Settings(
        size=size, fit=fit, start=start, end=end, every=every, max_frames=max_frames, fps=fps,
        settle=settle, temporal_fusion=temporal_fusion, storage=storage, batch_size=batch_size,
    )  # fmt: skip
    settings = row.plan(adapter, settings)
    dtype = storage_dtype(row, settings.storage, adapter.dtype)
    record = make_record(adapter, source, settings, row.name, dtype)
    check_recipe(path, record)
    work = Work(path, row)
    if not overwrite:
        finished = None if work.folder.exists() else find_finished(path, record)
        if finished is not None:
            return finished
    with work.claimed():
        whole = _take_up(work, path, record, overwrite=overwrite)
        if whole or not overwrite:
            finished = find_finished(path, record)  # by now, though perhaps not a moment ago
            if finished is not None:
                return finished
        work.kept = _resumable(record)
        found = work.frames
        run = _Run(adapter, row, dtype, record, work)
        truncated = run.encode(source, settings, on_chunk)
        work.finish(truncated=truncated)
        return Extraction(path, work.frames, work.shape, truncated, found)


def _take_up(work: Work, path: Path, record: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Go on with what an earlier run left, or clear it away; tell whether that made it whole."""
    started = work.started()
    differing = [] if started is None else differences(started, record)
    if not _resumable(record) or (differing and overwrite):
        work.discard()
        return False
    if differing:
        raise OutputExistsError(
            f"a started run of {path} was asked for otherwise: {listed(differing)}; ask for the "
            f"same to go on with it, or {ANEW}"
        )
    if work.publish():
        return True
    work.go_on()
    if work.frames:
        logger.info("going on with %s after %d frames", path, work.frames)
    return False


def _resumable(record: Mapping[str, Any]) -> bool:
    return record["source_identity"] is not None


@dataclasses.dataclass(frozen=True)
class _Run:
    """The part of a run that computes."""

    adapter: CoSettleAdapter
    row: Format
    dtype: torch.dtype
    record: Mapping[str, Any]
    work: Work

    def encode(
        self, source: Any, settings: Settings, on_chunk: Callable[[int], None]
    ) -> str | None:
        """Write all frames that are not there yet; return why the source ended early, if so."""
        truncated: str | None = None
        done = self.work.frames
        skip = self._independent(done, settings)
        chunks = self.adapter.stream(source, skip=skip, **settings.stream_options())
        try:
            with (
                contextlib.closing(chunks),  # type: ignore[type-var]
                in_background(self._write) as write,
            ):
                try:
                    for chunk in chunks:
                        if chunk.start < done:
                            continue  # encoded for those behind it alone
                        write(self._started(chunk, settings.batch_size))
                        done += len(chunk.timestamps)
                        on_chunk(done)
                except TruncatedVideoError as error:
                    if not done:
                        raise
                    truncated = str(error)
        except FrameError:
            self.work.kept = False  # the source is at fault, so there is nothing to go on with
            raise
        except BaseException:
            if self.work.kept and self.work.frames:
                logger.warning(
                    "%d frames are kept in %s: the same call goes on from there",
                    self.work.frames,
                    self.work.folder,
                )
            raise
        return truncated

    def _independent(self, done: int, settings: Settings) -> int:
        """How many of the frames that are written can be passed over: batches, all of them whole.

        Those behind depend on none of them.
        """
        if self.record["settings"]["settle"]:
            return 0
        if settings.temporal_fusion is None:
            return done
        return max(0, done - WINDOW) // settings.batch_size * settings.batch_size

    def _started(self, chunk: FeatureChunk, batch_size: int) -> _Batch:
        features, geometry = self.row.arrange(chunk.features, chunk.geometry)
        _, channels, height, width = features.shape
        layout = Layout((channels, height, width), self.dtype, batch_size, geometry, self.record)
        return _Batch(layout, Transfer.start(features, self.dtype), chunk.timestamps)

    def _write(self, batch: _Batch) -> None:
        self.work.begin(batch.layout)
        self.work.append(batch.features.wait(), batch.timestamps)


@dataclasses.dataclass(frozen=True, eq=False)
class _Batch:
    """A batch on its way to the writer."""

    layout: Layout
    features: Transfer
    timestamps: Tensor
