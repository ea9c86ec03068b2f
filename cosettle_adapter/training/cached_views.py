"""Views kept on disk: a few of each clip, encoded once, for any number of epochs.

``views.json`` says what the views were made of. A clip's views are one file, so that an
interruption costs no more than the clips that were being encoded; of a clip that cannot be read, a
text file says why.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.errors import FrameError
from cosettle_adapter.io import atomic_path, exclusive
from cosettle_adapter.training.data import Batch, Key, TrainingPairs, load_batches
from cosettle_adapter.training.encoding import Views, draw_offsets, encode_views
from cosettle_adapter.training.errors import (
    DiskFullError,
    TrainingError,
    TrainingInterrupted,
    disk_full,
)
from cosettle_adapter.training.seeds import seed_of
from cosettle_adapter.training.settings import ObjectiveSettings

INDEX_NAME = "views.json"

_FORMAT = {"format": "cosettle-views", "version": 2}


class CachedSample(NamedTuple):
    """The encoded views of one cycle.

    Attributes:
        tokens: (I, N, C) float16: the T frames, then all but the last with perturbed positions.
        seed: of whatever else is drawn for this sample.
    """

    tokens: Tensor
    seed: int


class CachedViews(Dataset[CachedSample]):
    """Encoded views of a corpus, read from disk in place of decoding and encoding.

    View ``k`` of a clip is encoded from what :class:`TrainingPairs` draws at that clip's ``k``-th
    turn, so that the two give the same samples until the views are used up; then they repeat.
    Positions are perturbed at a place of its own for each view, whether ``pea`` is ``sample`` or
    ``batch``. Videos that cannot be read are left out for good.

    Attributes:
        skipped: videos that could not be read, and why.
        clips: number of the others.
    """

    def __init__(
        self, folder: Path, pairs: TrainingPairs, made_of: Mapping[str, Any], grid: tuple[int, int]
    ) -> None:
        self._folder, self._made_of, self._grid = folder, dict(made_of), grid
        self._per_clip, self._seed = pairs.pairs_per_clip, pairs.seed
        self._names = [video.name for video in pairs.corpus.videos]
        there = _dealt_with(folder)
        self._kept = [clip for clip in range(pairs.clips) if there.get(clip) is None]
        self.skipped = tuple((self._names[c], why) for c, why in sorted(there.items()) if why)
        self.clips = len(self._kept)
        if not self.clips:
            name, problem = self.skipped[0]
            raise FrameError(
                f"none of the {pairs.clips} videos can be read; the first of them: {name} "
                f"({problem})"
            )

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike[str],
        pairs: TrainingPairs,
        backbone: Backbone,
        settings: ObjectiveSettings,
        *,
        layers: Sequence[int],
        norm: bool | None,
        views: int,
        autocast: torch.dtype | None = None,
        batch_size: int = 16,
        workers: int = 0,
        on_sample: Callable[[int, int], None] | None = None,
    ) -> CachedViews:
        """Encode views into a folder, or continue where an earlier call was stopped.

        A complete folder is used as it is. One process at a time may build a folder; any number
        may read a complete one.

        Args:
            folder: created if it does not exist.
            pairs: what to encode.
            backbone: the frozen encoder.
            settings: only how positions are perturbed matters here.
            layers: layers to read, concatenated along the channels.
            norm: apply the final norm, as in :meth:`Backbone.patch_tokens`.
            views: of each clip, at least 1.
            autocast: dtype to encode in, if not the backbone's.
            batch_size: samples encoded at a time.
            workers: processes that decode.
            on_sample: called with the views done and their number.

        Raises:
            TrainingError: the folder holds other views (the message says what differs), another
                process is building it, or the tokens do not fit float16.
            DiskFullError: there is not room for all views, which is checked before anything is
                encoded, or there is no more; views that are complete are kept.
            FrameError: no video can be read.
            TrainingInterrupted: Ctrl-C; views that are complete are kept.
        """
        folder = Path(folder)
        perturbed = settings.pea != "off"
        # a view outlives the step it is made in, so its offset cannot be the step's
        own = dataclasses.replace(settings, pea="sample") if perturbed else settings
        encoder = _Encoder(
            backbone, own, [backbone.block(layer) for layer in layers], norm, autocast, batch_size
        )
        made_of = {
            "backbone": backbone.row.name,
            "fingerprint": backbone.fingerprint,
            "stride": backbone.stride,
            "layers": encoder.layers,
            "norm": norm,
            "precision": str(autocast or backbone.dtype).removeprefix("torch."),
            "size": pairs.size,
            "frames": pairs.frames,
            "squash": pairs.squash,
            "views": views,
            "pea": "on" if perturbed else "off",
            "pea_ratio": settings.pea_ratio if perturbed else None,
            "seed": pairs.seed,
            "corpus": pairs.corpus.digest,
        }
        grid = backbone.grid(pairs.size, pairs.size)
        _compare(folder, made_of)
        missing = pairs.clips - len(_dealt_with(folder))
        if missing:
            images = 2 * pairs.frames - 1 if perturbed else pairs.frames
            width = sum(backbone.widths[layer] for layer in encoder.layers)
            _check_room(folder, missing * views * images * math.prod(grid) * width * 2, missing)
            _encode_missing(folder, made_of, pairs, encoder, workers, on_sample)
        return cls(folder, pairs, made_of, grid)

    @property
    def digest(self) -> str:
        """sha256 over what the views were made of and what was left out."""
        made = json.dumps([self._made_of, self.skipped, self._per_clip])
        return hashlib.sha256(made.encode()).hexdigest()

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.clips * self._per_clip

    def name(self, index: int) -> str:
        """Return the name of the video that sample ``index`` was drawn from."""
        return self._names[self._kept[index // self._per_clip]]

    def __getitem__(self, key: Key) -> CachedSample:
        """Return the views of ``(epoch, index)``, both 0-based.

        Raises:
            IndexError: no such sample.
            TrainingError: its file is damaged.
        """
        epoch, index = key
        if not 0 <= index < len(self) or epoch < 0:
            raise IndexError(f"no sample {index} of epoch {epoch}; an epoch has {len(self)}")
        place, turn = divmod(index, self._per_clip)
        clip = self._kept[place]
        view = (epoch * self._per_clip + turn) % self._made_of["views"]
        path = _tokens_of(self._folder, clip)
        try:
            with safe_open(path, "pt") as file:
                tokens = file.get_slice("tokens")[view]
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{path} cannot be read ({error}); delete it and run the same again"
            ) from error
        return CachedSample(tokens, seed_of(self._seed, clip, view))

    def collate(self, samples: Sequence[CachedSample]) -> Batch:
        """Stack samples into a batch of views."""
        tokens = torch.stack([sample.tokens for sample in samples])
        frames = self._made_of["frames"]
        forward, perturbed = tokens[:, :frames], tokens[:, frames:]
        backward = perturbed if self._made_of["pea"] == "on" else forward[:, :-1]
        seeds = torch.tensor([sample.seed for sample in samples], dtype=torch.int64)
        return Batch(seeds, views=Views(forward, backward, self._grid))


def _tokens_of(folder: Path, clip: int) -> Path:
    return folder / f"{clip:07d}.safetensors"


def _dealt_with(folder: Path) -> dict[int, str | None]:
    """Return which clips are done: with ``None``, or why they cannot be read."""
    if not folder.is_dir():
        return {}
    paths = [path for path in folder.iterdir() if path.stem.isdigit()]
    return {
        int(path.stem): path.read_text("utf-8") if path.suffix == ".txt" else None
        for path in paths
        if path.suffix in (".txt", ".safetensors")
    }


def _compare(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Refuse a folder that holds other views."""
    path = folder / INDEX_NAME
    if not path.exists():
        return
    remedy = f"use another folder, or delete {folder}"
    try:
        content = json.loads(path.read_text("utf-8"))
        if {name: content[name] for name in _FORMAT} != _FORMAT:
            raise ValueError(f"another version's: {content['version']!r}")
        before = dict(content["made_of"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} cannot be read ({error!r}); {remedy}") from error
    differing = [name for name in sorted(made_of) if before.get(name) != made_of[name]]
    if differing == ["corpus"]:
        raise TrainingError(
            f"the views in {folder} were made from other videos: some were added, removed, "
            f"renamed or changed since; {remedy}"
        )
    if differing:
        told = ", ".join(
            f"{name} {str(before.get(name))[:40]} (now {str(made_of[name])[:40]})"
            for name in differing
        )
        raise TrainingError(f"the views in {folder} were made with {told}; {remedy}")


def _check_room(folder: Path, needed: int, clips: int) -> None:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DiskFullError(
            f"the views of {clips} clips take {needed / 1e9:.3f} GB, and {existing} has "
            f"{free / 1e9:.3f} GB free; keep fewer views, use smaller frames, or another disk"
        )


class _Clip(NamedTuple):
    """All views of a clip to encode, or why there are none."""

    number: int
    batch: Batch | None = None
    problem: str = ""


class _Draws(Dataset[_Clip]):
    """Clips with all their views, decoded and cropped."""

    def __init__(self, pairs: TrainingPairs, views: int) -> None:
        self._pairs, self._views = pairs, views

    def __getitem__(self, clip: int) -> _Clip:
        try:
            return _Clip(clip, self._pairs.collate(self._pairs.draw(clip, range(self._views))))
        except FrameError as error:
            return _Clip(clip, problem=str(error) or "unreadable")


def _only(clips: Sequence[_Clip]) -> _Clip:
    return clips[0]


class _Encoder(NamedTuple):
    backbone: Backbone
    settings: ObjectiveSettings
    layers: list[int]
    norm: bool | None
    autocast: torch.dtype | None
    batch_size: int

    def encode(self, clips: Sequence[_Clip]) -> Tensor:
        """Encode what could be read: tokens (B, I, N, C) float16, on the CPU."""
        batches = [clip.batch for clip in clips if clip.batch is not None]
        frames = torch.cat([batch.frames for batch in batches if batch.frames is not None])
        seeds = torch.cat([batch.seeds for batch in batches])
        device, half = self.backbone.device.type, self.autocast is not None
        encoded = []
        with torch.inference_mode(), torch.autocast(device, self.autocast, enabled=half):
            for first in range(0, len(frames), self.batch_size):
                part = slice(first, first + self.batch_size)
                views = encode_views(
                    self.backbone,
                    frames[part],
                    layers=self.layers,
                    norm=self.norm,
                    settings=self.settings,
                    offsets=draw_offsets(self.settings, seed=0, step=0, sample_seeds=seeds[part]),
                )
                both = [views.forward] if self.settings.pea == "off" else list(views[:2])
                encoded.append(torch.cat(both, dim=1).to(torch.float16).cpu())
        tokens = torch.cat(encoded)
        if not bool(tokens.isfinite().all()):
            raise TrainingError(
                f"tokens of layers {self.layers} are not finite in float16; encode in float32, "
                "read other layers, apply the final norm, or train without cached views"
            )
        return tokens


def _encode_missing(
    folder: Path,
    made_of: Mapping[str, Any],
    pairs: TrainingPairs,
    encoder: _Encoder,
    workers: int,
    on_sample: Callable[[int, int], None] | None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    refusal = (
        f"another run is encoding views into {folder}: wait until it is done with them, or use "
        "another folder"
    )
    views = int(made_of["views"])
    together = max(1, math.ceil(encoder.batch_size / views))
    with exclusive(folder, refusal=TrainingError(refusal)):
        there = _dealt_with(folder)  # another run may just have continued
        missing = [clip for clip in range(pairs.clips) if clip not in there]
        keys = [[clip] for clip in missing]
        decoded = load_batches(_Draws(pairs, views), keys, collate=_only, workers=workers)
        done = len(there)
        try:
            with disk_full(
                f"no room is left in {folder} for the views; those that are complete are kept. "
                "Make room and run the same again to continue"
            ):
                with atomic_path(folder / INDEX_NAME) as path:
                    path.write_text(json.dumps({**_FORMAT, "made_of": made_of}, indent=1), "utf-8")
                while done < pairs.clips:
                    clips = [next(decoded) for _ in range(min(together, pairs.clips - done))]
                    _write(folder, clips, encoder)
                    done += len(clips)
                    if on_sample is not None:
                        on_sample(done * views, pairs.clips * views)
        except KeyboardInterrupt as interruption:
            raise TrainingInterrupted(
                f"the views of {done} of {pairs.clips} clips are kept in {folder}; run the same "
                "again to continue"
            ) from interruption


def _write(folder: Path, clips: Sequence[_Clip], encoder: _Encoder) -> None:
    read = [clip for clip in clips if clip.batch is not None]
    for clip in clips:
        if clip.batch is None:
            with atomic_path(folder / f"{clip.number:07d}.txt") as path:
                path.write_text(clip.problem, "utf-8")
    if not read:
        return
    tokens = encoder.encode(read)
    for clip, own in zip(read, tokens.chunk(len(read)), strict=True):
        with atomic_path(_tokens_of(folder, clip.number)) as path:
            save_file({"tokens": own.contiguous()}, path)
