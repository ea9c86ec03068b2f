"""Wrapper of timm's feature maps: ConvNeXt, ResNet, EfficientNet, Swin, Hiera, hybrids."""

from __future__ import annotations

import copy
import math
from typing import Any

import timm
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cosettle_adapter.backbones.architectures import TIMM_ERRORS, timm_module
from cosettle_adapter.backbones.backbone import Backbone, Grid, Positions, Read
from cosettle_adapter.backbones.registry import feature_info
from cosettle_adapter.backbones.rows import BackboneRow
from cosettle_adapter.backbones.vit import resize_positions
from cosettle_adapter.errors import GeometryError

Size = tuple[int, int]

_CACHED_SIZES = 4
_WHOLE_PATCHES = (
    "dla",
    "hiera",
    "hieradet_sam2",
    "hrnet",
    "maxxvit",
)  # need whole ones of the coarsest stage
_RESIZED = ("beit", "hiera", "maxxvit", "vision_transformer_relpos")  # use a copy per size
_OWN_SIZE_ONLY = ("mvitv2",)  # misreads its relative positions at others


class FeatureMapBackbone(Backbone):
    """A backbone of several resolutions; each *layer* is one of timm's feature maps.

    The grid is that of the stage with ``row.patch`` pixels per patch, and every layer is returned
    on it: finer maps are averaged over its patches, coarser maps are interpolated bilinearly
    between patch centres. Sides may be any multiple of ``row.patch``. If a stage omits the last
    pixels (ConvNeXt rounds down), its last patch is repeated; for models that need whole windows
    (Hiera, HRNet) the image's last row and column are repeated and the extra patches cropped.
    Positions and windows are resized to each image size; if timm cannot do that, any size but the
    model's own is an error.
    """

    def __init__(self, model: nn.Module, row: BackboneRow, **loaded: Any) -> None:
        """Wrap a timm model whose parameters are loaded; ``loaded`` goes to :class:`Backbone`."""
        if loaded.get("stride") not in (None, row.patch):
            raise GeometryError(
                f"feature maps have a fixed stride, got stride {loaded['stride']}: omit it, or "
                "choose another stage of the model as timm:<tag>@<pixels per patch>"
            )
        widths, pixels = zip(*feature_info(model), strict=True)
        if row.patch not in pixels:
            known = ", ".join(map(str, sorted(set(pixels))))
            raise GeometryError(f"{row.name} has no stage of {row.patch} pixels; it has {known}")
        default_layer = max(i for i, side in enumerate(pixels) if side == row.patch)
        super().__init__(row, widths=widths, default_layer=default_layer, **loaded)
        self.model: Any = model
        self._pixels = pixels
        self._family = timm_module(row)
        self._resized: dict[tuple[Size, torch.dtype, torch.device], Any] = {}
        self.requires_grad_(False).train()

    def positions(self, grid: Grid) -> Positions:
        """Return no positions: timm adds them inside the model."""
        del grid
        return Positions()

    def _maps(
        self, images: Tensor, reads: frozenset[Read], positions: Positions | None
    ) -> dict[Read, Tensor]:
        del positions  # checked to be empty
        if any(read.kind != "patch" for read in reads):
            raise ValueError(
                f"{self.row.name} returns feature maps: it has neither class and register tokens "
                "nor attention between all patches; use a vision transformer of one resolution"
            )
        if any(read.norm for read in reads):
            raise ValueError(
                f"{self.row.name} returns feature maps, which have no final norm: pass norm=None"
            )
        grid = self.grid(images.shape[-2], images.shape[-1])
        layers = sorted({read.layer for read in reads})
        images = self._pad(images)
        size = (images.shape[-2], images.shape[-1])
        maps = {
            layer: on_grid(tokens, size, self._pixels[layer], grid, self.patch)
            for layer, tokens in zip(layers, self._run(images, size, layers), strict=True)
        }
        return {read: maps[read.layer] for read in reads}

    def _pad(self, images: Tensor) -> Tensor:
        """Repeat the last row and column until every stage has whole patches."""
        coarsest = max(self._pixels)
        step = coarsest if self._family in _WHOLE_PATCHES else 1
        below, right = (
            max(coarsest, math.ceil(side / step) * step) - side for side in images.shape[-2:]
        )
        return F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images

    def _run(self, images: Tensor, size: Size, layers: list[int]) -> list[Tensor]:
        """Maps ``(B, C, h', w')`` of ascending ``layers``; no layer after the last one runs."""
        own = self.row.image_size
        message = (
            f"{self.row.name} does not accept images of {size[0]} x {size[1]} pixels ({{}}); its "
            f"own size is {own} x {own}: pass size=({own}, {own})"
        )
        if self._family in _OWN_SIZE_ONLY and size != (own, own):
            raise GeometryError(message.format("its positions are for one size"))
        try:
            # features_only=True would rename tensors and drop layers
            maps: list[Tensor] = self._model_for(size).forward_intermediates(
                images,
                indices=layers,
                norm=False,
                stop_early=True,
                output_fmt="NCHW",
                intermediates_only=True,
            )
        except TIMM_ERRORS as error:
            if size == (own, own) or isinstance(error, torch.OutOfMemoryError):
                raise
            raise GeometryError(message.format(f"{type(error).__name__}: {error}")) from error
        return maps

    def _model_for(self, size: Size) -> Any:
        """The model, or a copy that shares its tensors but has resized positions and windows."""
        if self._family not in _RESIZED:
            return self.model
        key = (size, self.dtype, self.device)
        if key not in self._resized:
            if len(self._resized) >= _CACHED_SIZES:
                self._resized.pop(next(iter(self._resized)))
            shared = (*self.model.parameters(), *self.model.buffers())
            resized = copy.deepcopy(self.model, {id(tensor): tensor for tensor in shared})
            with torch.inference_mode(False):  # a later pass may need gradients
                if self._family == "hiera":
                    _resize_hiera(resized, size, self.row)
                elif hasattr(resized, "set_input_size"):  # depends on timm's version
                    resized.set_input_size(img_size=size)
            self._resized[key] = resized.requires_grad_(False).eval()
        return self._resized[key]


def _resize_hiera(model: Any, size: Size, row: BackboneRow) -> None:
    """Resize positions and arrange mask units as in a model of this size."""
    with torch.device("meta"):
        reference: Any = timm.create_model(row.architecture, img_size=size, **row.options)
    positions, window = model.pos_embed.detach().float(), model.pos_embed_win
    source, within = tuple(model.tokens_spatial_shape), 0.0
    if window is not None:  # positions of the image and within each mask unit
        source = tuple(positions.shape[-2:])
        positions = rearrange(positions, "1 c h w -> 1 (h w) c")
        within = window.detach().float().tile(reference.mask_spatial_shape)
        within = rearrange(within, "1 c h w -> 1 (h w) c")
    grid = tuple(reference.tokens_spatial_shape)
    resized = within + resize_positions(
        positions, grid, source_grid=source, prefix=0, interpolation=row.interpolation
    )
    model.pos_embed, model.pos_embed_win = nn.Parameter(resized.to(model.pos_embed.dtype)), None
    for name in ("tokens_spatial_shape", "mask_spatial_shape", "unroll", "reroll"):
        setattr(model, name, getattr(reference, name))


def on_grid(tokens: Tensor, size: Size, pixels: int, grid: Grid, patch: int) -> Tensor:
    """Resample maps ``(B, C, h', w')``, ``pixels`` per patch of images of ``size``, to a grid."""
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
            max(0, target - side) for target, side in zip(grid, tokens.shape[-2:], strict=True)
        )
        tokens = F.pad(tokens, (0, right, 0, below), mode="replicate")
        return tokens[..., : grid[0], : grid[1]]
    # Patches of another size (Inception's convolutions lack padding) still span the whole image.
    stretched = F.interpolate(tokens.float(), size=grid, mode="bilinear", antialias=True)
    return stretched.to(tokens.dtype)
