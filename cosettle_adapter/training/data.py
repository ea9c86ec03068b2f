"""Samples of videos: which frames of a clip, which crop, as pure functions of counters."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cosettle_adapter.errors import CosettleError, FrameError
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.encoding import Views
from cosettle_adapter.training.seeds import generator_of, seed_of

T = TypeVar("T")

Key = tuple[int, int]
"""Epoch and index of a sample, both 0-based."""

Skipped = tuple[tuple[str, str], ...]
"""Names of videos that could not be read, and why."""

GAP = 0.15
"""Distance between the two frames of a pair, as a share of the clip's frames."""

SCALE = (0.5, 1.0)
RATIO = (3 / 4, 4 / 3)

_SHORT = 4
_PAIRS_PER_EPOCH = 2000
_TRIES = 100
_TOGETHER = 8  # samples whose frames are in memory at a time


class Sample(NamedTuple):
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


class Batch(NamedTuple):
    """Samples stacked; a ``DataLoader`` can pin it.

    Attributes:
        seeds: (B,) int64.
        frames: (B, T, 3, S, S) float32, or ``None`` where views are given.
        views: encoded already, float16.
        skipped: videos that could not be read, in the order they were met; may repeat.
    """

    seeds: Tensor
    frames: Tensor | None = None
    views: Views | None = None
    skipped: Skipped = ()


class TrainingPairs(Dataset[Sample]):
    """Cycles of frames, several per clip and epoch, each a pure function of its key.

    The sample of ``(epoch, index)`` depends on the seed, the clip and how many samples were drawn
    from that clip before, on nothing else: not on workers, nor on processes, nor on what was drawn
    from other clips. A video that cannot be read gives way to another one, in an order that the
    key decides; ``Sample.skipped`` says so.

    Args:
        corpus: where the clips are from; not empty.
        size: side of the square frames in pixels.
        frames: frames of a cycle, at least 2.
        pairs_per_clip: samples of each clip in an epoch; ``None`` makes epochs of about 2,000.
        seed: of all draws.
        squash: squash frames to the square before cropping; see :func:`augment`.
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
        if not len(corpus):
            raise FrameError("the corpus has no videos; training needs at least one")
        if pairs_per_clip is None:  # 1 for all corpora of more than about 1,300, as in the paper
            pairs_per_clip = max(1, round(_PAIRS_PER_EPOCH / len(corpus)))
        least = {"size": (size, 1), "frames": (frames, 2), "pairs_per_clip": (pairs_per_clip, 1)}
        for name, (value, smallest) in least.items():
            if value < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}")
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

    def __getitem__(self, key: Key) -> Sample:
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
                (sample,) = self.draw(candidate, [visit], standing_in_for=clip)
                return sample._replace(skipped=tuple(skipped))
            except FrameError as error:
                skipped.append((self.corpus.videos[candidate].name, str(error)))
        count = f"none of the {self.clips} videos"
        if len(skipped) < self.clips:
            count = f"none of {len(skipped)} videos, tried one after another out of {self.clips},"
        raise FrameError(
            f"{count} can be read; the first of them: {skipped[0][0]} ({skipped[0][1]})"
        )

    def draw(
        self, clip: int, visits: Sequence[int], *, standing_in_for: int | None = None
    ) -> list[Sample]:
        """Return samples of a clip, which is decoded once for every few of them.

        Args:
            clip: which video.
            visits: of each sample, how many were drawn from the clip before, over all epochs.
            standing_in_for: the clip in whose turn it is drawn, if that one could not be read.
        """
        video = self.corpus.videos[clip]
        length = video.length()
        owner = clip if standing_in_for is None else standing_in_for
        samples = []
        for first in range(0, len(visits), _TOGETHER):
            seeds = [seed_of(self.seed, owner, visit) for visit in visits[first:][:_TOGETHER]]
            generators = [generator_of(seed, "frames") for seed in seeds]
            chosen = [choose_frames(length, self.frames, generator=each) for each in generators]
            frames = video.read([index for indices in chosen for index in indices])
            cycles = rearrange(frames, "(s t) c h w -> s t c h w", t=self.frames)
            for seed, generator, cycle in zip(seeds, generators, cycles, strict=True):
                augmented = augment(cycle, self.size, generator=generator, squash_first=self.squash)
                samples.append(Sample(augmented, seed))
        return samples

    @staticmethod
    def collate(samples: Sequence[Sample]) -> Batch:
        """Stack samples into a batch."""
        return Batch(
            torch.tensor([sample.seed for sample in samples], dtype=torch.int64),
            frames=torch.stack([sample.frames for sample in samples]),
            skipped=tuple(skipped for sample in samples for skipped in sample.skipped),
        )

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


def choose_frames(
    length: int, frames: int = 2, *, generator: torch.Generator, gap: float = GAP
) -> tuple[int, ...]:
    """Draw the frames of a cycle as the official code does.

    The distance is always ``g = int(gap * length)``; only the place is drawn, uniformly from 1 on
    (the very first frame is never used). Clips of up to 4 frames, or too short for a distance of
    one frame, give frames drawn independently of each other. More than two frames follow at that
    distance, or at the largest equal distance at which they fit.

    Args:
        length: frames of the clip, at least 1.
        frames: how many to draw, at least 2.
        generator: source of randomness.
        gap: share of the clip between neighbours, in (0, 1).

    Returns:
        0-based indices, rising unless drawn independently.

    Raises:
        FrameError: the clip is empty.
    """
    if length < 1:
        raise FrameError("the clip has no frames")
    step = int(gap * length)
    if frames > 2:
        step = min(step, (length - 2) // (frames - 1))
    if length <= _SHORT or step < 1:
        drawn: list[int] = torch.randint(length, (frames,), generator=generator).tolist()
        return tuple(drawn)
    last_start = length - 1 - step * (frames - 1)
    first_start = min(1, last_start)  # a large gap leaves no place but the first frame
    start = int(torch.randint(first_start, last_start + 1, (1,), generator=generator))
    return tuple(start + step * place for place in range(frames))


@dataclasses.dataclass(frozen=True)
class Crop:
    """A rectangle of a frame in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw_crop(height: int, width: int, *, generator: torch.Generator) -> Crop:
    """Draw a random-resized crop as the official code does: one draw, cut to the frame.

    The share of the frame's area is drawn uniformly from 0.5 to 1, the ratio of width to height
    from 3/4 to 4/3 uniformly in its logarithm, and a side that is longer than the frame's becomes
    the frame's. (torchvision draws again instead.)
    """
    draws = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    share, shape, down, across, flip = draws
    area = height * width * (SCALE[0] + share * (SCALE[1] - SCALE[0]))
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    aspect = math.exp(low + shape * (high - low))
    rows = min(height, max(1, round(math.sqrt(area / aspect))))
    columns = min(width, max(1, round(math.sqrt(area * aspect))))
    # draws are below 1, so the largest place is the last that fits
    top, left = int(down * (height - rows + 1)), int(across * (width - columns + 1))
    return Crop(top, left, rows, columns, flip < 0.5)


def apply_crop(frames: Tensor, crop: Crop, size: int) -> Tensor:
    """Cut, resize and perhaps mirror frames, all alike.

    Resizing is bicubic with antialiasing in float32 and is not clamped, so values overshoot [0, 1]
    a little beside sharp edges, as they do in the official code.

    Args:
        frames: (T, 3, H, W) uint8 in [0, 255] or float in [0, 1].
        crop: a rectangle inside the frames.
        size: side of the result, (T, 3, size, size) float32.
    """
    rows = slice(crop.top, crop.top + crop.height)
    columns = slice(crop.left, crop.left + crop.width)
    pixels = frames[..., rows, columns]
    pixels = pixels.to(torch.float32) / 255 if frames.dtype == torch.uint8 else pixels.float()
    if (crop.height, crop.width) != (size, size):
        pixels = F.interpolate(
            pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False
        )
    return (pixels.flip(-1) if crop.flip else pixels).contiguous()


def squash(frames: Tensor, size: int) -> Tensor:
    """Resize whole frames (T, 3, H, W) uint8 to a square, bilinearly, rounded to 8 bits."""
    if tuple(frames.shape[-2:]) == (size, size):
        return frames
    resized = F.interpolate(
        frames.to(torch.float32), size=(size, size), mode="bilinear", antialias=True
    )
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def augment(
    frames: Tensor, size: int, *, generator: torch.Generator, squash_first: bool = False
) -> Tensor:
    """Give all frames of a cycle the same random-resized crop and the same flip.

    The official code squashes every frame to the square before it crops, so that what the encoder
    sees of a 16:9 video is narrowed by 1.3 to 2.4. Here the crop is cut from the frame as it is,
    which narrows by at most 1.54 (4/3 for frames up to 4:3) and keeps the pixels of the crop;
    ``squash_first`` does as the official code.

    Args:
        frames: (T, 3, H, W) uint8.
        size: side of the result, (T, 3, size, size) float32 in about [0, 1].
        generator: source of randomness; the same number of draws whatever the frames.
        squash_first: resize whole frames to the square before cropping.

    Raises:
        FrameError: the frames are no uint8 clip.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
        raise FrameError(
            f"got frames {tuple(frames.shape)} of {frames.dtype}, expected (T, 3, H, W) of uint8"
        )
    if squash_first:
        frames = squash(frames, size)
    height, width = frames.shape[-2:]
    return apply_crop(frames, draw_crop(height, width, generator=generator), size)


def load_batches(
    data: Dataset[Any],
    keys: Iterable[Sequence[Any]],
    *,
    collate: Callable[[Sequence[Any]], T],
    workers: int,
    pin_memory: bool = False,
) -> Iterator[T]:
    """Yield what ``collate`` makes of the samples of each group of keys, in order.

    An error of a sample is the same whether it was raised here or in a worker.
    """
    loader: DataLoader[Any] = DataLoader(
        _ErrorsAsValues(data),
        batch_sampler=keys,  # type: ignore[arg-type]  # any iterable will do
        num_workers=workers,
        collate_fn=_CollateUnlessFailed(collate),
        pin_memory=pin_memory,
        worker_init_fn=_leave_interrupts,
        # the loader's own draw stays out of the global state, which checkpoints hold
        generator=torch.Generator().manual_seed(0),
    )
    for fetched in loader:
        if isinstance(fetched, Exception):
            raise fetched
        yield fetched


class _ErrorsAsValues(Dataset[Any]):
    """An error as a value: raised, the loader would make a printed traceback of it."""

    def __init__(self, data: Dataset[Any]) -> None:
        self._data = data

    def __getitem__(self, key: Any) -> Any:
        try:
            return self._data[key]
        except (CosettleError, OSError) as error:
            return error


@dataclasses.dataclass(frozen=True)
class _CollateUnlessFailed:
    collate: Callable[[Sequence[Any]], Any]

    def __call__(self, samples: Sequence[Any]) -> Any:
        failed = next((sample for sample in samples if isinstance(sample, Exception)), None)
        return self.collate(samples) if failed is None else failed


def _leave_interrupts(worker: int) -> None:
    """Keep a worker alive on Ctrl-C: the step that is under way still needs its batches."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
