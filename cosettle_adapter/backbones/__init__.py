"""Backbones map normalised images to patch tokens, independently of video."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosettle_adapter.backbones.architectures import empty_model, load_tensors
from cosettle_adapter.backbones.backbone import Backbone, Positions
from cosettle_adapter.backbones.downloads import HubOptions
from cosettle_adapter.backbones.registry import REGISTRY, lookup
from cosettle_adapter.backbones.rows import BackboneRow
from cosettle_adapter.backbones.vit import VisionTransformerBackbone
from cosettle_adapter.backbones.weights import load_weights

__all__ = [
    "REGISTRY", "Backbone", "BackboneRow", "HubOptions", "Positions", "VisionTransformerBackbone",
    "build_backbone", "load_backbone", "lookup",
]  # fmt: skip


def load_backbone(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    stride: int | None = None,
    requires_input_grad: bool = False,
    options: HubOptions | None = None,
) -> Backbone:
    """Load a backbone by its registry name, ``timm:<tag>`` or ``open_clip:<arch>/<tag>``.

    Args:
        name: for example ``"dinov2-vits14-pypi"``; or a folder saved by transformers, for the patch
            tokens of its ``last_hidden_state``.
        weights: safetensors file, PyTorch checkpoint or folder saved by transformers, in timm's,
            the authors', OpenAI's or Hugging Face's layout, in place of the registered source.
        device, dtype: of the weights; positions stay float32.
        stride: step between patches in pixels; default: the patch size.
        requires_input_grad: record a graph from images to tokens when gradients are enabled.

    Raises:
        UnknownModelError: no such name.
        WeightsUnavailableError: no source provided the weights.
        CorruptWeightsError: the file is damaged or of another backbone.
    """
    row = lookup(name)
    loaded = load_weights(row, options or HubOptions(), path=weights)
    backbone = build_backbone(
        row, **loaded._asdict(), stride=stride, requires_input_grad=requires_input_grad
    )
    return backbone.to(device=device, dtype=dtype)


def build_backbone(
    row: BackboneRow, tensors: Mapping[str, Tensor], *, origin: str = "", **wrapping: Any
) -> Backbone:
    """Build a backbone from tensors in timm's names; ``wrapping`` goes to its class."""
    model = empty_model(row)
    in_float32 = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    load_tensors(model, in_float32, f"{row.name}, from {origin}" if origin else row.name)
    if row.kind == "vit":
        return VisionTransformerBackbone(model, row, origin=origin, **wrapping)
    from cosettle_adapter.backbones.feature_maps import FeatureMapBackbone  # rarely used

    return FeatureMapBackbone(model, row, origin=origin, **wrapping)
