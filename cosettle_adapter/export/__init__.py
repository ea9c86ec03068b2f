"""Adapters as files that run without this package: ONNX models and torch.export programs."""

from __future__ import annotations

from cosettle_adapter.export.errors import ExportError
from cosettle_adapter.export.onnx_file import to_onnx
from cosettle_adapter.export.parity import Parity
from cosettle_adapter.export.program_file import to_torch_export
from cosettle_adapter.export.signature import Exported, Signature, TensorSpec

__all__ = [
    "ExportError",
    "Exported",
    "Parity",
    "Signature",
    "TensorSpec",
    "to_onnx",
    "to_torch_export",
]
