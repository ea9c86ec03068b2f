from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.errors import BackboneMismatchError
from cosettle_adapter.evaluation.variants import (
    ADAPTED,
    CENTRED,
    RAW_LAST,
    RAW_SAME,
    SETTLED,
    compare_features,
    feature_variants,
    guide_layer,
    guide_variant,
)

from helpers import projection_for


def frames_of(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (length, 3, 32, 48), dtype=torch.uint8, generator=generator)


def test_one_pass_gives_what_the_parts_give(tiny_adapter: CoSettleAdapter) -> None:
    frames, done = frames_of(5), []
    found = compare_features(tiny_adapter, frames, batch_size=2, on_frames=done.append)
    assert list(found) == [RAW_LAST, RAW_SAME, CENTRED, ADAPTED]
    assert done == [2, 4, 5]
    raw, adapted = tiny_adapter(frames, return_backbone=True)
    torch.testing.assert_close(found[RAW_SAME], raw)
    torch.testing.assert_close(found[ADAPTED], adapted)
    torch.testing.assert_close(found[CENTRED], raw - raw.mean((0, 2, 3), keepdim=True))
    last = tiny_adapter.backbone.patch_tokens(tiny_adapter.preprocess(frames))
    torch.testing.assert_close(found[RAW_LAST], last)


def test_fused_and_settled_features_are_the_adapters(tiny_adapter: CoSettleAdapter) -> None:
    frames = frames_of(5)
    variants = feature_variants(tiny_adapter, fusion="symmetric", settle=True, centre=True)
    found = compare_features(tiny_adapter, frames, variants=variants)
    streamed = tiny_adapter.stream(frames, temporal_fusion="symmetric")
    expected = torch.cat([chunk.features for chunk in streamed])
    torch.testing.assert_close(found["adapted, fused"], expected)
    adapted = found[ADAPTED]
    torch.testing.assert_close(
        found["adapted, centred"], adapted - adapted.mean((0, 2, 3), keepdim=True)
    )
    assert not torch.allclose(found[SETTLED], adapted)


@pytest.mark.parametrize(
    ("layers", "norm"), [((3,), False), ((3,), True), ((11,), False), ((3, 11), False)]
)
def test_what_is_read_is_what_the_config_says(
    tiny_backbone: VisionTransformerBackbone, layers: tuple[int, ...], norm: bool
) -> None:
    projection = projection_for(
        tiny_backbone, layers=layers, norm=norm, in_width=tiny_backbone.width * len(layers)
    )
    adapter, frames = CoSettleAdapter(tiny_backbone, projection), frames_of(1)
    found = compare_features(adapter, frames)
    torch.testing.assert_close(found[ADAPTED], adapter(frames))
    earlier = [f"{name} layer 3" for name in ("raw", "centred")] if len(layers) > 1 else []
    assert list(found) == [RAW_LAST, RAW_SAME, CENTRED, *earlier, ADAPTED]
    if earlier:
        assert torch.equal(found["raw layer 3"], found[RAW_SAME][:, : tiny_backbone.width])


def test_the_names_say_what_is_compared(tiny_backbone: VisionTransformerBackbone) -> None:
    normed = tiny_backbone.row.final_norm
    last = CoSettleAdapter(tiny_backbone, projection_for(tiny_backbone, layers=(11,), norm=normed))
    assert [each.name for each in feature_variants(last)] == [RAW_LAST, CENTRED, ADAPTED]
    raw = CoSettleAdapter.raw(tiny_backbone)
    assert [each.name for each in feature_variants(raw)] == [RAW_LAST, CENTRED]
    other = projection_for(tiny_backbone, layers=(5,), seed=3)
    names = [
        each.name
        for each in feature_variants(
            last, baselines={"other": other}, baseline_layers=[-2], settle=True, fusion="causal"
        )
    ]
    assert names == [
        RAW_LAST, CENTRED, "centred layer 10", ADAPTED, SETTLED, "other", "other, settled",
        "centred layer 10, fused causally", "adapted, fused causally", "other, fused causally",
    ]  # fmt: skip
    foreign = projection_for(tiny_backbone, fingerprint="another")
    with pytest.raises(BackboneMismatchError, match="foreign was fitted on another backbone"):
        feature_variants(last, baselines={"foreign": foreign})


@pytest.mark.parametrize(
    ("depth", "read", "layer"),
    [
        (12, {7, 11}, 8),
        (12, {7, 8}, 6),
        (12, set(), 7),
        (24, {11}, 15),
        (6, {3, 4, 5}, 2),
        (1, {0}, 0),
    ],
)
def test_the_layer_that_judges_is_read_by_nothing_else(
    depth: int, read: set[int], layer: int
) -> None:
    assert guide_layer(depth, read) == layer


def test_the_guide_keeps_clear_of_baselines_and_of_fusion(tiny_adapter: CoSettleAdapter) -> None:
    variants = feature_variants(tiny_adapter, baseline_layers=[8], fusion="symmetric")
    guide = guide_variant(tiny_adapter, variants)
    assert guide.name == "matches of centred layer 6"
    assert guide.reads == ((6,), False)
    plain = [dataclasses.replace(each, fusion=None) for each in variants]
    assert guide_variant(tiny_adapter, plain).reads == ((8,), False)
