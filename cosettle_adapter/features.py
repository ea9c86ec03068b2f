"""Frames to features: a frozen backbone followed by a projection, as a pure function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from einops import pack, rearrange, unpack
from torch import Tensor, nn
from torch.nn import functional as F

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.closed_form import settle_clip
from cosettle_adapter.correspondence.fusion import fusion_guide
from cosettle_adapter.errors import BackboneMismatchError, ProjectionFormatError
from cosettle_adapter.projection import Projection, ProjectionConfig
from cosettle_adapter.video import Fit, Geometry, apply_geometry, as_frames, plan_geometry

Size = int | tuple[int, int]

DEFAULT_BATCH_SIZE = 8


class FeatureModel(nn.Module):
    """A backbone and its projection: the part of an adapter that knows nothing but frames."""

    def __init__(
        self,
        backbone: Backbone,
        projection: Projection,
        *,
        allow_mismatched_backbone: bool = False,
    ) -> None:
        """Put a projection on the backbone it was fitted on, else :class:`BackboneMismatchError`.

        With ``allow_mismatched_backbone`` on any that has as many channels.
        """
        super().__init__()
        config = projection.config
        read = sum(backbone.widths[backbone.block(layer)] for layer in config.layers)
        if config.in_width != read:
            raise ProjectionFormatError(
                f"the projection reads {config.in_width} channels, but {len(config.layers)} "
                f"layer(s) of {backbone.row.name} have {read}"
            )
        if config.fingerprint != backbone.fingerprint and not allow_mismatched_backbone:
            fitted, here = (each.fingerprint.removeprefix("sha256:") for each in (config, backbone))
            raise BackboneMismatchError(
                f"this projection was fitted on {config.backbone} with fingerprint {fitted[:12]}, "
                f"but the backbone here is {backbone.row.name} with fingerprint {here[:12]}. Load "
                "the one it names, fit a projection for this one (projection='fit'), or pass "
                "allow_mismatched_backbone=True if they are interchangeable"
            )
        self.backbone = backbone
        self.projection = projection  # frozen as well until ``projection.requires_grad_(True)``
        self.settles = False  # whether each clip is settled unless a call says otherwise

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
        """Resize and normalise frames into what the backbone takes: ``(T, 3, H', W')`` float32."""
        frames = as_frames(frames)
        frames = frames if frames.ndim == 4 else rearrange(frames, "c h w -> 1 c h w")
        return self._normalize(frames, self.geometry(*frames.shape[-2:], size=size, fit=fit))

    # fmt: off
    @overload
    def forward(
        self, frames: Any, *, size: Size | None = ..., fit: Fit = ..., batch_size: int = ...,
        normalize: bool = ..., return_backbone: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self, frames: Any, *, size: Size | None = ..., fit: Fit = ..., batch_size: int = ...,
        normalize: bool = ..., return_backbone: Literal[True],
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
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return temporally consistent patch features.

        Args:
            frames: ``(T, 3, H, W)``, ``(B, T, 3, H, W)`` or ``(3, H, W)``, RGB, uint8 in
                [0, 255] or floating point in [0, 1], not normalised; NumPy ``(T, H, W, 3)``
                arrays and PIL images are taken as well.
            size: what frames are resized to: ``None`` keeps their size, an integer sets the
                shorter side, a pair sets ``(height, width)`` exactly.
            fit: what happens to sides that are not whole patches: ``resize`` rounds each to the
                nearest, ``pad`` keeps the aspect and repeats the bottom and right edge.
            batch_size: frames in a forward pass; bounds memory and does not change the result.
            normalize: scale every patch's feature to unit length.
            return_backbone: return the tokens the projection read as well.

        Returns:
            Features ``(T, C, h, w)`` with the leading dimensions of ``frames``; or
            ``(backbone, features)`` if ``return_backbone``. If the adapter ``settles``, each clip
            by its own T frames, in their order.

        Raises:
            FrameError: frames of another shape, range or dtype, or none at all.
            GeometryError: frames smaller than a patch, or a size that does not fit the patch.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        frames, leading = pack([as_frames(frames)], "* c h w")
        kept: list[Tensor] = []
        projected: list[Tensor] = []
        for batch in frames.split(batch_size):
            tokens, features, _ = self._encode(batch, size=size, fit=fit)
            projected.append(features if self.settles else self._finished(features, normalize))
            if return_backbone:
                kept.append(tokens)
        flat = torch.cat(projected)
        if self.settles:
            length = leading[0][-1] if leading[0] else 1
            settled = torch.cat([settle_clip(clip) for clip in torch.split(flat, length)])
            flat = self._finished(settled, normalize)
        maps: Tensor = unpack(flat, leading, "* c h w")[0]
        if not return_backbone:
            return maps
        return unpack(torch.cat(kept), leading, "* c h w")[0], maps

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's own returns Any

    def _guide(self, tokens: Tensor) -> Tensor:
        """What temporal fusion takes its matches from, ``(N, G, h, w)``."""
        layers = map(self.backbone.block, self.config.layers)
        return fusion_guide(tokens, [self.backbone.widths[layer] for layer in layers])

    def _encode(
        self, frames: Tensor, *, size: Size | None, fit: Fit
    ) -> tuple[Tensor, Tensor, Geometry]:
        """Tokens, features and geometry of frames that fit in one pass."""
        geometry = self.geometry(*frames.shape[-2:], size=size, fit=fit)
        return *self._encode_images(self._normalize(frames, geometry)), geometry

    def _encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and features of what :meth:`preprocess` returns."""
        read = self.backbone.intermediate_tokens(images, self.config.layers, norm=self.config.norm)
        tokens = read[0] if len(read) == 1 else torch.cat(read, dim=1)
        return tokens, self.projection(tokens)

    def _finished(self, features: Tensor, normalize: bool) -> Tensor:
        return (F.normalize(features, dim=1) if normalize else features).to(self.dtype)

    def _normalize(self, frames: Tensor, geometry: Geometry) -> Tensor:
        images = apply_geometry(frames.to(self.device, non_blocking=True), geometry)
        full_scale = 1.0 if frames.is_floating_point() else 255.0
        row = self.backbone.row
        mean, std = (torch.tensor(each, dtype=torch.float64) for each in (row.mean, row.std))
        scale, shift = (
            rearrange(each, "c -> c 1 1").to(images.device, torch.float32)
            for each in (1 / (full_scale * std), mean / std)
        )
        # bytes are multiplied as they are, which saves a float copy of them
        images = images.float() if images.is_floating_point() else images
        return (images * scale).sub_(shift)
