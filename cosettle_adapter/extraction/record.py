"""The record of a run: its source, settings and progress."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones.weights import fingerprint
from cosettle_adapter.extraction.settings import ExtractSettings, OutputBusyError, OutputExistsError
from cosettle_adapter.io import LOCK_FILE, atomic_path, exclusive
from cosettle_adapter.version import __version__
from cosettle_adapter.video import FrameSelection, Geometry
from cosettle_adapter.video.files import resolve
from cosettle_adapter.video.reader import other_size
from cosettle_adapter.video.sources import Input, short_name

logger = logging.getLogger(__name__)

VERSION = 1
RESERVED = 8192  # bytes before the values, for the header of any format
REDO = "start over with --overwrite (overwrite=True), or give the output another name"

# Changes of these may change the last bits of features. They do not matter for a finished file,
# but an unfinished one is not resumed with others.
NUMERICAL = ("batch_size", "device", "settings.decode_on", "versions")
_BLOCK_BYTES = 1 << 20  # of a source read at a time
_CHANGED = {
    "source_identity": "the source's content has changed",
    "fingerprint": "the backbone's weights have changed",
    "projection.fingerprint": "the projection's weights have changed",
}


# by name: content, and axes, which are the dimension names of zarr
ARRAYS = {
    "features": ("patch features after the projection", ("time", "channel", "row", "column")),
    "cls": ("class token of the last layer", ("time", "backbone_channel")),
    "registers": ("register tokens of the last layer", ("time", "register", "backbone_channel")),
    "mean": ("mean of a frame's patch features", ("time", "channel")),
    "timestamps": ("seconds since the first frame of the source", ("time",)),
}


class RunRecord:
    """An unfinished extraction in the folder ``.NAME.partial`` beside the output.

    The folder holds the values of each array in a plain file after :data:`RESERVED` bytes, and a
    journal: a line of JSON for the run, and one for every batch with its checksum and timestamps.
    When complete, they become the output and its sidecar; otherwise the next run resumes them. A
    lock admits one run at a time.
    """

    def __init__(self, output: Path, request: Mapping[str, Any], state: str = "") -> None:
        """``request`` is what :func:`describe_run` returns; no file is touched yet."""
        self.request = request
        self.state = state  # hash of the sizes and times of the source's files
        self.folder = output.with_name(f".{output.name}.partial")
        self.keep = False  # whether the folder is kept at the end of the run
        self.timestamps: list[float] = []  # seconds of the written frames
        self.lost: list[float] = []  # seconds of frames that damage took from the source
        self._output = output
        self._frames: dict[str, list[int]] = {}  # shapes of one frame's values, by array
        self._geometry: Mapping[str, Any] = {}
        self._journal = self.folder / "journal"

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes ``(T, ...)`` of the written arrays."""
        return {name: [len(self.timestamps), *shape] for name, shape in self._frames.items()}

    def values(self, name: str) -> Path:
        """Return the file of an array's values."""
        return self.folder / name

    def frame_bytes(self, name: str) -> int:
        """Bytes of one frame's values."""
        dtype: torch.dtype = getattr(torch, self.request["storage"])
        return math.prod(self._frames[name]) * dtype.itemsize

    @property
    def description(self) -> dict[str, Any]:
        """Metadata of the feature file, without timestamps."""
        arrays = {}
        for name, shape in {**self.shapes, "timestamps": [len(self.timestamps)]}.items():
            content, axes = ARRAYS[name]
            arrays[name] = {"content": content, "axes": axes, "shape": shape}
        return {**self.request, "geometry": self._geometry, "arrays": arrays}

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Lock the output during the block; raise :class:`OutputBusyError` if a run holds it."""
        refusal = OutputBusyError(
            f"another run is writing {self._output}: wait until it ends, or use another name"
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with exclusive(self.folder, refusal=refusal):
                self.keep = self._journal.exists()  # an earlier run's work, until it is resumed
                try:
                    yield
                except OSError as error:  # a full disk is reported without a file name
                    if error.errno is None or error.filename is not None:
                        raise
                    raise OSError(error.errno, error.strerror, str(self._output)) from error
                finally:
                    if not self.keep:
                        self._discard()
        finally:
            with contextlib.suppress(OSError):  # not empty, or already locked by another run
                self.folder.rmdir()

    def resume(self, *, overwrite: bool) -> None:
        """Continue after the last undamaged batch; discard a run with other settings, or raise."""
        self.keep, lines = self.request["source_identity"] is not None, self._read_journal()
        changes = ""
        if lines and self.keep:
            ignore = ("settings.end",) if self._same_before_end(lines[1:]) else ()
            changes = differences(lines[0]["asked"], self.request, ignore=ignore)
        if changes and not overwrite:
            raise OutputExistsError(
                f"{self._output} was started with other settings: {changes}; use the same settings "
                f"to resume it, or {REDO}"
            )
        shapes = lines[0]["shapes"] if lines and self.keep and not changes else {}
        if not shapes or not all(self.values(name).is_file() for name in shapes):
            self._discard()
            return
        valid: list[Any] = [{**lines[0], "asked": self.request}]
        self._frames, self._geometry = shapes, valid[0]["geometry"]
        with contextlib.ExitStack() as opened:
            files = {name: opened.enter_context(self.values(name).open("r+b")) for name in shapes}
            for file in files.values():
                file.seek(RESERVED)
            for checksum, times, lost in lines[1:]:
                batch = (f.read(len(times) * self.frame_bytes(name)) for name, f in files.items())
                if _checksum(batch) != checksum:
                    break
                self.timestamps += times
                self._lose(lost)
                valid.append([checksum, times, lost])
            for name, file in files.items():
                file.truncate(RESERVED + len(self.timestamps) * self.frame_bytes(name))
        self._write_journal(valid)
        logger.info("resuming %s after %d frames", self._output, len(self.timestamps))

    def append(
        self,
        arrays: Mapping[str, Tensor],
        geometry: Geometry,
        timestamps: Tensor,
        lost: Sequence[float] = (),
    ) -> None:
        """Append arrays ``(N, ...)`` in the storage dtype; FrameError for another frame size."""
        first = Geometry.from_dict(self._geometry) if self.timestamps else geometry
        resized = self.request["settings"]["size"] is not None
        if geometry.grid != first.grid or not (resized or geometry.frame == first.frame):
            raise other_size(geometry.frame, first=first.frame, seconds=timestamps[0].item())
        if not self.timestamps:
            self._frames = {name: list(values.shape[1:]) for name, values in arrays.items()}
            self._geometry = geometry.to_dict()
            run = {"version": VERSION, "asked": self.request, "shapes": self._frames}
            self._write_journal([run | {"geometry": self._geometry}])
            for name in arrays:
                self.values(name).write_bytes(bytes(RESERVED))
        written: list[memoryview] = []
        for name, values in arrays.items():
            flat = rearrange(values.cpu(), "... -> (...)").contiguous()
            written.append(flat.view(torch.uint8).numpy().data)  # bytes, as NumPy lacks bfloat16
            with self.values(name).open("ab") as file:
                file.write(written[-1])
        with self._journal.open("a") as file:
            line = [_checksum(written), timestamps.tolist(), list(lost)]
            file.write(f"{json.dumps(line)}\n")
        self.timestamps += timestamps.tolist()
        self._lose(lost)

    def _lose(self, lost: Iterable[float]) -> None:
        self.lost = sorted({*self.lost, *lost})

    def finish(self, complete: Callable[[Path, RunRecord], Path]) -> None:
        """Complete the file by its format, write the sidecar, and move both into place."""
        whole = complete(self.values(next(iter(self._frames))), self)
        for path in [whole] if whole.is_file() else filter(Path.is_file, whole.rglob("*")):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        fields = {
            "cosettle_adapter_features": VERSION,
            **self.description,
            "source_state": self.state,
            "lost": self.lost,
            "shape": next(iter(self.shapes.values())),
            "timestamps": self.timestamps,
        }
        text = ",\n".join(f" {json.dumps(name)}: {json.dumps(fields[name])}" for name in fields)
        with atomic_path(sidecar_path(self._output)) as temporary:
            temporary.write_text(f"{{\n{text}\n}}\n")
            _remove(self._output)  # the new file and its sidecar are complete
        whole.replace(self._output)
        self.keep = False

    def _same_before_end(self, batches: Sequence[Any]) -> bool:
        """Whether the batches of an earlier run remain valid with this run's ``end``."""
        settings = self.request["settings"]
        if settings["temporal_fusion"] == "symmetric" or settings["fps"] or settings["times"]:
            return False  # features depend on later frames
        last = max((time for _, times, _ in batches for time in times), default=0)
        return last < (settings["end"] or math.inf)

    def _read_journal(self) -> list[Any]:
        lines: list[Any] = []
        # no journal yet, or its last line is incomplete
        with contextlib.suppress(FileNotFoundError, ValueError), self._journal.open() as file:
            for line in file:
                lines.append(json.loads(line))
        return lines if lines and lines[0].get("version") == VERSION else []

    def _write_journal(self, lines: Sequence[Any]) -> None:
        with atomic_path(self._journal) as temporary:
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def _discard(self) -> None:
        for entry in self.folder.iterdir():
            if entry.name != LOCK_FILE:
                _remove(entry)


def _checksum(parts: Iterable[bytes | memoryview]) -> int:
    return functools.reduce(lambda before, part: zlib.crc32(part, before), parts, 0)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sidecar_path(output: Path) -> Path:
    """Return the path of a feature file's sidecar."""
    return output.with_name(f"{output.name}.json")


def read_sidecar(output: Path) -> dict[str, Any] | None:
    """Return the sidecar of a feature file; ``None`` if it is missing or unreadable."""
    try:
        fields = json.loads(sidecar_path(output).read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(fields, dict) and fields.get("cosettle_adapter_features") == VERSION
    return fields if known else None


def describe_run(
    adapter: CoSettleAdapter,
    source: Any,
    settings: ExtractSettings,
    select: FrameSelection,
    *,
    identity: str | None,
    format: str,
    storage: str,
) -> dict[str, Any]:
    """Return the source, model, settings and versions of a run, ready for JSON."""
    config, backbone = adapter.config, adapter.backbone
    weights = adapter.projection.state_dict()
    is_path = isinstance(source, (str, os.PathLike))
    return {
        "source": short_name(source) if is_path else type(source).__name__,
        "source_identity": identity,
        "backbone": backbone.row.name,
        "fingerprint": backbone.fingerprint,
        "layers": list(config.layers),
        "norm": config.norm,
        "patch": backbone.patch,
        "stride": backbone.stride,
        "projection": {
            "kind": config.kind,
            "method": str(config.fit.get("method", "")),
            "fingerprint": fingerprint(weights) if weights else None,
            "averaging": config.averaging,
            "recipe": config.recipe,
        },
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "format": format,
        "storage": storage,
        "settings": {
            "size": list(settings.size) if isinstance(settings.size, tuple) else settings.size,
            "fit": settings.fit,
            **dataclasses.asdict(select),
            "times": select.times and _digest(select.times),
            "settle": adapter.settles if settings.settle is None else settings.settle,
            "temporal_fusion": settings.temporal_fusion,
            "tokens": settings.kinds,
        },
        "batch_size": settings.batch_size,
        "device": adapter.device.type,
        "versions": {"cosettle_adapter": __version__, "torch": torch.__version__},
    }


def _digest(times: Sequence[float]) -> str:
    """Abbreviate selected times, to fit into a file's header."""
    return f"{len(times)}, sha256:{hashlib.sha256(repr([*times]).encode()).hexdigest()[:16]}"


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, ignore: tuple[str, ...] = ()
) -> str:
    """Return how a run differs from an earlier one, besides settings that begin with ``ignore``."""
    previous = _flat(before)
    changes: list[str] = []
    for name, value in _flat(now).items():
        if previous.get(name) == value or name == "source":  # the file may be renamed
            continue
        if not name.startswith(ignore):
            short = name.removeprefix("settings.").replace("_", "-").replace(".", " ")
            old, new = ("not given" if v is None else v for v in (previous.get(name), value))
            changes.append(_CHANGED.get(name, f"{short} was {old} and is {new}"))
    return ", ".join(changes[:4]) + (", ..." if len(changes) > 4 else "")


def identify(source: Any, before: Mapping[str, Any] | None = None) -> tuple[str | None, str]:
    """Return hashes of a source's content, and of the sizes and times of its files.

    The content is read only if sizes or times differ from those in ``before``, an earlier run's
    sidecar. A URL has its server's version; arrays, iterators, pipes and live inputs have none.
    """
    if isinstance(source, (str, os.PathLike)):
        resolved = resolve(source)
        if isinstance(resolved, Input):
            return resolved.version(), ""
        files = [resolved] if isinstance(resolved, Path) else resolved
    elif isinstance(source, (list, tuple)) and source:
        if not all(isinstance(item, (str, os.PathLike)) for item in source):
            return None, ""
        files = [Path(item) for item in source]
    else:
        return None, ""
    names = [file.name if len(files) > 1 else "" for file in files]  # a single one may be renamed
    stats = [file.stat() for file in files]
    states = [
        f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        for name, stat in zip(names, stats, strict=True)
    ]
    state = hashlib.sha256("".join(states).encode()).hexdigest()
    if before is not None and before.get("source_state") == state:
        return before["source_identity"], state
    digest = hashlib.sha256()
    for name, stat, file in zip(names, stats, files, strict=True):
        digest.update(f"{name}\0{stat.st_size}\n".encode())
        with file.open("rb") as content:
            for block in iter(functools.partial(content.read, _BLOCK_BYTES), b""):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}", state


def _flat(description: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in description.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
