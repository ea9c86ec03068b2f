"""The eight image-pretrained encoders of the paper, and their relatives of other sizes.

What distinguishes them is tabled from the official code: tokens, final norm, QuickGELU, registers,
how positions are resized, and ImageNet mean and std for all of them.
"""

from __future__ import annotations

from typing import Any

from cosettle_adapter.backbones.row import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPENAI_MEAN,
    OPENAI_STD,
    BackboneRow,
    HubFile,
    PositionInterpolation,
    Release,
)
from cosettle_adapter.backbones.rows.common import NON_COMMERCIAL, SIZES

_BENCHMARKS = ("DAVIS J&F", "VIP mIoU", "JHMDB PCK@0.1")


def _reported(name: str, *figures: tuple[float, float]) -> Release:
    """What the paper reports: the backbone alone, then with its projection."""
    return Release(name, reported=dict(zip(_BENCHMARKS, figures, strict=True)))


def _mae(size: str, patch: int, release: Release | None = None) -> BackboneRow:
    timm_size, width, depth = SIZES[size]
    architecture = f"vit_{timm_size}_patch{patch}_224"
    return BackboneRow(
        name=f"mae-vit{size}{patch}",
        family="MAE",
        architecture=architecture,
        patch=patch,
        width=width,
        depth=depth,
        image_size=224,
        interpolation="scale+0.1",
        licence="CC-BY-NC-4.0",
        hub=HubFile(f"timm/{architecture}.mae"),
        release=release,
        note=NON_COMMERCIAL,
    )


def _dino(size: str, patch: int, release: Release | None = None) -> BackboneRow:
    timm_size, width, depth = SIZES[size]
    architecture = f"vit_{timm_size}_patch{patch}_224"
    return BackboneRow(
        name=f"dino-vit{size}{patch}",
        family="DINO",
        architecture=architecture,
        patch=patch,
        width=width,
        depth=depth,
        image_size=224,
        interpolation="scale+0.1",
        licence="Apache-2.0",
        hub=HubFile(f"timm/{architecture}.dino"),
        release=release,
    )


def _clip(size: str, patch: int, side: int, **changes: Any) -> BackboneRow:
    timm_size, width, depth = SIZES[size]
    suffix = "" if side == 224 else f"-{side}"
    values: dict[str, Any] = {
        "name": f"clip-vit{size}{patch}{suffix}",
        "family": "CLIP",
        "architecture": f"vit_{timm_size}_patch{patch}_clip_quickgelu_{side}",
        "patch": patch,
        "width": width,
        "depth": depth,
        "image_size": side,
        "licence": "MIT",
        "hub": HubFile(f"timm/vit_{timm_size}_patch{patch}_clip_{side}.openai"),
        "mean": OPENAI_MEAN,
        "std": OPENAI_STD,
        "note": "QuickGELU",
    }
    return BackboneRow(**{**values, **changes})


def _in1k_b16(
    name: str,
    family: str,
    licence: str,
    release: Release,
    *,
    interpolation: PositionInterpolation = "scale+0.1",
    note: str = "",
    **changes: Any,
) -> BackboneRow:
    """A ViT-B/16 of the paper that no public tag has: its weights come with the release."""
    return BackboneRow(
        name=name,
        family=family,
        architecture="vit_base_patch16_224",
        patch=16,
        width=768,
        depth=12,
        image_size=224,
        licence=licence,
        interpolation=interpolation,
        release=release,
        note=note,
        **changes,
    )


_PAPER = (
    _in1k_b16(
        "ijepa-vitb16",
        "I-JEPA",
        "CC-BY-NC-4.0",
        _reported("ijepa", (53.9, 58.7), (31.5, 35.3), (42.6, 44.4)),
        options={"class_token": False},
        final_norm=False,
        note=f"{NON_COMMERCIAL}; tokens before the final norm, as the paper trains on them",
    ),
    _in1k_b16(
        "blip-vitb16",
        "BLIP",
        "BSD-3-Clause",
        _reported("blip", (58.8, 62.0), (37.6, 39.6), (35.1, 38.9)),
        interpolation="size+antialias",
        load_interpolation="size",
        note="image tower of the COCO retrieval model",
    ),
    _in1k_b16(
        "mocov3-vitb16",
        "MoCo v3",
        "CC-BY-NC-4.0",
        _reported("mocov3", (62.6, 62.9), (38.8, 39.8), (43.6, 45.3)),
        note=f"{NON_COMMERCIAL}; momentum encoder",
    ),
    _in1k_b16(
        "ibot-vitb16",
        "iBOT",
        "Apache-2.0",
        _reported("ibot", (64.6, 65.1), (39.6, 40.8), (45.7, 46.1)),
        note="teacher",
    ),
    _in1k_b16(
        "dinov2-vitb16-in1k",
        "DINOv2 (ImageNet)",
        "Apache-2.0",
        _reported("dinov2", (63.1, 63.7), (38.4, 39.9), (46.6, 47.3)),
        interpolation="size+antialias",
        options={"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
        note="patch 16, 100 epochs on ImageNet, 4 registers; not Meta's LVD-142M release",
    ),
)

ROWS = (
    _mae("b", 16, _reported("mae", (52.4, 59.6), (29.3, 33.8), (41.6, 48.4))),
    _PAPER[0],
    _clip(
        "b",
        16,
        224,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        release=_reported("clip", (54.9, 58.3), (38.1, 39.2), (36.9, 40.6)),
        note="QuickGELU; ImageNet mean and std, as the paper trains and evaluates it",
    ),
    *_PAPER[1:4],
    _dino("b", 16, _reported("dino", (63.2, 64.2), (39.1, 39.8), (44.4, 46.2))),
    _PAPER[4],
    # their relatives, which the paper did not use
    _dino("s", 16),
    _dino("s", 8),
    _dino("b", 8),
    _mae("l", 16),
    _mae("h", 14),
    _clip("l", 14, 224),
    _clip("l", 14, 336),
)
