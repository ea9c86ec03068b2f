"""Encoders of several resolutions: convolutional and hierarchical ones."""

from __future__ import annotations

from typing import Any

from cosettle_adapter.backbones.row import BackboneRow, HubFile
from cosettle_adapter.backbones.rows.common import DINOV3_LICENCE, DINOV3_NOTE, NON_COMMERCIAL


def _features(
    name: str, family: str, tag: str, width: int, depth: int, licence: str, **changes: Any
) -> BackboneRow:
    """A backbone of several resolutions; its grid is the stage with 16 pixels a cell."""
    return BackboneRow(
        name=name,
        family=family,
        architecture=tag.partition(".")[0],
        patch=16,
        width=width,
        depth=depth,
        image_size=224,
        kind="features",
        final_norm=False,
        licence=licence,
        hub=HubFile(f"timm/{tag}"),
        **{"positions": "none", **changes},
    )


ROWS = (
    _features("resnet50", "ResNet (supervised)", "resnet50.a1_in1k", 1024, 5, "Apache-2.0"),
    _features(
        "convnextv2-base",
        "ConvNeXt V2 (FCMAE)",
        "convnextv2_base.fcmae",
        512,
        4,
        "CC-BY-NC-4.0",
        note=NON_COMMERCIAL,
    ),
    _features(
        "dinov3-convnext-base",
        "DINOv3 (ConvNeXt)",
        "convnext_base.dinov3_lvd1689m",
        512,
        4,
        DINOV3_LICENCE,
        note=DINOV3_NOTE,
    ),
    _features(
        "swin-base", "Swin (supervised)", "swin_base_patch4_window7_224.ms_in22k", 512, 4, "MIT"
    ),
    _features(
        "hiera-base",
        "Hiera (MAE)",
        "hiera_base_224.mae",
        384,
        4,
        "CC-BY-NC-4.0",
        positions="absolute",
        note=NON_COMMERCIAL,
    ),
)
