"""Mutual nearest neighbours and point tracking."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.correspondence import mutual_nearest, track_points
from cosettle_adapter.errors import FrameError, GeometryError


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
    pairs, _ = mutual_nearest(torch.ones(3, 2, 2), torch.ones(3, 2, 2), chunk=1)
    assert pairs.tolist() == [[0, 0]], "identical patches are matched once"


def smooth(h: int, w: int, shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Smooth features of an endless plane, seen after the plane moved by ``shift`` patches."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.arange(h)[:, None] - shift[0]
    columns = torch.arange(w)[None] - shift[1]
    wave = 0.5 * torch.randn(64, 2, generator=generator)
    phase = 6.28 * torch.rand(64, generator=generator)
    return torch.sin(wave[:, :1, None] * rows + wave[:, 1:, None] * columns + phase[:, None, None])


def test_tracking_follows_a_shift_to_a_fraction_of_a_patch() -> None:
    shifts = [(0.0, 0.0), (1.0, 2.0), (2.25, -1.5), (3.0, 0.75)]
    features = torch.stack([smooth(16, 20, shift) for shift in shifts])
    points = torch.tensor([[5.0, 6.0], [7.3, 9.6], [9.0, 13.5]])
    tracks = track_points(features, points)
    expected = points + torch.tensor(shifts)[:, None]
    assert (tracks.positions - expected).norm(dim=-1).max() < 0.35
    assert tracks.score.min() > 0.9
    assert tracks.cycle_error.max() < 0.6
    whole_patches = track_points(features, points, radius_argmax=0).positions
    assert torch.equal(whole_patches, whole_patches.round())
    refined = (tracks.positions - expected).norm(dim=-1).mean()
    assert refined < 0.7 * (whole_patches - expected).norm(dim=-1).mean()


def test_the_cycle_error_of_a_hidden_point_is_large() -> None:
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


@settings(max_examples=30)
@given(st.floats(-0.5, 5.5), st.floats(-0.5, 7.5))
def test_positions_stay_on_the_grid(row: float, column: float) -> None:
    maps = torch.randn(3, 16, 6, 8, generator=torch.Generator().manual_seed(0))
    tracks = track_points(maps, torch.tensor([[row, column]]), search_radius=1)
    assert tracks.positions.shape == (3, 1, 2)
    assert (tracks.positions >= -1e-4).all()
    assert (tracks.positions <= torch.tensor([5.0001, 7.0001])).all()
    none = track_points(maps, torch.zeros(0, 2))
    assert [tuple(value.shape) for value in none] == [(3, 0, 2), (3, 0), (3, 0)]


MAPS, POINTS = torch.randn(2, 16, 6, 8), torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": []}, "no feature maps"),
        ({"points": torch.zeros(2)}, r"shape \(2,\), expected \(N, 2\)"),
        ({"points": torch.tensor([[1.0, 1], [6, 1]])}, r"point \[6.0, 1.0\], which is outside"),
        ({"points": POINTS * math.nan}, "outside the grid"),
        ({"features": [MAPS[0], torch.randn(16, 6, 9)]}, "same shape"),
        ({"radius_argmax": -1}, "got radius_argmax=-1"),
        ({"temperature": 0}, "temperature=0"),
        ({"search_radius": 0}, "search_radius=0"),
    ],
)
def test_wrong_arguments_say_what_was_expected(options: dict[str, object], message: str) -> None:
    with pytest.raises((FrameError, GeometryError, ValueError), match=message):
        track_points(**{"features": MAPS, "points": POINTS, **options})  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="16 and 3 channels"):
        mutual_nearest(MAPS[0], MAPS[0, :3])
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        mutual_nearest(MAPS[0], MAPS[0], chunk=0)
