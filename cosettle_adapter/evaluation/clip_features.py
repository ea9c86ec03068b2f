"""A clip of a data set as every kind of features that a projection is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from einops import reduce
from torch import Tensor

from cosettle_adapter.analysis import ADAPTED, CENTRED, RAW_LAST, RAW_SAME
from cosettle_adapter.evaluation.encoding import encoded_chunks, joined

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.evaluation.datasets import Clip

KINDS = (RAW_LAST, RAW_SAME, CENTRED, ADAPTED)


def clip_features(
    adapter: CoSettleAdapter, clip: Clip, *, size: tuple[int, int], batch_size: int = 8
) -> dict[str, Tensor]:
    """Encode a clip in one pass of the backbone.

    Args:
        adapter: backbone and projection; without a projection (``CoSettleAdapter.raw``) there
            are no adapted features.
        clip: frames of one size.
        size: what frames are resized to, ``(height, width)``.
        batch_size: frames a forward pass.

    Returns:
        Kind to ``(T, C, h, w)`` float32 on the CPU, in the order of :data:`KINDS`: the raw last
        block, the raw block that the projection reads where that is another, that block minus
        the clip's mean token, and the adapted features.

    Raises:
        FrameError: a frame that cannot be read.
    """
    frames = (clip.read_frame(index) for index in range(len(clip)))
    features, _ = joined(encoded_chunks(adapter, frames, size=size, batch_size=batch_size))
    same = features.get(RAW_SAME, features[RAW_LAST])
    features[CENTRED] = same - reduce(same, "t c h w -> 1 c 1 1", "mean")
    return {kind: features[kind] for kind in KINDS if kind in features}
