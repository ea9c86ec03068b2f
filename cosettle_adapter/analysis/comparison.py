"""A clip's features before and after projections, from one pass of the backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from einops import reduce
from torch import Tensor

from cosettle_adapter.analysis.drift import guide_layer
from cosettle_adapter.closed_form import settle_clip
from cosettle_adapter.correspondence.fusion import FusionMode, fusion_guide, temporal_fusion
from cosettle_adapter.errors import BackboneMismatchError

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.backbones import Backbone
    from cosettle_adapter.projection import Projection

RAW_LAST = "raw last block"
RAW_SAME = "raw same block"
CENTRED = "centred"
ADAPTED = "adapted"
SETTLED = "settled"

Blocks = tuple[tuple[int, ...], bool]  # blocks read, and whether the final norm is applied


@dataclasses.dataclass(frozen=True)
class FeatureKind:
    """One kind of features: what is read of the backbone, and what becomes of it.

    Attributes:
        name: what tables call it.
        blocks: which are read, and whether through the final norm.
        projection: what every frame's tokens ``(N, C, h, w)`` go through, if anything.
        finish: what is done to a whole clip's ``(T, C, h, w)`` after that, if anything.
        fusion: mode of temporal fusion that comes last, if any.
        widths: channels of each layer read; needed for ``fusion``.
    """

    name: str
    blocks: Blocks
    projection: Projection | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    fusion: FusionMode | None = None
    widths: tuple[int, ...] = ()

    @property
    def needs_clip(self) -> bool:
        """Whether it is made of a whole clip, and not of each frame alone."""
        return self.finish is not None or self.fusion is not None

    @torch.no_grad()
    def of_frames(self, tokens: Tensor) -> Tensor:
        """Apply ``projection``; float32."""
        return tokens.float() if self.projection is None else self.projection(tokens).float()

    @torch.no_grad()
    def of_clip(self, tokens: Tensor) -> Tensor:
        """Apply ``projection``, ``finish`` and ``fusion``; float32."""
        features = self.of_frames(tokens)
        features = features if self.finish is None else self.finish(features)
        if self.fusion is None:
            return features
        return temporal_fusion(features, fusion_guide(tokens, self.widths), mode=self.fusion)


def centred(features: Tensor) -> Tensor:
    """Return a clip's features ``(T, C, h, w)`` minus their mean token."""
    return features - reduce(features, "t c h w -> 1 c 1 1", "mean")


def _fused(kind: FeatureKind, mode: FusionMode, backbone: Backbone) -> FeatureKind:
    name = f"{kind.name}, fused" + (" causally" if mode == "causal" else "")
    widths = tuple(backbone.widths[layer] for layer in kind.blocks[0])
    return dataclasses.replace(kind, name=name, fusion=mode, widths=widths)


def feature_kinds(
    adapter: CoSettleAdapter,
    *,
    beside: Mapping[str, Projection] | None = None,
    settle: bool | None = None,
    centre: bool = False,
    baseline_layers: Sequence[int] = (),
    fusion: FusionMode | None = None,
) -> list[FeatureKind]:
    """Return an adapter's features and what they must be compared with.

    Most of what a projection seems to gain over the last block can come from reading another
    block, or from no longer carrying the mean token; so both stand beside it.

    Args:
        adapter: backbone and projection.
        beside: name to other projections of the same backbone.
        settle: settle what the adapter returns, and each projection beside, by each clip's own
            statistics as well; by default where the adapter was loaded with
            ``projection="settle"``.
        centre: what the adapter returns minus the clip's mean token as well.
        baseline_layers: single layers that stand beside, centred by the clip's mean token.
        fusion: mode of temporal fusion; what the adapter and each projection beside return and
            the centred single layers then come fused as well.

    Returns:
        ``raw last block``, ``raw same block`` (the blocks that the projection reads, unless that
        is the last block), ``centred`` (those minus the clip's mean token), ``adapted`` (unless
        there is no projection), ``settled`` if asked for, and those beside. A projection that
        reads several blocks also stands beside each earlier one alone, ``raw layer 7`` and
        ``centred layer 7``.

    Raises:
        BackboneMismatchError: a projection of another backbone.
        ValueError: a layer that there is not.
    """
    backbone, config = adapter.backbone, adapter.config
    last: Blocks = ((backbone.default_layer,), backbone.row.final_norm)
    same: Blocks = (tuple(backbone.block(layer) for layer in config.layers), config.norm)
    kinds = [FeatureKind(RAW_LAST, last)]
    if same != last:
        kinds.append(FeatureKind(RAW_SAME, same))
    kinds.append(FeatureKind(CENTRED, same, finish=centred))
    earlier = sorted(same[0])[:-1]
    for layer in sorted({*earlier, *(backbone.block(layer) for layer in baseline_layers)}):
        alone: Blocks = ((layer,), layer == backbone.depth - 1 and backbone.row.final_norm)
        if layer in earlier:
            kinds.append(FeatureKind(f"raw layer {layer}", alone))
        kinds.append(FeatureKind(centred_layer(layer), alone, finish=centred))
    if config.kind != "identity":
        kinds.append(FeatureKind(ADAPTED, same, adapter.projection))
        if centre:
            kinds.append(FeatureKind(f"{ADAPTED}, centred", same, adapter.projection, centred))
    settle = adapter.settles if settle is None else settle
    if settle:
        kinds.append(FeatureKind(SETTLED, same, adapter.projection, finish=settle_clip))
    for name, projection in (beside or {}).items():
        other = projection.config
        if other.fingerprint != adapter.config.fingerprint:
            raise BackboneMismatchError(
                f"{name} was fitted on another backbone ({other.backbone}) than the model here "
                f"({config.backbone}); compare projections of one backbone"
            )
        blocks = (tuple(backbone.block(layer) for layer in other.layers), other.norm)
        kinds.append(FeatureKind(name, blocks, projection))
        if settle:
            kinds.append(FeatureKind(f"{name}, settled", blocks, projection, finish=settle_clip))
    if fusion is not None:
        fusable = {ADAPTED, *(beside or {}), *map(centred_layer, range(backbone.depth))}
        kinds += [_fused(kind, fusion, backbone) for kind in kinds if kind.name in fusable]
    return kinds


def centred_layer(layer: int) -> str:
    """Return the name of a single layer minus the clip's mean token."""
    return f"centred layer {layer}"


def guide_kind(adapter: CoSettleAdapter, kinds: Sequence[FeatureKind]) -> FeatureKind:
    """Return the single layer, centred, whose matches drift is measured with on real clips.

    It is none that a projection reads or that fusion matches by. Raw and centred single layers
    are not kept out: there would be none left.

    Args:
        adapter: backbone and projection.
        kinds: the features to be measured.
    """
    backbone = adapter.backbone
    read = {backbone.block(layer) for layer in adapter.config.layers}
    for kind in kinds:
        if kind.projection is not None or ", fused" in kind.name:
            read.update(kind.blocks[0])
    layer = guide_layer(backbone.depth, read)
    return FeatureKind(f"matches of {centred_layer(layer)}", ((layer,), False), finish=centred)


def read_blocks(
    backbone: Backbone, images: Tensor, wanted: Sequence[Blocks]
) -> dict[Blocks, Tensor]:
    """Read several sets of blocks in one pass of the backbone.

    Args:
        backbone: the frozen encoder.
        images: normalised ``(B, 3, H, W)``.
        wanted: sets of blocks; those of one set are concatenated along the channels.

    Returns:
        Set of blocks to ``(B, C, h, w)``.
    """
    singles = sorted({(layer, norm) for layers, norm in wanted for layer in layers})
    maps = backbone.intermediate_tokens(
        images, [layer for layer, _ in singles], norm=[norm for _, norm in singles]
    )
    found = dict(zip(singles, maps, strict=True))
    return {
        (layers, norm): torch.cat([found[layer, norm] for layer in layers], dim=1)
        for layers, norm in wanted
    }


def compare_features(
    adapter: CoSettleAdapter,
    frames: Tensor,
    *,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 4,
    on_frames: Callable[[int], None] | None = None,
    kinds: Sequence[FeatureKind] | None = None,
) -> dict[str, Tensor]:
    """Return a clip's adapted features and what they must be compared with.

    Args:
        adapter: backbone and projection.
        frames: ``(T, 3, H, W)`` uint8.
        size: what frames are resized to, as in the adapter's ``forward``.
        batch_size: frames a forward pass.
        on_frames: called with the number of frames done, after each pass.
        kinds: those of :func:`feature_kinds` by default.

    Returns:
        ``(T, C, h, w)`` float32 on the CPU for each of ``kinds``.
    """
    kinds = kinds or feature_kinds(adapter)
    wanted = list(dict.fromkeys(kind.blocks for kind in kinds))
    parts: dict[Blocks, list[Tensor]] = {blocks: [] for blocks in wanted}
    done = 0
    for batch in torch.split(frames, batch_size):
        images = adapter.preprocess(batch, size=size)
        for blocks, maps in read_blocks(adapter.backbone, images, wanted).items():
            parts[blocks].append(maps.float().cpu())
        done += len(batch)
        if on_frames is not None:
            on_frames(done)
    tokens = {blocks: torch.cat(parts.pop(blocks)) for blocks in wanted}
    return {kind.name: kind.of_clip(tokens[kind.blocks].to(adapter.device)).cpu() for kind in kinds}
