"""Encoding views into a folder, chunk by chunk, so that a stop costs no more than a chunk."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.errors import CosettleError, FrameError
from cosettle_adapter.locking import exclusive
from cosettle_adapter.training.encoding import encode_views
from cosettle_adapter.training.errors import DiskFullError, TrainingError, TrainingInterrupted
from cosettle_adapter.training.objective import ObjectiveSettings, draw_offsets
from cosettle_adapter.training.samples.dataset import TrainingPairs
from cosettle_adapter.training.samples.views_file import TOKENS_NAME, ViewsFile, ViewsLayout


@dataclasses.dataclass(frozen=True, eq=False)
class _Clip:
    """All views of a clip to encode, (K, T, 3, S, S), or why there are none.

    A failure ends the run; pickled by the loader it would become a printed traceback.
    """

    name: str
    frames: Tensor | None
    seeds: Tensor
    problem: str = ""
    failure: Exception | None = None


def write_views(
    file: ViewsFile,
    pairs: TrainingPairs,
    backbone: Backbone,
    settings: ObjectiveSettings,
    *,
    autocast: torch.dtype | None,
    batch_size: int,
    workers: int,
    on_sample: Callable[[int, int], None] | None,
) -> ViewsFile:
    """Encode what is missing in a folder; see :meth:`CachedViews.build`."""
    layout = file.layout
    if not file.complete:
        check_room(file)
        file.folder.mkdir(parents=True, exist_ok=True)
        refusal = (
            f"another run is encoding views into {file.folder}: wait until it is done with them, "
            "or use another folder"
        )
        with exclusive(file.folder, refusal=TrainingError(refusal)):
            file = ViewsFile.open(file.folder, layout)  # another run may just have gone on
            decoded = _decoded(pairs, layout.views, range(file.done, layout.clips), workers)
            with _tokens_file(file) as tokens:
                try:
                    for first in range(file.done, layout.clips, layout.chunk):
                        count = min(layout.chunk, layout.clips - first)
                        chunk = [next(decoded) for _ in range(count)]
                        encoded = _encode(chunk, backbone, settings, layout, autocast, batch_size)
                        file = _append(file, tokens, chunk, encoded)
                        if on_sample is not None:
                            on_sample(file.done * layout.views, layout.clips * layout.views)
                except KeyboardInterrupt as interruption:
                    raise TrainingInterrupted(
                        f"the views of {file.done} of {layout.clips} clips are kept in "
                        f"{file.folder}; run the same again to go on"
                    ) from interruption
    if len(file.skipped) == layout.clips:
        name, problem = file.skipped[0]
        raise FrameError(
            f"none of the {layout.clips} videos can be read; the first of them: {name} ({problem})"
        )
    return file


def _append(
    file: ViewsFile, tokens: BinaryIO, chunk: Sequence[_Clip], encoded: Sequence[Tensor]
) -> ViewsFile:
    """Write a chunk, and only then say that it is there."""
    skipped = tuple((clip.name, clip.problem) for clip in chunk if clip.problem)
    advanced = dataclasses.replace(
        file, done=file.done + len(chunk), skipped=file.skipped + skipped
    )
    with _told_if_full(file):
        for part in encoded:
            tokens.write(part.numpy().tobytes())
        tokens.flush()
        os.fsync(tokens.fileno())
        advanced.write_index()
    return advanced


def check_room(file: ViewsFile) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        DiskFullError: there is too little room for the views that are missing.
    """
    missing = (file.layout.clips - file.done) * file.layout.clip_bytes
    existing = file.folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise DiskFullError(
            f"{file.layout.views} views of {file.layout.clips - file.done} clips take "
            f"{_gigabytes(missing)}, and {existing} has {_gigabytes(free)} free; keep fewer views, "
            "use smaller frames, or another disk"
        )


class _Draws(Dataset[_Clip]):
    """Clips with all their views, decoded and cropped."""

    def __init__(self, pairs: TrainingPairs, views: int) -> None:
        self._pairs, self._views = pairs, views

    def __getitem__(self, clip: int) -> _Clip:
        name = self._pairs.corpus.videos[clip].name
        nothing = torch.empty(0, dtype=torch.int64)
        try:
            samples = self._pairs.draw_all(clip, range(self._views))
        except FrameError as error:
            return _Clip(name, None, nothing, str(error) or "unreadable")
        except (CosettleError, OSError) as error:
            return _Clip(name, None, nothing, failure=error)
        seeds = torch.tensor([sample.seed for sample in samples], dtype=torch.int64)
        return _Clip(name, torch.stack([sample.frames for sample in samples]), seeds)


def _itself(clip: Any) -> Any:
    return clip


def _decoded(
    pairs: TrainingPairs, views: int, clips: Sequence[int], workers: int
) -> Iterator[_Clip]:
    loader: DataLoader[_Clip] = DataLoader(
        _Draws(pairs, views),
        batch_size=None,
        sampler=clips,
        num_workers=workers,
        collate_fn=_itself,
        # the loader's own draw stays out of the global state
        generator=torch.Generator().manual_seed(0),
    )
    for clip in loader:
        if clip.failure is not None:
            raise clip.failure
        yield clip


def _encode(
    chunk: Sequence[_Clip],
    backbone: Backbone,
    settings: ObjectiveSettings,
    layout: ViewsLayout,
    autocast: torch.dtype | None,
    batch_size: int,
) -> list[Tensor]:
    """Encode the clips that could be read: tensors (B, images, N, C) float16."""
    read = [clip for clip in chunk if clip.frames is not None]
    if not read:
        return []
    frames = torch.cat([clip.frames for clip in read if clip.frames is not None])
    seeds = torch.cat([clip.seeds for clip in read])
    # a view outlives the step it is made in, so its offset cannot be the step's
    own = dataclasses.replace(settings, pea="sample") if layout.perturbed else settings
    kind = backbone.device.type
    encoded = []
    with torch.inference_mode(), torch.autocast(kind, autocast, enabled=autocast is not None):
        for first in range(0, len(frames), batch_size):
            batch = slice(first, first + batch_size)
            views = encode_views(
                backbone,
                frames[batch],
                layers=layout.layers,
                norm=layout.made_of["norm"],
                settings=own,
                offsets=draw_offsets(own, seed=0, step=0, sample_seeds=seeds[batch]),
            )
            images = [views.forward, views.backward] if layout.perturbed else [views.forward]
            tokens = torch.cat(images, dim=1)
            half = tokens.to(torch.float16)
            if not bool(half.isfinite().all()):
                _refuse_tokens(tokens, layout)
            encoded.append(half.cpu().contiguous())
    return encoded


def _refuse_tokens(tokens: Tensor, layout: ViewsLayout) -> None:
    if not bool(tokens.isfinite().all()):
        raise TrainingError(
            f"the backbone makes NaN or infinite tokens in blocks {list(layout.layers)}; encode "
            "in float32"
        )
    raise TrainingError(
        f"tokens of blocks {list(layout.layers)} reach {float(tokens.abs().max()):.0f}, more than "
        "float16 holds; read other blocks, apply the final norm, or train without cached views"
    )


@contextlib.contextmanager
def _tokens_file(file: ViewsFile) -> Iterator[BinaryIO]:
    """Open the tokens at the end of what counts; what follows it is half a chunk."""
    path = file.folder / TOKENS_NAME
    with _told_if_full(file):
        path.touch()
        file.write_index()
    with path.open("r+b") as tokens:
        tokens.truncate(file.bytes_written)
        tokens.seek(file.bytes_written)
        yield tokens


@contextlib.contextmanager
def _told_if_full(file: ViewsFile) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"no room is left in {file.folder} for the views; those of {file.done} of "
            f"{file.layout.clips} clips are kept. Make room for "
            f"{_gigabytes((file.layout.clips - file.done) * file.layout.clip_bytes)} and run the "
            "same again to go on"
        ) from error


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"
