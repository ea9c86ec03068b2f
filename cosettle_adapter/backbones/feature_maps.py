"""One wrapper over timm's feature maps: ConvNeXt, ResNet, EfficientNet, Swin, Hiera, hybrids."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from einops import rearrange
from timm.models.hiera import Reroll, Unroll
from torch import Tensor, nn
from torch.nn import functional as F

from cosettle_adapter.backbones.backbone import Backbone, Grid, Positions, Read
from cosettle_adapter.backbones.registry import feature_info
from cosettle_adapter.backbones.rows import BackboneRow, PositionInterpolation
from cosettle_adapter.backbones.timm_features import (
    SIZE_ERRORS,
    Size,
    copy_modules,
    feature_maps,
    own_size,
    takes,
)
from cosettle_adapter.backbones.vit import resize_positions
from cosettle_adapter.errors import GeometryError

_CACHED_SIZES = 4


class FeatureMapBackbone(Backbone):
    """A backbone of several resolutions; each *layer* is one of timm's feature maps.

    The grid is the stage with ``row.patch`` pixels a patch, and every layer is returned on it.
    Patch ``(i, j)`` of a map with ``s`` pixels a patch stands for rows ``s i`` to ``s (i + 1)``
    and columns ``s j`` to ``s (j + 1)`` of the image: finer maps are averaged over the patches of
    the grid, coarser ones interpolated bilinearly between the centres of theirs.
    (What strided convolutions with padding see, in a ResNet for one, is centred half a patch above
    and left of that; in models ported from TensorFlow, below and right. It is so in every frame,
    and left as timm computes it.)

    Sides may be any multiple of ``row.patch``. Where stages leave the last pixels out (ConvNeXt
    rounds down), their last patch is repeated. Models that need whole windows (Hiera, HRNet, ...)
    see the image with its last row and column repeated, and the patches over those are cut off.
    Positions and windows that belong to one image size are resized for each other one. Where
    timm can do none of this, another size than the model's own is an error.

    What a model has of positions timm adds inside; there are none that a caller could replace.
    """

    def __init__(self, model: nn.Module, row: BackboneRow, **loaded: Any) -> None:
        """Wrap a timm model whose parameters are loaded; ``loaded`` goes to :class:`Backbone`.

        Raises:
            GeometryError: a stride other than ``row.patch``, or no stage of that many pixels.
        """
        if loaded.get("stride") not in (None, row.patch):
            raise GeometryError(
                f"feature maps have no stride to choose, got {loaded['stride']}: leave it out; "
                "other stages of a model are reached as timm:<tag>@<pixels a patch>"
            )
        info = feature_info(model)
        pixels = tuple(reduction for _, reduction in info)
        if row.patch not in pixels:
            known = ", ".join(map(str, sorted(set(pixels))))
            raise GeometryError(
                f"{row.name} has no stage with {row.patch} pixels a patch; it has {known}"
            )
        super().__init__(
            row,
            widths=[channels for channels, _ in info],
            default_layer=max(i for i, side in enumerate(pixels) if side == row.patch),
            **loaded,
        )
        self.model: Any = model
        self._pixels = pixels
        self._family = family(row.architecture)
        self._fitted: dict[tuple[Size, torch.dtype, torch.device], Any] = {}
        self.freeze()

    @staticmethod
    def create_options(row: BackboneRow) -> Mapping[str, Any]:
        """What ``timm.create_model`` must be told: images of any size.

        The classifier is made, so that a file's is known for one when :func:`prune` cuts it off.
        """
        return {**family(row.architecture).options, **row.options}

    def positions(self, grid: Grid) -> Positions:
        """Return none: timm adds what there are inside the model."""
        del grid
        return Positions()

    def _maps(
        self, images: Tensor, reads: frozenset[Read], positions: Positions | None
    ) -> dict[Read, Tensor]:
        del positions  # checked to hold none
        if any(norm for _, norm in reads):
            raise ValueError(
                f"{self.row.name} returns feature maps, which have no final norm: give norm=None"
            )
        grid = self.grid(images.shape[-2], images.shape[-1])
        layers = sorted({layer for layer, _ in reads})
        images = self._pad(images)
        size = (images.shape[-2], images.shape[-1])
        found = {
            layer: on_grid(tokens, size, self._pixels[layer], grid, self.patch)
            for layer, tokens in zip(layers, self._run(images, size, layers), strict=True)
        }
        return {(layer, norm): found[layer] for layer, norm in reads}

    def _pad(self, images: Tensor) -> Tensor:
        """Repeat the last row and column until there is a whole patch of every stage."""
        coarsest = max(self._pixels)
        step = coarsest if self._family.whole_patches else 1
        below, right = (
            max(coarsest, math.ceil(side / step) * step) - side for side in images.shape[-2:]
        )
        return F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images

    def _run(self, images: Tensor, size: Size, layers: list[int]) -> list[Tensor]:
        own = own_size(self.model)
        if self._family.own_size_only and size != own:
            raise GeometryError(self._misfit(size, "its positions are for one size"))
        model = self._model_for(size)
        try:
            return feature_maps(model, images, layers)
        except SIZE_ERRORS as error:
            if takes(model, size) or not takes(self.model, own):
                raise
            raise GeometryError(self._misfit(size, f"{type(error).__name__}: {error}")) from error

    def _misfit(self, size: Size, reason: str) -> str:
        own = own_size(self.model)
        return (
            f"{self.row.name} does not take images of {size[0]} x {size[1]} pixels ({reason}); it "
            f"was made for {own[0]} x {own[1]}: give size=({own[0]}, {own[1]})"
        )

    def _model_for(self, size: Size) -> Any:
        """The model, or a copy with resized positions and windows that shares all other tensors."""
        if self._family.fit is None:
            return self.model
        key = (size, self.dtype, self.device)
        if key not in self._fitted:
            if len(self._fitted) >= _CACHED_SIZES:
                self._fitted.pop(next(iter(self._fitted)))
            with torch.inference_mode(False):  # a later pass may need gradients
                self._fitted[key] = fit_copy(self.model, size, self.row)
        return self._fitted[key]


def on_grid(tokens: Tensor, size: Size, pixels: int, grid: Grid, patch: int) -> Tensor:
    """Bring ``(B, C, h', w')``, a patch every ``pixels`` of images of ``size``, onto a grid."""
    regular = all(
        count in (side // pixels, math.ceil(side / pixels))
        for count, side in zip(tokens.shape[-2:], size, strict=True)
    )
    if regular and patch % pixels == 0:
        ratio = patch // pixels
        tokens = tokens[..., : grid[0] * ratio, : grid[1] * ratio]
        return tokens if ratio == 1 else F.avg_pool2d(tokens, ratio)
    if regular and pixels % patch == 0:
        tokens = F.interpolate(tokens, scale_factor=pixels // patch, mode="bilinear")
        below, right = (
            max(0, wanted - got) for wanted, got in zip(grid, tokens.shape[-2:], strict=True)
        )
        tokens = F.pad(tokens, (0, right, 0, below), mode="replicate")
        return tokens[..., : grid[0], : grid[1]]
    # Patches at another step (Inception's convolutions lack padding) still span the whole image.
    stretched = F.interpolate(tokens.float(), size=grid, mode="bilinear", antialias=True)
    return stretched.to(tokens.dtype)


# timm's models at any image size: what each family needs for it


@dataclasses.dataclass(frozen=True)
class Family:
    """What makes the models of one timm module take images of any size.

    Attributes:
        options: what ``timm.create_model`` is told.
        whole_patches: sides must be whole patches of the coarsest stage.
        own_size_only: timm takes other sizes and computes nonsense.
        fit: makes a copy of a model fit a size, where no option has timm do it on the way.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    whole_patches: bool = False
    own_size_only: bool = False
    fit: Callable[[Any, Size, PositionInterpolation], None] | None = None


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
    else:  # positions of the whole image, and of the patches in each mask unit
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
    "dla": Family(whole_patches=True),
    "eva": _DYNAMIC,
    "hiera": Family(whole_patches=True, fit=_fit_hiera),
    "hieradet_sam2": Family(whole_patches=True),
    "hrnet": Family(whole_patches=True),
    "maxxvit": Family(whole_patches=True, fit=_fit_input_size),
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
