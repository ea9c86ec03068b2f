"""Which samples every step sees: a pure function of the seed and the step.

There is one loader for the whole run. It begins at any step, gives the same samples for any number
of processes and workers, and cuts a step into forward passes of equal size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.training.cached_views import CachedViews
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.data import Key, TrainingPairs
from cosettle_adapter.training.distribution import on_main
from cosettle_adapter.training.encoding import compile_encoder
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.seeds import generator_of
from cosettle_adapter.training.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator


TrainingData = TrainingPairs | CachedViews
"""Samples: pairs from videos, or views kept on disk."""


def open_data(
    corpus: Corpus,
    backbone: Backbone,
    settings: TrainSettings,
    *,
    accelerator: Accelerator,
    views_folder: str | Path,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> TrainingData:
    """Return the samples that a run with ``settings`` is trained on.

    Where views are kept on disk, the backbone moves to the accelerator's device, and the first
    process encodes what is missing while the others wait; the folder must be on a disk that all of
    them see. ``on_sample`` is called there with the views encoded and their number.

    Raises:
        TrainingError: the folder holds views of something else.
        DiskFullError: there is not room for the views.
        FrameError: the corpus is empty, or no video can be read.
    """
    pairs = TrainingPairs(
        corpus,
        size=settings.size,
        frames=settings.frames,
        pairs_per_clip=settings.pairs_per_clip,
        seed=settings.seed,
        squash=settings.squash,
    )
    if not settings.cache_views:
        return pairs
    config = settings.head_config(backbone)
    backbone.grid(settings.size, settings.size)
    backbone.to(accelerator.device)
    if settings.compile:
        compile_encoder(backbone)

    def build() -> CachedViews:
        return CachedViews.build(
            views_folder,
            pairs,
            backbone,
            settings,
            layers=config.layers,
            norm=config.norm,
            views=settings.cache_views,
            autocast=None
            if settings.precision == "float32"
            else getattr(torch, settings.precision),
            workers=settings.workers,
            on_sample=on_sample if accelerator.is_main_process else None,
        )

    return on_main(accelerator, build) or build()


@dataclasses.dataclass(frozen=True)
class Plan:
    """How samples become steps.

    Attributes:
        samples: of an epoch.
        batch_size: samples per process and forward pass; made smaller where there are too few
            samples for one step.
        processes: that train together.
        accumulation: forward passes per step.
        epochs: passes over the samples.
        seed: of the order.

    Raises:
        TrainingError: fewer samples than one each for all processes and forward passes.
    """

    samples: int
    batch_size: int
    processes: int
    accumulation: int
    epochs: int
    seed: int

    def __post_init__(self) -> None:
        parts = self.processes * self.accumulation
        if self.samples < parts:
            raise TrainingError(
                f"{self.samples} samples are too few for {self.processes} processes and "
                f"{self.accumulation} forward passes per step: use fewer of either, more clips, or "
                "--pairs-per-clip"
            )
        object.__setattr__(self, "batch_size", min(self.batch_size, self.samples // parts))

    @property
    def samples_per_step(self) -> int:
        """Samples that one step sees, over all processes."""
        return self.batch_size * self.processes * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps of an epoch; what is left over is dropped, other samples every epoch."""
        return self.samples // self.samples_per_step

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.epochs * self.steps_per_epoch

    def keys(self, step: int, rank: int) -> list[list[Key]]:
        """Return what one process sees in a step: a list of keys for each forward pass."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = torch.randperm(self.samples, generator=generator_of(self.seed, "order", epoch))
        first = within * self.samples_per_step + rank * self.batch_size
        apart = self.batch_size * self.processes
        starts = [first + part * apart for part in range(self.accumulation)]
        chunks = [order[at : at + self.batch_size].tolist() for at in starts]
        return [[(epoch, index) for index in chunk] for chunk in chunks]

    def batches(self, rank: int = 0, *, start: int = 0) -> Iterator[list[Key]]:
        """Yield the keys of one process's forward passes, from step ``start`` to the end."""
        for step in range(start, self.steps):
            yield from self.keys(step, rank)
