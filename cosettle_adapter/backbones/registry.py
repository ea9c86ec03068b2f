"""Backbones by name: the table's rows, all models of timm, all image towers of open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import nn

from cosettle_adapter.backbones.rows import (
    POOLED_BEFORE_NORM,
    POOLED_NOTE,
    ROWS,
    BackboneRow,
    HubFile,
)
from cosettle_adapter.errors import UnknownModelError, did_you_mean

REGISTRY: dict[str, BackboneRow] = {row.name: row for row in ROWS}

TIMM, OPEN_CLIP = "timm:", "open_clip:"  # prefixes of names outside the table
TRANSFORMERS = "transformers:"  # prefix of folders' rows, which are found by path only

_PATCH = 16  # pixels per patch of the grid of feature maps, unless the name says otherwise
# timm's spelling: SPDX
_LICENCES = {row.licence.lower().removeprefix("licenseref-"): row.licence for row in ROWS}


def lookup(name: str | Path) -> BackboneRow:
    """Return the row of a registered name, ``timm:<tag>``, ``open_clip:<arch>/<tag>`` or a folder.

    The folder is one saved by transformers; a ``Path`` is always a folder.
    """
    text = name if isinstance(name, str) else ""
    if text in REGISTRY:
        return REGISTRY[text]
    if text.startswith(TIMM):
        return timm_row(text.removeprefix(TIMM))
    if text.startswith(OPEN_CLIP):
        from cosettle_adapter.backbones.open_clip import open_clip_row  # imports this module

        return open_clip_row(text.removeprefix(OPEN_CLIP))
    if is_model_folder(Path(name).expanduser()):
        from cosettle_adapter.backbones.folders import folder_row  # rarely used

        return folder_row(Path(name).expanduser())
    if text.startswith(TRANSFORMERS):
        raise UnknownModelError(
            f"{text} names a folder saved by transformers: give its path as the model, and the "
            "projection's folder as projection="
        )
    raise UnknownModelError(
        f"unknown backbone {str(name)!r}.{did_you_mean(str(name), REGISTRY)} "
        f"`cosettle-adapter list --backbones` lists all {len(REGISTRY)}; other models are "
        "timm:<tag>, open_clip:<arch>/<tag> or a folder saved by transformers."
    )


def is_backbone_name(name: str | Path) -> bool:
    """Whether :func:`lookup` has a row for a name."""
    known = isinstance(name, str) and (name in REGISTRY or name.startswith((TIMM, OPEN_CLIP)))
    return known or is_model_folder(Path(name).expanduser())


def is_model_folder(folder: Path) -> bool:
    """Whether a folder was saved by transformers, not by our ``save_pretrained``."""
    config, ours = folder / "config.json", folder / "projection.safetensors"
    return config.is_file() and not ours.is_file() and '"model_type"' in config.read_text("utf-8")


def timm_row(tag: str) -> BackboneRow:
    """Return the row of ``timm:<architecture>[.<pretraining>][@<pixels per patch>]``.

    For a model with several resolutions the grid is that of the stage with 16 pixels per patch, or
    with the number after ``@`` (``timm:resnet50.a1_in1k@8``).
    """
    name, at, pixels = tag.partition("@")
    architecture, _, pretraining = name.partition(".")
    config = _timm_config(architecture, pretraining)
    # The default tag of an architecture without published weights is not one that timm lists.
    pretraining = pretraining or (config.tag if config.has_weights else "")
    name = architecture + (f".{pretraining}" if pretraining else "") + at + pixels
    notes = []
    # timm lists weights trained with QuickGELU under the architecture with GELU as well.
    twin = architecture.replace("_clip_", "_clip_quickgelu_")
    if twin != architecture and timm.list_pretrained(f"{twin}.{pretraining}"):
        architecture, notes = twin, ["QuickGELU"]
    if not config.hf_hub_id:
        notes.append("no source on the Hub: pass backbone_weights=PATH")
    licence = config.license or "unstated"
    with torch.device("meta"):
        model: Any = timm.create_model(architecture, num_classes=0)
    kind = type(model).__name__
    row: dict[str, Any] = {
        "name": TIMM + name,
        "family": f"timm {kind}",
        "architecture": architecture,
        "image_size": config.input_size[-1],
        "licence": _LICENCES.get(licence.lower().removesuffix("-license"), licence),
        "hub": HubFile(config.hf_hub_id) if config.hf_hub_id else None,
        "mean": tuple(config.mean),
        "std": tuple(config.std),
    }
    plain = type(model) in (timm.models.VisionTransformer, timm.models.Eva)
    if plain and not at and not isinstance(model.patch_embed, HybridEmbed):
        positions = {"absolute": model.pos_embed, "rotary": getattr(model, "rope", None)}
        pooled = not isinstance(model.fc_norm, nn.Identity)
        return BackboneRow(
            **row,
            patch=model.patch_embed.patch_size[0],
            width=model.embed_dim,
            depth=len(model.blocks),
            options=POOLED_BEFORE_NORM[kind] if pooled else {},
            positions="+".join(name for name, has in positions.items() if has is not None)
            or "none",
            final_norm=not isinstance(model.norm, nn.Identity),
            note="; ".join(notes + [POOLED_NOTE] * pooled),
        )
    if not hasattr(model, "forward_intermediates"):
        raise UnknownModelError(
            f"timm's {architecture} is not supported: it does not return feature maps "
            "(forward_intermediates)"
        )
    stages = feature_info(model)
    known = {reduction for _, reduction in stages}
    patch = _PATCH if _PATCH in known else max(side for side in known if side <= 32)
    if at:
        if pixels not in map(str, known):
            raise UnknownModelError(
                f"{TIMM}{name} has no stage with {pixels or 'no number of'} pixels per patch; it "
                f"has {', '.join(map(str, sorted(known)))}"
            )
        patch = int(pixels)
    return BackboneRow(
        **row,
        patch=patch,
        width=[channels for channels, reduction in stages if reduction == patch][-1],
        depth=len(stages),
        kind="features",
        positions="none",
        final_norm=False,
        note="; ".join(notes),
    )


def feature_info(model: Any) -> list[tuple[int, int]]:
    """Return ``(channels, pixels per patch)`` of every feature map of a timm model."""
    info = getattr(model.feature_info, "info", model.feature_info)
    return [(int(stage["num_chs"]), int(stage["reduction"])) for stage in info]


def _timm_config(architecture: str, pretraining: str) -> Any:
    """timm's configuration of a pre-training, by default the default one."""
    config = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    if config is None:  # or timm has renamed it
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
        hint = did_you_mean(name, tags) if tags else f" It has no weights of {architecture}."
        raise UnknownModelError(f"timm {timm.__version__} has no weights {name!r}.{hint}")
    return timm.get_pretrained_cfg(name)
