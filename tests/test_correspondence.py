from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.correspondence import (
    PROTOCOLS,
    LabelPropagator,
    mutual_nearest,
    propagate_labels,
    track_points,
)
from cosettle_adapter.errors import FrameError, GeometryError

DEFAULTS = {
    "crw": {"context": 20, "radius": 20, "topk": 7, "temperature": 0.7},
    "dino": {"context": 7, "radius": 12, "topk": 5, "temperature": 0.1},
}


def dense(features: Tensor, labels: Tensor, protocol: str, **options: float | None) -> Tensor:
    """Both protocols over the whole affinity, one query cell at a time, as they are published."""
    o = {**DEFAULTS[protocol], **{k: v for k, v in options.items() if v is not None}}
    context, topk = int(o["context"]), int(o["topk"])
    t, c, h, w = features.shape
    unit = F.normalize(features.double(), dim=1).reshape(t, c, h * w)
    out = [labels.double().reshape(len(labels), h * w)]
    place = torch.tensor([(i, j) for i in range(h) for j in range(w)]).double()
    gap = place[:, None] - place[None]
    if protocol == "crw":
        far = gap.square().sum(-1).sqrt() >= o["radius"]
    else:
        far = gap.abs().amax(-1) > o["radius"]
    for now in range(1, t):
        if protocol == "crw":  # long memory, then a window that begins with copies of frame 0
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


def one_hot(h: int, w: int, labels: int = 3, *, seed: int = 1) -> Tensor:
    return torch.rand(labels, h, w, generator=torch.Generator().manual_seed(seed)).softmax(0)


@pytest.mark.parametrize("protocol", ["crw", "dino"])
@pytest.mark.parametrize("grid", [(5, 9), (9, 5), (6, 6), (3, 31), (28, 4)])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_propagation_equals_the_dense_definition(
    protocol: str, grid: tuple[int, int], frames: int
) -> None:
    features, labels = clip(frames, *grid), one_hot(*grid)
    options = {"context": 3, "radius": 4.0 if protocol == "crw" else 3.0}
    got = propagate_labels(features, labels, protocol=protocol, **options)  # type: ignore[arg-type]
    expected = dense(features, labels, protocol, **options)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("protocol", ["crw", "dino"])
def test_protocol_defaults_beyond_the_context(protocol: str) -> None:
    features, labels = clip(24, 5, 28), one_hot(5, 28)
    got = propagate_labels(features, labels, protocol=protocol)  # type: ignore[arg-type]
    expected = dense(features, labels, protocol)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


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
def test_propagation_equals_the_dense_definition_for_any_options(
    protocol: str, frames: int, h: int, w: int, context: int, radius: float, topk: int, seed: int
) -> None:
    features, labels = clip(frames, h, w, seed=seed), one_hot(h, w)
    options = {"context": context, "radius": radius, "topk": topk}
    if protocol == "dino":  # the definition has no answer with fewer cells in reach than top-k
        topk = options["topk"] = min(topk, (int(min(radius, h - 1)) + 1) * 2)
    got = propagate_labels(features, labels, protocol=protocol, **options)  # type: ignore[arg-type]
    expected = dense(features, labels, protocol, **options)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


def test_the_second_frame_of_crw_copies_the_nearest_cell() -> None:
    features, labels = clip(2, 6, 8), one_hot(6, 8)
    got = propagate_labels(features, labels, context=20, radius=100)[1]
    unit = F.normalize(features, dim=1).flatten(2)
    best = (unit[1].T @ unit[0]).argmax(1)
    torch.testing.assert_close(got, labels.flatten(1)[:, best].reshape(3, 6, 8))


def test_the_named_protocols_are_the_published_numbers() -> None:
    for name, row in DEFAULTS.items():
        assert {key: getattr(PROTOCOLS[name], key) for key in row} == row


@pytest.mark.parametrize("chunk", [1, 10, 64, 10_000])
def test_chunks_do_not_change_the_result(chunk: int) -> None:
    features, labels = clip(5, 12, 18), one_hot(12, 18)
    whole = propagate_labels(features, labels, radius=5)
    torch.testing.assert_close(propagate_labels(features, labels, radius=5, chunk=chunk), whole)


def test_an_infinite_radius_restricts_nothing() -> None:
    features, labels = clip(4, 6, 9), one_hot(6, 9)
    far = propagate_labels(features, labels, radius=1000)
    torch.testing.assert_close(propagate_labels(features, labels, radius=math.inf), far)


def test_an_iterable_of_maps_equals_the_tensor() -> None:
    features, labels = clip(4, 6, 9), one_hot(6, 9)
    whole = propagate_labels(features, labels)
    stream = (frame[None] if t % 2 else frame for t, frame in enumerate(features))
    torch.testing.assert_close(propagate_labels(stream, labels), whole)
    propagator = LabelPropagator(labels)
    torch.testing.assert_close(torch.stack([propagator.step(f) for f in features]), whole)


def held(propagator: LabelPropagator) -> int:
    """Bytes of the tensors that a propagator and its parts hold."""
    values = [*vars(propagator).values(), *vars(propagator._recent).values()]
    return sum(each.untyped_storage().nbytes() for each in values if isinstance(each, Tensor))


@pytest.mark.parametrize("context", [0, 1, 2, 7])
def test_streaming_keeps_the_context_alone(context: int) -> None:
    features = clip(20, 4, 5)
    propagator = LabelPropagator(one_hot(4, 5), context=context)
    for frame in features[: context + 1]:
        propagator.step(frame)
    full = held(propagator)
    # the context and the first frame, all cells and three labels
    assert full == (context + 1) * (features[0].nbytes + 3 * 4 * 5 * 4)
    for frame in features[context + 1 :]:
        propagator.step(frame)
    assert held(propagator) == full


def test_frames_of_inference_mode_and_others_may_follow_each_other() -> None:
    features, labels = clip(6, 5, 7), one_hot(5, 7)
    propagator = LabelPropagator(labels, context=2)
    found = []
    for t, frame in enumerate(features):
        with torch.inference_mode(t < 3):
            found.append(propagator.step(frame.clone()))
    torch.testing.assert_close(torch.stack(found), propagate_labels(features, labels, context=2))


def test_what_a_caller_does_to_labels_changes_nothing_later() -> None:
    features, labels = clip(4, 5, 7), one_hot(5, 7)
    expected = propagate_labels(features, labels)
    propagator = LabelPropagator(labels)
    labels.zero_()
    for frame, wanted in zip(features, expected, strict=True):
        found = propagator.step(frame)
        torch.testing.assert_close(found, wanted)
        found.zero_()


@pytest.mark.parametrize("protocol", ["crw", "dino"])
def test_frames_compared_together_or_one_by_one_give_the_same(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = clip(9, 6, 28), one_hot(6, 28)
    together = propagate_labels(features, labels, protocol=protocol, context=5)  # type: ignore[arg-type]
    for cells in (1, 300, 2 * 6 * 28):
        monkeypatch.setattr("cosettle_adapter.correspondence.propagation._AGAINST", cells)
        apart = propagate_labels(features, labels, protocol=protocol, context=5, chunk=6)  # type: ignore[arg-type]
        torch.testing.assert_close(apart, together)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_and_any_scale(dtype: torch.dtype) -> None:
    features, labels = clip(3, 5, 7).to(dtype), one_hot(5, 7)
    got = propagate_labels(features, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, propagate_labels(features.double() * 7, labels))


def test_labels_stay_a_distribution_and_constant_features_are_no_trouble() -> None:
    labels = one_hot(5, 7)
    got = propagate_labels(torch.zeros(4, 8, 5, 7), labels)
    torch.testing.assert_close(got.sum(1), torch.ones(4, 5, 7))


def test_equal_frames_keep_their_labels() -> None:
    features, labels = clip(1, 7, 9).expand(6, -1, -1, -1), one_hot(7, 9)
    got = propagate_labels(features, labels, topk=1)
    torch.testing.assert_close(got, labels.expand(6, -1, -1, -1))


@pytest.mark.gpu
def test_propagation_on_a_gpu_equals_the_cpu() -> None:
    features, labels = clip(6, 9, 14), one_hot(9, 14)
    got = propagate_labels(features.cuda(), labels, radius=5)
    assert got.is_cuda
    expected = propagate_labels(features, labels, radius=5)
    torch.testing.assert_close(got.cpu(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(5, 7), r"shape \(5, 7\), expected \(K, h, w\)"),
        (torch.zeros(0, 5, 7), r"shape \(0, 5, 7\)"),
        (torch.zeros(2, 5, 7, dtype=torch.uint8), r"torch.uint8, expected floating point"),
        (torch.zeros(2, 5, 8), r"grid of \(5, 7\), expected the labels' \(5, 8\)"),
    ],
)
def test_wrong_labels_say_what_was_expected(labels: Tensor, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        propagate_labels(torch.randn(2, 4, 5, 7), labels)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.randn(4, 5, 7), r"shape \(4, 5, 7\), expected \(T, C, h, w\)"),
        ([torch.randn(2, 4, 5, 7)], r"shape \(2, 4, 5, 7\), expected \(C, h, w\)"),
        ([torch.randn(4, 5, 7).int()], r"torch.int32, expected floating point"),
        ([torch.randn(4, 5, 7), torch.randn(6, 5, 7)], "6 channels after a first frame of 4"),
        ([torch.randn(4, 5, 7), torch.randn(4, 7, 5)], r"grid of \(7, 5\)"),
    ],
)
def test_wrong_features_say_what_was_expected(features: list[Tensor], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        propagate_labels(features, torch.rand(2, 5, 7))


def test_no_frames_is_an_error() -> None:
    with pytest.raises(FrameError, match="no feature maps"):
        propagate_labels([], torch.rand(2, 5, 7))
    with pytest.raises(FrameError, match="no feature maps"):
        track_points([], torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "cwr"}, "'cwr', expected 'crw' or 'dino'"),
        ({"context": -1}, "context must be 0 or more"),
        ({"topk": 0}, "topk must be at least 1"),
        ({"radius": 0}, "radius must be above 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_options_out_of_range_say_so(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelPropagator(torch.rand(2, 5, 7), **options)  # type: ignore[arg-type]


@settings(max_examples=30)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(0, 9))
def test_mutual_nearest_equals_the_full_matrix(h: int, w: int, w2: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(6, h, w, generator=generator), torch.randn(6, 5, w2, generator=generator)
    cosine = F.normalize(a, dim=0).flatten(1).T @ F.normalize(b, dim=0).flatten(1)
    expected = [
        (i, int(j)) for i, j in enumerate(cosine.argmax(1)) if int(cosine[:, int(j)].argmax()) == i
    ]
    for chunk in (1, 4, 1000):
        pairs, values = mutual_nearest(a, b, chunk=chunk)
        assert [tuple(pair) for pair in pairs.tolist()] == expected
        torch.testing.assert_close(values, cosine[pairs[:, 0], pairs[:, 1]])


def test_identical_cells_are_matched_once() -> None:
    pairs, _ = mutual_nearest(torch.ones(3, 2, 2), torch.ones(3, 2, 2), chunk=1)
    assert pairs.tolist() == [[0, 0]]


def test_mutual_nearest_needs_equal_channels() -> None:
    with pytest.raises(GeometryError, match="3 and 4 channels"):
        mutual_nearest(torch.rand(3, 2, 2), torch.rand(4, 2, 2))
    with pytest.raises(ValueError, match="chunk"):
        mutual_nearest(torch.rand(3, 2, 2), torch.rand(3, 2, 2), chunk=0)


def smooth(h: int, w: int, shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Smooth features of an endless plane, seen after the plane moved by ``shift`` cells."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.arange(h)[:, None] - shift[0]
    columns = torch.arange(w)[None] - shift[1]
    wave = 0.5 * torch.randn(64, 2, generator=generator)
    phase = 6.28 * torch.rand(64, generator=generator)
    return torch.sin(wave[:, :1, None] * rows + wave[:, 1:, None] * columns + phase[:, None, None])


def test_tracking_follows_a_shift_to_a_fraction_of_a_cell() -> None:
    shifts = [(0.0, 0.0), (1.0, 2.0), (2.25, -1.5), (3.0, 0.75)]
    features = torch.stack([smooth(16, 20, shift) for shift in shifts])
    points = torch.tensor([[5.0, 6.0], [7.3, 9.6], [9.0, 13.5]])
    tracks = track_points(features, points)
    expected = points + torch.tensor(shifts)[:, None]
    assert (tracks.positions - expected).norm(dim=-1).max() < 0.35
    assert tracks.score.min() > 0.9
    assert tracks.cycle_error.max() < 0.6
    whole_cells = track_points(features, points, radius_argmax=0).positions
    assert torch.equal(whole_cells, whole_cells.round())
    refined = (tracks.positions - expected).norm(dim=-1).mean()
    assert refined < 0.7 * (whole_cells - expected).norm(dim=-1).mean()


def test_a_hidden_point_does_not_come_home() -> None:
    features = smooth(16, 20)
    hidden = features.clone()
    hidden[:, 4:11, 4:11] = -features[:, 2, 2][:, None, None]
    tracks = track_points([features, hidden], torch.tensor([[7.0, 7.0], [13.0, 15.0]]))
    assert tracks.cycle_error[1, 0] > 2 > tracks.cycle_error[1, 1]
    assert tracks.score[1, 0] < tracks.score[1, 1]


def test_the_search_radius_follows_the_point() -> None:
    shifts = [(0.0, 2.0 * t) for t in range(5)]
    maps = [smooth(9, 30, shift) for shift in shifts]
    maps[0][:, 4, 25] = maps[0][:, 4, 5]
    for features in maps[1:]:  # a twin that stays
        features[:, 4, 25] = maps[0][:, 4, 5]
    tracks = track_points(maps, torch.tensor([[4.0, 5.0]]), search_radius=4, radius_argmax=1)
    expected = torch.tensor([[4.0, 5.0 + shift] for _, shift in shifts])
    assert (tracks.positions[:, 0] - expected).norm(dim=-1).max() < 0.5


@given(st.floats(-0.5, 5.5), st.floats(-0.5, 7.5))
def test_positions_stay_on_the_grid(row: float, column: float) -> None:
    tracks = track_points(clip(3, 6, 8), torch.tensor([[row, column]]), search_radius=1)
    assert tracks.positions.shape == (3, 1, 2)
    assert tracks.positions.isfinite().all()
    assert (tracks.positions >= -1e-4).all()
    assert (tracks.positions <= torch.tensor([5.0001, 7.0001])).all()


def test_no_points_is_no_trouble() -> None:
    tracks = track_points(clip(3, 6, 8), torch.zeros(0, 2))
    assert [tuple(value.shape) for value in tracks] == [(3, 0, 2), (3, 0), (3, 0)]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(2), r"shape \(2,\), expected \(N, 2\)"),
        (torch.tensor([[1.0, 1.0], [6.0, 1.0]]), r"point \[6.0, 1.0\], which is outside"),
        (torch.tensor([[math.nan, 1.0]]), "outside the grid"),
    ],
)
def test_wrong_points_say_what_was_expected(points: Tensor, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        track_points(clip(2, 6, 8), points)


def test_wrong_tracking_options_say_so() -> None:
    maps, points = clip(2, 6, 8), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="radius_argmax"):
        track_points(maps, points, radius_argmax=-1)
    with pytest.raises(ValueError, match="temperature"):
        track_points(maps, points, temperature=0)
    with pytest.raises(ValueError, match="search_radius"):
        track_points(maps, points, search_radius=0.5)
    with pytest.raises(GeometryError, match="same shape"):
        track_points([maps[0], torch.randn(16, 6, 9)], points)
