from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.correspondence import temporal_fusion
from cosettle_adapter.correspondence.fusion import FusionMode
from cosettle_adapter.errors import BackboneMismatchError
from cosettle_adapter.evaluation import variants
from cosettle_adapter.evaluation.variants import (
    ADAPTED,
    CENTRED,
    RAW_LAST,
    RAW_SAME,
    compare_features,
    feature_variants,
)

from helpers import projection_for

FRAMES = torch.randint(0, 256, (5, 3, 32, 48), dtype=torch.uint8, generator=torch.manual_seed(0))


def centred(features: Tensor) -> Tensor:
    return features - features.mean((0, 2, 3), keepdim=True)


def test_one_pass_gives_what_the_parts_give(tiny_adapter: CoSettleAdapter) -> None:
    done: list[int] = []
    found = compare_features(tiny_adapter, FRAMES, batch_size=2, on_frames=done.append)
    assert done == [2, 4, 5]
    raw, adapted = tiny_adapter(FRAMES, return_backbone=True)
    last = tiny_adapter.backbone.patch_tokens(tiny_adapter.preprocess(FRAMES))
    expected = {RAW_LAST: last, RAW_SAME: raw, CENTRED: centred(raw), ADAPTED: adapted}
    assert list(found) == list(expected)
    torch.testing.assert_close(dict(found), expected)


@pytest.mark.parametrize(("mode", "ending"), [("symmetric", ""), ("causal", " causally")])
def test_fused_and_settled_features_are_the_adapters(
    tiny_adapter: CoSettleAdapter, mode: FusionMode, ending: str
) -> None:
    chosen = feature_variants(
        tiny_adapter, fusion=mode, settle=True, centre=True, baseline_layers=[9]
    )
    found = compare_features(tiny_adapter, FRAMES, variants=chosen)
    streamed = tiny_adapter.stream(FRAMES, temporal_fusion=mode)
    expected = torch.cat([chunk.features for chunk in streamed])
    torch.testing.assert_close(found[f"adapted, fused{ending}"], expected)
    torch.testing.assert_close(found["adapted, centred"], centred(found[ADAPTED]))
    assert not torch.allclose(found[variants.SETTLED], found[ADAPTED])
    single = found["centred layer 9"]
    guide = single - single.mean((2, 3), keepdim=True)
    fused = temporal_fusion(single, guide, mode=mode)
    mine = found[f"centred layer 9, fused{ending}"]
    torch.testing.assert_close(mine, fused, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "norm"), [((3,), False), ((3,), True), ((11,), False), ((3, 11), False)]
)
def test_what_is_read_is_what_the_config_says(
    tiny_backbone: VisionTransformerBackbone, layers: tuple[int, ...], norm: bool
) -> None:
    width = tiny_backbone.width * len(layers)
    projection = projection_for(tiny_backbone, layers=layers, norm=norm, in_width=width)
    adapter = CoSettleAdapter(tiny_backbone, projection)
    found = compare_features(adapter, FRAMES[:1])
    torch.testing.assert_close(found[ADAPTED], adapter(FRAMES[:1]))
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
    baselines = {"other": projection_for(tiny_backbone, layers=(5,), seed=3)}
    options = {"baselines": baselines, "baseline_layers": [-2], "settle": True, "fusion": "causal"}
    assert [each.name for each in feature_variants(last, **options)] == [
        RAW_LAST, CENTRED, "centred layer 10", ADAPTED, "settled", "other", "other, settled",
        "centred layer 10, fused causally", "adapted, fused causally", "other, fused causally",
    ]  # fmt: skip
    foreign = projection_for(tiny_backbone, fingerprint="another")
    with pytest.raises(BackboneMismatchError, match="foreign was fitted on another backbone"):
        feature_variants(last, baselines={"foreign": foreign})


@pytest.mark.parametrize(
    ("read", "fused", "layer"),
    [((7, 11), [], 8), ((7, 8), [], 6), ((11,), [7], 8), (tuple(range(12)), [], 7)],
)
def test_the_layer_that_judges_is_read_by_nothing_else(
    tiny_backbone: VisionTransformerBackbone, read: tuple[int, ...], fused: list[int], layer: int
) -> None:
    width = tiny_backbone.width * len(read)
    projection = projection_for(tiny_backbone, layers=read, in_width=width)
    adapter = CoSettleAdapter(tiny_backbone, projection)
    guide = variants.guide_variant(
        adapter, feature_variants(adapter, baseline_layers=fused, fusion="symmetric")
    )
    assert (guide.name, guide.reads) == (f"matches of centred layer {layer}", ((layer,), False))
