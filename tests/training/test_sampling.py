from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosettle_adapter.errors import FrameError
from cosettle_adapter.training.data import automatic_pairs_per_clip, choose_frames
from cosettle_adapter.training.seeds import generator_of, seed_of


def draw(length: int, frames: int = 2, *, seed: int = 0, gap: float = 0.15) -> tuple[int, ...]:
    return choose_frames(length, frames, generator=generator_of(seed), gap=gap)


class TestPairs:
    @given(st.integers(7, 5000), st.integers(0, 50))
    def test_the_distance_is_a_share_of_the_clip_and_frame_0_is_never_drawn(
        self, length: int, seed: int
    ) -> None:
        first, second = draw(length, seed=seed)
        assert second - first == int(0.15 * length)
        assert first >= 1
        assert second <= length - 1

    @pytest.mark.parametrize("length", [7, 20, 33])
    def test_every_place_is_as_likely(self, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        starts = Counter(choose_frames(length, generator=generator)[0] for _ in range(4000))
        # the published code draws from 1 to n - g - 1
        places = range(1, length - int(0.15 * length))
        assert set(starts) == set(places)
        expected = 4000 / len(places)
        deviation = sum((starts[place] - expected) ** 2 / expected for place in places)
        assert deviation < len(places) + 5 * (2 * len(places)) ** 0.5

    @pytest.mark.parametrize("length", [1, 2, 4, 5, 6])
    def test_short_clips_give_independent_frames(self, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        pairs = Counter(choose_frames(length, generator=generator) for _ in range(3000))
        assert len(pairs) == length**2
        assert min(pairs.values()) > 0.5 * 3000 / length**2

    def test_an_empty_clip(self) -> None:
        with pytest.raises(FrameError, match="has no frames"):
            draw(0)


class TestLongerCycles:
    @given(st.integers(1, 3000), st.integers(2, 12), st.integers(0, 9), st.floats(0.01, 0.9))
    def test_equal_distances_that_fit(
        self, length: int, frames: int, seed: int, gap: float
    ) -> None:
        chosen = draw(length, frames, seed=seed, gap=gap)
        assert len(chosen) == frames
        assert all(0 <= index < length for index in chosen)
        steps = {later - earlier for earlier, later in itertools.pairwise(chosen)}
        if length > 4 and int(gap * length) >= 1 and (length - 2) // (frames - 1) >= 1:
            assert len(steps) == 1
            step = steps.pop()
            assert 1 <= step <= int(gap * length)
            # it is the published distance unless that does not fit
            assert step == int(gap * length) or step * (frames - 1) > length - 2 - (frames - 1)

    def test_two_frames_do_not_depend_on_how_more_are_drawn(self) -> None:
        assert draw(300, 4, seed=3)[1] - draw(300, 4, seed=3)[0] == 45
        assert draw(40, 12, seed=3)[1] - draw(40, 12, seed=3)[0] == 3

    def test_arguments_out_of_range(self) -> None:
        with pytest.raises(ValueError, match="at least 2 frames, got frames=1"):
            draw(10, 1)
        with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
            draw(10, gap=1.5)


@pytest.mark.parametrize(
    ("clips", "pairs"), [(1, 2000), (115, 17), (1000, 2), (1334, 1), (240_000, 1)]
)
def test_about_two_thousand_pairs_an_epoch(clips: int, pairs: int) -> None:
    assert automatic_pairs_per_clip(clips) == pairs


class TestSeeds:
    def test_known_values_stay(self) -> None:
        # a change here would change every run that is resumed or repeated
        assert seed_of(0) == 7520536977032167579
        assert seed_of(0, "order", 1) == 8677279991123922410

    @given(st.lists(st.one_of(st.integers(), st.text()), max_size=4))
    def test_in_range_and_repeatable(self, parts: list[int | str]) -> None:
        assert 0 <= seed_of(*parts) < 2**63
        assert seed_of(*parts) == seed_of(*parts)

    def test_parts_are_kept_apart(self) -> None:
        parts: list[tuple[int | str, ...]] = [
            (), (1, 23), (12, 3), ("1", 23), ("1,23",), (1, 23, ""), (1, "23"), ("",), (-1,), (1,),
        ]  # fmt: skip
        assert len({seed_of(*each) for each in parts}) == len(parts)

    def test_neighbouring_seeds_draw_unrelated_numbers(self) -> None:
        draws = torch.stack([torch.rand(64, generator=generator_of(7, i)) for i in range(200)])
        assert abs(float(torch.corrcoef(draws).fill_diagonal_(0).abs().mean())) < 0.12
        assert abs(float(draws[:, 0].mean()) - 0.5) < 0.07
