"""Empty timm models of the registered architectures, and loading tensors into them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cosettle_adapter.backbones.registry import feature_info
from cosettle_adapter.backbones.rows import BackboneRow
from cosettle_adapter.errors import CorruptWeightsError

# What timm raises for images and files that a model does not support.
TIMM_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_DYNAMIC, _LENIENT = {"dynamic_img_size": True}, {"strict_img_size": False}
_ANY_SIZE = {  # by timm module: the option that lets its models accept any size
    **dict.fromkeys(("deit", "eva", "vision_transformer", "vision_transformer_hybrid"), _DYNAMIC),
    **dict.fromkeys((f"swin_transformer{version}" for version in ("", "_v2", "_v2_cr")), _LENIENT),
}


def meta_model(row: BackboneRow, *, whole: bool = False) -> nn.Module:
    """Create a row's model on the meta device; ``whole``: with the head of feature maps."""
    with torch.device("meta"):
        return _create(row, whole=whole)


def empty_model(row: BackboneRow) -> nn.Module:
    """Create a row's model with uninitialised parameters."""
    # Buffers that no file stores (rotary frequencies, window indices) are computed.
    with torch.random.fork_rng(devices=[]), _SkipInitialisation():
        return _create(row)


class _SkipInitialisation(TorchFunctionMode):
    """Skip in-place writes to parameters: initialising a large model takes many seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name: str = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        target = args[0] if args else kwargs.get("tensor")  # nn.init passes a keyword
        if in_place and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)


def _create(row: BackboneRow, *, whole: bool = False) -> nn.Module:
    if row.kind == "features":
        model: Any = timm.create_model(
            row.architecture, **{**_ANY_SIZE.get(timm_module(row), {}), **row.options}
        )
        if not whole:
            count = len(feature_info(model))
            model.prune_intermediate_layers(count, prune_norm=True, prune_head=True)
        return model  # type: ignore[no-any-return]
    # Mean pooling would turn timm's norm into an identity. With dynamic sizes, a rotary embedding
    # computes any grid.
    options: dict[str, Any] = {"num_classes": 0, "global_pool": "", **row.options}
    if "rotary" in row.positions:
        options["dynamic_img_size"] = True
    return timm.create_model(row.architecture, **options)  # type: ignore[no-any-return]


def timm_module(row: BackboneRow) -> str:
    """Return the name of the timm module that defines a row's architecture."""
    module: str = timm.model_entrypoint(row.architecture).__module__
    return module.rpartition(".")[2]


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Load tensors into a model without copying; ``name`` is the model's name in errors."""
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:  # it lists what differs
        differs = textwrap.shorten(str(error).partition(":")[2], 600, placeholder=" ...")
        raise CorruptWeightsError(f"these are not the weights of {name}: {differs}") from error
