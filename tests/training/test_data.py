from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numbered import encode_numbered
from PIL import Image
from torch.utils.data import DataLoader

from cosettle_adapter.errors import FrameError, MissingExtraError
from cosettle_adapter.training.corpus import Corpus, Video
from cosettle_adapter.training.data import Batch, Sample, TrainingPairs, choose_frames, collate
from cosettle_adapter.training.discovery import Found
from cosettle_adapter.training.seeds import generator_of

LENGTHS = (40, 20, 30)


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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos and a folder of images, with four broken ones among them."""
    root = tmp_path_factory.mktemp("videos")
    for name, length in zip(("a.mp4", "c.mkv", "e.avi"), LENGTHS, strict=True):
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
    return root


@pytest.fixture(scope="module")
def pairs(folder: Path) -> TrainingPairs:
    return TrainingPairs(Corpus.open(folder), size=32, pairs_per_clip=2, seed=5)


def same(one: Sample, other: Sample) -> bool:
    return (
        torch.equal(one.frames, other.frames)
        and one.seed == other.seed
        and one.skipped == other.skipped
    )


class TestKeys:
    def test_samples_of_an_epoch(self, pairs: TrainingPairs) -> None:
        assert (len(pairs), pairs.clips) == (16, 8)
        assert [pairs.name(index) for index in (0, 1, 2, 15)] == ["a.mp4", "a.mp4", "b.mp4", "h"]
        sample = pairs[0, 0]
        assert sample.frames.shape == (2, 3, 32, 32)
        assert sample.frames.dtype == torch.float32
        assert 0 <= sample.seed < 2**63

    def test_a_sample_depends_on_its_key_alone(self, pairs: TrainingPairs) -> None:
        keys = [(epoch, index) for epoch in (0, 1) for index in range(16)]
        first = {key: pairs[key] for key in keys}
        assert all(same(pairs[key], first[key]) for key in reversed(keys))
        assert len({sample.seed for sample in first.values()}) == 32

    def test_other_seeds_other_samples(self, folder: Path, pairs: TrainingPairs) -> None:
        other = TrainingPairs(Corpus.open(folder), size=32, pairs_per_clip=2, seed=6)
        assert not torch.equal(other[0, 0].frames, pairs[0, 0].frames)
        assert other.digest != pairs.digest

    def test_turns_go_on_over_epochs(self, folder: Path, pairs: TrainingPairs) -> None:
        """Two pairs a clip for two epochs are the four pairs of one epoch."""
        four = TrainingPairs(Corpus.open(folder), size=32, pairs_per_clip=4, seed=5)
        for turn in range(4):
            assert torch.equal(four[0, turn].frames, pairs[turn // 2, turn % 2].frames)
            assert four[0, turn].seed == pairs[turn // 2, turn % 2].seed

    def test_drawing_several_at_once_changes_nothing(self, pairs: TrainingPairs) -> None:
        together = pairs.draw_all(0, range(20))
        assert all(same(sample, pairs.draw(0, visit)) for visit, sample in enumerate(together))

    def test_frames_are_the_chosen_ones(self) -> None:
        pairs = fake_pairs([40], pairs_per_clip=1, frames=3)
        for epoch in range(10):
            sample = pairs[epoch, 0]
            chosen = choose_frames(40, 3, generator=generator_of(sample.seed, "frames"))
            levels = (sample.frames.mean((1, 2, 3)) * 255).round().int().tolist()
            assert levels == list(chosen)

    def test_automatic_number_of_pairs(self) -> None:
        assert len(fake_pairs([9] * 100)) == 2000
        assert len(fake_pairs([9] * 3000)) == 3000

    @pytest.mark.parametrize("key", [(0, -1), (0, 16), (-1, 0)])
    def test_no_such_sample(self, pairs: TrainingPairs, key: tuple[int, int]) -> None:
        with pytest.raises(IndexError, match="an epoch has 16"):
            pairs[key]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"frames": 1}, "frames must be at least 2, got 1"),
            ({"pairs_per_clip": 0}, "pairs_per_clip must be at least 1, got 0"),
        ],
    )
    def test_arguments_out_of_range(self, options: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fake_pairs([9], **options)

    def test_an_empty_corpus(self) -> None:
        with pytest.raises(FrameError, match="the corpus has no videos"):
            fake_pairs([])


class TestBroken:
    def test_broken_videos_give_way_and_are_told(self, pairs: TrainingPairs) -> None:
        broken = {"b.mp4", "d.mkv", "f.webm", "g"}
        told = set()
        for index in range(16):
            sample = pairs[0, index]
            names = [name for name, _ in sample.skipped]
            assert len(set(names)) == len(names)
            assert bool(names) is (pairs.name(index) in broken)
            assert names[:1] in ([], [pairs.name(index)])
            told.update(sample.skipped)
        assert {name for name, _ in told} == broken
        assert all(name in reason and "\n" not in reason for name, reason in told)

    @given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 9))
    def test_any_readable_video_is_found(self, readable: list[bool], epoch: int) -> None:
        pairs = fake_pairs([9 * good for good in readable], pairs_per_clip=1)
        for index, good in enumerate(readable):
            if not any(readable):
                with pytest.raises(FrameError, match=f"none of the {len(readable)} videos can be"):
                    pairs[epoch, index]
                continue
            sample = pairs[epoch, index]
            assert bool(sample.skipped) is not good
            assert len(sample.skipped) <= readable.count(False)

    def test_stand_ins_are_not_neighbours(self) -> None:
        """A folder that is gone takes its neighbours with it; they are not all tried."""
        pairs = fake_pairs([0] * 1000 + [9] * 1000, pairs_per_clip=1)
        tries = [len(pairs[0, index].skipped) for index in range(0, 1000, 50)]
        assert max(tries) < 100
        assert sum(tries) / len(tries) < 12

    def test_the_search_ends(self) -> None:
        pairs = fake_pairs([0] * 1000, pairs_per_clip=1)
        with pytest.raises(FrameError, match=r"none of 100 videos, tried one after another out of"):
            pairs[0, 7]

    def test_a_missing_library_ends_training(
        self, pairs: TrainingPairs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> int:
            raise MissingExtraError("av")

        monkeypatch.setattr("cosettle_adapter.training.corpus.count_frames", fail)
        with pytest.raises(MissingExtraError):
            pairs[0, 0]


class TestBatches:
    def test_collate(self, pairs: TrainingPairs) -> None:
        samples = [pairs[0, index] for index in (0, 2, 3)]
        batch = pairs.collate(samples)
        assert batch.frames.shape == (3, 2, 3, 32, 32)
        assert batch.seeds.dtype == torch.int64
        assert batch.seeds.tolist() == [sample.seed for sample in samples]
        assert batch.skipped == samples[1].skipped + samples[2].skipped

    @pytest.mark.parametrize(("workers", "method"), [(2, "fork"), (1, "spawn")])
    def test_workers_change_nothing(self, pairs: TrainingPairs, workers: int, method: str) -> None:
        keys = [[(epoch, index) for index in (0, 3, 4, 14)] for epoch in (0, 1)]
        loader = DataLoader(
            pairs,
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=collate,
            multiprocessing_context=method,
        )
        for batch, group in zip(loader, keys, strict=True):
            expected: Batch = collate([pairs[key] for key in group])
            assert torch.equal(batch.frames, expected.frames)
            assert torch.equal(batch.seeds, expected.seeds)
            assert batch.skipped == expected.skipped

    def test_pickling(self, pairs: TrainingPairs) -> None:
        again = pickle.loads(pickle.dumps(pairs))
        assert same(again[1, 3], pairs[1, 3])
        assert again.digest == pairs.digest
