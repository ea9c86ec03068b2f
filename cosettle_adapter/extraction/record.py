"""What a run was asked for, of which source, and how far it came."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones.weights import fingerprint
from cosettle_adapter.extraction.settings import ExtractSettings, dtype_name
from cosettle_adapter.version import __version__
from cosettle_adapter.video import FrameSelection, Geometry
from cosettle_adapter.video.files import resolve

SIDECAR_VERSION = 1

# These may change the last bits of features. A finished file is accepted whatever they are, but
# both parts of a resumed file must agree in them.
_NUMERICAL = ("batch_size", "device", "versions")
_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10


@dataclasses.dataclass
class RunRecord:
    """A run: what it was asked for, what its features are like, and how far it came.

    While the run lasts it is kept as a journal: a line for the header and one for every batch. In
    the end it becomes the sidecar of the feature file.

    Attributes:
        asked: what :func:`describe_run` returns; the metadata of the feature file.
        shape: ``(C, h, w)`` of one frame.
        geometry: how patches map to pixels.
        batches: CRC-32 and timestamps (seconds, one a frame) of every batch written.
    """

    asked: Mapping[str, Any]
    shape: tuple[int, int, int]
    geometry: Geometry
    batches: list[tuple[int, list[float]]] = dataclasses.field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored features."""
        dtype: torch.dtype = getattr(torch, self.asked["storage"])
        return dtype

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame's features."""
        channels, height, width = self.shape
        return channels * height * width * self.dtype.itemsize

    @property
    def timestamps(self) -> list[float]:
        """Seconds, one a frame."""
        return [time for _, times in self.batches for time in times]

    @classmethod
    def read_journal(cls, path: Path) -> RunRecord | None:
        """Read a journal; ``None`` if there is none that can be understood.

        A last line that was cut off does not count.
        """
        lines: list[Mapping[str, Any]] = []
        try:
            for line in path.read_text().splitlines():
                lines.append(json.loads(line))
        except FileNotFoundError:
            return None
        except ValueError:
            pass  # the process was killed while it wrote this line
        try:
            header, *batches = lines
            channels, height, width = header["shape"]
            return cls(
                header["metadata"],
                (channels, height, width),
                Geometry.from_dict(header["geometry"]),
                [(batch["checksum"], batch["timestamps"]) for batch in batches],
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    def write_journal(self, path: Path) -> None:
        """Write the journal anew, at once."""
        header = {
            "shape": self.shape,
            "geometry": self.geometry.to_dict(),
            "metadata": self.asked,
        }
        lines = [json.dumps(header), *(_batch_line(*batch) for batch in self.batches)]
        replacement = path.with_suffix(".new")
        replacement.write_text("".join(f"{line}\n" for line in lines))
        replacement.replace(path)

    def add_batch(self, path: Path, checksum: int, timestamps: list[float]) -> None:
        """Add a batch, here and in the journal."""
        with path.open("a") as file:
            file.write(f"{_batch_line(checksum, timestamps)}\n")
        self.batches.append((checksum, timestamps))

    def sidecar(self, *, truncated: str | None) -> str:
        """Return the text of the sidecar; ``truncated`` says why the source ended early."""
        fields = {
            "cosettle_adapter_features": SIDECAR_VERSION,
            **self.asked,
            "truncated": truncated,
            "shape": [len(self.timestamps), *self.shape],
            "geometry": self.geometry.to_dict(),
            "timestamps": self.timestamps,
        }
        lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"


def sidecar_path(output: Path) -> Path:
    """Return where the sidecar of a feature file is: ``clip.zarr.json`` beside ``clip.zarr``."""
    return output.with_name(f"{output.name}.json")


def read_sidecar(output: Path) -> dict[str, Any] | None:
    """Return the sidecar of a feature file; ``None`` if there is none that can be read."""
    try:
        fields = json.loads(sidecar_path(output).read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(fields, dict) and fields.get("cosettle_adapter_features") == SIDECAR_VERSION
    return fields if known else None


def describe_run(
    adapter: CoSettleAdapter,
    source: Any,
    settings: ExtractSettings,
    select: FrameSelection,
    *,
    format: str,
    storage: torch.dtype,
) -> dict[str, Any]:
    """Describe a run, JSON-ready: source, model, settings, and what computes it."""
    config, projection = adapter.config, adapter.projection.state_dict()
    size = settings.size
    is_path = isinstance(source, (str, os.PathLike))
    return {
        "source": Path(source).name if is_path else type(source).__name__,
        "source_identity": identify(source),
        "backbone": adapter.backbone.row.name,
        "fingerprint": adapter.backbone.fingerprint,
        "layers": list(config.layers),
        "norm": config.norm,
        "patch": adapter.backbone.patch,
        "stride": adapter.backbone.stride,
        "projection": {
            "kind": config.kind,
            "method": str(config.fit.get("method", "")),
            "fingerprint": fingerprint(projection) if projection else None,
            "averaging": config.averaging,
            "recipe": config.recipe,
        },
        "dtype": dtype_name(adapter.dtype),
        "format": format,
        "storage": dtype_name(storage),
        "settings": {
            "size": list(size) if isinstance(size, tuple) else size,
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
    """Say how two descriptions differ (``size was 280 and is 476, ...``); empty if they do not.

    Args:
        before: the one.
        now: the other.
        numerical: whether differences count that change only the last bits.
    """
    contents = {
        "source_identity": "the source's content has changed",
        "fingerprint": "the backbone's weights are others",
        "projection.fingerprint": "the projection's weights are others",
    }
    before, now = _flat(before), _flat(now)
    found: list[str] = []
    for name in {**before, **now}:
        if before.get(name) == now.get(name) or name == "source":  # a renamed file is the same
            continue
        if name.split(".")[0] in _NUMERICAL and not numerical:
            continue
        short = name.removeprefix("settings.").replace("_", "-").replace(".", " ")
        was, is_now = _value_text(before.get(name)), _value_text(now.get(name))
        found.append(contents.get(name, f"{short} was {was} and is {is_now}"))
    return ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")


def identify(source: Any) -> str | None:
    """Return a hash by which a file, or images in files, are recognised.

    It covers names, sizes and samples of the content but no times, so a copy is the same.

    Returns:
        ``sha256:...``; ``None`` for frames in memory and iterators.

    Raises:
        FrameError: no such file.
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
    return f"sha256:{_hash(files)}"


def _batch_line(checksum: int, timestamps: list[float]) -> str:
    return json.dumps({"checksum": checksum, "timestamps": timestamps})


def _flat(description: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in description.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _value_text(value: Any) -> str:
    if value is None:
        return "not given"
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    sizes = [file.stat().st_size for file in files]
    for file, size in zip(files, sizes, strict=True):
        # a single file may be renamed; the names of several are their order
        digest.update(f"{file.name if len(files) > 1 else ''}\0{size}\n".encode())
    samples = max(1, _SAMPLES // len(files))
    for index in sorted({len(files) * sample // _SAMPLES for sample in range(_SAMPLES)}):
        with files[index].open("rb") as content:
            for sample in range(samples):
                last = max(0, sizes[index] - _SAMPLE_BYTES)
                content.seek(last * sample // max(1, samples - 1))
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()
