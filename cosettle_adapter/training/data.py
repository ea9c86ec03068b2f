"""Training samples: which frames of which clips each step sees, and how they are loaded.

Every random draw is a function of counters (seed, epoch, sample, step), so a resumed run and a run
with another number of processes or workers see the same samples.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import math
import operator
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cosettle_adapter.errors import FrameError
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.errors import TrainingError, WorkerEndedError
from cosettle_adapter.training.settings import TrainSettings

T = TypeVar("T")
Key = tuple[int, int]  # epoch and index of a sample, both 0-based

_SCALE = (0.5, 1.0)
_RATIO = (3 / 4, 4 / 3)
_SHORT = 4
_PAIRS_PER_EPOCH = 2000
_CROP_TRIES = 10
_TRIES = 100
_SAMPLES_PER_READ = 8  # bounds the frames in memory


def seed_of(*parts: int | str) -> int:
    """Hash the counters of a draw into a seed in [0, 2^63); the same on every machine."""
    plain = [part if isinstance(part, str) else operator.index(part) for part in parts]
    digest = hashlib.sha256(json.dumps(plain).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_of(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded with :func:`seed_of` of ``parts``."""
    return torch.Generator().manual_seed(seed_of(*parts))


class Plan:
    """Divides the samples of an epoch into steps, and each step into forward passes of equal size.

    ``batch_size`` is lowered if an epoch has too few samples; the remainder of an epoch is dropped.
    """

    def __init__(self, samples: int, processes: int, settings: TrainSettings) -> None:
        parts = processes * settings.accumulation
        if samples < parts:
            raise TrainingError(
                f"{samples} samples are too few for {processes} processes and "
                f"{settings.accumulation} forward passes per step: use fewer processes or forward "
                "passes, more clips, or a larger --pairs-per-clip"
            )
        self.samples, self.settings = samples, settings
        self.batch_size = min(settings.batch_size, samples // parts)
        self.samples_per_step = self.batch_size * parts
        self.steps_per_epoch = samples // self.samples_per_step
        self.steps = settings.epochs * self.steps_per_epoch

    def keys(self, step: int, rank: int) -> list[list[Key]]:
        """Return the keys that one process sees in a step: a list for each forward pass."""
        epoch, within = divmod(step, self.steps_per_epoch)
        generator = generator_of(self.settings.seed, "order", epoch)
        order = torch.randperm(self.samples, generator=generator)[within * self.samples_per_step :]
        apart = self.samples_per_step // self.settings.accumulation
        starts = range(rank * self.batch_size, self.samples_per_step, apart)
        chunks = [order[at : at + self.batch_size].tolist() for at in starts]
        return [[(epoch, index) for index in chunk] for chunk in chunks]

    def batches(self, rank: int = 0, *, start: int = 0) -> Iterator[list[Key]]:
        """Yield the keys of one process's forward passes, from step ``start`` to the end."""
        for step in range(start, self.steps):
            yield from self.keys(step, rank)


class Sample(NamedTuple):
    """One cycle: frames (T, 3, S, S) float32 in about [0, 1], or their tokens (I, N, C) float16."""

    data: Tensor
    seed: int  # for all further draws of this sample
    skipped: tuple[tuple[str, str], ...] = ()  # unreadable videos: name, reason


class Batch(NamedTuple):
    """Stacked samples: ``data`` (B, ...), ``seeds`` (B,) int64; a ``DataLoader`` can pin it."""

    data: Tensor
    seeds: Tensor
    skipped: tuple[tuple[str, str], ...]


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a batch."""
    data, seeds, skipped = zip(*samples, strict=True)
    return Batch(torch.stack(data), torch.tensor(seeds), sum(skipped, ()))


class TrainingPairs(Dataset[Sample]):
    """Cycles of frames, several per clip and epoch.

    A sample is a function of the seed, the clip and the number of samples drawn from that clip
    before. An unreadable video is replaced by another one, which depends on the key alone.
    """

    def __init__(self, corpus: Corpus, settings: TrainSettings) -> None:
        self.corpus, self.settings, self.clips = corpus, settings, len(corpus)
        # 1 for all corpora of more than about 1,300, as in the paper
        per_clip = max(1, round(_PAIRS_PER_EPOCH / len(corpus)))
        self.pairs_per_clip = settings.pairs_per_clip or per_clip

    @property
    def digest(self) -> str:
        """sha256 over the videos' names and sizes and the number of samples per clip."""
        return hashlib.sha256(f"{self.corpus.digest} {self.pairs_per_clip}".encode()).hexdigest()

    def __len__(self) -> int:
        return self.clips * self.pairs_per_clip

    def name(self, index: int) -> str:
        """Return the name of the video that sample ``index`` is drawn from."""
        return self.corpus.videos[index // self.pairs_per_clip].name

    def __getitem__(self, key: Key) -> Sample:
        clip, turn = divmod(key[1], self.pairs_per_clip)
        visit = key[0] * self.pairs_per_clip + turn
        skipped: list[tuple[str, str]] = []
        first: FrameError | None = None
        # Replacements are random, not neighbours, because the videos of a folder break together.
        generator = generator_of(self.settings.seed, "instead", *key)
        others = torch.randperm(self.clips, generator=generator)
        for candidate in [clip, *others[others != clip][: _TRIES - 1].tolist()]:
            try:
                (sample,) = self.draw(candidate, [visit], owner=clip)
                return sample._replace(skipped=tuple(skipped))
            except FrameError as error:
                skipped.append((self.corpus.videos[candidate].name, str(error)))
                first = first or error
        name, problem = skipped[0]
        raise FrameError(
            f"none of the {len(skipped)} videos that were tried can be read; the first is {name} "
            f"({problem})"
        ) from first

    def draw(self, clip: int, visits: Sequence[int], *, owner: int | None = None) -> list[Sample]:
        """Draw a sample for each 0-based visit of a clip; ``owner`` is the clip it replaces."""
        video, settings = self.corpus.videos[clip], self.settings
        length = video.length()
        owner = clip if owner is None else owner
        samples = []
        for first in range(0, len(visits), _SAMPLES_PER_READ):
            chunk = visits[first : first + _SAMPLES_PER_READ]
            seeds = [seed_of(settings.seed, owner, visit) for visit in chunk]
            generators = [generator_of(seed, "frames") for seed in seeds]
            chosen = [
                choose_frames(length, settings.frames, gap=settings.clip_gap, generator=generator)
                for generator in generators
            ]
            frames = video.read([index for indices in chosen for index in indices])
            cycles = rearrange(frames, "(s t) c h w -> s t c h w", t=settings.frames)
            for seed, generator, cycle in zip(seeds, generators, cycles, strict=True):
                samples.append(Sample(augment(cycle, settings, generator=generator), seed))
        return samples


def choose_frames(
    length: int, frames: int = 2, *, gap: float, generator: torch.Generator
) -> tuple[int, ...]:
    """Draw the 0-based frames of a cycle as the official code does, never frame 0 of a long clip.

    Frames are ``int(gap * length)`` apart, or less if more than two frames would not fit; in clips
    of at most 4 frames, or too short for a distance of 1, they are drawn independently.
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
    first_start = min(1, last_start)  # with a large gap only frame 0 is left
    start = int(torch.randint(first_start, last_start + 1, (1,), generator=generator))
    return tuple(start + step * index for index in range(frames))


def draw_crop(
    height: int, width: int, *, generator: torch.Generator
) -> tuple[int, int, int, int, bool]:
    """Draw a random-resized crop: top, left, height, width in pixels, and whether to mirror it.

    Draws equal those of torchvision's ``RandomResizedCrop``, which the official code runs: the
    method that it defines to clip the sides to the frame is never called.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(1).uniform_(low, high, generator=generator)

    def place(room: int) -> int:
        return int(torch.randint(room + 1, (1,), generator=generator))

    low, high = torch.tensor(_RATIO).log().tolist()
    for _ in range(_CROP_TRIES):
        area = height * width * uniform(*_SCALE).item()
        aspect = uniform(low, high).exp().item()
        rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = place(height - rows), place(width - columns)
            break
    else:  # the largest crop in the centre
        rows, columns = min(height, round(width / _RATIO[0])), min(width, round(height * _RATIO[1]))
        top, left = (height - rows) // 2, (width - columns) // 2
    return top, left, rows, columns, uniform(0, 1).item() < 0.5


def squash(frames: Tensor, size: int) -> Tensor:
    """Resize whole frames (T, 3, H, W) uint8 to a square, bilinearly, rounded to 8 bits."""
    if tuple(frames.shape[-2:]) == (size, size):
        return frames
    resized = F.interpolate(frames.float(), size=(size, size), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def augment(frames: Tensor, settings: TrainSettings, *, generator: torch.Generator) -> Tensor:
    """Apply one random-resized crop and flip to all frames (T, 3, H, W) uint8 of a cycle.

    Without ``squash`` (the official code squashes) a 16:9 video is narrowed by at most 1.33 instead
    of 1.33 to 2.37. Values overshoot [0, 1] a little, because bicubic resizing is not clamped.
    """
    frames = squash(frames, settings.size) if settings.squash else frames
    sides = (settings.size, settings.size)
    top, left, rows, columns, flip = draw_crop(*frames.shape[-2:], generator=generator)
    pixels = frames[..., top : top + rows, left : left + columns].float() / 255
    if (rows, columns) != sides:
        pixels = F.interpolate(
            pixels, size=sides, mode="bicubic", antialias=True, align_corners=False
        )
    return (pixels.flip(-1) if flip else pixels).contiguous()


def load_batches(
    data: Dataset[Sample], keys: Iterable[list[Key]], *, workers: int, pin_memory: bool = False
) -> Iterator[Batch]:
    """Yield a batch for each list of keys, in order; raises the error of a sample."""
    work = functools.partial(_batch, data)
    for batch in work_on(work, keys, workers=workers, pin_memory=pin_memory):
        if isinstance(batch, FrameError):
            raise batch
        yield batch


def _batch(data: Dataset[Sample], keys: list[Key]) -> Batch:
    return collate([data[key] for key in keys])


def work_on(
    work: Callable[[Any], T], items: Iterable[Any], *, workers: int, pin_memory: bool = False
) -> Iterator[T | FrameError]:
    """Yield ``work(item)`` for each item, in order, or the FrameError that it raised.

    Other errors are raised, :class:`WorkerEndedError` if a worker process dies. The cause of an
    error holds the worker's traceback.
    """
    loader: DataLoader[Any] = DataLoader(
        _Work(work),
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupts,
        # Without its own generator the loader draws from the global state, which checkpoints hold.
        generator=torch.Generator().manual_seed(0),
    )
    for result in _results(loader):
        if not isinstance(result, _Failure):
            yield result
            continue
        result.error.__cause__ = RuntimeError(result.traceback)
        if not isinstance(result.error, FrameError):
            raise result.error
        yield result.error


def _results(loader: DataLoader[Any]) -> Iterator[Any]:
    try:
        if loader.num_workers:
            # a decoder freed in a forked process would wait for threads that it does not have
            gc.collect()
        results = iter(loader)
        with _sigchld_suspended() if loader.num_workers else contextlib.nullcontext():
            yield from results
    except RuntimeError as error:  # errors of the work itself are values
        raise WorkerEndedError(
            f"a process that decodes videos ended unexpectedly ({error}). If memory ran out, use "
            "fewer --workers; if a damaged video crashed the decoder, find it with "
            "cosettle-adapter prepare and remove it"
        ) from error


@contextlib.contextmanager
def _sigchld_suspended() -> Iterator[None]:
    """Suspend PyTorch's handler, which raises in the middle of whatever the main thread does."""
    # Without it the loader notices a dead worker within five seconds.
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


class _Failure(NamedTuple):
    """An error of the work and its traceback, which pickling the error would lose."""

    error: Exception
    traceback: str


class _Work(Dataset[Any]):
    """Returns errors as values; the loader would replace the message of a raised one."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def __getitem__(self, item: Any) -> Any:
        try:
            return self._work(item)
        except FrameError as error:
            # A subclass may not unpickle.
            return _Failure(FrameError(str(error)), traceback.format_exc())
        except Exception as error:
            return _Failure(error, traceback.format_exc())


def _identity(result: Any) -> Any:
    return result


def _ignore_interrupts(worker: int) -> None:
    """Keep a worker alive on Ctrl-C: the current step still needs its batches."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
