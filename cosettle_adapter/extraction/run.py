"""Extract the features of one source to a file, in constant memory."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter, FeatureChunk
from cosettle_adapter.correspondence.fusion import WINDOW
from cosettle_adapter.errors import FrameError
from cosettle_adapter.extraction import dino_tracker
from cosettle_adapter.extraction.formats import choose_format, storage_dtype
from cosettle_adapter.extraction.record import (
    NUMERICAL,
    REDO,
    RunRecord,
    describe_run,
    differences,
    identify,
    read_sidecar,
    sidecar_path,
)
from cosettle_adapter.extraction.settings import ExtractSettings, FormatError, OutputExistsError
from cosettle_adapter.video import FrameSelection
from cosettle_adapter.video.selection import selects_frames

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Extraction:
    """The result of :func:`extract`."""

    path: Path  # the sidecar is PATH.json
    frames: int
    arrays: Mapping[str, tuple[int, ...]]  # shapes of the written arrays: features (T, C, h, w)
    lost: tuple[float, ...] = ()  # seconds of the source's frames that damage took
    found: int = 0  # frames written by an earlier run

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one frame's values: (C, h, w) of the features, or of the first array."""
        return next(iter(self.arrays.values()))[1:]


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
    """Write the features of a video of any length to a file, with a JSON sidecar ``PATH.json``.

    The file appears complete or not at all. If a run is interrupted or killed, the same call
    resumes it after its last complete batch, and the file is byte-identical to that of an
    uninterrupted run; arrays and iterators start over. A finished file is left unchanged.
    Frames that damage took from the source are left out, and the result says which.

    Args:
        source, select: as in :meth:`CoSettleAdapter.stream`.
        overwrite: replace an existing file once the new one is complete.
        on_chunk: called after every batch with the number of frames written so far.
        **options: fields of :class:`ExtractSettings` that override ``settings``.

    Raises:
        FrameError: no frame can be read, or frames cannot be used.
        FormatError: unknown format, or one that cannot store the dtype or the tokens, or a backbone
            without these.
        MissingExtraError: the format's package is not installed; raised before any frame is read.
        OutputExistsError: the file exists, or was started, with other settings; or the folder holds
            features of another recipe.
        OutputBusyError: another run is writing this file.
    """
    path, select = Path(destination), select or FrameSelection()
    settings = dataclasses.replace(settings or ExtractSettings(), **options)
    form = choose_format(path, settings.format, settings.kinds)
    _check_tokens(adapter, settings)
    if form.name == "dino-tracker":
        settings = dino_tracker.plan_settings(adapter, settings)
    storage = storage_dtype(form, settings.storage, adapter.dtype)
    identity, state = identify(source, read_sidecar(path))
    request = describe_run(
        adapter, source, settings, select, identity=identity, format=form.name, storage=storage
    )
    _check_recipe(path, request)
    record = RunRecord(path, request, state)
    # return a finished file without locking: its folder may be read-only
    if not overwrite and not record.folder.exists() and (finished := _finished(path, request)):
        return finished
    with record.claimed():
        if not overwrite and (finished := _finished(path, request)):
            return finished
        record.resume(overwrite=overwrite)
        resumed_after = len(record.timestamps)
        _encode(adapter, source, record, settings, select, on_chunk)
        record.finish(form.finish)
        return _result(path, {**record.description, "lost": record.lost}, resumed_after)


def _result(path: Path, description: Mapping[str, Any], found: int | None = None) -> Extraction:
    """Return the result that a description states; ``found`` defaults to all frames."""
    arrays = {name: tuple(array["shape"]) for name, array in description["arrays"].items()}
    (frames,) = arrays.pop("timestamps")
    found = frames if found is None else found
    return Extraction(path, frames, arrays, tuple(description["lost"]), found)


def _check_tokens(adapter: CoSettleAdapter, settings: ExtractSettings) -> None:
    """Raise if the backbone lacks requested tokens."""
    for kind, name in {"cls": "class token", "registers": "register tokens"}.items():
        if kind in settings.kinds and kind not in adapter.backbone.special:
            raise FormatError(
                f"{adapter.backbone.row.name} has no {name}: leave {kind} out of --tokens "
                "(tokens=); mean gives one vector per frame for every backbone"
            )


def _finished(path: Path, request: Mapping[str, Any]) -> Extraction | None:
    """Return the finished file of the same request, ``None`` if there is no file; else raise."""
    if not path.exists():
        return None
    problem = ""
    sidecar = read_sidecar(path)
    if sidecar is None:
        problem = f", but not {sidecar_path(path).name}, which describes it"
    elif request["source_identity"] is not None:
        if not (changes := differences(sidecar, request, ignore=NUMERICAL)):
            return _result(path, sidecar)
        problem = f": {changes}"
    raise OutputExistsError(f"{path} exists{problem}; {REDO}")


def _check_recipe(path: Path, request: Mapping[str, Any]) -> None:
    """Raise if the folder holds features of the same backbone by another recipe."""
    recipe = request["projection"]["recipe"]
    if recipe is None:
        return
    for file in path.parent.glob("*.json"):
        neighbour = read_sidecar(file.with_suffix(""))
        if neighbour is None or neighbour["fingerprint"] != request["fingerprint"]:
            continue
        other = neighbour["projection"].get("recipe")
        if other not in (recipe, None):
            raise OutputExistsError(
                f"{path.parent} holds features by recipe {other} ({file.stem}), which cannot be "
                f"compared with those by recipe {recipe} that {path.name} would hold: load the "
                f"adapter with recipe={other}, or give another folder"
            )
        if other is not None:
            return  # all features in a folder are by one recipe


def _encode(
    adapter: CoSettleAdapter,
    source: Any,
    record: RunRecord,
    settings: ExtractSettings,
    select: FrameSelection,
    on_chunk: Callable[[int], None],
) -> None:
    """Append all missing frames."""
    batch_size = settings.batch_size
    skip = written_before = len(record.timestamps)
    if record.request["settings"]["settle"]:
        skip = 0
    elif settings.temporal_fusion is not None:  # whole batches that no missing frame depends on
        skip = max(0, written_before - WINDOW) // batch_size * batch_size
    stream = adapter.stream(
        source,
        select=select,
        batch_size=batch_size,
        size=settings.size,
        fit=settings.fit,
        skip=skip,
        return_special=not {"cls", "registers"}.isdisjoint(settings.kinds),
        settle=settings.settle,
        temporal_fusion=settings.temporal_fusion,
    )
    dtype = getattr(torch, record.request["storage"])
    writing: Future[None] | None = None

    def write(waits: Mapping[str, Callable[[], Tensor]], *rest: Any) -> None:
        record.append({name: wait() for name, wait in waits.items()}, *rest)

    try:
        # a batch is written while the next one is encoded
        with (
            contextlib.closing(stream),  # type: ignore[type-var]
            ThreadPoolExecutor(1, "cosettle-writer") as writer,
        ):
            try:
                for chunk in stream:
                    # encoded again only because later frames depend on them
                    spare = max(0, written_before - chunk.start)
                    geometry, times = chunk.geometry, chunk.timestamps[spare:]
                    if not len(times):
                        continue
                    arrays = _arrays(chunk, settings.kinds)
                    if record.request["format"] == "dino-tracker":
                        stride = 7 if geometry.stride == 7 else 14
                        features = dino_tracker.arrange(
                            chunk.features, geometry, stride=stride, first=chunk.start
                        )
                        arrays = {"features": features}
                        geometry = dino_tracker.cells(stride, frame=geometry.frame)
                    waits = {
                        name: _to_cpu(a[spare:].detach().to(dtype)) for name, a in arrays.items()
                    }
                    if writing is not None:
                        writing.result()
                    writing = writer.submit(write, waits, geometry, times, chunk.lost)
                    on_chunk(chunk.start + spare + len(times))
            finally:
                if writing is not None:
                    writing.result()
    except BaseException as error:
        record.keep = record.keep and bool(record.timestamps)
        if record.keep:
            message = "%d frames are kept in %s: the same call resumes after them"
            if isinstance(error, FrameError):
                message += "; with an end (--end) before the unusable frame, it finishes the file"
            logger.warning(message, len(record.timestamps), record.folder)
        raise


def _arrays(chunk: FeatureChunk, kinds: Sequence[str]) -> dict[str, Tensor]:
    """Return the arrays to write for a chunk, by the names of :data:`ARRAYS`."""
    arrays: dict[str, Any] = {}
    for kind in kinds:
        if kind == "patch":
            arrays["features"] = chunk.features
        elif kind == "mean":
            arrays["mean"] = reduce(chunk.features.float(), "n c h w -> n c", "mean")
        else:
            arrays[kind] = getattr(chunk, kind)
    return arrays


def _to_cpu(features: Tensor) -> Callable[[], Tensor]:
    """Start copying features to the CPU; return a function that waits for the copy."""
    if not features.is_cuda:
        return features.cpu
    copy = features.to("cpu", non_blocking=True)  # into page-locked memory
    copied = torch.cuda.current_stream(features.device).record_event()

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait
