"""A clip's features before and after the projection, from one pass of the backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter

RAW_LAST = "raw last block"
RAW_SAME = "raw same block"
CENTRED = "centred"
ADAPTED = "adapted"


def compare_features(
    adapter: CoSettleAdapter,
    frames: Tensor,
    *,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 4,
    on_frames: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Return a clip's adapted features and what they must be compared with.

    Most of what a projection seems to gain over the last block can come from reading another
    block, or from no longer carrying the mean token; so both stand beside it. All are read in one
    pass of the backbone.

    Args:
        adapter: backbone and projection.
        frames: ``(T, 3, H, W)`` uint8.
        size: what frames are resized to, as in the adapter's ``forward``.
        batch_size: frames a forward pass.
        on_frames: called with the number of frames done, after each pass.

    Returns:
        ``(T, C, h, w)`` float32 on the CPU for each of ``raw last block``, ``raw same block``
        (the blocks that the projection reads; left out when that is the last block),
        ``centred`` (those minus the clip's mean token) and ``adapted``.
    """
    last: list[Tensor] = []
    same: list[Tensor] = []
    adapted: list[Tensor] = []
    done = 0
    for batch in torch.split(frames, batch_size):
        final, read = _read_blocks(adapter, adapter.preprocess(batch, size=size))
        last.append(final.float().cpu())
        same.append(read.float().cpu())
        with torch.no_grad():
            adapted.append(adapter.projection(read).float().cpu())
        done += len(batch)
        if on_frames is not None:
            on_frames(done)
    raw_last, raw_same = torch.cat(last), torch.cat(same)
    variants = {RAW_LAST: raw_last}
    if raw_same.shape != raw_last.shape or not torch.equal(raw_same, raw_last):
        variants[RAW_SAME] = raw_same
    variants[CENTRED] = raw_same - raw_same.mean(dim=(0, 2, 3), keepdim=True)
    variants[ADAPTED] = torch.cat(adapted)
    return variants


def _read_blocks(adapter: CoSettleAdapter, images: Tensor) -> tuple[Tensor, Tensor]:
    """Last block's tokens, and those the projection reads, ``(B, C, h, w)``; one pass if it can."""
    backbone, config = adapter.backbone, adapter.config
    final = backbone.default_layer
    usual = [backbone.block(layer) == final and backbone.row.final_norm for layer in config.layers]
    if all(norm == config.norm for norm in usual):
        *read, last = backbone.intermediate_tokens(images, (*config.layers, final))
    else:
        read = backbone.intermediate_tokens(images, config.layers, norm=config.norm)
        last = backbone.patch_tokens(images)
    return last, torch.cat(read, dim=1)
