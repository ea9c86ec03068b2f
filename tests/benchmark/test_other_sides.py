from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import HubOptions
from cosettle_adapter.benchmark import BenchmarkError
from cosettle_adapter.benchmark.bench import close
from cosettle_adapter.benchmark.masks import object_masks
from cosettle_adapter.benchmark.models import load_model
from cosettle_adapter.benchmark.others import dense_propagation, plain_masks
from cosettle_adapter.benchmark.others.bare_backbone import BareBackbone
from cosettle_adapter.benchmark.propagation import clip_features
from cosettle_adapter.correspondence import propagate_labels
from cosettle_adapter.evaluation.metrics import boundary_f, region_similarity


def small(name: str) -> CoSettleAdapter:
    return load_model(
        name,
        random_weights=True,
        weights=None,
        device=torch.device("cpu"),
        dtype=torch.float32,
        options=HubOptions(local_files_only=True),
    )


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_vit2", "timm:test_convnext"])
def test_the_bare_backbone_returns_the_tokens_that_the_projection_reads(name: str) -> None:
    adapter = small(name)
    size = (3 * adapter.backbone.patch, 5 * adapter.backbone.patch)
    frames = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    tokens, _ = adapter(frames, return_backbone=True)
    bare = BareBackbone(adapter, size)
    torch.testing.assert_close(bare(adapter.preprocess(frames)), tokens)


def test_several_blocks_come_in_the_order_of_the_config() -> None:
    backbone = small("timm:test_vit").backbone
    raw = CoSettleAdapter.raw(backbone, layer=2, norm=False)
    both = CoSettleAdapter.raw(backbone, layer=0, norm=False)
    images = torch.randn(1, 3, 48, 64)
    found = [BareBackbone(each, (48, 64))(images) for each in (raw, both)]
    expected = backbone.intermediate_tokens(images, (2, 0), norm=False)
    for ours, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, ours)


@given(
    grid=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    context=st.integers(1, 4),
    radius=st.integers(1, 5),
    topk=st.integers(1, 5),
)
@settings(max_examples=20)
def test_dense_propagation_is_the_dino_protocol(
    grid: tuple[int, int], context: int, radius: int, topk: int
) -> None:
    features, first = clip_features(grid, context + 3, 16, device=torch.device("cpu"))
    ours = propagate_labels(
        features, first, context=context, radius=radius, topk=topk, temperature=0.1, protocol="dino"
    )
    near = dense_propagation.neighbourhood(grid, radius, like=first)
    for now in range(1, len(features)):
        at = [0, *range(max(1, now - context), now)]
        other = dense_propagation.propagate(
            features[now], [features[t] for t in at], [ours[t] for t in at], near, topk=topk
        )
        torch.testing.assert_close(ours[now], other, atol=1e-4, rtol=1e-3)


def test_the_clip_moves_and_its_labels_are_shares() -> None:
    features, labels = clip_features((12, 16), 9, 8, device=torch.device("cpu"))
    assert features.shape == (9, 8, 12, 16)
    torch.testing.assert_close(labels.sum(0), torch.ones(12, 16))
    moved = F.cosine_similarity(features[0, :, :, :-2], features[8, :, :, 2:], dim=0).mean()
    stayed = F.cosine_similarity(features[0], features[8], dim=0).mean()
    assert moved > stayed


def test_plain_masks_are_the_metrics() -> None:
    truth, guess = object_masks(3, (60, 90))
    empty = truth[0] & ~truth[0]
    pairs = [*zip(truth, guess, strict=True), (truth[0], empty), (empty, guess[0]), (empty, empty)]
    for pair in pairs:
        assert math.isclose(region_similarity(*pair), plain_masks.region_similarity(*pair))
        assert math.isclose(boundary_f(*pair), plain_masks.boundary_f(*pair))
        assert math.isclose(boundary_f(*pair), plain_masks.boundary_f_by_distance(*pair))
    assert 0.5 < region_similarity(truth[0], guess[0]) < 1
    assert 0.02 < truth.mean() < 0.3


def test_sides_that_differ_are_not_timed() -> None:
    one = torch.ones(3)
    assert close("sums", one, one, tolerance=0) == "sums within 0.0e+00"
    with pytest.raises(BenchmarkError, match=r"sums differ by 0\.5 .* no point in timing"):
        close("sums", one * 1.5, one, tolerance=1e-3)
    with pytest.raises(BenchmarkError, match=r"sums: \(2,\) here and \(3,\) beside"):
        close("sums", one[:2], one, tolerance=1e-3)
    with pytest.raises(BenchmarkError, match="sums differ by nan"):
        close("sums", one * math.nan, one, tolerance=1e-3)
