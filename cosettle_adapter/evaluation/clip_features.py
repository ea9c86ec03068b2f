"""A clip of a data set as every kind of features that is compared, one kind after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosettle_adapter.analysis import FeatureKind, read_blocks
from cosettle_adapter.video import open_frames

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.evaluation.datasets import Clip


def clip_features(
    adapter: CoSettleAdapter,
    clip: Clip,
    kinds: Sequence[FeatureKind],
    *,
    size: tuple[int, int],
    batch_size: int = 8,
) -> Iterator[tuple[str, Tensor]]:
    """Encode a clip in one pass of the backbone.

    What the backbone returned is kept; of the features made of it, one kind at a time.

    Args:
        adapter: gives the backbone.
        clip: frames of one size.
        kinds: see :func:`~cosettle_adapter.analysis.feature_kinds`.
        size: what frames are resized to, ``(height, width)``.
        batch_size: frames a forward pass.

    Yields:
        Name of a kind and its features ``(T, C, h, w)``, float32 on the CPU.

    Raises:
        FrameError: a frame that cannot be read.
    """
    wanted = list(dict.fromkeys(kind.blocks for kind in kinds))
    parts: dict[object, list[Tensor]] = {blocks: [] for blocks in wanted}
    frames = (clip.read_frame(index) for index in range(len(clip)))
    for chunk in open_frames(frames, chunk_size=batch_size):
        images = adapter.preprocess(chunk.frames, size=size)
        for blocks, maps in read_blocks(adapter.backbone, images, wanted).items():
            parts[blocks].append(maps.float().cpu())
    tokens = {blocks: torch.cat(parts.pop(blocks)) for blocks in wanted}
    for kind in kinds:
        yield kind.name, kind.of_clip(tokens[kind.blocks].to(adapter.device)).cpu()
