"""One wrapper over timm's feature maps: ConvNeXt, ResNet, EfficientNet, Swin, Hiera, hybrids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosettle_adapter.backbones.backbone import Backbone, Read
from cosettle_adapter.backbones.positions import Positions
from cosettle_adapter.backbones.row import BackboneRow
from cosettle_adapter.backbones.timm_features import (
    SIZE_ERRORS,
    Size,
    feature_info,
    feature_maps,
    own_size,
    takes,
)
from cosettle_adapter.backbones.timm_sizes import family, fit_copy
from cosettle_adapter.backbones.zoom import Grid
from cosettle_adapter.errors import GeometryError

_CACHED_SIZES = 4


class FeatureMapBackbone(Backbone):
    """A backbone of several resolutions; each *layer* is one of timm's feature maps.

    The grid is the stage with ``row.patch`` pixels a cell, and every layer is returned on it.
    Cell ``(i, j)`` of a map with ``s`` pixels a cell stands for rows ``s i`` to ``s (i + 1)`` and
    columns ``s j`` to ``s (j + 1)`` of the image, as patches do: finer maps are averaged over the
    cells of the grid, coarser ones interpolated bilinearly between the centres of their cells.
    (What strided convolutions with padding see, in a ResNet for one, is centred half a cell above
    and left of that; in models ported from TensorFlow, below and right. It is so in every frame,
    and left as timm computes it.)

    Sides may be any multiple of ``row.patch``. Where stages leave the last pixels out (ConvNeXt
    rounds down), their last cell is repeated. Models that need whole windows (Hiera, HRNet, ...)
    see the image with its last row and column repeated, and the cells over those are cut off.
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
                "other stages of a model are reached as timm:<tag>@<pixels a cell>"
            )
        info = feature_info(model)
        pixels = tuple(reduction for _, reduction in info)
        if row.patch not in pixels:
            known = ", ".join(map(str, sorted(set(pixels))))
            raise GeometryError(
                f"{row.name} has no stage with {row.patch} pixels a cell; it has {known}"
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
        if any(norm for _, norm in reads):
            raise ValueError(
                f"{self.row.name} returns feature maps, which have no final norm: give norm=None"
            )
        grid = self.grid(images.shape[-2], images.shape[-1])
        del positions  # checked to be none; a picture that is moved comes moved
        wanted = sorted({layer for layer, _ in reads})
        images = self._pad(images)
        size = (images.shape[-2], images.shape[-1])
        maps = {
            layer: _on_grid(cells, size, self._pixels[layer], grid, self.patch)
            for layer, cells in zip(wanted, self._run(images, size, wanted), strict=True)
        }
        return {(layer, norm): maps[layer] for layer, norm in reads}

    def _pad(self, images: Tensor) -> Tensor:
        """Repeat the last row and column until there is a whole cell of every stage."""
        coarsest = max(self._pixels)
        step = coarsest if self._family.whole_cells else 1
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
            self._fitted[key] = fit_copy(self.model, size, self.row)
        return self._fitted[key]


def _on_grid(cells: Tensor, size: Size, pixels: int, grid: Grid, patch: int) -> Tensor:
    """Bring ``(B, C, h', w')``, a cell every ``pixels`` of images of ``size``, onto a grid."""
    regular = all(
        count in (side // pixels, math.ceil(side / pixels))
        for count, side in zip(cells.shape[-2:], size, strict=True)
    )
    if regular and patch % pixels == 0:
        ratio = patch // pixels
        cells = cells[..., : grid[0] * ratio, : grid[1] * ratio]
        return cells if ratio == 1 else F.avg_pool2d(cells, ratio)
    if regular and pixels % patch == 0:
        cells = F.interpolate(cells, scale_factor=pixels // patch, mode="bilinear")
        missing = [max(0, wanted - got) for wanted, got in zip(grid, cells.shape[-2:], strict=True)]
        cells = F.pad(cells, (0, missing[1], 0, missing[0]), mode="replicate")
        return cells[..., : grid[0], : grid[1]]
    # Cells at another step (Inception's convolutions lack padding) still span the whole image.
    stretched = F.interpolate(cells.float(), size=grid, mode="bilinear", antialias=True)
    return stretched.to(cells.dtype)
