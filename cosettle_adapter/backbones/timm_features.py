"""Feature maps of timm's models, and which of a model's tensors they come from."""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cosettle_adapter.backbones.registry import feature_info
from cosettle_adapter.errors import UnknownModelError

logger = logging.getLogger(__name__)

Size = tuple[int, int]
# What timm raises for an image that a model cannot take: its own checks, and shapes that disagree.
SIZE_ERRORS = (AssertionError, RuntimeError, ValueError)


def own_size(model: Any) -> Size:
    """``(height, width)`` of the images a timm model was made for."""
    height, width = model.pretrained_cfg["input_size"][-2:]
    return int(height), int(width)


def feature_maps(model: Any, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """``(B, C, h', w')`` of each of ``layers``, which ascend; nothing after the last one runs."""
    # Not features_only=True: that renames the tensors of a file, and drops layers from the model.
    maps: list[Tensor] = model.forward_intermediates(
        images,
        indices=list(layers),
        norm=False,
        stop_early=True,
        output_fmt="NCHW",
        intermediates_only=True,
    )
    return maps


def takes(model: nn.Module, size: Size) -> bool:
    """Whether images of a size go through a model, whatever its tensors hold and where they are."""
    try:
        _outline_maps(copy_modules(model, _without_data), size)
    except SIZE_ERRORS:
        return False
    return True


def unused_modules(model: nn.Module) -> list[str]:
    """Names of the outermost modules that no feature map goes through: heads, final norms.

    A module is used when it is called, or when a map depends on one of its parameters (some
    families read ``self.qkv.weight`` and never call ``self.qkv``). The model is run on its
    outline, without data, so this costs a fraction of a second whatever its size.

    Raises:
        UnknownModelError: timm cannot compute this model's feature maps.
    """
    outline = copy_modules(model, _without_data).eval()
    used: set[int] = set()
    for module in outline.modules():
        module.register_forward_pre_hook(lambda module, _: used.add(id(module)))
    try:
        maps = _outline_maps(outline, own_size(model))
    except SIZE_ERRORS as error:
        raise UnknownModelError(
            f"timm {timm.__version__} cannot compute the feature maps of {type(model).__name__} "
            f"({type(error).__name__}: {error}), so it cannot be a backbone here"
        ) from error
    read = _graph_leaves(maps)
    modules = dict(outline.named_modules(remove_duplicate=False))
    used |= {
        id(module)
        for module in modules.values()
        if any(id(parameter) in read for parameter in module.parameters(recurse=False))
    }
    names = {
        name
        for name, module in modules.items()
        if not any(id(inner) in used for inner in module.modules())
    }
    return [name for name in modules if name in names and name.rpartition(".")[0] not in names]


def prune(model: nn.Module) -> None:
    """Replace what stores tensors and serves no feature map by ``nn.Identity``, in place.

    Lists stay lists: some families walk over their final norms whether they apply them or not.
    """
    # What stores nothing stays: rotary embeddings are used without being called.
    stored = {name.rpartition(".")[0] for name in model.state_dict()}
    for unused in unused_modules(model):
        inside = [name for name, _ in model.get_submodule(unused).named_modules(prefix=unused)]
        for name in reversed(inside):
            if name in stored:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, nn.Identity())


def own_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pick from a published file the tensors that feature maps come from, under current names.

    Heads and final norms are left out, whatever a family calls them: all that stands below a
    module of the model that no feature map goes through. Names of authors and of earlier timm
    versions, and buffers that those stored, are dealt with by timm's own
    ``checkpoint_filter_fn`` where a family has one. Whatever else is amiss is left for a strict
    check against the pruned model.

    Args:
        model: the row's architecture, pruned or not, on any device.
        tensors: the file's names to tensors.
    """
    unused = tuple(f"{name}." for name in unused_modules(model))

    def used(names: Iterable[str]) -> set[str]:
        return {name for name in names if not name.startswith(unused)}

    kept = used(tensors)
    if kept != used(model.state_dict()):
        tensors = _current_names(model, tensors)
        kept = used(tensors)
    return {name: tensor for name, tensor in tensors.items() if name in kept}


def _current_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    convert = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        converted: Mapping[str, Tensor] = convert(dict(tensors), model)
    except (AttributeError, IndexError, KeyError, TypeError, *SIZE_ERRORS) as error:
        logger.debug("not in a layout that timm knows for %s: %r", type(model).__name__, error)
        return tensors
    return converted


def copy_modules(model: nn.Module, tensor: Callable[[Tensor], Tensor]) -> Any:
    """Copy the modules, but in place of each tensor put what ``tensor`` makes of it."""
    stored = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(each): tensor(each) for each in stored})


def _without_data(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if not isinstance(tensor, nn.Parameter):
        return empty
    return nn.Parameter(empty, requires_grad=tensor.is_floating_point())


def _outline_maps(outline: nn.Module, size: Size) -> list[Tensor]:
    dtype = next(outline.parameters()).dtype
    images = torch.empty(1, 3, *size, device="meta", dtype=dtype)
    with torch.enable_grad():
        return feature_maps(outline, images, range(len(feature_info(outline))))


def _graph_leaves(outputs: list[Tensor]) -> set[int]:
    """Ids of the parameters that outputs depend on."""
    nodes: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = {None}
    leaves: set[int] = set()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            leaves.add(id(getattr(node, "variable", None)))
            nodes.extend(following for following, _ in node.next_functions)
    return leaves
