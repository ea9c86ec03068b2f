from __future__ import annotations

import itertools
import math
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cosettle_adapter.training.batches import Plan
from cosettle_adapter.training.discovery import Found
from cosettle_adapter.training.seeds import generator_of, seed_of
from hypothesis import given
from hypothesis import strategies as st
from numbered import encode_numbered
from PIL import Image
from training_fakes import FakeData

from cosettle_adapter.errors import FrameError, MissingExtraError
from cosettle_adapter.training.corpus import Corpus, Video
from cosettle_adapter.training.data import (
    Crop,
    Sample,
    TrainingPairs,
    apply_crop,
    augment,
    choose_frames,
    draw_crop,
    load_batches,
    squash,
)

# Seeds ----------------------------------------------------------------------------------------


def test_known_seeds_stay() -> None:
    """A change here would change every run that is resumed or repeated."""
    assert seed_of(0) == 7520536977032167579
    assert seed_of(0, "order", 1) == 8677279991123922410


@given(st.lists(st.one_of(st.integers(), st.text()), max_size=4))
def test_seeds_are_in_range_and_repeatable(parts: list[int | str]) -> None:
    assert 0 <= seed_of(*parts) < 2**63
    assert seed_of(*parts) == seed_of(*parts)


def test_neighbouring_seeds_draw_unrelated_numbers() -> None:
    parts = [(), (1, 23), (12, 3), ("1", 23), ("1,23",), (1, 23, ""), (1, "23"), ("",), (-1,), (1,)]
    assert len({seed_of(*each) for each in parts}) == len(parts)  # type: ignore[misc]
    draws = torch.stack([torch.rand(64, generator=generator_of(7, i)) for i in range(200)])
    assert abs(float(torch.corrcoef(draws).fill_diagonal_(0).abs().mean())) < 0.12
    assert abs(float(draws[:, 0].mean()) - 0.5) < 0.07


# Frames of a cycle ----------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(2, 12), st.integers(0, 9), st.floats(0.01, 0.9))
def test_frames_are_equally_far_apart(length: int, frames: int, seed: int, gap: float) -> None:
    chosen = choose_frames(length, frames, generator=generator_of(seed), gap=gap)
    assert len(chosen) == frames
    assert all(0 <= index < length for index in chosen)
    published, room = int(gap * length), (length - 2) // (frames - 1)
    if length > 4 and published >= 1 and (room >= 1 or frames == 2):
        steps = {later - earlier for earlier, later in itertools.pairwise(chosen)}
        assert steps == {published if frames == 2 else min(published, room)}


@pytest.mark.parametrize("length", [7, 20, 33])
def test_every_place_but_frame_0_is_as_likely(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = Counter(choose_frames(length, generator=generator)[0] for _ in range(4000))
    places = range(1, length - int(0.15 * length))  # the official code draws from 1 to n - g - 1
    assert set(starts) == set(places)
    expected = 4000 / len(places)
    deviation = sum((starts[place] - expected) ** 2 / expected for place in places)
    assert deviation < len(places) + 5 * (2 * len(places)) ** 0.5


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6])
def test_short_clips_give_independent_frames(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = Counter(choose_frames(length, generator=generator) for _ in range(3000))
    assert len(pairs) == length**2
    assert min(pairs.values()) > 0.5 * 3000 / length**2
    with pytest.raises(FrameError, match="has no frames"):
        choose_frames(0, generator=generator)


# Crops ----------------------------------------------------------------------------------------


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator_of(0))


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 10**6))
def test_crops_lie_inside_the_frame(height: int, width: int, seed: int) -> None:
    crop = draw_crop(height, width, generator=torch.Generator().manual_seed(seed))
    assert min(crop.height, crop.width) >= 1
    assert 0 <= crop.top <= height - crop.height
    assert 0 <= crop.left <= width - crop.width
    if (height, width) == (1080, 1920):
        assert 0.74 <= crop.width / crop.height <= 1.545


def test_crops_are_drawn_as_the_official_code_draws() -> None:
    """Area uniform, ratio log-uniform, sides cut to the frame, place uniform, half mirrored."""
    generator = torch.Generator().manual_seed(0)
    side, count = 224, 20_000
    crops = [draw_crop(side, side, generator=generator) for _ in range(count)]
    own = np.random.default_rng(0)
    area = side * side * own.uniform(0.5, 1.0, count)
    ratio = np.exp(own.uniform(math.log(3 / 4), math.log(4 / 3), count))
    for ours, theirs in (
        ([crop.width for crop in crops], np.minimum(np.round(np.sqrt(area * ratio)), side)),
        ([crop.height for crop in crops], np.minimum(np.round(np.sqrt(area / ratio)), side)),
    ):
        levels = np.linspace(0.02, 0.98, 25)
        assert np.abs(np.quantile(ours, levels) - np.quantile(theirs, levels)).max() <= 2
    free = [crop for crop in crops if crop.height <= side - 20]
    places = np.array([crop.top / (side - crop.height) for crop in free])
    assert np.histogram(places, bins=5, range=(0, 1))[0].min() > 0.17 * len(places)
    assert {crop.top for crop in crops if crop.height == side - 1} == {0, 1}
    assert sum(crop.flip for crop in crops) == pytest.approx(count / 2, rel=0.03)


def test_a_crop_of_equal_size_is_the_pixels_themselves() -> None:
    frames = noise(2, 3, 40, 50)
    out = apply_crop(frames, Crop(3, 7, 24, 24, flip=False), 24)
    assert torch.equal(out, frames[..., 3:27, 7:31] / 255)
    assert torch.equal(apply_crop(frames, Crop(3, 7, 24, 24, flip=True), 24), out.flip(-1))


@pytest.mark.parametrize("side", [16, 40])
def test_resizing_is_pillows_bicubic(side: int) -> None:
    frames = noise(1, 3, 37, 53)
    out = apply_crop(frames, Crop(2, 5, 31, 41, flip=False), side)
    for channel in range(3):
        picture = Image.fromarray(frames[0, channel].float().numpy()).crop((5, 2, 46, 33))
        expected = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(out[0, channel].numpy() * 255, expected, atol=0.01)
    edge = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    edge[..., 16:] = 255
    overshot = apply_crop(edge, Crop(0, 0, 32, 32, flip=False), 48)
    assert float(overshot.min()) < -0.01 < 1.01 < float(overshot.max())


def test_squashing_is_pillows_resize() -> None:
    frames = noise(1, 3, 61, 97)
    picture = Image.fromarray(frames[0].permute(1, 2, 0).numpy())
    expected = np.asarray(picture.resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
    ours = squash(frames, 48)[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - expected).max() <= 1
    assert squash(frames[..., :48, :48], 48).shape == (1, 3, 48, 48)


@given(st.integers(8, 80), st.integers(8, 80), st.integers(1, 4), st.integers(0, 1000))
def test_all_frames_are_cropped_alike(height: int, width: int, count: int, seed: int) -> None:
    frames = torch.stack([noise(3, height, width)] * count)
    for first in (False, True):
        out = augment(frames, 16, generator=generator_of(seed), squash_first=first)
        assert (out.shape, out.dtype) == ((count, 3, 16, 16), torch.float32)
        assert all(torch.equal(each, out[0]) for each in out)
        again = augment(frames, 16, generator=generator_of(seed), squash_first=first)
        assert torch.equal(out, again)


@pytest.mark.parametrize(
    "frames",
    [torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 8), torch.zeros(1, 1, 8, 8)],
)
def test_other_things_than_clips_are_refused(frames: torch.Tensor) -> None:
    with pytest.raises(FrameError, match=r"expected \(T, 3, H, W\) of uint8"):
        augment(frames, 8, generator=torch.Generator())


# Pairs ----------------------------------------------------------------------------------------


class FakeVideo(Video):
    """Frame i of video v is one grey, 20 v + i; a video of length 0 is broken."""

    def __init__(self, number: int, length: int) -> None:
        super().__init__(f"v{number}", Found("", ""))
        object.__setattr__(self, "number", number)
        object.__setattr__(self, "count", length)

    def length(self) -> int:
        if not self.count:
            raise FrameError(f"{self.name} is broken")
        return int(self.count)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        levels = torch.tensor([(20 * self.number + index) % 256 for index in indices]).byte()
        return levels[:, None, None, None].expand(-1, 3, 32, 48).contiguous()


def fake_pairs(lengths: Sequence[int], **options: int) -> TrainingPairs:
    corpus = Corpus([FakeVideo(number, length) for number, length in enumerate(lengths)])
    return TrainingPairs(corpus, size=16, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Three videos and a folder of images, with four broken ones among them."""
    root: Path = tmp_path_factory.mktemp("videos")
    for name, length in (("a.mp4", 40), ("c.mkv", 20), ("e.avi", 30)):
        codec = "mpeg4" if name.endswith("avi") else "libx264"
        encode_numbered(root / name, length, codec=codec, options={"g": "8"})
    (root / "b.mp4").write_bytes((root / "a.mp4").read_bytes()[:-900])
    (root / "d.mkv").write_bytes((root / "c.mkv").read_bytes()[:2000])
    (root / "f.webm").write_bytes(b"")
    (root / "g").mkdir()
    (root / "g" / "0.jpg").write_bytes(b"no image")
    (root / "h").mkdir()
    for index in range(9):
        Image.new("RGB", (64, 48), (28 * index,) * 3).save(root / "h" / f"{index}.png")
    return Corpus.open(root)


@pytest.fixture(scope="module")
def pairs(corpus: Corpus) -> TrainingPairs:
    return TrainingPairs(corpus, size=32, pairs_per_clip=2, seed=5)


def same(one: Sample, other: Sample) -> bool:
    return torch.equal(one.frames, other.frames) and one[1:] == other[1:]


def test_a_sample_depends_on_its_key_alone(pairs: TrainingPairs) -> None:
    assert (len(pairs), pairs.clips) == (16, 8)
    assert [pairs.name(index) for index in (0, 1, 2, 15)] == ["a.mp4", "a.mp4", "b.mp4", "h"]
    keys = [(epoch, index) for epoch in (0, 1) for index in range(16)]
    first = {key: pairs[key] for key in keys}
    again = pickle.loads(pickle.dumps(pairs))
    assert all(same(again[key], first[key]) for key in reversed(keys))
    assert len({sample.seed for sample in first.values()}) == 32
    assert first[0, 0].frames.shape == (2, 3, 32, 32)
    other = TrainingPairs(pairs.corpus, size=32, pairs_per_clip=2, seed=6)
    assert not torch.equal(other[0, 0].frames, first[0, 0].frames)
    assert other.digest != pairs.digest == again.digest


def test_turns_continue_over_epochs_however_they_are_drawn(pairs: TrainingPairs) -> None:
    """Two pairs per clip for two epochs are the four pairs of one epoch."""
    four = TrainingPairs(pairs.corpus, size=32, pairs_per_clip=4, seed=5)
    for turn in range(4):
        assert same(four[0, turn], pairs[turn // 2, turn % 2])
    together = pairs.draw(0, range(20))
    assert all(same(sample, pairs.draw(0, [visit])[0]) for visit, sample in enumerate(together))


def test_frames_are_the_chosen_ones() -> None:
    pairs = fake_pairs([40], pairs_per_clip=1, frames=3)
    for epoch in range(10):
        sample = pairs[epoch, 0]
        chosen = choose_frames(40, 3, generator=generator_of(sample.seed, "frames"))
        levels = (sample.frames.mean((1, 2, 3)) * 255).round().int().tolist()
        assert levels == list(chosen)


def test_an_epoch_has_about_two_thousand_pairs() -> None:
    for clips, per_clip in ((1, 2000), (115, 17), (1000, 2), (1334, 1), (3000, 1)):
        assert fake_pairs([9] * clips).pairs_per_clip == per_clip


def test_numbers_out_of_range(pairs: TrainingPairs) -> None:
    for key in ((0, -1), (0, 16), (-1, 0)):
        with pytest.raises(IndexError, match="an epoch has 16"):
            pairs[key]
    with pytest.raises(ValueError, match="frames must be at least 2, got 1"):
        fake_pairs([9], frames=1)
    with pytest.raises(FrameError, match="the corpus has no videos"):
        fake_pairs([])


def test_broken_videos_give_way_and_are_named(pairs: TrainingPairs) -> None:
    broken = {"b.mp4", "d.mkv", "f.webm", "g"}
    told = set()
    for index in range(16):
        names = [name for name, _ in pairs[0, index].skipped]
        assert len(set(names)) == len(names)
        assert bool(names) is (pairs.name(index) in broken)
        assert names[:1] in ([], [pairs.name(index)])
        told.update(pairs[0, index].skipped)
    assert {name for name, _ in told} == broken
    assert all(name in reason and "\n" not in reason for name, reason in told)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 9))
def test_any_readable_video_is_found(readable: list[bool], epoch: int) -> None:
    pairs = fake_pairs([9 * good for good in readable], pairs_per_clip=1)
    for index, good in enumerate(readable):
        if not any(readable):
            with pytest.raises(FrameError, match=f"none of the {len(readable)} videos can be"):
                pairs[epoch, index]
            continue
        sample = pairs[epoch, index]
        assert bool(sample.skipped) is not good
        assert len(sample.skipped) <= readable.count(False)


def test_stand_ins_are_not_neighbours_and_the_search_ends() -> None:
    """A folder that is gone takes its neighbours with it; they are not all tried."""
    pairs = fake_pairs([0] * 1000 + [9] * 1000, pairs_per_clip=1)
    tries = [len(pairs[0, index].skipped) for index in range(0, 1000, 50)]
    assert sum(tries) / len(tries) < 12
    with pytest.raises(FrameError, match=r"none of 100 videos, tried one after another out of"):
        fake_pairs([0] * 1000, pairs_per_clip=1)[0, 7]


def test_a_missing_library_ends_training(
    pairs: TrainingPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise MissingExtraError("av")

    monkeypatch.setattr("cosettle_adapter.training.corpus.count_frames", fail)
    with pytest.raises(MissingExtraError):
        pairs[0, 0]


# Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(pairs: TrainingPairs, workers: int) -> None:
    keys = [[(epoch, index) for index in (0, 3, 4, 14)] for epoch in (0, 1)]
    batches = load_batches(pairs, keys, collate=pairs.collate, workers=workers)
    for batch, group in zip(batches, keys, strict=True):
        samples = [pairs[key] for key in group]
        assert batch.frames is not None
        assert torch.equal(batch.frames, torch.stack([sample.frames for sample in samples]))
        assert batch.seeds.tolist() == [sample.seed for sample in samples]
        assert batch.skipped == samples[2].skipped + samples[1].skipped


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_the_same_sentence_from_a_worker(workers: int) -> None:
    data, plan = FakeData(8, missing=(5,)), Plan(8, 4, 1, 1, 2, 0)
    batches = load_batches(data, plan.batches(), collate=data.collate, workers=workers)  # type: ignore[arg-type]
    with pytest.raises(FrameError, match=r"^clip05.mp4 cannot be read$"):
        list(batches)
