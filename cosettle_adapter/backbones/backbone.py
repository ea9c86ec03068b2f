"""The interface all backbones share: normalised images in, maps of patch tokens out, frozen."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from cosettle_adapter.backbones.positions import Positions
from cosettle_adapter.backbones.row import BackboneRow
from cosettle_adapter.backbones.zoom import Grid, crop_corners, zoomed_side
from cosettle_adapter.errors import GeometryError

Read = tuple[int, bool | None]  # layer, and whether the final norm is applied; None: by the row


class Backbone(nn.Module, abc.ABC):
    """A frozen encoder that returns patch tokens as a map.

    It stays in eval mode whatever ``train()`` is asked for, its parameters never require
    gradients, and no graph is recorded unless ``requires_input_grad`` says so. A *layer* is a
    transformer block, or a feature map where the resolution changes on the way; all layers are
    returned on one grid.

    Attributes:
        row: the registry row it was built from.
        patch: side of a patch in pixels.
        stride: step between patches in pixels; smaller than ``patch`` makes them overlap.
        widths: channels of each layer's tokens.
        depth: number of layers.
        default_layer: the layer that is read when none is named.
        fingerprint: hash over its tensors, as :func:`cosettle_adapter.backbones.weights` makes it.
        origin: where the weights came from, for people.
        revision: commit of the Hub repository they came from, if they did.
        requires_input_grad: record a graph from images to tokens when gradients are enabled.
    """

    def __init__(
        self,
        row: BackboneRow,
        *,
        widths: Sequence[int],
        default_layer: int,
        fingerprint: str,
        origin: str = "",
        revision: str | None = None,
        stride: int | None = None,
        requires_input_grad: bool = False,
    ) -> None:
        super().__init__()
        self.row = row
        self.patch = row.patch
        self.stride = row.patch if stride is None else stride
        if not 1 <= self.stride <= self.patch:
            raise GeometryError(
                f"stride must be between 1 and the patch size {self.patch}, got {stride}"
            )
        self.widths = tuple(widths)
        self.depth = len(self.widths)
        self.default_layer = default_layer
        self.fingerprint, self.origin, self.revision = fingerprint, origin, revision
        self.requires_input_grad = requires_input_grad

    @property
    def width(self) -> int:
        """Channels of the default layer's tokens."""
        return self.widths[self.default_layer]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; positions are float32 whatever it is."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: frozen means frozen."""
        del mode
        super().train(False)
        return self

    def freeze(self) -> None:
        """Turn gradients of all parameters off; constructors end with it."""
        self.requires_grad_(False)
        self.train()

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

    def block(self, layer: int) -> int:
        """Return the 0-based number of a layer that may be counted from the end."""
        if not -self.depth <= layer < self.depth:
            raise ValueError(
                f"{self.row.name} has blocks 0 to {self.depth - 1} (or -1 to -{self.depth}), "
                f"got layer {layer}"
            )
        return layer % self.depth

    @abc.abstractmethod
    def positions(self, grid: Grid) -> Positions:
        """Return the positions of a grid in float32, computed once."""

    def perturbed_positions(self, grid: Grid, offsets: Tensor, *, ratio: float = 10.0) -> Positions:
        """Return positions that do not tell patches where they are (the paper's PEA).

        This is what backbones without positions to replace do in its stead (feature maps: their
        zero padding and windows tell cells where they are all the same). The picture is moved to
        another place of a canvas that is the picture repeated in both directions, and cut to the
        size it has; maps are moved back, so that cells keep their content. It moves as far as a
        crop of the zoomed grid would: by up to ``ratio / (1 + ratio)`` of a side, in whole cells.

        Args:
            grid: ``(h, w)`` of the images.
            offsets: ``(S, 2)`` in [0, 1), (row, column): one for all images, or one for each.
            ratio: by how much more than once the grid is zoomed; 0 changes nothing.

        Returns:
            ``S`` variants, on the device of the backbone.

        Raises:
            ValueError: offsets of another shape or range, or a negative ratio.
        """
        corners = crop_corners(offsets, grid, ratio)
        moved = [
            corner * side // zoomed_side(side, ratio)
            for corner, side in zip(corners, grid, strict=True)
        ]
        return Positions(shift=torch.stack(moved, dim=1).to(self.device))

    @abc.abstractmethod
    def _maps(
        self, images: Tensor, reads: frozenset[Read], positions: Positions | None
    ) -> dict[Read, Tensor]:
        """Run no further than the deepest of the layers read; ``(B, C, h, w)`` for each read."""

    def patch_tokens(
        self,
        images: Tensor,
        *,
        layer: int | None = None,
        norm: bool | None = None,
        positions: Positions | None = None,
    ) -> Tensor:
        """Return the patch tokens of one layer as a map.

        Args:
            images: normalised images ``(B, 3, H, W)``, floating point.
            layer: 0-based layer, negative from the end; ``default_layer`` when not given.
            norm: apply the final norm; by default as the row says for the last layer, and not
                for earlier ones.
            positions: positions to use in place of the backbone's own, in the shapes of
                :meth:`positions`; they may differ from image to image, as
                :class:`~cosettle_adapter.backbones.positions.Positions` says.

        Returns:
            ``(B, C, h, w)``, dtype of the backbone.

        Raises:
            GeometryError: the sides do not fit the patch and stride.
            ValueError: no such layer, no such norm, or positions of another shape or kind.
        """
        layer = self.default_layer if layer is None else layer
        return self.intermediate_tokens(images, (layer,), norm=norm, positions=positions)[0]

    def intermediate_tokens(
        self,
        images: Tensor,
        layers: Sequence[int],
        *,
        norm: bool | Sequence[bool | None] | None = None,
        positions: Positions | None = None,
    ) -> list[Tensor]:
        """Return the patch tokens of several layers from one pass, which ends at the deepest.

        Args:
            images: as in :meth:`patch_tokens`.
            layers: 0-based layers, negative from the end, in any order.
            norm: as in :meth:`patch_tokens`; one for all layers, or one for each.
            positions: as in :meth:`patch_tokens`.

        Returns:
            One ``(B, C, h, w)`` a requested layer, in the order of ``layers``.
        """
        norms = norm if isinstance(norm, Sequence) else [norm] * len(layers)
        wanted = [(self.block(layer), each) for layer, each in zip(layers, norms, strict=True)]
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images (B, 3, H, W), got {tuple(images.shape)}")
        if positions is not None:
            grid = self.grid(images.shape[-2], images.shape[-1])
            positions.check_like(self.positions(grid), grid, images=len(images))
        shift = self._shift(positions)
        with torch.set_grad_enabled(self.requires_input_grad and torch.is_grad_enabled()):
            images = images.to(self.dtype)
            if shift is not None:
                images = _roll(images, shift * self.patch)
            maps = self._maps(images, frozenset(wanted), positions)
            if shift is not None:
                maps = {read: _roll(cells, -shift) for read, cells in maps.items()}
        return [maps[read] for read in wanted]

    def _shift(self, positions: Positions | None) -> Tensor | None:
        if positions is None or positions.shift is None:
            return None
        if self.stride != self.patch:
            raise GeometryError(
                f"pictures cannot be moved by whole cells where patches overlap (patch "
                f"{self.patch}, stride {self.stride}); leave the stride out"
            )
        return positions.for_images(positions.shift).to(self.device)

    def extra_repr(self) -> str:
        """Name, patch and stride."""
        return f"{self.row.name}, patch={self.patch}, stride={self.stride}"


def _roll(images: Tensor, shift: Tensor) -> Tensor:
    """Move each of ``(B, C, H, W)`` down and right by its ``(B or 1, 2)``, round the edges."""
    rows, columns = (
        (torch.arange(side, device=images.device) - rearrange(moved, "b -> b 1")) % side
        for side, moved in zip(images.shape[-2:], shift.unbind(1), strict=True)
    )
    which = torch.arange(len(images), device=images.device)
    rolled = images[
        rearrange(which, "b -> b 1 1"),
        :,
        rearrange(rows, "b h -> b h 1"),
        rearrange(columns, "b w -> b 1 w"),
    ]
    return rearrange(rolled, "b h w c -> b c h w")
