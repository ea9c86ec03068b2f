"""The interface of all backbones: normalised images in, maps of patch tokens out, frozen."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from cosettle_adapter.backbones.rows import BackboneRow
from cosettle_adapter.errors import GeometryError

Grid = tuple[int, int]
Kind = Literal["patch", "cls", "registers", "attention"]


class Read(NamedTuple):
    """One output of a forward pass, of a layer from 0 to ``depth - 1``."""

    layer: int
    norm: bool | None = None  # whether to apply the final norm (None: as the row says)
    # patch tokens (B, C, h, w), class token (B, C), register tokens (B, R, C), or the attention of
    # all tokens after softmax (B, heads, N, N)
    kind: Kind = "patch"


@dataclasses.dataclass(frozen=True)
class Positions:
    """Positional embeddings of one grid, used in place of a backbone's own."""

    # (1 or B, prefix + h * w, C), added to the tokens before the first layer
    absolute: Tensor | None = None
    # (h * w, 2 D), sines then cosines that rotate queries and keys in every layer;
    # (depth, heads, h * w, 2 D) if layers differ
    rotary: Tensor | None = None

    def check_like(self, own: Positions, grid: Grid, *, images: int) -> None:
        """Raise ``ValueError`` unless these have the shapes of a backbone's own positions."""
        for kind in ("absolute", "rotary"):
            shape, expected = (
                None if tensor is None else tuple(tensor.shape)
                for tensor in (getattr(self, kind), getattr(own, kind))
            )
            batched = (images, *expected[1:]) if expected and kind == "absolute" else expected
            if shape not in (expected, batched):
                raise ValueError(
                    f"expected {kind} positions of shape {expected} for grid {grid[0]} x "
                    f"{grid[1]}{f', or {batched}' if batched != expected else ''}, got {shape}"
                )

    def to(self, device: torch.device) -> Positions:
        """Return the same positions on a device, in float32."""
        absolute, rotary = (
            None if tensor is None else tensor.to(device, torch.float32)
            for tensor in (self.absolute, self.rotary)
        )
        return dataclasses.replace(self, absolute=absolute, rotary=rotary)

    def added(self) -> Tensor | None:
        """Embedding to add to the tokens of a batch, ``(1 or B, prefix + h * w, C)``."""
        return self.absolute

    def rotations(self) -> Any:
        """Rotations of queries and keys; indexed by layer if layers differ."""
        return self.rotary

    def before(self, images: Tensor, backbone: Backbone) -> Tensor:
        """Transform the images before they are encoded; training shifts them, this does nothing."""
        del backbone
        return images

    def after(self, tokens: Tensor) -> Tensor:
        """Undo on maps ``(B, C, h, w)`` the transform of :meth:`before`."""
        return tokens


class Backbone(nn.Module, abc.ABC):
    """A frozen encoder that returns patch tokens as a map.

    It always stays in eval mode, and its parameters never require gradients. A *layer* is a
    transformer block, or a feature map if the resolution changes between layers; all layers are
    returned on one grid.
    """

    special: tuple[Kind, ...] = ()  # kinds of prefix tokens: cls, registers

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
        # step between patches in pixels; smaller than ``patch`` makes them overlap
        self.stride = row.patch if stride is None else stride
        if not 1 <= self.stride <= self.patch:
            raise GeometryError(
                f"stride must be between 1 and the patch size {self.patch}, got {stride}"
            )
        self.widths = tuple(widths)  # channels of each layer's tokens
        self.depth = len(self.widths)
        self.default_layer = default_layer
        self.fingerprint = fingerprint
        self.origin = origin  # readable source of the weights
        self.revision = revision  # commit of the weights' Hub repository, if they come from one
        # whether to record a graph from images to tokens when gradients are enabled
        self.requires_input_grad = requires_input_grad
        mean, std = (torch.tensor(rgb, dtype=torch.float64) for rgb in (row.mean, row.std))
        factors = torch.stack([1 / std, 1 / (255 * std), mean / std]).float()
        self._factors = rearrange(factors, "n c -> n c 1 1")  # not a buffer: stays float32

    def _apply(self, fn: Any, recurse: bool = True) -> Backbone:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._factors = self._factors.to(self.device)
        return self

    @property
    def width(self) -> int:
        """Channels of the default layer's tokens."""
        return self.widths[self.default_layer]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; positions are always float32."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode, because the backbone is frozen."""
        del mode
        super().train(False)
        return self

    def grid(self, height: int, width: int) -> Grid:
        """Return ``(h, w)`` for images of ``height`` x ``width`` pixels, or raise GeometryError."""
        for axis, side in (("height", height), ("width", width)):
            if side < self.patch or (side - self.patch) % self.stride:
                below = self.patch + max(0, (side - self.patch) // self.stride) * self.stride
                near = f"{below}" if side < below else f"{below} or {below + self.stride}"
                raise GeometryError(
                    f"{axis} {side} does not fit patch {self.patch} at stride {self.stride}; "
                    f"the nearest valid size is {near}"
                )
        return (height - self.patch) // self.stride + 1, (width - self.patch) // self.stride + 1

    def normalize(self, images: Tensor, *, to_255: bool) -> Tensor:
        """Normalise RGB in [0, 255] (``to_255``) or [0, 1] with the row's mean and deviation."""
        of_1, of_255, shift = self._factors
        # uint8 images are multiplied directly, which saves a float copy
        images = images.float() if images.is_floating_point() else images
        normalized: Tensor = images * (of_255 if to_255 else of_1)
        return normalized.sub_(shift)

    def block(self, layer: int) -> int:
        """Return the 0-based number of a layer; negative ones count from the end."""
        if layer not in range(-self.depth, self.depth):
            raise ValueError(
                f"{self.row.name} has layers 0 to {self.depth - 1} (or -1 to -{self.depth}), "
                f"got layer {layer!r}"
            )
        return layer % self.depth

    @abc.abstractmethod
    def positions(self, grid: Grid) -> Positions:
        """Return the positions of a grid in float32; they are cached."""

    @abc.abstractmethod
    def _maps(
        self, images: Tensor, reads: frozenset[Read], positions: Positions | None
    ) -> dict[Read, Tensor]:
        """One tensor for each read; no layer after the deepest one runs."""

    def patch_tokens(
        self,
        images: Tensor,
        *,
        layer: int | None = None,
        norm: bool | None = None,
        positions: Positions | None = None,
    ) -> Tensor:
        """Return the patch tokens of one layer, as :meth:`intermediate_tokens` does."""
        layer = self.default_layer if layer is None else layer
        return self.intermediate_tokens(images, (layer,), norm=norm, positions=positions)[0]

    def intermediate_tokens(
        self,
        images: Tensor,
        layers: Sequence[int],
        *,
        norm: bool | Sequence[bool | None] | None = None,
        positions: Positions | None = None,
        also: Sequence[Read] = (),
    ) -> list[Tensor]:
        """Return the patch tokens of several layers from one pass, which stops at the deepest.

        Args:
            images: normalised, ``(B, 3, H, W)``, floating point.
            layers: 0-based layers, negative from the end, in any order.
            norm: apply the final norm, one value for all layers or one per layer; default: for the
                last layer as the row says, for earlier layers never.
            positions: used in place of the backbone's own, in the shapes of :meth:`positions`.
            also: further outputs of the pass, such as class tokens or attention.

        Returns:
            One map ``(B, C, h, w)`` per layer, in the order of ``layers``, then one tensor per
            item of ``also``; in the backbone's dtype.

        Raises:
            GeometryError: the sides do not fit the patch and stride.
            ValueError: no such layer, norm or output, or positions of another shape or kind.
        """
        norms = norm if isinstance(norm, Sequence) else [norm] * len(layers)
        reads = [Read(self.block(layer), use) for layer, use in zip(layers, norms, strict=True)]
        reads += also
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images (B, 3, H, W), got {tuple(images.shape)}")
        if positions is not None:
            grid = self.grid(images.shape[-2], images.shape[-1])
            positions.check_like(self.positions(grid), grid, images=len(images))
        with torch.set_grad_enabled(self.requires_input_grad and torch.is_grad_enabled()):
            images = images.to(self.dtype)
            if positions is not None:
                images = positions.before(images, self)
            outputs = self._maps(images, frozenset(reads), positions)
            if positions is not None:
                for read in filter(lambda read: read.kind == "patch", outputs):
                    outputs[read] = positions.after(outputs[read])
            return [outputs[read] for read in reads]
