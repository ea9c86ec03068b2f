"""One wrapper over timm's transformers of constant resolution: ViT, and Eva for rotary ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cosettle_adapter.backbones.backbone import Backbone, Read
from cosettle_adapter.backbones.positions import (
    Positions,
    perturb_positions,
    resize_positions,
)
from cosettle_adapter.backbones.rotary import perturb_rotary, rotary_angles
from cosettle_adapter.backbones.row import BackboneRow
from cosettle_adapter.backbones.zoom import Grid

_CACHED_GRIDS = 16


class VisionTransformerBackbone(Backbone):
    """A vision transformer: patches, class and register tokens or none, any grid, any stride.

    Positions are absolute (learned or sinusoidal), rotary, both, or none; whatever they are,
    :meth:`positions` computes them for a grid and a caller may put others in their place.
    """

    def __init__(self, vit: Any, row: BackboneRow, **loaded: Any) -> None:
        """Wrap a timm model whose parameters are loaded; ``loaded`` goes to :class:`Backbone`."""
        super().__init__(
            row, widths=(row.width,) * row.depth, default_layer=row.depth - 1, **loaded
        )
        self.vit = vit
        self._source_grid = (row.image_size // row.patch,) * 2
        # Learned positions stay float32 on the CPU, where bicubic resizing is exact and exists on
        # every build; only the result travels to the device.
        learned = self.vit.pos_embed
        self._learned = None if learned is None else learned.detach().float().cpu()
        # So does what rotary positions are computed from; in a tuple, it is not cast with the rest.
        rope = getattr(self.vit, "rope", None)
        self._rope = None if rope is None else (copy.deepcopy(rope).float().cpu(),)
        self._positions: dict[tuple[Grid, torch.device], Positions] = {}
        self._angles: dict[Grid, Tensor] = {}
        self.freeze()

    @staticmethod
    def create_options(row: BackboneRow) -> Mapping[str, Any]:
        """What ``timm.create_model`` must be told: no head, no pooling, so that ``norm`` is real.

        Pooling by mean would turn timm's ``norm`` into an identity and load its weights nowhere.
        """
        # A rotary embedding built for dynamic sizes computes any grid in place of a stored one.
        rotary = {"dynamic_img_size": True} if "rotary" in row.positions else {}
        return {"num_classes": 0, "global_pool": "", **rotary, **row.options}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; positions are float32 whatever it is."""
        dtype: torch.dtype = self.vit.patch_embed.proj.weight.dtype
        return dtype

    def positions(self, grid: Grid) -> Positions:
        """Return the positions of a grid, computed once.

        Returns:
            ``absolute`` ``(1, prefix + h * w, C)`` and ``rotary`` ``(h * w, 2 D)``, sines then
            cosines of ``D`` channels a head (``(depth, heads, h * w, 2 D)`` where they are
            learned for each block); float32, ``None`` for a kind the backbone does not have.
        """
        key = (grid, self.device)
        if key not in self._positions:
            if len(self._positions) >= _CACHED_GRIDS:
                self._positions.pop(next(iter(self._positions)))
            self._positions[key] = Positions(self._absolute(grid), self._rotary(grid))
        return self._positions[key]

    def perturbed_positions(self, grid: Grid, offsets: Tensor, *, ratio: float = 10.0) -> Positions:
        """Return positions that do not tell patches where they are (the paper's PEA).

        Absolute and rotary positions are those of a crop of the zoomed grid, as
        :func:`~cosettle_adapter.backbones.positions.perturb_positions` and
        :func:`~cosettle_adapter.backbones.rotary.perturb_rotary` say. A transformer without any
        does not know where its patches are, and is left as it is.

        Args:
            grid: ``(h, w)`` of the images.
            offsets: ``(S, 2)`` in [0, 1), (row, column): one for all images, or one for each.
            ratio: by how much more than once the grid is zoomed; 0 changes nothing.

        Returns:
            ``S`` variants in the shapes of :meth:`positions`, ``rotary`` with a leading ``S``.

        Raises:
            ValueError: offsets of another shape or range, or a negative ratio.
        """
        absolute, rotary = self.positions(grid).absolute, None
        if absolute is not None:
            absolute = perturb_positions(
                absolute, offsets, grid=grid, prefix=self._prefix_positions, ratio=ratio
            )
        if self._rope is not None:
            if grid not in self._angles:  # one is enough: training has one grid
                self._angles = {grid: rotary_angles(self._rope[0], grid)}
            rotary = perturb_rotary(
                self._angles[grid], offsets, grid=grid, ratio=ratio, device=self.device
            )
        return Positions(absolute, rotary)

    def _absolute(self, grid: Grid) -> Tensor | None:
        if self._learned is None:
            return None
        return resize_positions(
            self._learned,
            grid,
            source_grid=self._source_grid,
            prefix=self._prefix_positions,
            interpolation=self.row.interpolation,
        ).to(self.device)

    def _rotary(self, grid: Grid) -> Tensor | None:
        if self._rope is None:
            return None
        with torch.no_grad():
            rotary: Tensor = self._rope[0].get_embed(shape=list(grid))
        return rotary.to(self.device)

    @property
    def _prefix_positions(self) -> int:
        return 0 if self.vit.no_embed_class else int(self.vit.num_prefix_tokens)

    def _maps(
        self, images: Tensor, reads: frozenset[Read], positions: Positions | None
    ) -> dict[Read, Tensor]:
        grid = self.grid(images.shape[-2], images.shape[-1])
        used = self.positions(grid) if positions is None else positions.to(self.device)
        absolute = None if used.absolute is None else used.for_images(used.absolute)
        tokens = self._embed(images, absolute)
        rotations = self._rotations(used)
        found: dict[Read, Tensor] = {}
        for index in range(max(layer for layer, _ in reads) + 1):
            if rotations is None:
                tokens = self.vit.blocks[index](tokens)
            else:
                tokens = self.vit.blocks[index](tokens, rope=rotations(index))
            for layer, norm in reads:
                if layer == index:
                    found[layer, norm] = self._read(tokens, index, norm, grid)
        return found

    @staticmethod
    def _rotations(positions: Positions) -> Callable[[int], Tensor] | None:
        """What each block rotates by: ``(h * w, 2 D)``, or ``(1 or B, 1 or heads, h * w, 2 D)``."""
        rotary = positions.rotary
        if rotary is None:
            return None
        if rotary.ndim < 4:  # the same in every block
            if rotary.ndim == 3:
                rotary = positions.for_images(rearrange(rotary, "s n d -> s 1 n d"))
            return lambda block: rotary
        if rotary.ndim == 4:
            return lambda block: rotary[block]
        # Block by block: copies for every image at once would be large.
        return lambda block: positions.for_images(rotary[:, block])

    def _embed(self, images: Tensor, absolute: Tensor | None) -> Tensor:
        """Patches, class and register tokens and their positions: ``(B, prefix + h * w, C)``."""
        projection = self.vit.patch_embed.proj
        cells = F.conv2d(images, projection.weight, projection.bias, stride=self.stride)
        tokens = rearrange(cells, "b c h w -> b (h w) c")
        tokens = self.vit.patch_embed.norm(tokens)
        prefix = [
            token.expand(images.shape[0], -1, -1)
            for token in (self.vit.cls_token, self.vit.reg_token)
            if token is not None
        ]
        added = 0.0 if absolute is None else absolute
        if self._prefix_positions:
            tokens = torch.cat([*prefix, tokens], dim=1) + added
        else:
            tokens = torch.cat([*prefix, (tokens + added).to(tokens.dtype)], dim=1)
        embedded: Tensor = self.vit.norm_pre(tokens.to(self.dtype))
        return embedded

    def _read(self, tokens: Tensor, index: int, norm: bool | None, grid: Grid) -> Tensor:
        """Strip class and register tokens, apply the final norm if asked, fold into a map."""
        last = index == self.depth - 1
        if norm or (norm is None and last and self.row.final_norm):
            if isinstance(self.vit.norm, nn.Identity):
                raise ValueError(f"{self.row.name} has no final norm; leave norm=True away")
            tokens = self.vit.norm(tokens)
        patches = tokens[:, self.vit.num_prefix_tokens :]
        return rearrange(patches, "b (h w) c -> b c h w", h=grid[0], w=grid[1])
