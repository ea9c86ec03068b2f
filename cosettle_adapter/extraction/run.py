"""One source through an adapter into a feature file, at constant memory."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.correspondence.fusion import WINDOW
from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.extraction import dino_tracker
from cosettle_adapter.extraction.formats import choose_format, storage_dtype
from cosettle_adapter.extraction.record import (
    REDO,
    RunRecord,
    describe_run,
    differences,
    read_sidecar,
    sidecar_path,
)
from cosettle_adapter.extraction.settings import ExtractSettings, OutputExistsError
from cosettle_adapter.video import FrameSelection, Geometry
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
        source, select: as in :meth:`CoSettleAdapter.stream`.
        overwrite: replace what is there under that name, once the new file is whole.
        on_chunk: called with the number of frames written so far after every batch.
        **options: fields of :class:`ExtractSettings`, instead of ``settings`` or to change it.

    Raises:
        FrameError: not a single frame could be read, or frames cannot be used.
        FormatError: no such format, or it cannot store that dtype.
        OutputExistsError: the file exists, or was started, with other settings; or the folder holds
            features by another recipe. OutputBusyError: another run is writing this file.
    """
    path, select = Path(destination), select or FrameSelection()
    settings = dataclasses.replace(settings or ExtractSettings(), **options)
    form = choose_format(path, settings.format)
    if form.name == "dino-tracker":
        settings = dino_tracker.plan_settings(adapter, settings)
    storage = storage_dtype(form, settings.storage, adapter.dtype)
    asked = describe_run(adapter, source, settings, select, format=form.name, storage=storage)
    _check_recipe(path, asked)
    record = RunRecord(path, asked)
    # nothing is touched for what is finished, which may lie where nothing can be written
    if not overwrite and not record.folder.exists() and (finished := _finished(path, asked)):
        return finished
    with record.claimed():
        if not overwrite and (finished := _finished(path, asked)):
            return finished
        record.resume(overwrite=overwrite)
        found = len(record.timestamps)
        truncated = _encode(adapter, source, record, settings, select, on_chunk)
        record.finish(form.finish, truncated)
        frames, *shape = record.shape
        return Extraction(path, frames, tuple(shape), truncated, found)


def _finished(path: Path, asked: Mapping[str, Any]) -> Extraction | None:
    """Return what is under ``path`` if it is what was asked for, ``None`` if nothing is."""
    if not path.exists():
        return None
    different = ""
    sidecar = read_sidecar(path)
    if sidecar is None:
        different = f", but not {sidecar_path(path).name}, which says what it is"
    elif asked["source_identity"] is not None:
        if not (told := differences(sidecar, asked, numerical=False)):
            frames, *shape = sidecar["shape"]
            return Extraction(path, frames, tuple(shape), sidecar["truncated"], frames)
        different = f": {told}"
    raise OutputExistsError(f"{path} exists{different}; {REDO}")


def _check_recipe(path: Path, asked: Mapping[str, Any]) -> None:
    """Refuse features by one recipe of a backbone beside others: a neighbour tells that of all."""
    recipe = asked["projection"]["recipe"]
    for file in path.parent.glob("*.json") if recipe is not None else ():
        beside = read_sidecar(file.with_suffix(""))
        if beside is None or beside["fingerprint"] != asked["fingerprint"]:
            continue
        other = beside["projection"].get("recipe")
        if other not in (recipe, None):
            raise OutputExistsError(
                f"{path.parent} holds features by recipe {other} ({file.stem}), which cannot be "
                f"compared with those by recipe {recipe} that {path.name} would hold: load the "
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
    """Write all frames that are not there yet; return why the source ended early, if it did."""
    batch_size = settings.batch_size
    skip = found = len(record.timestamps)
    if record.asked["settings"]["settle"]:
        skip = 0
    elif settings.temporal_fusion is not None:  # whole batches on which no frame to come depends
        skip = max(0, found - WINDOW) // batch_size * batch_size
    stream = adapter.stream(
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
    truncated: str | None = None
    written: Future[None] | None = None

    def write(wait: Callable[[], Tensor], geometry: Geometry, timestamps: Tensor) -> None:
        record.append(wait(), geometry, timestamps)

    try:
        # a batch is written while the next one is encoded
        with (
            contextlib.closing(stream),  # type: ignore[type-var]
            ThreadPoolExecutor(1, "cosettle-writer") as writer,
        ):
            try:
                for chunk in stream:
                    if chunk.start < found:
                        continue  # encoded only for those that depend on it
                    features, geometry = chunk.features, chunk.geometry
                    if record.asked["format"] == "dino-tracker":
                        stride = 7 if geometry.stride == 7 else 14
                        features = dino_tracker.arrange(
                            features, geometry, stride=stride, first=chunk.start
                        )
                        geometry = dino_tracker.cells(stride, frame=geometry.frame)
                    arriving = _to_cpu(features.detach().to(dtype))
                    if written is not None:
                        written.result()
                    written = writer.submit(write, arriving, geometry, chunk.timestamps)
                    on_chunk(chunk.start + len(chunk.timestamps))
            except TruncatedVideoError as error:
                truncated = str(error)
                if written is None and not found:
                    raise
            finally:
                if written is not None:
                    written.result()
    except BaseException as error:
        # nothing is to be resumed where the source is at fault
        resumable = bool(record.timestamps) and not isinstance(error, FrameError)
        record.keep = record.keep and resumable
        if record.keep:
            kept = "%d frames are kept in %s: the same call resumes after them"
            logger.warning(kept, len(record.timestamps), record.folder)
        raise
    return truncated


def _to_cpu(features: Tensor) -> Callable[[], Tensor]:
    """Begin to copy features to the CPU; return what waits for them, in another thread."""
    if not features.is_cuda:
        return features.cpu
    arriving = features.to("cpu", non_blocking=True)  # into page-locked memory
    copied = torch.cuda.current_stream(features.device).record_event()

    def wait() -> Tensor:
        copied.synchronize()
        return arriving

    return wait
