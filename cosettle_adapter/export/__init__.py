"""Export adapters to files that run without this package: ONNX and torch.export."""

from __future__ import annotations

from cosettle_adapter.export.onnx import to_onnx
from cosettle_adapter.export.program import Exported, ExportError, Parity, to_torch_export

__all__ = ["ExportError", "Exported", "Parity", "to_onnx", "to_torch_export"]
