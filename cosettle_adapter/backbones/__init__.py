"""Backbones: normalised images to patch tokens. Nothing here knows about video."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cosettle_adapter.backbones.registry import REGISTRY, BackboneRow, lookup
from cosettle_adapter.backbones.vit import VisionTransformerBackbone
from cosettle_adapter.backbones.weights import HubOptions, load_weights
from cosettle_adapter.errors import CorruptWeightsError

__all__ = [
    "REGISTRY",
    "BackboneRow",
    "HubOptions",
    "VisionTransformerBackbone",
    "build_backbone",
    "load_backbone",
    "lookup",
]

logger = logging.getLogger(__name__)


def load_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    stride: int | None = None,
    requires_input_grad: bool = False,
    options: HubOptions | None = None,
) -> VisionTransformerBackbone:
    """Load a registered backbone, frozen and in eval mode.

    Args:
        name: registry name, for example ``"dinov2-vits14-pypi"``.
        weights: a safetensors file in timm's layout to use in place of the registered sources.
        device: where to put it.
        dtype: dtype of the weights; positions stay float32.
        stride: step between patches in pixels; the patch size by default.
        requires_input_grad: record a graph from images to tokens when gradients are enabled.
        options: cache, revision, token and network.

    Raises:
        UnknownModelError: no such name.
        WeightsUnavailableError: no source could deliver the weights.
        CorruptWeightsError: the weights are not this backbone's.
    """
    row = lookup(name)
    loaded = load_weights(row, options or HubOptions(), path=weights)
    backbone = build_backbone(
        row,
        loaded.tensors,
        fingerprint=loaded.fingerprint,
        origin=loaded.origin,
        revision=loaded.revision,
        stride=stride,
        requires_input_grad=requires_input_grad,
    )
    return backbone.to(device=device, dtype=dtype)


def build_backbone(
    row: BackboneRow,
    tensors: Mapping[str, Tensor],
    *,
    fingerprint: str,
    origin: str = "",
    revision: str | None = None,
    stride: int | None = None,
    requires_input_grad: bool = False,
) -> VisionTransformerBackbone:
    """Build a row's architecture around a state dict in timm's names.

    Raises:
        CorruptWeightsError: tensors are missing, unexpected or misshapen; all are listed.
    """
    # On the meta device nothing is initialised only to be overwritten.
    with torch.device("meta"):
        vit: Any = timm.create_model(row.architecture, num_classes=0, pretrained=False)
    _check_tensors(vit, tensors, row)
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    vit.load_state_dict(floats, strict=True, assign=True)
    return VisionTransformerBackbone(
        vit,
        row,
        fingerprint=fingerprint,
        origin=origin,
        revision=revision,
        stride=stride,
        requires_input_grad=requires_input_grad,
    )


def _check_tensors(vit: nn.Module, tensors: Mapping[str, Tensor], row: BackboneRow) -> None:
    expected = vit.state_dict()
    faults = [f"missing {name}" for name in expected if name not in tensors]
    faults += [f"unexpected {name}" for name in tensors if name not in expected]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if faults:
        shown = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if faults[10:] else "")
        raise CorruptWeightsError(f"these are not the weights of {row.name}: {shown}")
