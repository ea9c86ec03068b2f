"""Cycles of frames from videos: what the encoder is shown, as a function of counters."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from cosettle_adapter.errors import FrameError
from cosettle_adapter.training.corpora.corpus import Corpus
from cosettle_adapter.training.samples.augmentation import augment
from cosettle_adapter.training.samples.sampling import automatic_pairs_per_clip, choose_frames
from cosettle_adapter.training.seeds import generator_of, seed_of

Skipped = tuple[tuple[str, str], ...]
"""Names of videos that could not be read, and why."""

_TRIES = 100
_TOGETHER = 8  # samples whose frames are in memory at a time


@dataclass(frozen=True, eq=False)
class Sample:
    """The frames of one cycle.

    Attributes:
        frames: (T, 3, S, S) float32, RGB with 0 for black and 1 for white; bicubic overshoot is
            kept.
        seed: of whatever else is drawn for this sample.
        skipped: videos that could not be read on the way to it.
    """

    frames: Tensor
    seed: int
    skipped: Skipped = ()


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples stacked.

    Attributes:
        frames: (B, T, 3, S, S) float32.
        seeds: (B,) int64.
        skipped: videos that could not be read, in the order they were met; may repeat.
    """

    frames: Tensor
    seeds: Tensor
    skipped: Skipped = ()


class TrainingPairs(Dataset[Sample]):
    """Cycles of frames, several a clip and epoch, each a pure function of its key.

    The sample of ``(epoch, index)`` depends on the seed, the clip and how many samples were drawn
    from that clip before, on nothing else: not on workers, nor on processes, nor on what was drawn
    from other clips. A video that cannot be read gives way to another one, in an order that the
    key decides; ``Sample.skipped`` tells.

    Attributes:
        corpus: where the clips are from.
        size: side of the square frames in pixels.
        frames: frames of a cycle.
        pairs_per_clip: samples of each clip in an epoch.
        seed: of all draws.
        squash: whether frames are squashed to the square before cropping, as the paper's code
            does; see :func:`~cosettle_adapter.training.samples.augmentation.augment`.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        size: int,
        frames: int = 2,
        pairs_per_clip: int | None = None,
        seed: int = 0,
        squash: bool = False,
    ) -> None:
        """Draw from ``corpus``; ``pairs_per_clip`` None makes epochs of about 2,000 samples.

        Raises:
            FrameError: the corpus is empty.
            ValueError: a number out of range.
        """
        if not len(corpus):
            raise FrameError("the corpus has no videos; training needs at least one")
        if pairs_per_clip is None:
            pairs_per_clip = automatic_pairs_per_clip(len(corpus))
        for name, value, least in (
            ("size", size, 1), ("frames", frames, 2), ("pairs_per_clip", pairs_per_clip, 1)
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.corpus, self.size, self.frames = corpus, size, frames
        self.pairs_per_clip, self.seed, self.squash = pairs_per_clip, seed, squash

    @property
    def clips(self) -> int:
        """Number of videos."""
        return len(self.corpus)

    @property
    def digest(self) -> str:
        """sha256 over the videos' names and sizes, and over how samples are drawn from them."""
        drawn = (self.size, self.frames, self.pairs_per_clip, self.seed, self.squash)
        return hashlib.sha256(f"{self.corpus.digest} {drawn}".encode()).hexdigest()

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.clips * self.pairs_per_clip

    def name(self, index: int) -> str:
        """Return the name of the video that sample ``index`` is drawn from."""
        return self.corpus.videos[index // self.pairs_per_clip].name

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return the sample of ``(epoch, index)``, both 0-based.

        Raises:
            FrameError: no video was found that can be read.
            IndexError: no such sample.
        """
        epoch, index = key
        if not 0 <= index < len(self) or epoch < 0:
            raise IndexError(f"no sample {index} of epoch {epoch}; an epoch has {len(self)}")
        clip, turn = divmod(index, self.pairs_per_clip)
        visit = epoch * self.pairs_per_clip + turn
        skipped: list[tuple[str, str]] = []
        for candidate in self._candidates(clip, visit):
            try:
                sample = self.draw(candidate, visit, standing_in_for=clip)
            except FrameError as error:
                skipped.append((self.corpus.videos[candidate].name, str(error)))
            else:
                return Sample(sample.frames, sample.seed, tuple(skipped))
        everything = len(skipped) == self.clips
        count = f"none of the {self.clips} videos" if everything else (
            f"none of {len(skipped)} videos, tried one after another out of {self.clips},"
        )  # fmt: skip
        raise FrameError(
            f"{count} can be read; the first of them: {skipped[0][0]} ({skipped[0][1]})"
        )

    def draw(self, clip: int, visit: int, *, standing_in_for: int | None = None) -> Sample:
        """Return the sample of a clip's ``visit``-th turn, or fail.

        Args:
            clip: which video.
            visit: how many samples were drawn from the clip before, over all epochs.
            standing_in_for: the clip in whose turn it is drawn, if that one could not be read.

        Raises:
            FrameError: the video cannot be read.
        """
        return self.draw_all(clip, [visit], standing_in_for=standing_in_for)[0]

    def draw_all(
        self, clip: int, visits: Sequence[int], *, standing_in_for: int | None = None
    ) -> list[Sample]:
        """Return several samples of a clip, which is decoded once for every few of them.

        Args:
            clip: which video.
            visits: which turns, as in :meth:`draw`.
            standing_in_for: as in :meth:`draw`.

        Raises:
            FrameError: the video cannot be read.
        """
        video = self.corpus.videos[clip]
        length = video.length()
        owner = clip if standing_in_for is None else standing_in_for
        samples = []
        for first in range(0, len(visits), _TOGETHER):
            seeds = [seed_of(self.seed, owner, visit) for visit in visits[first:][:_TOGETHER]]
            generators = [generator_of(seed, "frames") for seed in seeds]
            indices = [
                choose_frames(length, self.frames, generator=generator) for generator in generators
            ]
            frames = video.read([index for chosen in indices for index in chosen])
            cycles = rearrange(frames, "(s t) c h w -> s t c h w", t=self.frames)
            for seed, generator, cycle in zip(seeds, generators, cycles, strict=True):
                augmented = augment(cycle, self.size, generator=generator, squash_first=self.squash)
                samples.append(Sample(augmented, seed))
        return samples

    @staticmethod
    def collate(samples: Sequence[Sample]) -> Batch:
        """Stack samples; what a ``DataLoader`` takes."""
        return collate(samples)

    def _candidates(self, clip: int, visit: int) -> Iterator[int]:
        """Yield the clip, then others: all of them if they are few, none of them twice."""
        yield clip
        # a step that shares no factor with the number of clips meets every clip; neighbours are
        # avoided, as folders break together
        step = 1 + seed_of(self.seed, "instead", clip, visit) % max(1, self.clips - 1)
        while math.gcd(step, self.clips) != 1:
            step = step % (self.clips - 1) + 1
        for turn in range(1, min(self.clips, _TRIES)):
            yield (clip + turn * step) % self.clips


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a batch."""
    return Batch(
        torch.stack([sample.frames for sample in samples]),
        torch.tensor([sample.seed for sample in samples], dtype=torch.int64),
        tuple(skipped for sample in samples for skipped in sample.skipped),
    )
