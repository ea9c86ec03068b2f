"""From clips to samples: drawn and encoded anew, or views kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.training.batches import TrainingData
from cosettle_adapter.training.compilation import compile_encoder
from cosettle_adapter.training.corpora.corpus import Corpus
from cosettle_adapter.training.distribution import on_main
from cosettle_adapter.training.samples.dataset import TrainingPairs
from cosettle_adapter.training.samples.views import CachedViews
from cosettle_adapter.training.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator


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

    Where views are kept on disk, the first process encodes what is missing while the others
    wait; the folder must be on a disk that all of them see.

    Args:
        corpus: clips.
        backbone: the frozen encoder; where views are kept, it moves to the accelerator's device
            and is compiled if the settings say so.
        settings: of the run.
        accelerator: of this process.
        views_folder: where views are kept.
        on_sample: called in the first process with the views encoded and their number.

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
    backbone.grid(settings.size, settings.size)
    backbone.to(accelerator.device)
    if settings.compile:
        compile_encoder(backbone)
    config = settings.head_config(backbone)
    half = settings.precision != "float32"

    def build() -> CachedViews:
        return CachedViews.build(
            views_folder,
            pairs,
            backbone,
            settings.objective,
            layers=config.layers,
            norm=config.norm,
            views=settings.cache_views,
            autocast=getattr(torch, settings.precision) if half else None,
            workers=settings.workers,
            on_sample=on_sample if accelerator.is_main_process else None,
        )

    built = on_main(accelerator, build)
    return build() if built is None else built
