"""Variants of a clip's features, with and without projections, from one pass of the backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from einops import reduce
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter, Size
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.closed_form import settle_clip
from cosettle_adapter.correspondence.fusion import FusionMode, fusion_guide, temporal_fusion
from cosettle_adapter.errors import BackboneMismatchError
from cosettle_adapter.projection import Projection

RAW_LAST = "raw last layer"
RAW_SAME = "raw same layer"
CENTRED = "centred"
ADAPTED = "adapted"
SETTLED = "settled"

Preprocess = Callable[..., Tensor]  # with the arguments of CoSettleAdapter.preprocess
Reads = tuple[tuple[int, ...], bool]  # layers, and whether the final norm is applied
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class FeatureVariant:
    """One way to compute features: the layers to read and the steps applied to their tokens.

    The steps are ``projection`` for each frame, ``finish`` for the whole clip ``(T, C, h, w)``,
    and temporal fusion, for which ``widths`` are the channels of each layer.
    """

    name: str
    reads: Reads
    projection: Projection | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    fusion: FusionMode | None = None
    widths: tuple[int, ...] = ()

    @property
    def needs_clip(self) -> bool:
        """Whether a frame's features depend on the whole clip."""
        return self.finish is not None or self.fusion is not None

    @torch.no_grad()
    def of_frames(self, tokens: Tensor) -> Tensor:
        """Apply the projection to tokens ``(N, C, h, w)``, on their device; float32."""
        if self.projection is None:
            return tokens.float()
        features: Tensor = self.projection.to(tokens.device)(tokens)
        return features.float()

    @torch.no_grad()
    def of_clip(self, tokens: Tensor) -> Tensor:
        """Compute the features of a whole clip ``(T, C, h, w)``; float32."""
        features = self.of_frames(tokens)
        features = features if self.finish is None else self.finish(features)
        if self.fusion is None:
            return features
        return temporal_fusion(features, fusion_guide(tokens, self.widths), mode=self.fusion)


def feature_variants(
    adapter: CoSettleAdapter,
    *,
    baselines: Mapping[str, Projection] | None = None,
    settle: bool | None = None,
    centre: bool = False,
    baseline_layers: Sequence[int] = (),
    fusion: FusionMode | None = None,
) -> list[FeatureVariant]:
    """Return the variants of an adapter's features, with their baselines.

    Much of a projection's gain over the last layer can come from reading another layer, or from
    removing the mean token, so the baselines do both. The variants are ``raw last layer``, ``raw
    same layer`` (the layers that the projection reads, if different), ``centred`` (the same minus
    the clip's mean token) and ``adapted``; if the projection reads several layers, also ``raw
    layer 7`` and ``centred layer 7`` for each of them but the last.

    Args:
        adapter: backbone and projection.
        baselines: further projections of the same backbone, by name.
        settle: also settle the features of the adapter and each baseline by the clip's own
            statistics; by default if the adapter was loaded with ``projection="settle"``.
        centre: also subtract the clip's mean token from the adapter's features.
        baseline_layers: single layers to compare with, centred by the clip's mean token.
        fusion: also fuse over time the features of the adapter, of each baseline and of the
            centred single layers.
    """
    backbone, config, projection = adapter.backbone, adapter.config, adapter.projection
    baselines = baselines or {}
    settle = adapter.settles if settle is None else settle
    last: Reads = ((backbone.default_layer,), backbone.row.final_norm)
    same = _reads(backbone, projection)
    variants = [FeatureVariant(RAW_LAST, last)]
    if same != last:
        variants.append(FeatureVariant(RAW_SAME, same))
    variants.append(FeatureVariant(CENTRED, same, finish=centred))
    earlier = sorted(same[0])[:-1]
    for layer in sorted({*earlier, *(backbone.block(layer) for layer in baseline_layers)}):
        alone: Reads = ((layer,), layer == backbone.depth - 1 and backbone.row.final_norm)
        if layer in earlier:
            variants.append(FeatureVariant(f"raw layer {layer}", alone))
        variants.append(FeatureVariant(f"centred layer {layer}", alone, finish=centred))
    if config.kind != "identity":
        variants.append(FeatureVariant(ADAPTED, same, projection))
        if centre:
            variants.append(FeatureVariant(f"{ADAPTED}, centred", same, projection, centred))
    if settle:
        variants.append(FeatureVariant(SETTLED, same, projection, settle_clip))
    for name, other in baselines.items():
        if other.config.fingerprint != config.fingerprint:
            raise BackboneMismatchError(
                f"{name} was fitted on another backbone ({other.config.backbone}) than the model "
                f"({config.backbone}); compare projections of one backbone"
            )
        reads = _reads(backbone, other)
        variants.append(FeatureVariant(name, reads, other))
        if settle:
            variants.append(FeatureVariant(f"{name}, settled", reads, other, settle_clip))
    if fusion is None:
        return variants
    suffix = ", fused causally" if fusion == "causal" else ", fused"
    fused: list[FeatureVariant] = []
    for variant in variants:
        if variant.name in {ADAPTED, *baselines} or variant.name.startswith("centred layer"):
            widths = tuple(backbone.widths[layer] for layer in variant.reads[0])
            name = variant.name + suffix
            fused.append(dataclasses.replace(variant, name=name, fusion=fusion, widths=widths))
    return variants + fused


def _reads(backbone: Backbone, projection: Projection) -> Reads:
    config = projection.config
    return tuple(backbone.block(layer) for layer in config.layers), config.norm


def guide_variant(adapter: CoSettleAdapter, variants: Sequence[FeatureVariant]) -> FeatureVariant:
    """Return the centred single layer whose matches serve as truth on real clips.

    It is the layer nearest to two thirds of the depth (the later of two) that no projection and no
    fusion reads; if they read all layers, the nearest of all.
    """
    depth = adapter.backbone.depth
    read = {adapter.backbone.block(layer) for layer in adapter.config.layers}
    for variant in variants:
        if variant.projection is not None or variant.fusion is not None:
            read.update(variant.reads[0])
    free = sorted({*range(depth)} - read, reverse=True) or range(depth)
    layer = min(free, key=lambda layer: abs(3 * (layer + 1) - 2 * depth))
    return FeatureVariant(f"matches of centred layer {layer}", ((layer,), False), finish=centred)


def centred(features: Tensor) -> Tensor:
    """Return a clip's features ``(T, C, h, w)`` minus their mean token."""
    return features - reduce(features, "t c h w -> 1 c 1 1", "mean")


def raw_same(features: Mapping[str, Value]) -> Value:
    """Return the value of the raw variant with the layers that the projection reads."""
    return features[RAW_SAME if RAW_SAME in features else RAW_LAST]


def read_layers(backbone: Backbone, images: Tensor, sets: Iterable[Reads]) -> dict[Reads, Tensor]:
    """Read sets of layers in one pass: ``(B, C, h, w)`` by set, concatenated along channels."""
    singles = sorted({(layer, norm) for layers, norm in sets for layer in layers})
    maps = backbone.intermediate_tokens(
        images, [layer for layer, _ in singles], norm=[norm for _, norm in singles]
    )
    tokens = dict(zip(singles, maps, strict=True))
    return {
        (layers, norm): torch.cat([tokens[layer, norm] for layer in layers], dim=1)
        for layers, norm in sets
    }


def encode_variants(
    adapter: CoSettleAdapter,
    batches: Iterable[Tensor],
    variants: Sequence[FeatureVariant],
    *,
    size: Size | None = None,
    preprocess: Preprocess = CoSettleAdapter.preprocess,
) -> Iterator[tuple[str, Tensor]]:
    """Encode frames ``(N, 3, H, W)`` in one pass; yield names and ``(T, C, h, w)`` float32.

    Features are on the adapter's device, those of one variant at a time.
    """
    parts: dict[Reads, list[Tensor]] = {variant.reads: [] for variant in variants}
    for frames in batches:
        images = preprocess(adapter, frames, size=size)
        for reads, maps in read_layers(adapter.backbone, images, list(parts)).items():
            parts[reads].append(maps.float().cpu())
    tokens = {reads: torch.cat(parts.pop(reads)) for reads in list(parts)}
    for variant in variants:
        yield variant.name, variant.of_clip(tokens[variant.reads].to(adapter.device))


def compare_features(
    adapter: CoSettleAdapter,
    frames: Tensor,
    *,
    size: Size | None = None,
    batch_size: int = 4,
    on_frames: Callable[[int], None] = lambda done: None,
    variants: Sequence[FeatureVariant] | None = None,
) -> dict[str, Tensor]:
    """Return a clip's features ``(T, C, h, w)`` by variant, on the CPU.

    Frames are ``(T, 3, H, W)`` uint8. ``on_frames`` is called with the number of frames done.
    """

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(frames), batch_size):
            yield frames[start : start + batch_size]
            on_frames(min(start + batch_size, len(frames)))

    variants = variants or feature_variants(adapter)
    encoded = encode_variants(adapter, batches(), variants, size=size)
    return {name: features.cpu() for name, features in encoded}
