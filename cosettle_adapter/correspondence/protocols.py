"""The published label-propagation protocols, as rows of data.

They differ in more than numbers: a figure is only comparable with others of the same protocol,
frame size and frame rate.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Protocol = Literal["crw", "dino"]


@dataclasses.dataclass(frozen=True)
class PropagationProtocol:
    """How labels reach a frame from the frames before it.

    Attributes:
        context: preceding frames that are looked at besides the first.
        radius: how far from its own place a cell may look, in cells; ``math.inf`` for anywhere.
        topk: most similar cells, over all context frames together, whose labels are averaged.
        temperature: the average's weights are the softmax of cosine / temperature.
        neighbourhood: ``disk`` is Euclidean distance strictly below the radius, ``square`` is
            row and column distance up to and including it.
        restrict_first: apply the neighbourhood to the first frame as well.
        repeat_first: before ``context`` preceding frames exist, copies of the first frame (under
            the neighbourhood) stand in for the missing ones and compete for the top-k.
    """

    context: int
    radius: float
    topk: int
    temperature: float
    neighbourhood: Literal["disk", "square"]
    restrict_first: bool
    repeat_first: bool

    def __post_init__(self) -> None:
        if self.context < 0:
            raise ValueError(f"context must be 0 or more preceding frames, got {self.context}")
        if self.topk < 1:
            raise ValueError(f"topk must be at least 1 cell, got {self.topk}")
        if not self.radius > 0:
            raise ValueError(
                f"radius must be above 0 cells, got {self.radius}; use math.inf to look anywhere"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


PROTOCOLS: dict[str, PropagationProtocol] = {
    # videowalk's test.py as SiamMAE and CropMAE use it. Its loader puts `context` copies of frame
    # 0 before the clip: they lie in the sliding window, hence under the radius, and count once
    # each. So frame 1 takes all seven votes from the single best cell near by: a plain copy.
    "crw": PropagationProtocol(
        context=20,
        radius=20,
        topk=7,
        temperature=0.7,
        neighbourhood="disk",
        restrict_first=False,
        repeat_first=True,
    ),
    # DINO's eval_video_segmentation.py: the queue starts empty and never holds frame 0.
    "dino": PropagationProtocol(
        context=7,
        radius=12,
        topk=5,
        temperature=0.1,
        neighbourhood="square",
        restrict_first=True,
        repeat_first=False,
    ),
}
