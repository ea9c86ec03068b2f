"""One wrapper over timm's VisionTransformer family: images to patch tokens, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cosettle_adapter.backbones.positions import Grid, resize_positions
from cosettle_adapter.backbones.registry import BackboneRow
from cosettle_adapter.errors import GeometryError

_CACHED_GRIDS = 16


class VisionTransformerBackbone(nn.Module):
    """A frozen vision transformer that returns patch tokens as a map.

    It stays in eval mode whatever ``train()`` is asked for, its parameters never require
    gradients, and no graph is recorded unless ``requires_input_grad`` says so.

    Attributes:
        row: the registry row it was built from.
        patch: side of a patch in pixels.
        stride: step between patches in pixels; smaller than ``patch`` makes them overlap.
        width: channels of a patch token.
        depth: number of transformer blocks.
        fingerprint: hash over its tensors, as :func:`cosettle_adapter.backbones.weights` makes it.
        origin: where the weights came from, for people.
        revision: commit of the Hub repository they came from, if they did.
        requires_input_grad: record a graph from images to tokens when gradients are enabled.
    """

    def __init__(
        self,
        vit: nn.Module,
        row: BackboneRow,
        *,
        fingerprint: str,
        origin: str = "",
        revision: str | None = None,
        stride: int | None = None,
        requires_input_grad: bool = False,
    ) -> None:
        super().__init__()
        self.row = row
        self.patch, self.width, self.depth = row.patch, row.width, row.depth
        self.stride = row.patch if stride is None else stride
        if not 1 <= self.stride <= self.patch:
            raise GeometryError(
                f"stride must be between 1 and the patch size {self.patch}, got {stride}"
            )
        self.fingerprint, self.origin, self.revision = fingerprint, origin, revision
        self.requires_input_grad = requires_input_grad
        self.vit: Any = vit
        self._source_grid = (row.image_size // row.patch,) * 2
        # Learned positions stay float32 on the CPU, where bicubic resizing is exact and exists on
        # every build; only the result travels to the device.
        self._learned_positions = vit.get_parameter("pos_embed").detach().float().cpu()
        self._positions: dict[tuple[Grid, torch.device], Tensor] = {}
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> VisionTransformerBackbone:
        """Stay in eval mode: frozen means frozen."""
        del mode
        super().train(False)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; positions are float32 whatever it is."""
        dtype: torch.dtype = self.vit.patch_embed.proj.weight.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self.vit.patch_embed.proj.weight.device
        return device

    def grid(self, height: int, width: int) -> Grid:
        """Return ``(h, w)`` for images of ``height`` x ``width`` pixels.

        Raises:
            GeometryError: a side is not the patch plus a whole number of strides; the nearest
                sides that are get named.
        """
        for axis, side in (("height", height), ("width", width)):
            if side < self.patch or (side - self.patch) % self.stride:
                below = self.patch + max(0, (side - self.patch) // self.stride) * self.stride
                near = f"{below}" if side < below else f"{below} or {below + self.stride}"
                raise GeometryError(
                    f"{axis} {side} does not fit patch {self.patch} at stride {self.stride}; "
                    f"the nearest that does is {near}"
                )
        return (height - self.patch) // self.stride + 1, (width - self.patch) // self.stride + 1

    def positions(self, grid: Grid) -> Tensor:
        """Return the positions ``(1, prefix + h * w, C)`` of a grid: float32, computed once."""
        key = (grid, self.device)
        if key not in self._positions:
            if len(self._positions) >= _CACHED_GRIDS:
                self._positions.pop(next(iter(self._positions)))
            resized = resize_positions(
                self._learned_positions,
                grid,
                source_grid=self._source_grid,
                prefix=self._prefix_positions,
                interpolation=self.row.interpolation,
            )
            self._positions[key] = resized.to(self.device)
        return self._positions[key]

    @property
    def _prefix_positions(self) -> int:
        return 0 if self.vit.no_embed_class else int(self.vit.num_prefix_tokens)

    def patch_tokens(
        self,
        images: Tensor,
        *,
        layer: int | None = None,
        norm: bool | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the patch tokens of one block as a map.

        Args:
            images: normalised images ``(B, 3, H, W)``, floating point.
            layer: 0-based block, negative from the end; the last one by default.
            norm: apply the final norm; by default as the row says for the last block, and not
                for earlier ones.
            positions: ``(1 or B, prefix + h * w, C)`` to use in place of the backbone's own.

        Returns:
            ``(B, C, h, w)``, dtype of the backbone.

        Raises:
            GeometryError: the sides do not fit the patch and stride.
            ValueError: no such block, or positions of another shape.
        """
        layer = self.depth - 1 if layer is None else layer
        return self.intermediate_tokens(images, (layer,), norm=norm, positions=positions)[0]

    def intermediate_tokens(
        self,
        images: Tensor,
        layers: Sequence[int],
        *,
        norm: bool | None = None,
        positions: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the patch tokens of several blocks from one pass, which ends at the deepest.

        Args:
            images: as in :meth:`patch_tokens`.
            layers: 0-based blocks, negative from the end, in any order.
            norm: as in :meth:`patch_tokens`, for each block.
            positions: as in :meth:`patch_tokens`.

        Returns:
            One ``(B, C, h, w)`` a requested block, in the order of ``layers``.
        """
        blocks = [self.block(layer) for layer in layers]
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images (B, 3, H, W), got {tuple(images.shape)}")
        grid = self.grid(images.shape[-2], images.shape[-1])
        with torch.set_grad_enabled(self.requires_input_grad and torch.is_grad_enabled()):
            tokens = self._embed(images.to(self.dtype), grid, positions)
            read: dict[int, Tensor] = {}
            for index in range(max(blocks) + 1):
                tokens = self.vit.blocks[index](tokens)
                if index in blocks:
                    read[index] = self._read(tokens, index, norm, grid)
        return [read[index] for index in blocks]

    def block(self, layer: int) -> int:
        """Return the 0-based number of a block that may be counted from the end."""
        if not -self.depth <= layer < self.depth:
            raise ValueError(
                f"{self.row.name} has blocks 0 to {self.depth - 1} (or -1 to -{self.depth}), "
                f"got layer {layer}"
            )
        return layer % self.depth

    def _embed(self, images: Tensor, grid: Grid, positions: Tensor | None) -> Tensor:
        """Patches, class and register tokens and their positions: ``(B, prefix + h * w, C)``."""
        own = self.positions(grid)
        if positions is not None and positions.shape[1:] != own.shape[1:]:
            raise ValueError(
                f"expected positions (1 or B, {own.shape[1]}, {own.shape[2]}) for grid "
                f"{grid[0]} x {grid[1]}, got {tuple(positions.shape)}"
            )
        added = own if positions is None else positions.to(own.device, torch.float32)
        projection = self.vit.patch_embed.proj
        cells = F.conv2d(images, projection.weight, projection.bias, stride=self.stride)
        tokens = rearrange(cells, "b c h w -> b (h w) c")
        tokens = self.vit.patch_embed.norm(tokens)
        prefix = [
            token.expand(len(images), -1, -1)
            for token in (self.vit.cls_token, self.vit.reg_token)
            if token is not None
        ]
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
            tokens = self.vit.norm(tokens)
        patches = tokens[:, self.vit.num_prefix_tokens :]
        return rearrange(patches, "b (h w) c -> b c h w", h=grid[0], w=grid[1])

    def extra_repr(self) -> str:
        """Name, patch and stride."""
        return f"{self.row.name}, patch={self.patch}, stride={self.stride}"
