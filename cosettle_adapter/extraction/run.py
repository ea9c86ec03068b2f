"""One source, or many, through an adapter into feature files, at constant memory."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.correspondence.fusion import WINDOW
from cosettle_adapter.errors import (
    CosettleError,
    FrameError,
    MissingExtraError,
    TruncatedVideoError,
)
from cosettle_adapter.extraction import dino_tracker
from cosettle_adapter.extraction.formats import Format, choose_format, storage_dtype
from cosettle_adapter.extraction.record import (
    REDO,
    RunRecord,
    describe_run,
    differences,
    read_sidecar,
    sidecar_path,
)
from cosettle_adapter.extraction.settings import ExtractSettings, FormatError, OutputExistsError
from cosettle_adapter.extraction.sources import Source, output_names
from cosettle_adapter.video import FrameSelection
from cosettle_adapter.video.selection import selects_frames

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What :func:`extract` wrote."""

    path: Path  # its sidecar lies beside it, as PATH.json
    frames: int
    shape: tuple[int, ...]  # (C, h, w) of one frame's features
    truncated: str | None = None  # why the source ended early
    found: int = 0  # frames that an earlier run had written


@dataclasses.dataclass(frozen=True)
class Job:
    """One source and where its features go."""

    source: str
    output: Path


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a job: an extraction, or why it failed."""

    job: Job
    extraction: Extraction | None = None
    error: str | None = None
    transient: bool = False  # neither source nor settings are at fault, so try again

    @property
    def skipped(self) -> bool:
        """Whether it was finished before."""
        return self.extraction is not None and self.extraction.found == self.extraction.frames


@selects_frames
def extract(
    adapter: CoSettleAdapter,
    source: Any,
    destination: str | Path,
    settings: ExtractSettings | None = None,
    *,
    select: FrameSelection | None = None,
    overwrite: bool = False,
    on_chunk: Callable[[int], None] = lambda frames: None,
    **options: Any,
) -> Extraction:
    """Write the features of a video of any length to a file, and a JSON sidecar beside it.

    The file appears whole or not at all. When a run is interrupted or killed, the same call resumes
    it after its last whole batch, and the file is byte-identical to that of an uninterrupted run;
    arrays and iterators start over. What is finished already is left as it is. When a video breaks
    off, the features of its readable frames are kept and the result says so.

    Args:
        adapter: what computes the features.
        source: as in :meth:`CoSettleAdapter.stream`.
        destination: the file to write.
        settings: how features are computed and stored.
        select: which frames; all by default.
        overwrite: replace what is there under that name, once the new file is whole.
        on_chunk: called with the number of frames done so far after every batch.
        **options: fields of :class:`ExtractSettings`, instead of ``settings`` or to change it.

    Raises:
        FrameError: not a single frame could be read, or frames cannot be used.
        FormatError: no such format, or it cannot store that dtype.
        OutputExistsError: the file exists, or was started, with other settings; or the folder holds
            features by another recipe.
        OutputBusyError: another run is writing this file.
    """
    path, select = Path(destination), select or FrameSelection()
    settings = dataclasses.replace(settings or ExtractSettings(), **options)
    form = choose_format(path, settings.format)
    if form.name == "dino-tracker":
        settings = dino_tracker.plan_settings(adapter, settings)
    storage = storage_dtype(form, settings.storage or adapter.dtype)
    asked = describe_run(adapter, source, settings, select, format=form.name, storage=storage)
    _check_recipe(path, asked)
    if not overwrite and (finished := _finished(path, asked)):
        return finished
    record = RunRecord(path, asked)
    with record.claimed():
        if not overwrite and (finished := _finished(path, asked)):  # by another run, meanwhile
            return finished
        record.resume(overwrite=overwrite)
        found = len(record.timestamps)
        truncated = _encode(adapter, source, record, settings, select, on_chunk)
        record.finish(form.finish, truncated)
        return Extraction(path, len(record.timestamps), record.shape, truncated, found)


def plan_jobs(sources: Sequence[Source], folder: Path, form: Format) -> list[Job]:
    """Give every source an output in ``folder``, named after it."""
    names = output_names(sources)
    return [
        Job(source.path, folder / f"{name}{form.suffix}")
        for source, name in zip(sources, names, strict=True)
    ]


def extract_many(
    adapter: CoSettleAdapter,
    jobs: Sequence[Job],
    *,
    on_job: Callable[[Job], None] = lambda job: None,
    **options: Any,
) -> Iterator[Outcome]:
    """Do jobs one after the other and yield their outcomes; one that fails affects no other.

    ``on_job`` is called before each; ``options`` are those of :func:`extract`.

    Raises:
        OSError, FormatError, MissingExtraError: the disk is full, the format cannot hold what was
            asked for, or a package is missing; so that the others would fail too.
    """
    for job in jobs:
        on_job(job)
        yield attempt(adapter, job, **options)


def attempt(adapter: CoSettleAdapter, job: Job, **options: Any) -> Outcome:
    """Do one job; return what is wrong with it as its outcome, raise what would stop all."""
    try:
        return Outcome(job, extract(adapter, job.source, job.output, **options))
    except (FormatError, MissingExtraError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        logger.debug("%s failed", job.source, exc_info=True)
        transient = not isinstance(error, CosettleError)
        return Outcome(job, error=str(error) or type(error).__name__, transient=transient)


def _finished(path: Path, asked: Mapping[str, Any]) -> Extraction | None:
    """Return what is under ``path`` if it is what was asked for, ``None`` if nothing is."""
    if not path.exists():
        return None
    sidecar = read_sidecar(path)
    if sidecar is None:
        name = sidecar_path(path).name
        raise OutputExistsError(f"{path} exists, but not {name}, which says what it is; {REDO}")
    if asked["source_identity"] is None:
        raise OutputExistsError(f"{path} exists; {REDO}")
    if different := differences(sidecar, asked, numerical=False):
        raise OutputExistsError(f"{path} exists: {different}; {REDO}")
    frames, *shape = sidecar["shape"]
    return Extraction(path, frames, tuple(shape), sidecar["truncated"], frames)


def _check_recipe(path: Path, asked: Mapping[str, Any]) -> None:
    """Refuse features by one recipe of a backbone beside others: a neighbour tells that of all."""
    recipe = asked["projection"]["recipe"]
    for sidecar in path.parent.glob("*.json") if recipe is not None else ():
        beside = read_sidecar(sidecar.with_suffix("")) or {"fingerprint": None}
        same = beside["fingerprint"] == asked["fingerprint"]
        other = beside["projection"]["recipe"] if same else None
        if other not in (recipe, None):
            raise OutputExistsError(
                f"{path.parent} holds features by recipe {other} ({sidecar.stem}), which cannot "
                f"be compared with those by recipe {recipe} that {path.name} would hold: load the "
                f"adapter with recipe={other}, or give another folder"
            )
        if other is not None:
            return


def _encode(
    adapter: CoSettleAdapter,
    source: Any,
    record: RunRecord,
    settings: ExtractSettings,
    select: FrameSelection,
    on_chunk: Callable[[int], None],
) -> str | None:
    """Write all frames that are not there yet; return why the source ended early, if it did.

    Decoding runs ahead in a thread, and a batch is written while the next one is encoded.
    """
    done, batch_size = len(record.timestamps), settings.batch_size
    skip = done
    if record.asked["settings"]["settle"]:
        skip = 0
    elif settings.temporal_fusion is not None:  # whole batches on which no frame to come depends
        skip = max(0, done - WINDOW) // batch_size * batch_size
    chunks = adapter.stream(
        source,
        select=select,
        batch_size=batch_size,
        size=settings.size,
        fit=settings.fit,
        skip=skip,
        settle=settings.settle,
        temporal_fusion=settings.temporal_fusion,
    )
    dtype = getattr(torch, record.asked["storage"])
    written: Future[None] | None = None
    try:
        with (
            contextlib.closing(chunks),  # type: ignore[type-var]
            ThreadPoolExecutor(1, "cosettle-writer") as writer,
        ):
            try:
                for chunk in chunks:
                    if chunk.start < done:
                        continue  # encoded only for those that depend on it
                    features, geometry = chunk.features, chunk.geometry
                    if record.asked["format"] == "dino-tracker":
                        stride = 7 if geometry.stride == 7 else 14
                        features = dino_tracker.arrange(
                            features, geometry, stride=stride, first=chunk.start
                        )
                        geometry = dino_tracker.cells(stride, frame=geometry.frame)
                    if written is not None:
                        written.result()
                    written = writer.submit(
                        record.append, features.to(dtype), geometry, chunk.timestamps
                    )
                    done += len(chunk.timestamps)
                    on_chunk(done)
            except TruncatedVideoError as error:
                if not done:
                    raise
                return str(error)
            finally:
                if written is not None:
                    written.result()
    except BaseException as error:
        # nothing is to be resumed where the source is at fault
        record.keep &= bool(record.timestamps) and not isinstance(error, FrameError)
        if record.keep:
            kept = "%d frames are kept in %s: the same call resumes after them"
            logger.warning(kept, len(record.timestamps), record.folder)
        raise
    return None
