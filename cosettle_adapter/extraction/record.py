"""The record of a run: what it was asked for, of which source, and how far it came."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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

logger = logging.getLogger(__name__)

VERSION = 1
RESERVED = 8192  # bytes before the numbers, for the header of any format
REDO = "start over with --overwrite (overwrite=True), or give the output another name"

# These may change the last bits of features. A finished file is accepted whatever they are, but
# both parts of a resumed file must agree in them.
_NUMERICAL = ("batch_size", "device", "versions")
_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10
_CHANGED = {
    "source_identity": "the source's content has changed",
    "fingerprint": "the backbone's weights are others",
    "projection.fingerprint": "the projection's weights are others",
}


class RunRecord:
    """An extraction on its way: what was asked for, and how far it came.

    It lies in ``.NAME.partial`` beside the output, which one run at a time has: the numbers in one
    plain file behind :data:`RESERVED` bytes, and a journal, a line of JSON for the run and one with
    checksum and timestamps for every batch. Both become the output and its sidecar once they are
    whole; what a run leaves that ends early is resumed by the next one.
    """

    def __init__(self, output: Path, asked: Mapping[str, Any]) -> None:
        """Name the output and what :func:`describe_run` returned; nothing is touched."""
        self.asked = asked
        self.folder = output.with_name(f".{output.name}.partial")
        self.keep = False  # whether the folder is kept in the end
        self.timestamps: list[float] = []  # seconds of the frames that are written
        self._output = output
        self._frame: list[int] = []  # (C, h, w) of a frame's features
        self._geometry: Mapping[str, Any] = {}
        self._numbers, self._journal = self.folder / "features", self.folder / "journal"

    @property
    def shape(self) -> list[int]:
        """(T, C, h, w) of what is written."""
        return [len(self.timestamps), *self._frame]

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame's features."""
        dtype: torch.dtype = getattr(torch, self.asked["storage"])
        return math.prod(self._frame) * dtype.itemsize

    @property
    def description(self) -> dict[str, Any]:
        """All but the timestamps: what a feature file says of itself."""
        return {**self.asked, "geometry": self._geometry}

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other runs from this output while the block runs, or raise if one has it."""
        refusal = OutputBusyError(
            f"another run is writing {self._output}: wait until it ends, or use another name"
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with exclusive(self.folder, refusal=refusal):
                self.keep = self._journal.exists()  # the work of another run, until it is resumed
                try:
                    yield
                except OSError as error:  # of a full disk, which names no file
                    if error.errno is None or error.filename is not None:
                        raise
                    raise OSError(error.errno, error.strerror, str(self._output)) from error
                finally:
                    if not self.keep:
                        self._discard()
        finally:
            with contextlib.suppress(OSError):  # not empty, or locked by another run already
                self.folder.rmdir()

    def resume(self, *, overwrite: bool) -> None:
        """Continue what an earlier run left after its last undamaged batch, or discard it.

        Raises:
            OutputExistsError: it was asked for something else, and not to ``overwrite`` it.
        """
        self.keep, lines = self.asked["source_identity"] is not None, self._read_journal()
        different = differences(lines[0]["asked"], self.asked) if lines and self.keep else ""
        if different and not overwrite:
            raise OutputExistsError(
                f"{self._output} was started with other settings: {different}; use the same ones "
                f"to resume it, or {REDO}"
            )
        if different or not lines or not self.keep or not self._numbers.is_file():
            self._discard()
            return
        whole = lines[:1]
        self._frame, self._geometry = whole[0]["shape"], whole[0]["geometry"]
        with self._numbers.open("r+b") as file:
            file.seek(RESERVED)
            for checksum, times in lines[1:]:
                if zlib.crc32(file.read(len(times) * self.frame_bytes)) != checksum:
                    break
                self.timestamps += times
                whole.append([checksum, times])
            file.truncate(RESERVED + len(self.timestamps) * self.frame_bytes)
        self._write_journal(whole)
        logger.info("resuming %s after %d frames", self._output, len(self.timestamps))

    def append(self, features: Tensor, geometry: Geometry, timestamps: Tensor) -> None:
        """Write ``(N, C, h, w)`` features of the dtype to store, so that they outlive the run."""
        flat = rearrange(features.cpu(), "n c h w -> (n c h w)").contiguous()
        numbers = flat.view(torch.uint8).numpy().data  # of any dtype, also of those NumPy lacks
        if not self.timestamps:
            self._frame, self._geometry = list(features.shape[1:]), geometry.to_dict()
            run = {"version": VERSION, "asked": self.asked, "shape": self._frame}
            self._write_journal([run | {"geometry": self._geometry}])
            self._numbers.write_bytes(bytes(RESERVED))
        with self._numbers.open("ab") as file:
            file.write(numbers)
        with self._journal.open("a") as file:
            file.write(f"{json.dumps([zlib.crc32(numbers), timestamps.tolist()])}\n")
        self.timestamps += timestamps.tolist()

    def finish(self, make_whole: Callable[[Path, RunRecord], Path], truncated: str | None) -> None:
        """Have the output made whole, of the numbers, and give it its name and its sidecar."""
        whole = make_whole(self._numbers, self)
        for path in [whole] if whole.is_file() else filter(Path.is_file, whole.rglob("*")):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        fields = {
            "cosettle_adapter_features": VERSION,
            **self.description,
            "truncated": truncated,
            "shape": self.shape,
            "timestamps": self.timestamps,
        }
        text = ",\n".join(f" {json.dumps(name)}: {json.dumps(fields[name])}" for name in fields)
        with atomic_path(sidecar_path(self._output)) as temporary:
            temporary.write_text(f"{{\n{text}\n}}\n")
            _remove(self._output)  # the new one is whole, and so is its sidecar
        whole.replace(self._output)
        self.keep = False

    def _read_journal(self) -> list[Any]:
        lines: list[Any] = []
        # none yet, or of a process killed while it wrote a line
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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sidecar_path(output: Path) -> Path:
    """Return where the sidecar of a feature file is."""
    return output.with_name(f"{output.name}.json")


def read_sidecar(output: Path) -> dict[str, Any] | None:
    """Return the sidecar of a feature file; ``None`` if there is none that can be read."""
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
    format: str,
    storage: str,
) -> dict[str, Any]:
    """Describe a run, JSON-ready: source, model, settings, and what computes it."""
    config, backbone = adapter.config, adapter.backbone
    weights = adapter.projection.state_dict()
    is_path = isinstance(source, (str, os.PathLike))
    return {
        "source": Path(source).name if is_path else type(source).__name__,
        "source_identity": identify(source),
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
            "settle": adapter.settles if settings.settle is None else settings.settle,
            "temporal_fusion": settings.temporal_fusion,
        },
        "batch_size": settings.batch_size,
        "device": adapter.device.type,
        "versions": {"cosettle_adapter": __version__, "torch": torch.__version__},
    }


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, numerical: bool = True
) -> str:
    """Say how a run differs from an earlier one: ``size was 280 and is 476, ...``.

    ``numerical`` says whether differences count that change only the last bits.
    """
    was = _flat(before)
    found: list[str] = []
    for name, value in _flat(now).items():
        if was.get(name) == value or name == "source":  # a renamed file is the same
            continue
        if numerical or not name.startswith(_NUMERICAL):
            short = name.removeprefix("settings.").replace("_", "-").replace(".", " ")
            old, new = ("not given" if v is None else v for v in (was.get(name), value))
            found.append(_CHANGED.get(name, f"{short} was {old} and is {new}"))
    return ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")


def identify(source: Any) -> str | None:
    """Return a hash by which a file, or images in files, are recognised; no times, so copies agree.

    It covers sizes, the names of several files, and samples of their content. Frames in memory and
    iterators have none.
    """
    if isinstance(source, (str, os.PathLike)):
        found = resolve(source)
        files = [found] if isinstance(found, Path) else found
    elif isinstance(source, (list, tuple)) and source:
        if not all(isinstance(item, (str, os.PathLike)) for item in source):
            return None
        files = [Path(item) for item in source]
    else:
        return None
    digest = hashlib.sha256()
    for file in files:  # a single file may be renamed; the names of several are their order
        name = file.name if len(files) > 1 else ""
        digest.update(f"{name}\0{file.stat().st_size}\n".encode())
    samples = max(1, _SAMPLES // len(files))
    for index in sorted({len(files) * sample // _SAMPLES for sample in range(_SAMPLES)}):
        last = max(0, files[index].stat().st_size - _SAMPLE_BYTES)
        with files[index].open("rb") as content:
            for sample in range(samples):
                content.seek(last * sample // max(1, samples - 1))
                digest.update(content.read(_SAMPLE_BYTES))
    return f"sha256:{digest.hexdigest()}"


def _flat(description: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in description.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
