"""Label propagation against the published protocols, one query at a time over all patches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.correspondence import PROTOCOLS, LabelPropagator, propagate_labels
from cosettle_adapter.errors import FrameError, GeometryError

DEFAULTS = {
    "best": {"context": 20, "radius": 20, "topk": 7, "temperature": 0.7},
    "crw": {"context": 20, "radius": 12, "topk": 10, "temperature": 0.05},
    "dino": {"context": 7, "radius": 12, "topk": 5, "temperature": 0.1},
}
both_protocols = pytest.mark.parametrize("protocol", ["crw", "dino"])
any_protocol = pytest.mark.parametrize("protocol", DEFAULTS)


def dense(features: Tensor, labels: Tensor, protocol: str, **options: float) -> Tensor:
    o = {**DEFAULTS[protocol], **options}
    context, topk = int(o["context"]), int(o["topk"])
    t, c, h, w = features.shape
    unit = F.normalize(features.double(), dim=1).reshape(t, c, h * w)
    out = [labels.double().reshape(len(labels), h * w)]
    place = torch.tensor([(i, j) for i in range(h) for j in range(w)]).double()
    gap = place[:, None] - place[None]
    if protocol != "dino":
        far = gap.square().sum(-1).sqrt() >= o["radius"]
    else:
        far = gap.abs().amax(-1) > o["radius"]
    for now in range(1, t):
        if protocol != "dino":  # long memory, then a window that begins with copies of frame 0
            frames = [0] + [max(0, now - back) for back in range(context, 0, -1)]
            near = [False] + [True] * context
        else:
            frames = [0, *range(max(1, now - context), now)]
            near = [True] * len(frames)
        rows = []
        for frame, restricted in zip(frames, near, strict=True):
            affinity = unit[now].T @ unit[frame]  # (query, key)
            rows.append(affinity.masked_fill(far, -math.inf) if restricted else affinity)
        values, index = torch.cat(rows, 1).topk(topk, dim=1)
        weights = torch.softmax(values / o["temperature"], 1)
        context_labels = torch.cat([out[frame] for frame in frames], 1)  # (K, key)
        out.append(torch.einsum("qn,kqn->kq", weights, context_labels[:, index]))
    return torch.stack(out).reshape(t, len(labels), h, w)


def clip(frames: int, h: int, w: int, *, seed: int = 0, channels: int = 16) -> Tensor:
    """Features that look alike from frame to frame, so that neighbours mean something."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(channels, h, w, generator=generator)
    noise = torch.randn(frames, channels, h, w, generator=generator)
    return torch.stack([base.roll(t, -1) + 0.5 * noise[t] for t in range(frames)]) * 3


def soft_labels(h: int, w: int, labels: int = 3) -> Tensor:
    return torch.rand(labels, h, w, generator=torch.Generator().manual_seed(1)).softmax(0)


@both_protocols
@pytest.mark.parametrize(("grid", "frames"), [((5, 9), 7), ((9, 5), 2), ((28, 4), 4)])
def test_it_equals_the_dense_definition(protocol: str, grid: tuple[int, int], frames: int) -> None:
    features, labels = clip(frames, *grid), soft_labels(*grid)
    options = {"context": 3, "radius": 4.0 if protocol == "crw" else 3.0}
    got = propagate_labels(features, labels, protocol=protocol, **options)
    expected = dense(features, labels, protocol, **options)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(got[0], labels)


@any_protocol
def test_the_named_protocols_are_the_published_numbers(protocol: str) -> None:
    row = DEFAULTS[protocol]
    assert {key: getattr(PROTOCOLS[protocol], key) for key in row} == row
    features, labels = clip(23, 4, 26), soft_labels(4, 26)
    for chosen in (protocol, PROTOCOLS[protocol]):
        got = propagate_labels(features, labels, protocol=chosen)
        expected = dense(features, labels, protocol)
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


@settings(max_examples=30)
@given(
    st.sampled_from(["crw", "dino"]),
    st.integers(1, 6),
    st.integers(3, 12),
    st.integers(3, 12),
    st.integers(0, 4),
    st.integers(4, 36).map(lambda quarters: quarters / 4),  # exact, so no distance is a near tie
    st.integers(1, 9),
    st.integers(0, 5),
)
def test_it_equals_the_dense_definition_for_any_options(
    protocol: str, frames: int, h: int, w: int, context: int, radius: float, topk: int, seed: int
) -> None:
    features, labels = clip(frames, h, w, seed=seed), soft_labels(h, w)
    if protocol == "dino":  # the definition has no answer with fewer patches in reach than top-k
        topk = min(topk, (int(min(radius, h - 1)) + 1) * 2)
    options = {"context": context, "radius": radius, "topk": topk}
    got = propagate_labels(features, labels, protocol=protocol, **options)
    expected = dense(features, labels, protocol, **options)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


@both_protocols
def test_chunks_and_frames_compared_together_do_not_change_the_result(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = clip(8, 5, 12), soft_labels(5, 12)
    options = {"protocol": protocol, "context": 5, "radius": 5}
    whole = propagate_labels(features, labels, **options)
    for against, chunk in ((1, 6), (300, 1), (2 * 5 * 12, 10), (8192, 10_000)):
        monkeypatch.setattr("cosettle_adapter.correspondence.propagation._CONTEXT_CHUNK", against)
        # maps one by one, of either shape
        stream = (frame[None] if t % 2 else frame for t, frame in enumerate(features))
        torch.testing.assert_close(propagate_labels(stream, labels, chunk=chunk, **options), whole)
    far, anywhere = (propagate_labels(features, labels, radius=r) for r in (1000, math.inf))
    torch.testing.assert_close(anywhere, far)


@pytest.mark.parametrize("context", [0, 1, 7])
def test_streaming_keeps_the_context_only(context: int) -> None:
    features = clip(20, 4, 5)
    propagator = LabelPropagator(soft_labels(4, 5), context=context)
    for frame in features:
        propagator.step(frame)
    held = [propagator._first, propagator._first_labels]
    held += [tensor for frame in propagator._recent for tensor in frame]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in held}
    assert sum(storages.values()) == (context + 1) * (features[0].nbytes + 3 * 4 * 5 * 4)


def test_what_a_caller_does_to_labels_changes_nothing_later() -> None:
    features, labels = clip(4, 5, 7), soft_labels(5, 7)
    expected = propagate_labels(features, labels)
    propagator = LabelPropagator(labels)
    labels.zero_()
    for t, (frame, wanted) in enumerate(zip(features, expected, strict=True)):
        with torch.inference_mode(t < 2):  # and either mode may follow the other
            found = propagator.step(frame.clone())
        torch.testing.assert_close(found, wanted)
        found.zero_() if t >= 2 else None


def test_any_dtype_and_scale_constant_features_and_equal_frames_are_no_trouble() -> None:
    labels = soft_labels(5, 7)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        features = clip(3, 5, 7).to(dtype)
        got = propagate_labels(features, labels)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, propagate_labels(features.double() * 7, labels))
    got = propagate_labels(torch.zeros(4, 8, 5, 7), labels)
    torch.testing.assert_close(got.sum(1), torch.ones(4, 5, 7))
    still = clip(1, 5, 7).expand(6, -1, -1, -1)
    got = propagate_labels(still, labels, topk=1)
    torch.testing.assert_close(got, labels.expand(6, -1, -1, -1))


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu() -> None:
    features, labels = clip(6, 9, 14), soft_labels(9, 14)
    got = propagate_labels(features.cuda(), labels, radius=5)
    assert got.is_cuda
    expected = propagate_labels(features, labels, radius=5)
    torch.testing.assert_close(got.cpu(), expected, atol=1e-3, rtol=0)


MAP = torch.randn(4, 5, 7)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        ([MAP], torch.zeros(5, 7), r"shape \(5, 7\) .*point \(K, h, w\)"),
        ([MAP], torch.zeros(2, 5, 7, dtype=torch.uint8), "torch.uint8, expected floating"),
        ([MAP], torch.zeros(2, 5, 8), r"grid of \(5, 7\), expected the labels' \(5, 8\)"),
        (MAP, torch.zeros(2, 5, 7), r"shape \(4, 5, 7\), expected \(T, C, h, w\)"),
        ([MAP.int()], torch.zeros(2, 5, 7), r"torch.int32, expected floating point \(C, h, w\)"),
        ([MAP, torch.randn(6, 5, 7)], torch.zeros(2, 5, 7), "6 channels after a first frame of 4"),
        ([MAP, torch.randn(4, 7, 5)], torch.zeros(2, 5, 7), r"grid of \(7, 5\)"),
    ],
)
def test_wrong_shapes_say_what_was_expected(
    features: list[Tensor], labels: Tensor, message: str
) -> None:
    with pytest.raises(GeometryError, match=message):
        propagate_labels(features, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "cwr"}, "'cwr', expected one of 'best', 'crw', 'dino'"),
        ({"context": -1}, "context must be 0 or more"),
        ({"topk": 0}, "topk must be at least 1"),
        ({"radius": 0}, "radius must be above 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_options_out_of_range_say_so(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        propagate_labels([MAP], torch.rand(2, 5, 7), **options)
    with pytest.raises(FrameError, match="no feature maps"):
        propagate_labels([], torch.rand(2, 5, 7))
