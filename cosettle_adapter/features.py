"""Frames to features: a frozen backbone followed by a projection, as a pure function."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from einops import pack, rearrange, unpack
from torch import Tensor, nn
from torch.nn import functional as F

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.backbones.backbone import Read
from cosettle_adapter.closed_form import settle_clip
from cosettle_adapter.correspondence.fusion import fusion_guide
from cosettle_adapter.errors import BackboneMismatchError, ProjectionFormatError
from cosettle_adapter.projection import Projection, ProjectionConfig
from cosettle_adapter.video import Fit, Geometry, apply_geometry, as_frames, plan_geometry
from cosettle_adapter.video.geometry import check_side

if TYPE_CHECKING:
    from cosettle_adapter.upsampling import DenseSize, Upsampler

Size = int | tuple[int, int]

DEFAULT_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of frames, in the adapter's dtype; ``T`` stands for the leading dimensions."""

    patch: Tensor  # (T, C, h, w) patch tokens of the backbone
    adapted: Tensor  # (T, C', h, w) features, as ``adapter(frames)`` returns them
    geometry: Geometry  # how patches map to pixels of the frames
    cls: Tensor | None = None  # (T, C) class token, if the backbone has one
    registers: Tensor | None = None  # (T, R, C) register tokens, if the backbone has any
    attention: Tensor | None = None  # (T, heads, N, N) after softmax, on request


class FeatureModel(nn.Module):
    """A backbone and its projection: the part of an adapter that maps frames to features."""

    def __init__(
        self, backbone: Backbone, projection: Projection, *, allow_mismatched_backbone: bool = False
    ) -> None:
        """Combine a projection with its backbone, on the backbone's device.

        A projection of another backbone is a :class:`BackboneMismatchError`.
        """
        super().__init__()
        config = projection.config
        width = sum(backbone.widths[backbone.block(layer)] for layer in config.layers)
        if config.in_width != width:
            raise ProjectionFormatError(
                f"the projection reads {config.in_width} channels, but {len(config.layers)} "
                f"layer(s) of {backbone.row.name} have {width}"
            )
        if config.fingerprint != backbone.fingerprint and not allow_mismatched_backbone:
            expected = config.fingerprint.removeprefix("sha256:")
            actual = backbone.fingerprint.removeprefix("sha256:")
            raise BackboneMismatchError(
                f"this projection was fitted on {config.backbone} with fingerprint "
                f"{expected[:12]}, but the backbone is {backbone.row.name} with fingerprint "
                f"{actual[:12]}. Load that backbone, fit a projection for this one "
                "(projection='fit'), or pass allow_mismatched_backbone=True if both are "
                "interchangeable"
            )
        self.backbone = backbone
        # frozen until ``projection.requires_grad_(True)``
        self.projection = projection.to(backbone.device)
        self.settles = False  # whether ``forward`` and ``stream`` settle by default

    @property
    def config(self) -> ProjectionConfig:
        """The projection's config."""
        return self.projection.config

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.config.out_width

    @property
    def device(self) -> torch.device:
        """Device of the backbone, where features are computed and returned."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the backbone and of the features."""
        return self.backbone.dtype

    def geometry(
        self, height: int, width: int, *, size: Size | None = None, fit: Fit = "resize"
    ) -> Geometry:
        """Return how frames of ``height`` x ``width`` pixels become a grid of patches."""
        patch, stride = self.backbone.patch, self.backbone.stride
        return plan_geometry(height, width, patch=patch, stride=stride, size=size, fit=fit)

    def preprocess(self, frames: Any, *, size: Size | None = None, fit: Fit = "resize") -> Tensor:
        """Resize and normalise frames for the backbone: ``(T, 3, H', W')`` float32."""
        frames = as_frames(frames)
        frames = frames if frames.ndim == 4 else rearrange(frames, "c h w -> 1 c h w")
        return self._prepare(frames, self.geometry(*frames.shape[-2:], size=size, fit=fit))

    # fmt: off
    @overload
    def forward(
        self, frames: Any, *, size: Size | None = ..., fit: Fit = ..., batch_size: int = ...,
        normalize: bool = ..., return_backbone: Literal[False] = ...,
        dense: DenseSize | None = ..., upsampler: Upsampler = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self, frames: Any, *, size: Size | None = ..., fit: Fit = ..., batch_size: int = ...,
        normalize: bool = ..., return_backbone: Literal[True],
        dense: DenseSize | None = ..., upsampler: Upsampler = ...,
    ) -> tuple[Tensor, Tensor]: ...
    # fmt: on

    def forward(
        self,
        frames: Any,
        *,
        size: Size | None = None,
        fit: Fit = "resize",
        batch_size: int = DEFAULT_BATCH_SIZE,
        normalize: bool = False,
        return_backbone: bool = False,
        dense: DenseSize | None = None,
        upsampler: Upsampler = "bilinear",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return temporally consistent patch features.

        Args:
            frames: ``(T, 3, H, W)``, ``(B, T, 3, H, W)`` or ``(3, H, W)``, RGB, uint8 in
                [0, 255] or floating point in [0, 1], not normalised; NumPy ``(T, H, W, 3)``
                arrays and PIL images also work.
            size: size to resize frames to: ``None`` keeps their size, an integer sets the shorter
                side, a pair sets ``(height, width)`` exactly.
            fit: how each side becomes a whole number of patches: ``resize`` rounds it to the
                nearest, ``pad`` keeps the aspect ratio and repeats the bottom and right edge.
            batch_size: frames per forward pass; bounds memory and does not change the result.
            normalize: scale every patch's (with ``dense``, pixel's) feature to unit length.
            return_backbone: also return the tokens that the projection reads.
            dense: upsample the features, without gradients, to one per pixel of the frames
                (``"input"``) or to ``(height, width)``.
            upsampler: for ``dense``: ``"bilinear"``, or ``"guided"`` by the colours of the frames
                (:mod:`~cosettle_adapter.upsampling`).

        Returns:
            Features ``(T, C, h, w)`` with the leading dimensions of ``frames``, or ``(T, C, H, W)``
            if ``dense``; ``(backbone, features)`` if ``return_backbone``. If the adapter
            ``settles``, each clip is settled with the statistics of its own T frames.

        Raises:
            FrameError: frames of another shape, range or dtype, or no frames.
            GeometryError: frames smaller than a patch, or a size that does not fit the patch.
        """
        packed, leading = self._pack(frames, batch_size)
        backbone_maps: list[Tensor] = []
        projected: list[Tensor] = []
        by_batch = dense is None and not self.settles  # saves memory
        for batch in torch.split(packed, batch_size):
            tokens, features, geometry, _ = self._encode(batch, size=size, fit=fit)
            if by_batch:
                features = self._finished(features, normalize, upsampler=upsampler)
            projected.append(features)
            if return_backbone:
                backbone_maps.append(tokens)
        flat = torch.cat(projected)
        if not by_batch:
            flat = self._settled(flat, leading)
            flat = self._finished(flat, normalize, geometry, packed, dense, upsampler)
        maps: Tensor = unpack(flat, leading, "* c h w")[0]
        if not return_backbone:
            return maps
        return unpack(torch.cat(backbone_maps), leading, "* c h w")[0], maps

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's own returns Any

    def tokens(
        self,
        frames: Any,
        *,
        layer: int | None = None,
        size: Size | None = None,
        fit: Fit = "resize",
        batch_size: int = DEFAULT_BATCH_SIZE,
        attention: int | None = None,
    ) -> Tokens:
        """Return class, register and patch tokens beside the features, from one pass.

        Tokens are read before any head; those of the last layer after the final norm, if the model
        has one. Models with attention pooling (SigLIP) or mean pooling and feature maps (CNNs,
        Swin) have no class token; the mean of the features describes a frame of any model.

        Args:
            frames, size, fit, batch_size: as in :meth:`forward`.
            layer: 0-based layer of ``cls``, ``registers`` and ``patch``, negative from the end;
                default: the last one; for feature maps, the backbone's default layer.
            attention: layer whose attention is returned: for every head, how much each token
                (row) attends to each token (column), in the order class token, registers, patches
                by rows. The class token's map is ``tokens.attention[:, :, 0, -h * w:]`` with
                ``h, w = tokens.geometry.grid``. 1370 tokens and 12 heads take 90 MB per frame in
                float32.

        Raises:
            ValueError: no such layer, or no attention between all patches (feature maps).
            FrameError, GeometryError: as in :meth:`forward`.
        """
        backbone = self.backbone
        layer = backbone.block(backbone.default_layer if layer is None else layer)
        reads = [Read(layer), *(Read(layer, kind=kind) for kind in backbone.special)]
        if attention is not None:
            reads.append(Read(backbone.block(attention), kind="attention"))
        packed, leading = self._pack(frames, batch_size)
        projected: list[Tensor] = []
        read: list[list[Tensor]] = []
        for batch in torch.split(packed, batch_size):
            _, features, geometry, outputs = self._encode(batch, size=size, fit=fit, also=reads)
            projected.append(features)
            read.append(outputs)
        adapted = self._settled(torch.cat(projected), leading).to(self.dtype)
        tokens: dict[str, Tensor] = {"adapted": unpack(adapted, leading, "* c h w")[0]}
        for output, *parts in zip(reads, *read, strict=True):
            axes = {"cls": "* c", "registers": "* n c"}.get(output.kind, "* c h w")
            (tokens[output.kind],) = unpack(torch.cat(parts), leading, axes)
        return Tokens(**tokens, geometry=geometry)

    def _pack(self, frames: Any, batch_size: int) -> tuple[Tensor, Any]:
        """Frames ``(N, 3, H, W)``, and the leading dimensions to restore."""
        check_side("batch_size", batch_size)
        packed, leading = pack([as_frames(frames)], "* c h w")
        return packed, leading

    def _settled(self, features: Tensor, leading: Any) -> Tensor:
        """Settle each clip with its own statistics, if the adapter does."""
        if not self.settles:
            return features
        length = leading[0][-1] if leading[0] else 1
        return torch.cat([settle_clip(clip) for clip in torch.split(features, length)])

    def _guide(self, tokens: Tensor) -> Tensor:
        """Maps ``(N, G, h, w)`` in which temporal fusion finds its matches."""
        layers = map(self.backbone.block, self.config.layers)
        return fusion_guide(tokens, [self.backbone.widths[layer] for layer in layers])

    def _encode(
        self, frames: Tensor, *, size: Size | None, fit: Fit, also: Sequence[Read] = ()
    ) -> tuple[Tensor, Tensor, Geometry, list[Tensor]]:
        """Tokens, features, geometry and further reads of frames, in one pass."""
        geometry = self.geometry(*frames.shape[-2:], size=size, fit=fit)
        tokens, features, outputs = self._encode_images(self._prepare(frames, geometry), also)
        return tokens, features, geometry, outputs

    def _encode_images(
        self, images: Tensor, also: Sequence[Read] = ()
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Tokens, features and further reads of what :meth:`preprocess` returns."""
        layers, norm = self.config.layers, self.config.norm
        read = self.backbone.intermediate_tokens(images, layers, norm=norm, also=also)
        count = len(layers)
        tokens = read[0] if count == 1 else torch.cat(read[:count], dim=1)
        return tokens, self.projection(tokens), read[count:]

    def _finished(
        self,
        features: Tensor,
        normalize: bool,
        geometry: Geometry | None = None,
        frames: Tensor | None = None,
        dense: DenseSize | None = None,
        upsampler: Upsampler = "bilinear",
    ) -> Tensor:
        """Features in the adapter's dtype, with ``dense`` one per pixel of ``frames``."""
        if dense is None or geometry is None:
            if upsampler != "bilinear":
                raise ValueError(f"upsampler={upsampler!r} needs dense, the size of the features")
            return (F.normalize(features, dim=1) if normalize else features).to(self.dtype)
        from cosettle_adapter.upsampling import upsample  # rarely used

        return upsample(features.to(self.dtype), geometry, dense, frames, upsampler, normalize)

    def _prepare(self, frames: Tensor, geometry: Geometry) -> Tensor:
        """Resized and normalised frames, on the device."""
        images = apply_geometry(frames.to(self.device, non_blocking=True), geometry)
        return self.backbone.normalize(images, to_255=not frames.is_floating_point())
