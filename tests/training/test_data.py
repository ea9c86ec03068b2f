from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import pickle
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numbered import encode_numbered
from PIL import Image

from cosettle_adapter.errors import FrameError, MissingExtraError
from cosettle_adapter.training import data as module
from cosettle_adapter.training.corpus import Corpus, Video
from cosettle_adapter.training.data import (
    Plan,
    Sample,
    TrainingPairs,
    augment,
    choose_frames,
    draw_crop,
    generator_of,
    load_batches,
    seed_of,
    squash,
)
from cosettle_adapter.training.errors import TrainingError, WorkerEndedError
from cosettle_adapter.training.settings import TrainSettings

# Seeds ----------------------------------------------------------------------------------------


def test_known_seeds_stay() -> None:
    """A change here would change every run that is resumed or repeated."""
    assert seed_of(0) == 7520536977032167579
    assert seed_of(0, "order", 1) == 8677279991123922410


# Steps ----------------------------------------------------------------------------------------


def plan(samples: int = 24, processes: int = 1, **changes: int) -> Plan:
    return Plan(samples, processes, TrainSettings(**{"batch_size": 4, "epochs": 2, **changes}))  # type: ignore[arg-type]


def step_keys(of: Plan, step: int, processes: int = 1) -> list[tuple[int, int]]:
    """What all processes see in a step, in order of forward pass, then rank."""
    ranks = [of.keys(step, rank) for rank in range(processes)]
    return [key for parts in zip(*ranks, strict=True) for part in parts for key in part]


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_a_step_is_the_same_however_it_is_divided(
    samples: int, batch: int, processes: int, accumulation: int
) -> None:
    whole = batch * processes * accumulation
    if samples < whole:
        return
    divided = plan(samples, batch_size=batch, processes=processes, accumulation=accumulation)
    one = plan(samples, batch_size=whole)
    assert divided.steps == one.steps == 2 * (samples // whole)
    for step in range(one.steps):
        assert step_keys(divided, step, processes) == one.keys(step, 0)[0]


def test_an_epoch_sees_no_sample_twice_and_drops_others_each_time() -> None:
    of = plan(10, epochs=3)
    epochs = [[step_keys(of, 2 * epoch + step) for step in range(2)] for epoch in range(3)]
    seen = [{index for step in epoch for _, index in step} for epoch in epochs]
    assert [len(indices) for indices in seen] == [8, 8, 8]
    assert len({frozenset(indices) for indices in seen}) > 1
    assert plan(10, seed=1).keys(0, 0) != plan(10, seed=0).keys(0, 0)
    # a change here would change every run that is resumed or repeated
    assert [index for _, index in plan(10).keys(0, 0)[0]] == [6, 3, 1, 9]
    of = plan(accumulation=2)
    assert list(of.batches(start=4)) == list(of.batches())[8:]


def test_few_samples_make_small_batches_and_too_few_are_refused() -> None:
    assert plan(7, batch_size=128, accumulation=2).batch_size == 3
    assert plan(7, batch_size=128).steps_per_epoch == 1
    with pytest.raises(TrainingError, match="3 samples are too few for 2 processes and 2 forward"):
        plan(3, processes=2, accumulation=2)


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


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6])
def test_short_clips_give_independent_frames(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = Counter(choose_frames(length, gap=0.15, generator=generator) for _ in range(3000))
    assert len(pairs) == length**2
    assert min(pairs.values()) > 0.5 * 3000 / length**2
    with pytest.raises(FrameError, match="has no frames"):
        choose_frames(0, gap=0.15, generator=generator)


# Crops ----------------------------------------------------------------------------------------


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator_of(0))


def published_crop(height: int, width: int, own: np.random.Generator) -> tuple[int, int]:
    """Height and width as torchvision documents them: ten tries, then the centre."""
    for _ in range(10):
        area = height * width * own.uniform(0.5, 1.0)
        ratio = math.exp(own.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            return h, w
    if width / height < 3 / 4:
        return round(width * 4 / 3), width
    return (height, round(height * 4 / 3)) if width / height > 4 / 3 else (height, width)


def test_crops_are_drawn_as_published() -> None:
    generator, own = torch.Generator().manual_seed(0), np.random.default_rng(0)
    side, count = 224, 20_000
    crops = [draw_crop(side, side, generator=generator) for _ in range(count)]
    tops, lefts, heights, widths, flips = np.array(crops).T
    assert (np.minimum(tops, lefts) >= 0).all()
    assert (np.maximum(tops + heights, lefts + widths) <= side).all()
    assert np.mean([heights, widths]) == pytest.approx(186.4, abs=0.5)
    assert np.mean((heights == side) | (widths == side)) == pytest.approx(0.02, abs=0.004)
    expected = np.array([published_crop(side, side, own) for _ in range(count)]).T
    levels = np.linspace(0.02, 0.98, 25)
    for found, sides in zip((heights, widths), expected, strict=True):
        assert np.abs(np.quantile(found, levels) - np.quantile(sides, levels)).max() <= 2
    free = heights <= side - 20
    places = tops[free] / (side - heights[free])
    assert np.histogram(places, bins=5, range=(0, 1))[0].min() > 0.17 * len(places)
    assert set(tops[heights == side - 1]) == {0, 1}
    assert flips.sum() == pytest.approx(count / 2, rel=0.03)


@pytest.mark.parametrize("size", [(224, 224), (90, 160), (40, 400), (400, 40), (1, 1)])
def test_crops_are_torchvisions(size: tuple[int, int]) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    for seed in range(50):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            theirs = transforms.RandomResizedCrop.get_params(
                torch.zeros(3, *size), scale=[0.5, 1.0], ratio=[3 / 4, 4 / 3]
            )
        assert draw_crop(*size, generator=torch.Generator().manual_seed(seed))[:4] == theirs
    if max(size) == 400:
        assert max(theirs[2:]) == 53, "no crop of that shape fits, so it is the centre"


@pytest.mark.parametrize("size", [16, 24, 40])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_resized_as_pillow_does(
    size: int, flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = noise(1, 3, 37, 53).expand(2, -1, -1, -1)
    rows, columns = (24, 24) if size == 24 else (31, 41)
    monkeypatch.setattr(module, "draw_crop", lambda *_, **__: (2, 5, rows, columns, flip))
    out = augment(frames, TrainSettings(size=size), generator=generator_of(0))
    assert (out.shape, out.dtype) == ((2, 3, size, size), torch.float32)
    assert torch.equal(out[0], out[1]), "all frames are cropped alike"
    for channel in range(3):
        picture = Image.fromarray(frames[0, channel].float().numpy())
        picture = picture.crop((5, 2, 5 + columns, 2 + rows))
        expected = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
        expected = expected[:, ::-1] if flip else expected
        np.testing.assert_allclose(out[0, channel].numpy() * 255, expected, atol=0.01)


def test_squashing_is_pillows_resize() -> None:
    frames = noise(1, 3, 61, 97)
    picture = Image.fromarray(frames[0].permute(1, 2, 0).numpy())
    expected = np.asarray(picture.resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
    ours = squash(frames, 48)[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - expected).max() <= 1
    assert torch.equal(squash(frames[..., :48, :48], 48), frames[..., :48, :48])
    squashed = TrainSettings(size=48, squash=True)
    given = [frames, squash(frames, 48)]
    first, second = (augment(each, squashed, generator=generator_of(7)) for each in given)
    assert torch.equal(first, second)


# Pairs ----------------------------------------------------------------------------------------


class FakeVideo(Video):
    """Frame i of video v is one grey, 20 v + i; a video of length 0 is broken."""

    def length(self) -> int:
        if not (count := int(str(self.source))):
            raise FrameError(f"{self.name} is broken")
        return count

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        levels = torch.tensor([(20 * int(self.name) + index) % 256 for index in indices]).byte()
        return levels[:, None, None, None].expand(-1, 3, 32, 48).contiguous()


def fake_pairs(lengths: Sequence[int], **options: float) -> TrainingPairs:
    videos = [FakeVideo(str(number), Path(str(length))) for number, length in enumerate(lengths)]
    return TrainingPairs(Corpus(videos), TrainSettings(size=16, **options))  # type: ignore[arg-type]


def same(one: Sample, other: Sample) -> bool:
    return torch.equal(one.data, other.data) and one[1:] == other[1:]


def settings(**changes: int) -> TrainSettings:
    return TrainSettings(**{"size": 32, "pairs_per_clip": 2, "seed": 5, **changes})  # type: ignore[arg-type]


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
    return TrainingPairs(corpus, settings())


def test_a_sample_depends_on_its_key_alone(pairs: TrainingPairs) -> None:
    assert (len(pairs), pairs.clips) == (16, 8)
    assert [pairs.name(index) for index in (0, 1, 2, 15)] == ["a.mp4", "a.mp4", "b.mp4", "h"]
    keys = [(epoch, index) for epoch in (0, 1) for index in range(16)]
    first = {key: pairs[key] for key in keys}
    again = pickle.loads(pickle.dumps(pairs))
    assert all(same(again[key], first[key]) for key in reversed(keys))
    assert len({sample.seed for sample in first.values()}) == 32
    assert first[0, 0].data.shape == (2, 3, 32, 32)
    other = TrainingPairs(pairs.corpus, settings(seed=6))
    assert not torch.equal(other[0, 0].data, first[0, 0].data)
    assert other.digest == pairs.digest == again.digest
    assert TrainingPairs(pairs.corpus, settings(pairs_per_clip=3)).digest != pairs.digest


def test_turns_continue_over_epochs_however_they_are_drawn(pairs: TrainingPairs) -> None:
    """Two pairs per clip for two epochs are the four pairs of one epoch."""
    four = TrainingPairs(pairs.corpus, settings(pairs_per_clip=4))
    for turn in range(4):
        assert same(four[0, turn], pairs[turn // 2, turn % 2])
    together = pairs.draw(0, range(20))
    assert all(same(sample, pairs.draw(0, [visit])[0]) for visit, sample in enumerate(together))


def test_frames_are_the_chosen_ones() -> None:
    pairs = fake_pairs([40], pairs_per_clip=1, frames=3, clip_gap=0.3)
    for epoch in range(10):
        sample = pairs[epoch, 0]
        chosen = choose_frames(40, 3, gap=0.3, generator=generator_of(sample.seed, "frames"))
        assert np.diff(chosen).tolist() == [12, 12]
        levels = (sample.data.mean((1, 2, 3)) * 255).round().int().tolist()
        assert levels == list(chosen)


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


def test_any_readable_video_is_found_and_the_search_ends() -> None:
    """A folder that is gone takes its neighbours with it; they are not all tried."""
    few = fake_pairs([0, 0, 9, 0], pairs_per_clip=1)
    assert all(bool(few[0, index].skipped) is (index != 2) for index in range(4))
    with pytest.raises(FrameError, match="none of the 3 videos that were tried"):
        fake_pairs([0, 0, 0], pairs_per_clip=1)[0, 0]
    pairs = fake_pairs([0] * 1000 + [9] * 1000)
    tries = [len(pairs[0, index].skipped) for index in range(0, 1000, 50)]
    assert sum(tries) / len(tries) < 12
    with pytest.raises(FrameError, match="none of the 100 videos that were tried"):
        fake_pairs([0] * 1000, pairs_per_clip=1)[0, 7]
    for clips, per_clip in ((1, 2000), (115, 17), (1000, 2), (1334, 1), (3000, 1)):
        assert fake_pairs([9] * clips).pairs_per_clip == per_clip


# Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(pairs: TrainingPairs, workers: int) -> None:
    keys = [[(epoch, index) for index in (0, 3, 4, 14)] for epoch in (0, 1)]
    batches = load_batches(pairs, keys, workers=workers)
    for batch, group in zip(batches, keys, strict=True):
        samples = [pairs[key] for key in group]
        assert torch.equal(batch.data, torch.stack([sample.data for sample in samples]))
        assert batch.seeds.tolist() == [sample.seed for sample in samples]
        assert batch.skipped == samples[2].skipped + samples[1].skipped


class Failing(FakeVideo):
    """Reading raises an error that says nothing about the video."""

    def length(self) -> int:
        if str(self.source) == "value":
            raise ValueError("a mistake in the code")
        raise MissingExtraError("reading video files needs the package 'av'")


def test_a_killed_worker_raises_where_batches_are_taken_and_nowhere_else() -> None:
    batches = load_batches(fake_pairs([20]), [[(0, index)] for index in range(50)], workers=1)
    next(batches)
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        worker.kill()  # as the kernel does if memory runs out
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # in the middle of a step
    with pytest.raises(WorkerEndedError, match=r"exited unexpectedly\).* use fewer --workers;"):
        list(batches)
    assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL, "PyTorch's is back"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("videos", "kind", "message"),
    [
        ([Failing("0", Path("extra"))], MissingExtraError, "reading video files needs the package"),
        ([Failing("0", Path("value"))], ValueError, "a mistake in the code"),
        ([FakeVideo("0", Path("0"))] * 2, FrameError, "none of the 2 videos that were tried"),
    ],
)
def test_errors_end_training_with_their_traceback(
    videos: list[Video], kind: type[Exception], message: str, workers: int
) -> None:
    data = TrainingPairs(Corpus(videos), settings())
    with pytest.raises(kind, match=message) as caught:
        next(load_batches(data, [[(0, 0)]], workers=workers))
    assert type(caught.value) is kind
    assert "in length" in str(caught.value.__cause__)
