"""The interface all backbones share: normalised images in, maps of patch tokens out, frozen."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cosettle_adapter.backbones.positions import Grid, Positions
from cosettle_adapter.backbones.row import BackboneRow
from cosettle_adapter.errors import GeometryError


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

    @abc.abstractmethod
    def _maps(
        self, images: Tensor, layers: frozenset[int], norm: bool | None, positions: Positions | None
    ) -> dict[int, Tensor]:
        """Run no further than the deepest of ``layers``; ``{layer: (B, C, h, w)}``."""

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
                :meth:`positions`; the absolute ones may differ from image to image
                ``(B, prefix + h * w, C)``.

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
        norm: bool | None = None,
        positions: Positions | None = None,
    ) -> list[Tensor]:
        """Return the patch tokens of several layers from one pass, which ends at the deepest.

        Args:
            images: as in :meth:`patch_tokens`.
            layers: 0-based layers, negative from the end, in any order.
            norm: as in :meth:`patch_tokens`, for each layer.
            positions: as in :meth:`patch_tokens`.

        Returns:
            One ``(B, C, h, w)`` a requested layer, in the order of ``layers``.
        """
        wanted = [self.block(layer) for layer in layers]
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images (B, 3, H, W), got {tuple(images.shape)}")
        with torch.set_grad_enabled(self.requires_input_grad and torch.is_grad_enabled()):
            maps = self._maps(images.to(self.dtype), frozenset(wanted), norm, positions)
        return [maps[layer] for layer in wanted]

    def extra_repr(self) -> str:
        """Name, patch and stride."""
        return f"{self.row.name}, patch={self.patch}, stride={self.stride}"
