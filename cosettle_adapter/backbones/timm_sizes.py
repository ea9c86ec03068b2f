"""timm's models of several resolutions at any image size: what each family needs for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import timm
from einops import rearrange
from timm.models.hiera import Reroll, Unroll
from torch import nn

from cosettle_adapter.backbones.positions import resize_positions
from cosettle_adapter.backbones.row import BackboneRow, PositionInterpolation
from cosettle_adapter.backbones.timm_features import Size, copy_modules

Fit = Callable[[Any, Size, PositionInterpolation], None]


@dataclasses.dataclass(frozen=True)
class Family:
    """What makes the models of one timm module take images of any size.

    Attributes:
        options: what ``timm.create_model`` is told.
        whole_cells: sides must be whole cells of the coarsest stage.
        own_size_only: timm takes other sizes and computes nonsense.
        fit: makes a copy of a model fit a size, where no option has timm do it on the way.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    whole_cells: bool = False
    own_size_only: bool = False
    fit: Fit | None = None


def _fit_input_size(model: Any, size: Size, interpolation: PositionInterpolation) -> None:
    """Resize windows and their tables of relative positions, where this version of timm can."""
    del interpolation
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)


def _fit_hiera(model: Any, size: Size, interpolation: PositionInterpolation) -> None:
    """Resize positions and lay mask units out anew; timm does both for one size only."""
    grid = tuple(side // step for side, step in zip(size, model.patch_stride, strict=True))
    units = [side // unit for side, unit in zip(grid, model.mask_unit_size, strict=True)]
    stored = model.pos_embed.detach().float()
    if model.pos_embed_win is None:
        source, within = tuple(model.tokens_spatial_shape), 0.0
    else:  # positions of the whole image, and of the cells in each mask unit
        source = tuple(stored.shape[-2:])
        stored = rearrange(stored, "1 c h w -> 1 (h w) c")
        tiled = model.pos_embed_win.detach().float().tile(units)
        within = rearrange(tiled, "1 c h w -> 1 (h w) c")
    positions = within + resize_positions(
        stored, grid, source_grid=source, prefix=0, interpolation=interpolation
    )
    model.pos_embed = nn.Parameter(positions.to(model.pos_embed.dtype))
    model.pos_embed_win = None
    model.tokens_spatial_shape, model.mask_spatial_shape = list(grid), units
    strides = model.unroll.schedule
    model.unroll = Unroll(size, model.patch_stride, strides)
    model.reroll = Reroll(size, model.patch_stride, strides, model.stage_ends, model.q_pool)


_DYNAMIC = Family({"dynamic_img_size": True})
_PADDED_WINDOWS = Family({"strict_img_size": False})
_FAMILIES = {  # timm module: its family, where the default does not do
    "beit": Family(fit=_fit_input_size),
    "deit": _DYNAMIC,
    "dla": Family(whole_cells=True),
    "eva": _DYNAMIC,
    "hiera": Family(whole_cells=True, fit=_fit_hiera),
    "hieradet_sam2": Family(whole_cells=True),
    "hrnet": Family(whole_cells=True),
    "maxxvit": Family(whole_cells=True, fit=_fit_input_size),
    "mvitv2": Family(own_size_only=True),  # reads its tables of relative positions off centre
    "swin_transformer": _PADDED_WINDOWS,
    "swin_transformer_v2": _PADDED_WINDOWS,
    "swin_transformer_v2_cr": _PADDED_WINDOWS,
    "vision_transformer": _DYNAMIC,
    "vision_transformer_hybrid": _DYNAMIC,
    "vision_transformer_relpos": Family(fit=_fit_input_size),
}


def family(architecture: str) -> Family:
    """Return the family of a timm architecture."""
    module: str = timm.model_entrypoint(architecture).__module__
    return _FAMILIES.get(module.rpartition(".")[2], Family())


def fit_copy(model: nn.Module, size: Size, row: BackboneRow) -> Any:
    """Copy a model for images of ``size``, sharing all tensors that need not be resized."""
    fit = family(row.architecture).fit
    if fit is None:
        return model
    fitted = copy_modules(model, lambda tensor: tensor)
    fit(fitted, size, row.interpolation)
    shared = {id(parameter) for parameter in model.parameters()}
    for parameter in fitted.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return fitted.eval()
