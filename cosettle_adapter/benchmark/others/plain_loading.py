"""timm loading a backbone from a safetensors file.

It stands for the least that anybody does to have the same model: build the architecture, read the
file, copy its tensors in. Nothing is verified.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import nn

from cosettle_adapter.backbones import BackboneRow


def load(row: BackboneRow, path: Path) -> nn.Module:
    """Load a row's architecture with the tensors in ``path``, under timm's own names."""
    options: dict[str, Any] = {"num_classes": 0, "global_pool": "", **row.options}
    model: nn.Module = timm.create_model(
        row.architecture, pretrained=False, checkpoint_path=str(path), **options
    )
    return model.eval()
