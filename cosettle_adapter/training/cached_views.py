"""Views kept on disk: a few of each clip, encoded once, for any number of epochs.

A folder holds ``tokens.f16`` (clip, view, image, token, channel) and ``views.json``, which says
what the tokens were made of and how many clips count. Views are written a chunk of clips at a time,
and the index after the tokens, so that an interruption costs no more than a chunk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cosettle_adapter import extras
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.errors import CosettleError, FrameError
from cosettle_adapter.locking import exclusive
from cosettle_adapter.training.data import Batch, Key, TrainingPairs
from cosettle_adapter.training.encoding import Views, draw_offsets, encode_views
from cosettle_adapter.training.errors import TrainingError, TrainingInterrupted
from cosettle_adapter.training.seeds import seed_of
from cosettle_adapter.training.settings import ObjectiveSettings
from cosettle_adapter.training.views_file import (
    TOKENS_NAME,
    ViewsFile,
    check_room,
    room_for_views,
)


class CachedSample(NamedTuple):
    """The encoded views of one cycle.

    Attributes:
        forward: (T, N, C) float16 tokens of the frames.
        backward: (T - 1, N, C) float16 tokens of all but the last, with perturbed positions.
        seed: of whatever else is drawn for this sample.
    """

    forward: Tensor
    backward: Tensor
    seed: int


class CachedViews(Dataset[CachedSample]):
    """Encoded views of a corpus, read from disk in place of decoding and encoding.

    View ``k`` of a clip is encoded from what :class:`TrainingPairs` draws at that clip's ``k``-th
    turn, so that the two give the same samples until the views are used up; then they repeat.
    Positions are perturbed at a place of its own for each view, whether ``pea`` is ``sample`` or
    ``batch``. Videos that cannot be read are left out for good.

    Attributes:
        file: the folder and what it holds; :meth:`build` makes it.
        pairs_per_clip: samples of each clip in an epoch.
        skipped: videos that could not be read, and why.
    """

    def __init__(self, file: ViewsFile, pairs: TrainingPairs) -> None:
        self.file, self.pairs_per_clip, self.skipped = file, pairs.pairs_per_clip, file.skipped
        self._seed = pairs.seed
        missing = {name for name, _ in file.skipped}
        names = [video.name for video in pairs.corpus.videos]
        self._kept = [clip for clip, name in enumerate(names) if name not in missing]
        self._names = [names[clip] for clip in self._kept]
        self._mapped: Any = None

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
            settings: of the objective; only how positions are perturbed matters here.
            layers: layers to read, concatenated along the channels.
            norm: apply the final norm, as in :meth:`Backbone.patch_tokens`.
            views: of each clip, at least 1.
            autocast: dtype to encode in, if not the backbone's.
            batch_size: samples encoded at a time, at least 1.
            workers: processes that decode; 0 decodes here.
            on_sample: called with the views done and their number.

        Raises:
            TrainingError: the folder holds other views (the message says what differs), is
                damaged, another process is building it, or the tokens do not fit float16.
            DiskFullError: there is not room for all views, which is checked before anything is
                encoded, or there is no more; whole chunks are kept.
            FrameError: no video can be read.
            TrainingInterrupted: Ctrl-C; whole chunks are kept.
        """
        blocks = [backbone.block(layer) for layer in layers]
        perturbed = settings.pea != "off"
        made_of = {
            "backbone": backbone.row.name,
            "fingerprint": backbone.fingerprint,
            "stride": backbone.stride,
            "layers": blocks,
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
        file = ViewsFile(
            Path(folder),
            made_of,
            clips=pairs.clips,
            frames=pairs.frames,
            grid=backbone.grid(pairs.size, pairs.size),
            channels=sum(backbone.widths[block] for block in blocks),
        ).read()
        if file.done < file.clips:
            check_room(file)
            # a view outlives the step it is made in, so its offset cannot be the step's
            own = dataclasses.replace(settings, pea="sample") if perturbed else settings
            encoder = _Encoder(backbone, own, blocks, norm, autocast, batch_size)
            file = _write(file, pairs, encoder, workers, on_sample)
        if len(file.skipped) == file.clips:
            name, problem = file.skipped[0]
            raise FrameError(
                f"none of the {file.clips} videos can be read; the first of them: {name} "
                f"({problem})"
            )
        return cls(file, pairs)

    @property
    def clips(self) -> int:
        """Number of videos."""
        return len(self._kept)

    @cached_property
    def digest(self) -> str:
        """sha256 over what the views were made of and what was left out."""
        made = json.dumps([self.file.made_of, self.file.skipped, self.pairs_per_clip])
        return hashlib.sha256(made.encode()).hexdigest()

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.clips * self.pairs_per_clip

    def name(self, index: int) -> str:
        """Return the name of the video that sample ``index`` was drawn from."""
        return self._names[index // self.pairs_per_clip]

    def __getitem__(self, key: Key) -> CachedSample:
        """Return the views of ``(epoch, index)``, both 0-based.

        Raises:
            IndexError: no such sample.
        """
        epoch, index = key
        if not 0 <= index < len(self) or epoch < 0:
            raise IndexError(f"no sample {index} of epoch {epoch}; an epoch has {len(self)}")
        numpy = extras.require("numpy", extra="train", purpose="reading cached views")
        file = self.file
        if self._mapped is None:
            shape = (self.clips * file.views, *file.shape)
            path = file.folder / TOKENS_NAME
            self._mapped = numpy.memmap(path, numpy.float16, mode="r", shape=shape)
        place, turn = divmod(index, self.pairs_per_clip)
        view = (epoch * self.pairs_per_clip + turn) % file.views
        tokens = torch.from_numpy(numpy.array(self._mapped[place * file.views + view]))
        forward = tokens[: file.frames]
        backward = tokens[file.frames :] if file.perturbed else forward[:-1]
        return CachedSample(forward, backward, seed_of(self._seed, self._kept[place], view))

    def collate(self, samples: Sequence[CachedSample]) -> Batch:
        """Stack samples into a batch of views."""
        forward, backward = (torch.stack(each) for each in list(zip(*samples, strict=True))[:2])
        seeds = torch.tensor([sample.seed for sample in samples], dtype=torch.int64)
        return Batch(seeds, views=Views(forward, backward, self.file.grid))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the memory map behind; every process has its own."""
        return {**self.__dict__, "_mapped": None}


class _Clip(NamedTuple):
    """All views of a clip to encode, (K, T, 3, S, S), or why there are none.

    A failure ends the run; raised, the loader would make a printed traceback of it.
    """

    name: str
    frames: Tensor | None = None
    seeds: Tensor | None = None
    problem: str = ""
    failure: Exception | None = None


class _Draws(Dataset[_Clip]):
    """Clips with all their views, decoded and cropped."""

    def __init__(self, pairs: TrainingPairs, views: int) -> None:
        self._pairs, self._views = pairs, views

    def __getitem__(self, clip: int) -> _Clip:
        name = self._pairs.corpus.videos[clip].name
        try:
            samples = self._pairs.draw(clip, range(self._views))
        except FrameError as error:
            return _Clip(name, problem=str(error) or "unreadable")
        except (CosettleError, OSError) as error:
            return _Clip(name, failure=error)
        batch = self._pairs.collate(samples)
        return _Clip(name, batch.frames, batch.seeds)


class _Encoder(NamedTuple):
    backbone: Backbone
    settings: ObjectiveSettings
    layers: list[int]
    norm: bool | None
    autocast: torch.dtype | None
    batch_size: int

    def encode(self, chunk: Sequence[_Clip]) -> list[Tensor]:
        """Encode the clips that could be read: tensors (B, images, N, C) float16."""
        frames = torch.cat([clip.frames for clip in chunk if clip.frames is not None])
        seeds = torch.cat([clip.seeds for clip in chunk if clip.seeds is not None])
        encoded = []
        device, half = self.backbone.device.type, self.autocast is not None
        with torch.inference_mode(), torch.autocast(device, self.autocast, enabled=half):
            for first in range(0, len(frames), self.batch_size):
                batch = slice(first, first + self.batch_size)
                offsets = draw_offsets(self.settings, seed=0, step=0, sample_seeds=seeds[batch])
                views = encode_views(
                    self.backbone,
                    frames[batch],
                    layers=self.layers,
                    norm=self.norm,
                    settings=self.settings,
                    offsets=offsets,
                )
                off = self.settings.pea == "off"
                tokens = views.forward if off else torch.cat([views.forward, views.backward], 1)
                encoded.append(self._halved(tokens).cpu().contiguous())
        return encoded

    def _halved(self, tokens: Tensor) -> Tensor:
        half = tokens.to(torch.float16)
        if bool(half.isfinite().all()):
            return half
        if not bool(tokens.isfinite().all()):
            raise TrainingError(
                f"the backbone makes NaN or infinite tokens in layers {self.layers}; encode in "
                "float32"
            )
        raise TrainingError(
            f"tokens of layers {self.layers} reach {float(tokens.abs().max()):.0f}, more than "
            "float16 holds; read other layers, apply the final norm, or train without cached views"
        )


def _write(
    file: ViewsFile,
    pairs: TrainingPairs,
    encoder: _Encoder,
    workers: int,
    on_sample: Callable[[int, int], None] | None,
) -> ViewsFile:
    """Encode what is missing in a folder."""
    file.folder.mkdir(parents=True, exist_ok=True)
    refusal = (
        f"another run is encoding views into {file.folder}: wait until it is done with them, "
        "or use another folder"
    )
    chunk_size = max(1, math.ceil(encoder.batch_size / file.views))
    with exclusive(file.folder, refusal=TrainingError(refusal)), contextlib.ExitStack() as opened:
        file = file.read()  # another run may just have continued
        decoded = _decoded(pairs, file, workers)
        with room_for_views(file):
            tokens = opened.enter_context((file.folder / TOKENS_NAME).open("ab"))
            tokens.truncate(file.written)  # what follows is half a chunk
            file.write_index()
        try:
            while file.done < file.clips:
                count = min(chunk_size, file.clips - file.done)
                file = _append(file, tokens, encoder, [next(decoded) for _ in range(count)])
                if on_sample is not None:
                    on_sample(file.done * file.views, file.clips * file.views)
        except KeyboardInterrupt as interruption:
            raise TrainingInterrupted(
                f"the views of {file.done} of {file.clips} clips are kept in {file.folder}; run "
                "the same again to continue"
            ) from interruption
    return file


def _decoded(pairs: TrainingPairs, file: ViewsFile, workers: int) -> Iterator[_Clip]:
    loader: DataLoader[_Clip] = DataLoader(
        _Draws(pairs, file.views),
        batch_size=None,
        sampler=range(file.done, file.clips),
        num_workers=workers,
        collate_fn=_itself,
        # the loader's own draw stays out of the global state
        generator=torch.Generator().manual_seed(0),
    )
    for clip in loader:
        if clip.failure is not None:
            raise clip.failure
        yield clip


def _itself(clip: Any) -> Any:
    return clip


def _append(
    file: ViewsFile, tokens: BinaryIO, encoder: _Encoder, chunk: Sequence[_Clip]
) -> ViewsFile:
    """Write a chunk, and only then record that it is there."""
    encoded = encoder.encode(chunk) if any(clip.frames is not None for clip in chunk) else []
    skipped = tuple((clip.name, clip.problem) for clip in chunk if clip.problem)
    advanced = dataclasses.replace(
        file, done=file.done + len(chunk), skipped=file.skipped + skipped
    )
    with room_for_views(file):
        for part in encoded:
            tokens.write(part.numpy().tobytes())
        tokens.flush()
        os.fsync(tokens.fileno())
        advanced.write_index()
    return advanced
