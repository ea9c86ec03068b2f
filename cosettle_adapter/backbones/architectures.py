"""A row's architecture as an empty timm model, and whether tensors are exactly its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cosettle_adapter.backbones.feature_maps import FeatureMapBackbone
from cosettle_adapter.backbones.rows import BackboneRow
from cosettle_adapter.backbones.timm_features import prune
from cosettle_adapter.backbones.vit import VisionTransformerBackbone
from cosettle_adapter.errors import CorruptWeightsError

WRAPPERS: dict[str, type[VisionTransformerBackbone] | type[FeatureMapBackbone]] = {
    "vit": VisionTransformerBackbone,
    "features": FeatureMapBackbone,
}

_SHOWN = 8


def meta_model(row: BackboneRow) -> nn.Module:
    """Create a row's architecture without memory: names, shapes and structure only."""
    with torch.device("meta"):
        return _create(row)


def empty_model(row: BackboneRow) -> nn.Module:
    """Create a row's architecture whose parameters are about to be replaced."""
    # On the meta device nothing is initialised only to be overwritten.
    model = meta_model(row)
    stored = model.state_dict()
    if all(name in stored for name, _ in model.named_buffers()):
        return model
    # Buffers that no file stores (rotary frequencies, window indices) must be computed for real.
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


def _create(row: BackboneRow) -> nn.Module:
    options: Mapping[str, Any] = WRAPPERS[row.kind].create_options(row)
    model: nn.Module = timm.create_model(row.architecture, pretrained=False, **options)
    if row.kind == "features":
        prune(model)
    return model


def check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], row: BackboneRow) -> None:
    """Raise one error that lists everything by which tensors differ from an architecture's.

    Raises:
        CorruptWeightsError: tensors are missing, unexpected or misshapen.
    """
    expected = model.state_dict()
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "misshapen": [
            f"{name} is {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        listing = "; ".join(_list(kind, names) for kind, names in faults.items() if names)
        raise CorruptWeightsError(f"these are not the weights of {row.name}: {listing}")


def _list(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else ""
    return f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{more})"
