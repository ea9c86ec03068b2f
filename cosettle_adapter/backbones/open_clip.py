"""Rows for open_clip's image towers: ``open_clip:<architecture>/<tag>[@<pixels per patch>]``.

open_clip's towers run at one resolution, timm's models with the same tensors at any. A row is
therefore a timm architecture with options, and :mod:`cosettle_adapter.backbones.layouts` renames
the tensors. Only open_clip's lists of architectures and tags are used.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import posixpath
import textwrap
from typing import Any

from cosettle_adapter.backbones.registry import OPEN_CLIP, timm_row
from cosettle_adapter.backbones.rows import OPENAI_MEAN, OPENAI_STD, BackboneRow, HubFile
from cosettle_adapter.errors import UnknownModelError, did_you_mean

# Files of a repository that open_clip's table lists without a file; older ones have the second.
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_LICENCES = {  # by pattern of "<Hub repository>:<tag>"; the first match counts
    "*:openai": "MIT",
    "*:metaclip*": "CC-BY-NC-4.0",
    "*:dfndr*": "LicenseRef-Apple-AMLR",
    "*:datacompdr*": "LicenseRef-Apple-AMLR",
    "apple/DFN*": "LicenseRef-Apple-ASCL",
    "laion/*": "MIT",
    "timm/*:laion*": "MIT",
    "timm/eva*": "MIT",
    "timm/resnet*": "MIT",
    "timm/PE-Core-*": "Apache-2.0",
    "timm/ViT-*-SigLIP*": "Apache-2.0",
    "jienengchen/ViTamin*": "MIT",
    "*": "unstated",
}
_RESNETS = {  # blocks per stage: timm's ResNet without attention pooling
    (3, 4, 6, 3): "resnet50_clip_gap",
    (3, 4, 23, 3): "resnet101_clip_gap",
    (4, 6, 10, 6): "resnet50x4_clip_gap",
    (6, 8, 18, 8): "resnet50x16_clip_gap",
    (3, 15, 36, 10): "resnet50x64_clip_gap",
}
_SUPPORTED = {  # fields of open_clip's config that a row can express
    "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value",
    "no_ln_pre", "attentional_pool", "final_ln_after_pool",
}  # fmt: skip
_IGNORED = {  # without effect on patch tokens at inference; files store sinusoidal positions
    "patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "pool_type", "output_tokens",
    "pos_embed_type", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path",
    "timm_model_pretrained",
}  # fmt: skip


def open_clip_row(rest: str) -> BackboneRow:
    """Return the row of ``open_clip:<rest>``; only models without published weights lack a tag."""
    import open_clip  # takes seconds, and only these names need it

    name, at, pixels = rest.partition("@")
    architecture, _, tag = name.partition("/")
    if architecture not in open_clip.list_models():
        raise UnknownModelError(
            f"open_clip {open_clip.__version__} has no architecture {architecture!r}."
            f"{did_you_mean(architecture, open_clip.list_models())}"
        )
    tag = _known_tag(architecture, tag, open_clip.list_pretrained_tags_by_model(architecture))
    config = open_clip.get_model_config(architecture)
    weights = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
    row_name = OPEN_CLIP + architecture + (f"/{tag}" if tag else "") + at + pixels
    notes: list[str] = []
    resnet = isinstance(vision.layers, (list, tuple)) and _RESNETS.get(tuple(vision.layers))
    if timm_name := vision.timm_model_name or resnet:
        row = timm_row(timm_name + at + pixels)
    elif at:
        raise UnknownModelError(f"all layers of {architecture} have one resolution; omit @{pixels}")
    else:
        # open_clip itself uses GELU, with a warning, if only the tag says QuickGELU.
        quick_gelu = bool(config.get("quick_gelu") or weights.get("quick_gelu"))
        row, notes = _vit(vision, row_name, quick_gelu=quick_gelu)
    repo, filename = posixpath.split(weights.get("hf_hub") or "")
    if not repo and (url := weights.get("url")):
        notes.append(f"not on the Hub: download {url} and pass backbone_weights=PATH")
    elif not repo:
        notes.append("open_clip publishes no weights: pass backbone_weights=PATH")
    source = f"{repo}:{tag}"
    family = "SigLIP" if "init_logit_bias" in config else "CLIP"
    return dataclasses.replace(
        row,
        name=row_name,
        family="CoCa" if "multimodal_cfg" in config else family,
        licence=next(text for key, text in _LICENCES.items() if fnmatch.fnmatchcase(source, key)),
        hub=HubFile(repo, (filename,) if filename else _WEIGHTS) if repo else None,
        mean=tuple(weights.get("mean") or OPENAI_MEAN),
        std=tuple(weights.get("std") or OPENAI_STD),
        note="; ".join(notes),
    )


def _known_tag(architecture: str, tag: str, tags: list[str]) -> str:
    """Return a tag as open_clip spells it; an unknown one is an UnknownModelError."""
    clean = tag.lower().replace("-", "_")
    if clean in tags or (not tag and not tags):
        return clean
    problem = f"has no tag {tag!r}" if tag else "needs a tag"
    shown = textwrap.shorten(", ".join(tags), 300, placeholder=" ...") or "none"
    example = f"/{tags[0]}" if tags else ", with backbone_weights=PATH"
    raise UnknownModelError(
        f"open_clip's {architecture} {problem}.{did_you_mean(clean, tags)} "
        f"Its tags: {shown}; write {OPEN_CLIP}{architecture}{example}"
    )


def _vit(vision: Any, name: str, *, quick_gelu: bool) -> tuple[BackboneRow, list[str]]:
    """Express open_clip's ViT by options of timm's; also return notes on it."""
    for field in dataclasses.fields(vision):
        value = getattr(vision, field.name)
        known = field.name in _SUPPORTED and isinstance(value, (bool, int, float))
        if not known and field.name not in _IGNORED and value != field.default:
            raise UnknownModelError(
                f"{name} is not supported: timm has no model for a tower with "
                f"{field.name}={value!r}"
            )
    notes = ["QuickGELU"] if quick_gelu else []
    if vision.attentional_pool:
        notes.append("no final norm: this tower's norm comes after its attention pooling")
    elif vision.final_ln_after_pool:
        notes.append("trained to normalise the mean of its patch tokens, not the tokens")
    row = BackboneRow(
        name=name,
        family="",
        architecture="vit_base_patch16_clip_224",
        patch=vision.patch_size,
        width=vision.width,
        depth=vision.layers,
        licence="",
        image_size=vision.image_size,
        options={
            "img_size": vision.image_size,
            "patch_size": vision.patch_size,
            "embed_dim": vision.width,
            "depth": vision.layers,
            "num_heads": vision.width // vision.head_width,
            "mlp_ratio": vision.mlp_ratio,
            "pre_norm": not vision.no_ln_pre,
            "act_layer": "quick_gelu" if quick_gelu else "gelu",
            "init_values": vision.ls_init_value,
            "final_norm": not vision.attentional_pool,
        },
        final_norm=not (vision.attentional_pool or vision.final_ln_after_pool),
    )
    return row, notes
