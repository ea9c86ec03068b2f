"""Views kept on disk: a few of each clip, encoded once, for any number of epochs.

``views.json`` says what the views were made of. A clip's views are one safetensors file, so that an
interruption costs no more than the clip that was being encoded; of a clip that cannot be read, a
text file says why.
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

_AT_ONCE = 16  # samples encoded at a time


class CachedViews(TrainingPairs):
    """Encoded views of a corpus, read from disk in place of decoding and encoding.

    View ``k`` of a clip is what :class:`TrainingPairs` draws at that clip's ``k``-th turn, with
    positions perturbed at a place of its own whether ``pea`` is ``sample`` or ``batch``; when all
    were used they repeat. Videos that cannot be read are left out; ``skipped`` says why.
    """

    def __init__(self, folder: Path, pairs: TrainingPairs, made_of: Mapping[str, Any]) -> None:
        videos, done = pairs.corpus.videos, _encoded(folder)
        kept = [clip for clip, problem in done.items() if not problem]
        self.skipped = tuple((videos[clip].name, why) for clip, why in done.items() if why)
        if not kept:
            name, problem = self.skipped[0]
            raise FrameError(
                f"none of the {pairs.clips} videos can be read; the first of them: {name} "
                f"({problem})"
            )
        super().__init__(Corpus(videos[clip] for clip in kept), pairs.settings)
        self.pairs_per_clip = pairs.pairs_per_clip
        self._folder, self._numbers, self._made_of = folder, kept, made_of

    @property
    def digest(self) -> str:
        """sha256 over what the views were made of, and the samples drawn from each video."""
        described = json.dumps([self._made_of, self.skipped, self.pairs_per_clip])
        return hashlib.sha256(described.encode()).hexdigest()

    def __getitem__(self, key: Key) -> Sample:
        place, turn = divmod(key[1], self.pairs_per_clip)
        clip = self._numbers[place]
        view = (key[0] * self.pairs_per_clip + turn) % self.settings.cache_views
        path = self._folder / f"{clip:07d}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                tokens = file.get_slice("tokens")[view]
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{path} cannot be read ({error}); delete it and run the same again"
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
    """Return the samples that a run with ``settings`` is trained on.

    Where views are kept on disk, the backbone moves to the accelerator's device, and the first
    process encodes what is missing while the others wait, into a folder that all of them see.
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
    """Encode views into a folder, or continue where an earlier call was stopped.

    One process at a time may build a folder; any number may read a complete one. ``on_sample`` is
    called with the views encoded and their number.

    Raises:
        TrainingError: the folder holds other views, another process is building it, or the tokens
            do not fit float16.
        DiskFullError: there is not room for all views, which is checked first, or no more.
        FrameError: no video can be read.
        TrainingInterrupted: Ctrl-C.
    """
    settings, config = pairs.settings, pairs.settings.head_config(backbone)
    grid = backbone.grid(settings.size, settings.size)
    names = ("size", "frames", "squash", "cache_views", "pea_ratio", "precision", "seed")
    made_of = {name: getattr(settings, name) for name in names} | {
        "pea": settings.pea != "off",
        "backbone": config.backbone,
        "fingerprint": config.fingerprint,
        "stride": backbone.stride,
        "layers": list(config.layers),
        "norm": config.norm,
        "videos": pairs.corpus.digest,
    }
    refusal = (
        f"another run is encoding views into {folder}: wait until it is done with them, or use "
        "another folder"
    )
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX_NAME).exists():
        keep_settings(folder / INDEX_NAME, made_of)
    missing = pairs.clips - len(_encoded(folder))
    if missing:
        images = settings.frames if settings.pea == "off" else 2 * settings.frames - 1
        patches = missing * settings.cache_views * images * math.prod(grid)
        needed = patches * config.in_width * torch.float16.itemsize
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise DiskFullError(
                f"the views of {missing} clips take {needed / 1e9:.3f} GB, and {folder} has "
                f"{free / 1e9:.3f} GB free; keep fewer views, use smaller frames, or another disk"
            )
        with exclusive(folder, refusal=TrainingError(refusal)):
            keep_settings(folder / INDEX_NAME, made_of)
            _encode_missing(folder, pairs, backbone, on_sample)
    return CachedViews(folder, pairs, made_of)


def _encoded(folder: Path) -> dict[int, str]:
    """Return which clips are done, in order, and why some of them cannot be read."""
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
    views, done = pairs.settings.cache_views, _encoded(folder)  # another may just have continued
    clips, count = [clip for clip in range(pairs.clips) if clip not in done], len(done)
    try:
        with disk_full(
            f"no room is left in {folder} for the views; those that are complete are kept. Make "
            "room and run the same again to continue"
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
            "again to continue"
        ) from interruption


def _encode_clip(backbone: Backbone, settings: TrainSettings, drawn: Batch) -> Tensor:
    """Encode the samples of a clip, a few at a time: tokens (B, I, N, C) float16, on the CPU."""
    if settings.pea == "batch":
        # a view outlives the step it is made in, so its offset cannot be the step's
        settings = dataclasses.replace(settings, pea="sample")
    parts = zip(torch.split(drawn.data, _AT_ONCE), torch.split(drawn.seeds, _AT_ONCE), strict=True)
    encoded = [encode(backbone, settings, frames, seeds, step=0) for frames, seeds in parts]
    tokens = torch.cat([each.to("cpu", torch.float16) for each in encoded])
    if not bool(tokens.isfinite().all()):
        raise TrainingError(
            "tokens are not finite in float16; encode in float32, read other layers, apply the "
            "final norm, or train without cached views"
        )
    return tokens
