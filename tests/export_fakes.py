"""One small random encoder of each family that is exported and compiled in tests."""

from __future__ import annotations

import dataclasses
import functools

import torch
from training_fakes import SMALL_CLIP, SMALL_VIT

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import BackboneRow, build_backbone
from cosettle_adapter.backbones.weights import fingerprint

from helpers import TINY, projection_for, tiny_state

_SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 2}
ROWS: dict[str, BackboneRow] = {
    "vit": SMALL_VIT,
    "dinov2": dataclasses.replace(
        TINY, name="small-dinov2", architecture="vit_small_patch14_dinov2", patch=14, width=48,
        depth=2, image_size=518, interpolation="scale+0.1", options=_SMALL,
    ),
    "clip": SMALL_CLIP,
    "rotary": dataclasses.replace(
        TINY, name="small-dinov3", architecture="vit_small_patch16_dinov3", width=48, depth=2,
        image_size=256, positions="rotary", options=_SMALL,
    ),
    "convnext": dataclasses.replace(
        TINY, name="small-convnext", kind="features", architecture="convnext_atto", width=32,
        depth=4, positions="none", final_norm=False,
        options={"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 48)},
    ),
}  # fmt: skip


@functools.cache
def small_adapter(
    name: str, *, dtype: torch.dtype = torch.float32, stride: int | None = None
) -> CoSettleAdapter:
    """A random encoder of a family with a random projection of its last but one layer.

    That of DINOv2 averages patches, as projections fitted on first use do.
    """
    row = ROWS[name]
    state = tiny_state(row)
    backbone = build_backbone(row, state, fingerprint=fingerprint(state), stride=stride).to(dtype)
    width, layer = backbone.widths[-2], backbone.depth - 2
    averaging = 0.2 if name == "dinov2" else 0.0
    projection = projection_for(
        backbone, layers=(layer,), in_width=width, out_width=width, averaging=averaging
    )
    return CoSettleAdapter(backbone, projection)
