"""What a layout is: one way of naming an image encoder's tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way of naming an image encoder's tensors.

    Attributes:
        name: what people call it.
        mark: end of a tensor name that only this layout has.
        convert: selects the image encoder and gives it timm's names and shapes.
    """

    name: str
    mark: str
    convert: Callable[[Tensors], Tensors]
