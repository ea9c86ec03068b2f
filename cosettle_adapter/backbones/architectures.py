"""A row's architecture as an empty timm model, and whether tensors are exactly its own."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cosettle_adapter.backbones.rows import BackboneRow
from cosettle_adapter.errors import CorruptWeightsError


def meta_model(row: BackboneRow, *, whole: bool = False) -> nn.Module:
    """Create a row's architecture without memory: names, shapes and structure only.

    ``whole`` keeps the classifier and final norm that feature maps do not go through.
    """
    with torch.device("meta"):
        return _create(row, whole=whole)


def empty_model(row: BackboneRow) -> nn.Module:
    """Create a row's architecture whose parameters are about to be replaced."""
    # Buffers that no file stores (rotary frequencies, window indices) are computed for real.
    with torch.random.fork_rng(devices=[]), _ParametersStayEmpty():
        return _create(row)


class _ParametersStayEmpty(TorchFunctionMode):
    """Skip what would fill parameters in place: initialising a large model takes many seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name: str = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and args and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


def _create(row: BackboneRow, *, whole: bool = False) -> nn.Module:
    if row.kind == "features":
        from cosettle_adapter.backbones.feature_maps import create_feature_maps  # few are

        return create_feature_maps(row, whole=whole)
    # Pooling by mean would turn timm's norm into an identity. A rotary embedding built for dynamic
    # sizes computes any grid in place of a stored one.
    options: dict[str, Any] = {"dynamic_img_size": True} if "rotary" in row.positions else {}
    options |= {"num_classes": 0, "global_pool": "", **row.options}
    model: nn.Module = timm.create_model(row.architecture, **options)
    return model


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Make tensors the parameters of a model; ``name`` is what errors call it."""
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:  # lists what differs
        differs = textwrap.shorten(str(error).partition(":")[2], 600, placeholder=" ...")
        raise CorruptWeightsError(f"these are not the weights of {name}: {differs}") from error
