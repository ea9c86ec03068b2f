"""Transformers pre-trained on video frames, to compare with."""

from __future__ import annotations

from typing import Any

from cosettle_adapter.backbones.row import BackboneRow, HubFile
from cosettle_adapter.backbones.rows.common import SIZES


def _video(name: str, family: str, size: str, licence: str, **changes: Any) -> BackboneRow:
    """A video-pretrained ViT that people compare with."""
    timm_size, width, depth = SIZES[size]
    return BackboneRow(
        name=name,
        family=family,
        architecture=f"vit_{timm_size}_patch16_224",
        patch=16,
        width=width,
        depth=depth,
        image_size=224,
        licence=licence,
        **changes,
    )


def _tcore(name: str, size: str, file: str) -> BackboneRow:
    return _video(
        name,
        "T-CoRe",
        size,
        "Apache-2.0",
        options={"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
        hub=HubFile("yafeng19/T-CORE", f"ckpt/{file}.pth"),
        note="trained on video frames",
    )


_OWN_FILE = "no public source is registered: give the authors' file as backbone_weights=PATH"

ROWS = (
    _video(
        "siammae-vits16",
        "SiamMAE",
        "s",
        "LicenseRef-unstated",
        interpolation="scale+0.1",
        note=_OWN_FILE,
    ),
    _video(
        "cropmae-vits16",
        "CropMAE",
        "s",
        "LicenseRef-unstated",
        interpolation="scale+0.1",
        note=_OWN_FILE,
    ),
    _tcore("tcore-vits16-in1k", "s", "vits16_100ep_INET"),
    _tcore("tcore-vits16-k400", "s", "vits16_400ep_K400"),
    _tcore("tcore-vitb16-k400", "b", "vitb16_200ep_K400"),
)
