"""What an exported model takes and returns, and what it says about itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.errors import GeometryError
from cosettle_adapter.export.errors import ExportError
from cosettle_adapter.export.parity import Parity
from cosettle_adapter.version import __version__

BATCH = "batch"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: as the runtime wants or returns it.
        dtype: ``uint8``, ``float32``, ``float16`` or ``bfloat16``.
        shape: sides; the first is ``"batch"`` where any number of frames is taken.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        sides = ", ".join(map(str, self.shape))
        return f"{self.name} {self.dtype} ({sides})"


@dataclasses.dataclass(frozen=True)
class Signature:
    """Inputs, outputs and metadata of an exported model.

    Attributes:
        input: ``frames``, RGB uint8 in [0, 255]; or ``images``, float32 and normalised with the
            ``mean`` and ``std`` of the metadata, where preprocessing was left out.
        output: ``features`` ``(batch, C, h, w)``.
        metadata: where the model comes from and what its cells are; JSON-ready values.
    """

    input: TensorSpec
    output: TensorSpec
    metadata: dict[str, Any]

    def texts(self) -> dict[str, str]:
        """Return the metadata as ONNX stores it: strings as they are, all else as JSON."""
        return {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in self.metadata.items()
        }


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model that was written.

    Attributes:
        path: the file.
        size: bytes of it and, beyond 2 GB of ONNX, of the ``.data`` file beside it.
        signature: what it takes and returns.
        parity: how far its results were from PyTorch's; ``None`` if that was not looked at.
    """

    path: Path
    size: int
    signature: Signature
    parity: Parity | None


def plan_signature(
    adapter: CoSettleAdapter,
    size: tuple[int, int],
    *,
    preprocessing: bool,
    normalize: bool,
    static_batch: int | None,
) -> Signature:
    """Say what the exported model will be, or why it cannot be.

    Raises:
        ExportError: the adapter settles on every clip anew, or the batch is below 1.
        GeometryError: ``size`` is not made of whole patches; the nearest that is gets named.
    """
    if adapter.settles:
        raise ExportError(
            "this adapter settles on every clip anew, which one exported model cannot do. Export "
            "adapter.settle(clip), which is settled on one clip for good, or a fitted projection"
        )
    if static_batch is not None and static_batch < 1:
        raise ExportError(f"static_batch must be at least 1, or None for any, got {static_batch}")
    backbone, config = adapter.backbone, adapter.config
    geometry = adapter.geometry(*size)
    if geometry.padded != geometry.frame:
        raise GeometryError(
            f"an exported model takes frames of one exact size, and {size[0]} x {size[1]} (height "
            f"x width) does not fit patch {backbone.patch} at stride {backbone.stride}; the "
            f"nearest size that does is {geometry.padded[0]} x {geometry.padded[1]}"
        )
    count: int | str = BATCH if static_batch is None else static_batch
    dtype = str(adapter.dtype).removeprefix("torch.")
    metadata = {
        "cosettle_adapter": __version__,
        "backbone": backbone.row.name,
        "fingerprint": backbone.fingerprint,
        "licence": config.licence,
        "layers": list(config.layers),
        "projection": config.kind,
        "patch": backbone.patch,
        "stride": backbone.stride,
        "size": list(geometry.frame),
        "grid": list(geometry.grid),
        "preprocessing": preprocessing,
        "mean": list(backbone.row.mean),
        "std": list(backbone.row.std),
        "normalized": normalize,
    }
    taken = ("frames", "uint8") if preprocessing else ("images", "float32")
    return Signature(
        input=TensorSpec(*taken, (count, 3, *geometry.frame)),
        output=TensorSpec("features", dtype, (count, adapter.width, *geometry.grid)),
        metadata=metadata,
    )


def check_suffix(path: Path, suffix: str) -> None:
    """Raise unless a file is named as what it will be."""
    if path.suffix != suffix:
        raise ExportError(f"expected a file name that ends in {suffix}, got {path}")
