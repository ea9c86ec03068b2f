"""Adapters as ``.pt2`` files, which PyTorch runs without this package."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.export.program import OneSize, trace
from cosettle_adapter.export.signature import Exported, check_suffix, plan_signature
from cosettle_adapter.files import atomic_path

METADATA_FILE = "cosettle_adapter.json"


def to_torch_export(
    adapter: CoSettleAdapter,
    path: str | Path,
    size: tuple[int, int],
    *,
    preprocessing: bool = True,
    normalize: bool = False,
    static_batch: int | None = None,
    check: bool = True,
    check_on: Any = None,
) -> Exported:
    """Write an adapter at one frame size as a ``torch.export`` program.

    It is read back by ``torch.export.load(path).module()``, called with one tensor, on the
    device it was exported on. Its metadata is in the file as ``cosettle_adapter.json``:
    ``torch.export.load(path, extra_files={"cosettle_adapter.json": ""})`` fills it in.

    Args:
        adapter: frozen backbone and projection; device and dtype become the file's.
        path: a ``.pt2`` file.
        size: ``(H, W)`` of the frames, whole patches; positions are resized for it and stored.
        preprocessing: take uint8 frames; otherwise images as ``adapter.preprocess`` returns them.
        normalize: scale every cell's feature to unit length.
        static_batch: take exactly so many frames at a time; ``None`` takes any number.
        check: run the file on a few frames, and keep it only if it computes the same.
        check_on: frames to check on, of any kind and size that the adapter takes; rendered ones
            by default.

    Raises:
        GeometryError: ``size`` is not made of whole patches.
        ExportError: torch cannot trace this model, or the file computes something else.
        OSError: the file cannot be written.
    """
    path = Path(path)
    check_suffix(path, ".pt2")
    signature = plan_signature(
        adapter, size, preprocessing=preprocessing, normalize=normalize, static_batch=static_batch
    )
    traced = trace(OneSize(adapter, preprocessing=preprocessing, normalize=normalize), signature)
    # Through memory: the format's own writer hides that it was the disk that is full.
    content = io.BytesIO()
    torch.export.save(
        traced.program, content, extra_files={METADATA_FILE: json.dumps(signature.metadata)}
    )
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())
        parity = None
        if check:
            loaded = torch.export.load(temporary).module()
            parity = traced.compared(loaded, f"torch.export ({torch.__version__})", check_on)
    return Exported(path, path.stat().st_size, signature, parity)
