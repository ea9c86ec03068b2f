"""Encoded views on disk: a few of each clip, encoded once and reused in every epoch.

``views.json`` records the inputs of the encoding. Each clip has one safetensors file, so an
interruption loses at most one clip; an unreadable clip has a text file with the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.errors import FrameError
from cosettle_adapter.io import atomic_path, exclusive
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.data import (
    Batch,
    Key,
    Sample,
    TrainingPairs,
    collate,
    seed_of,
    work_on,
)
from cosettle_adapter.training.encoding import compile_encoder, encode
from cosettle_adapter.training.errors import (
    DiskFullError,
    TrainingError,
    TrainingInterrupted,
    disk_full,
    keep_settings,
)
from cosettle_adapter.training.processes import on_main
from cosettle_adapter.training.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

INDEX_NAME = "views.json"

_BATCH_SIZE = 16  # samples per encoder pass


class CachedViews(TrainingPairs):
    """Encoded views of a corpus, read from disk instead of decoding and encoding.

    View ``k`` of a clip is the sample that :class:`TrainingPairs` draws at visit ``k``; after the
    last one they repeat. ``skipped`` lists unreadable videos with reasons.
    """

    def __init__(self, folder: Path, pairs: TrainingPairs, inputs: Mapping[str, Any]) -> None:
        videos, done = pairs.corpus.videos, _encoded(folder)
        readable = [clip for clip, problem in done.items() if not problem]
        self.skipped = tuple((videos[clip].name, why) for clip, why in done.items() if why)
        if not readable:
            name, problem = self.skipped[0]
            raise FrameError(
                f"none of the {pairs.clips} videos can be read; the first is {name} ({problem})"
            )
        super().__init__(Corpus(videos[clip] for clip in readable), pairs.settings)
        self.pairs_per_clip = pairs.pairs_per_clip
        self._folder, self._numbers, self._inputs = folder, readable, inputs

    @property
    def digest(self) -> str:
        """sha256 over the inputs of the encoding and the number of samples per clip."""
        described = json.dumps([self._inputs, self.skipped, self.pairs_per_clip])
        return hashlib.sha256(described.encode()).hexdigest()

    def __getitem__(self, key: Key) -> Sample:
        position, turn = divmod(key[1], self.pairs_per_clip)
        clip = self._numbers[position]
        view = (key[0] * self.pairs_per_clip + turn) % self.settings.cache_views
        path = self._folder / f"{clip:07d}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                tokens = file.get_slice("tokens")[view]
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{path} cannot be read ({error}); delete it and run the same command again"
            ) from error
        return Sample(tokens, seed_of(self.settings.seed, clip, view))


def open_data(
    corpus: Corpus,
    backbone: Backbone,
    settings: TrainSettings,
    *,
    accelerator: Accelerator,
    views_folder: Path,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> TrainingPairs:
    """Return the training samples; with ``cache_views`` the first process encodes missing views.

    The backbone then moves to the accelerator's device; all processes must see ``views_folder``.
    """
    pairs = TrainingPairs(corpus, settings)
    if not settings.cache_views:
        return pairs
    backbone.to(accelerator.device)
    if settings.compile:
        compile_encoder(backbone)
    built = on_main(accelerator, lambda: build_views(views_folder, pairs, backbone, on_sample))
    return built or build_views(views_folder, pairs, backbone)


def build_views(
    folder: Path,
    pairs: TrainingPairs,
    backbone: Backbone,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> CachedViews:
    """Encode views into a folder, or continue an interrupted call; one process at a time."""
    settings, config = pairs.settings, pairs.settings.head_config(backbone)
    grid = backbone.grid(settings.size, settings.size)
    names = (
        "size", "frames", "clip_gap", "squash", "cache_views", "pea_ratio", "precision", "seed"
    )  # fmt: skip
    inputs = {name: getattr(settings, name) for name in names} | {
        "pea": settings.pea != "off",
        "backbone": config.backbone,
        "fingerprint": config.fingerprint,
        "stride": backbone.stride,
        "layers": list(config.layers),
        "norm": config.norm,
        "perturbed_norm": settings.perturbed_norm(backbone),
        "videos": pairs.corpus.digest,
    }
    refusal = (
        f"another run is encoding views into {folder}: wait until it finishes, or use another "
        "folder"
    )
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX_NAME).exists():
        keep_settings(folder / INDEX_NAME, inputs)
    missing = pairs.clips - len(_encoded(folder))
    if missing:
        images = settings.frames if settings.pea == "off" else 2 * settings.frames - 1
        patches = missing * settings.cache_views * images * math.prod(grid)
        needed = patches * config.in_width * torch.float16.itemsize
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise DiskFullError(
                f"the views of {missing} clips take {needed / 1e9:.3f} GB, but {folder} has only "
                f"{free / 1e9:.3f} GB free; cache fewer views, use smaller frames or another disk"
            )
        with exclusive(folder, refusal=TrainingError(refusal)):
            keep_settings(folder / INDEX_NAME, inputs)
            _encode_missing(folder, pairs, backbone, on_sample)
    return CachedViews(folder, pairs, inputs)


def _encoded(folder: Path) -> dict[int, str]:
    """Return the clips done, in order, each with the reason if it is unreadable, else ``""``."""
    done: dict[int, str] = {}
    for path in sorted(folder.iterdir()):
        if path.stem.isdigit() and path.suffix in (".safetensors", ".txt"):
            done[int(path.stem)] = path.read_text("utf-8") if path.suffix == ".txt" else ""
    return done


def _draw_views(pairs: TrainingPairs, clip: int) -> Batch:
    return collate(pairs.draw(clip, range(pairs.settings.cache_views)))


def _encode_missing(
    folder: Path, pairs: TrainingPairs, backbone: Backbone, on_sample: Callable[[int, int], None]
) -> None:
    # Listed again under the lock: another process may have encoded clips meanwhile.
    views, done = pairs.settings.cache_views, _encoded(folder)
    clips, count = [clip for clip in range(pairs.clips) if clip not in done], len(done)
    try:
        with disk_full(
            f"no space left in {folder} for the views; complete ones are kept. Free some space, "
            "then run the same command again to continue"
        ):
            draw = functools.partial(_draw_views, pairs)
            drawn = work_on(draw, clips, workers=pairs.settings.workers)
            for clip, batch in zip(clips, drawn, strict=True):
                if isinstance(batch, FrameError):
                    with atomic_path(folder / f"{clip:07d}.txt") as path:
                        path.write_text(str(batch), "utf-8")
                else:
                    tokens = _encode_clip(backbone, pairs.settings, batch)
                    with atomic_path(folder / f"{clip:07d}.safetensors") as path:
                        save_file({"tokens": tokens}, path)
                count += 1
                on_sample(count * views, pairs.clips * views)
    except KeyboardInterrupt as interruption:
        raise TrainingInterrupted(
            f"the views of {count} of {pairs.clips} clips are kept in {folder}; run the same "
            "command again to continue"
        ) from interruption


def _encode_clip(backbone: Backbone, settings: TrainSettings, drawn: Batch) -> Tensor:
    """Encode the samples of a clip in small batches: tokens (B, I, N, C) float16, on the CPU."""
    if settings.pea == "batch":
        # A view is used in many steps, so it cannot have the offset of one step.
        settings = dataclasses.replace(settings, pea="sample")
    data, seeds = (torch.split(tensor, _BATCH_SIZE) for tensor in (drawn.data, drawn.seeds))
    parts = zip(data, seeds, strict=True)
    encoded = [encode(backbone, settings, frames, seed, step=0) for frames, seed in parts]
    tokens = torch.cat([part.to("cpu", torch.float16) for part in encoded])
    if not bool(tokens.isfinite().all()):
        raise TrainingError(
            "tokens are not finite in float16; use --precision float32, other layers, --norm, or "
            "train without --cache-views"
        )
    return tokens
