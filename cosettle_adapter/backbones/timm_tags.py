"""Rows for any timm model that can return maps: ``timm:<architecture>.<tag>[@<pixels a cell>]``."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import nn

from cosettle_adapter.backbones.row import BackboneRow, HubFile, PositionKind
from cosettle_adapter.backbones.timm_features import feature_info
from cosettle_adapter.errors import UnknownModelError, did_you_mean

PREFIX = "timm:"
_CELL = 16  # pixels a cell, where a model has several resolutions and the name does not choose
_POOLING = ("head.", "attn_pool.")  # have positions of their own
_LICENCES = {  # timm's spelling: SPDX
    "apache-2.0": "Apache-2.0",
    "mit": "MIT",
    "bsd-3-clause": "BSD-3-Clause",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "dinov3-license": "LicenseRef-DINOv3",
}


def resolve(tag: str) -> BackboneRow:
    """Make the row of ``timm:<tag>``.

    Normalisation, licence and source are timm's own. A model of one resolution is read block by
    block; of one with several, the stage with 16 pixels a cell is the grid, or the one that
    ``@<pixels>`` names (``timm:resnet50.a1_in1k@8``).

    Args:
        tag: what follows ``timm:``; without a pre-training tag, timm's default one.

    Raises:
        UnknownModelError: timm has no such model or tag, it cannot return maps, or has no stage
            with that many pixels a cell.
    """
    model_name, at, cell = tag.partition("@")
    architecture, _, pretraining = model_name.partition(".")
    config = _config(architecture, pretraining)
    # An architecture that nobody has published weights of has a tag that timm does not list.
    pretraining = pretraining or (config.tag if config.has_weights else "")
    name = architecture + (f".{pretraining}" if pretraining else "") + at + cell
    architecture, notes = _as_trained(architecture, pretraining)
    if not config.hf_hub_id:
        notes.append("no source on the Hub: give backbone_weights=PATH")
    with torch.device("meta"):
        model: Any = timm.create_model(architecture, num_classes=0)
    common: dict[str, Any] = {
        "name": PREFIX + name,
        "family": f"timm {type(model).__name__}",
        "architecture": architecture,
        "image_size": config.input_size[-1],
        "licence": _LICENCES.get(str(config.license).lower(), config.license or "unstated"),
        "hub": HubFile(config.hf_hub_id) if config.hf_hub_id else None,
        "positions": _positions(model),
        "mean": tuple(config.mean),
        "std": tuple(config.std),
        "note": "; ".join(notes),
    }
    if _constant_resolution(model) and not at:
        patch = model.patch_embed.patch_size[0]
        return BackboneRow(
            **common,
            patch=patch,
            width=model.embed_dim,
            depth=len(model.blocks),
            final_norm=_has_final_norm(architecture),
        )
    stages = _stages(model, architecture)
    pixels = _cell(cell if at else None, stages, name)
    width = [channels for channels, reduction in stages if reduction == pixels][-1]
    return BackboneRow(
        **common,
        patch=pixels,
        width=width,
        depth=len(stages),
        kind="features",
        final_norm=False,
        ignored=(),  # which tensors are a head's is found out from the model
    )


def _as_trained(architecture: str, pretraining: str) -> tuple[str, list[str]]:
    """Swap in the QuickGELU twin of an architecture, for weights that timm lists under both."""
    twin = architecture.replace("_clip_", "_clip_quickgelu_")
    if twin != architecture and timm.list_pretrained(f"{twin}.{pretraining}"):
        return twin, ["QuickGELU"]
    return architecture, []


def _config(architecture: str, pretraining: str) -> Any:
    """timm's configuration of a pre-training, or of the default one."""
    config = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    if config is None:  # also what timm calls by another name now
        known = (*timm.list_models(), *timm.list_pretrained())
        raise UnknownModelError(
            f"timm {timm.__version__} has no model {architecture!r}."
            f"{did_you_mean(architecture, known)}"
        )
    if not pretraining:
        return config
    name = f"{architecture}.{pretraining}"
    tags = timm.list_pretrained(f"{architecture}.*")
    if name not in tags:
        hint = did_you_mean(name, tags) if tags else f" It has none of {architecture} at all."
        raise UnknownModelError(f"timm {timm.__version__} has no weights {name!r}.{hint}")
    return timm.get_pretrained_cfg(name)


def _constant_resolution(model: nn.Module) -> bool:
    """Whether ``vit.py`` reads it: plain patches through the blocks of timm's ViT or Eva."""
    plain = type(model) in (timm.models.VisionTransformer, timm.models.Eva)
    return plain and not isinstance(model.patch_embed, HybridEmbed)


def _has_final_norm(architecture: str) -> bool:
    with torch.device("meta"):
        model: Any = timm.create_model(architecture, num_classes=0, global_pool="")
    return not isinstance(model.norm, nn.Identity)


def _positions(model: Any) -> PositionKind:
    absolute = getattr(model, "pos_embed", None) is not None or any(
        name.rpartition(".")[2].startswith("pos_embed") and not name.startswith(_POOLING)
        for name, _ in model.named_parameters()
    )
    rotary = getattr(model, "rope", None) is not None
    if absolute and rotary:
        return "absolute+rotary"
    return "rotary" if rotary else "absolute" if absolute else "none"


def _stages(model: Any, architecture: str) -> list[tuple[int, int]]:
    """``(channels, pixels a cell)`` of every feature map."""
    if not hasattr(model, "forward_intermediates"):
        raise UnknownModelError(
            f"timm's {architecture} does not return feature maps (forward_intermediates), so it "
            "cannot be a backbone here"
        )
    return feature_info(model)


def _cell(given: str | None, stages: list[tuple[int, int]], name: str) -> int:
    known = sorted({reduction for _, reduction in stages})
    if given is None:
        return _CELL if _CELL in known else max(pixels for pixels in known if pixels <= 32)
    if not given.isdigit() or int(given) not in known:
        raise UnknownModelError(
            f"{PREFIX}{name} has no stage with {given or 'no number of'} pixels a cell; it has "
            f"{', '.join(map(str, known))}"
        )
    return int(given)
