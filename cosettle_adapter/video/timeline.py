"""Frames whose times are known and whose pixels are not made yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PendingFrame:
    """A frame whose time is known and whose pixels cost something.

    Attributes:
        time: seconds from the start of the source.
        name: what errors call it: a file, or a position.
        load: makes the pixels, (3, H, W) uint8 or float in [0, 1].
    """

    time: float
    name: str
    load: Callable[[], Tensor]
