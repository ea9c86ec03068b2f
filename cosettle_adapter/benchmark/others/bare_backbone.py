"""timm's model by itself, on images that are normalised already.

It stands for what anybody would write who wants the same tokens and nothing else: one
``timm.create_model``, the weights, ``forward_intermediates``. It is given every advantage: it is
made for the one image size it will see, so that no call resizes positions; it stops at the block
that is read; it runs in inference mode; and its images are on the device in the right dtype.
"""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone


class BareBackbone:
    """A timm model that returns the tokens a projection reads."""

    def __init__(self, adapter: CoSettleAdapter, size: tuple[int, int]) -> None:
        """Make timm's model for images of ``size`` with the tensors of ``adapter``'s backbone."""
        config = adapter.config
        self.model: Any = _model(adapter.backbone, size)
        self._layers = [adapter.backbone.block(layer) for layer in config.layers]
        self._norm = {"norm": config.norm} if adapter.backbone.row.kind == "vit" else {}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return ``(B, C, h, w)`` tokens of normalised images ``(B, 3, H, W)``."""
        maps = self.model.forward_intermediates(
            images,
            indices=sorted(set(self._layers)),
            stop_early=True,
            intermediates_only=True,
            output_fmt="NCHW",
            **self._norm,
        )
        if len(maps) == 1:
            only: Tensor = maps[0]
            return only
        at = dict(zip(sorted(set(self._layers)), maps, strict=True))
        return torch.cat([at[layer] for layer in self._layers], dim=1)

    def compile(self) -> None:
        """Compile each block."""
        for block in self.model.blocks:
            block.compile()


def _model(backbone: Backbone, size: tuple[int, int]) -> nn.Module:
    row = backbone.row
    if row.kind != "vit":
        own: Any = backbone.model  # pruned; with its positions, if any, for its own size
        return cast(nn.Module, own)
    options = {"num_classes": 0, "global_pool": "", **row.options, "img_size": size}
    model: nn.Module = timm.create_model(row.architecture, pretrained=False, **options)
    vit: Any = backbone.vit
    state = dict(vit.state_dict())
    if state.get("pos_embed") is not None:
        state["pos_embed"] = backbone.positions(backbone.grid(*size)).absolute
    model.load_state_dict(state)
    model = model.eval().requires_grad_(False)
    return model.to(device=backbone.device, dtype=backbone.dtype)
