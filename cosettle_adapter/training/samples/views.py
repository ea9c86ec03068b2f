"""Views kept on disk: a few of each clip, encoded once, for any number of epochs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cosettle_adapter import extras
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.training.encoding import Views
from cosettle_adapter.training.objective import ObjectiveSettings
from cosettle_adapter.training.samples.dataset import Skipped, TrainingPairs
from cosettle_adapter.training.samples.views_file import ViewsFile, ViewsLayout
from cosettle_adapter.training.samples.views_writing import write_views
from cosettle_adapter.training.seeds import seed_of


@dataclass(frozen=True, eq=False)
class CachedSample:
    """The encoded views of one cycle.

    Attributes:
        forward: (T, N, C) float16 tokens of the frames.
        backward: (T - 1, N, C) float16 tokens of all but the last, with perturbed positions.
        grid: (h, w), with N = h * w.
        seed: of whatever else is drawn for this sample.
    """

    forward: Tensor
    backward: Tensor
    grid: tuple[int, int]
    seed: int


@dataclass(frozen=True, eq=False)
class CachedBatch:
    """Samples stacked.

    Attributes:
        views: of the batch, float16, on the CPU.
        seeds: (B,) int64.
        skipped: always empty; :attr:`CachedViews.skipped` tells what was left out.
    """

    views: Views
    seeds: Tensor
    skipped: Skipped = ()


class CachedViews(Dataset[CachedSample]):
    """Encoded views of a corpus, read from disk in place of decoding and encoding.

    View ``k`` of a clip is encoded from what :class:`TrainingPairs` draws at that clip's ``k``-th
    turn, so that the two give the same samples until the views are used up; then they come round
    again. Positions are perturbed at a place of its own for each view, whether ``pea`` is
    ``sample`` or ``batch``. Videos that cannot be read are left out for good.

    Attributes:
        file: the folder and what it holds.
        pairs_per_clip: samples of each clip in an epoch.
        skipped: videos that could not be read, and why.
    """

    def __init__(self, file: ViewsFile, pairs: TrainingPairs) -> None:
        """Read ``file``, which :meth:`build` makes."""
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
        """Encode views into a folder, or go on where an earlier call was stopped.

        A folder that is complete is used as it is. What is written counts only once a whole chunk
        of clips is on disk, so that a killed process costs the chunk it was at. One process at a
        time may build a folder; any number may read a complete one.

        Args:
            folder: made if it is not there.
            pairs: what to encode.
            backbone: the frozen encoder.
            settings: of the objective; only how positions are perturbed matters here.
            layers: layers to read, concatenated along the channels.
            norm: apply the final norm, as in :meth:`Backbone.patch_tokens`.
            views: of each clip.
            autocast: dtype to encode in, if not the backbone's.
            batch_size: samples encoded at a time.
            workers: processes that decode; 0 decodes here.
            on_sample: called with the views done and their number.

        Raises:
            TrainingError: the folder holds other views (the message says what differs), is
                damaged, another process is building it, or the tokens do not fit float16.
            DiskFullError: there is not room for all views, which is found out before anything is
                encoded, or there is no more; whole chunks are kept.
            FrameError: no video can be read.
            TrainingInterrupted: Ctrl-C; whole chunks are kept.
        """
        layout = ViewsLayout.of(
            pairs, backbone, settings,
            layers=layers, norm=norm, views=views, autocast=autocast, batch_size=batch_size,
        )  # fmt: skip
        file = ViewsFile.open(Path(folder), layout)
        file = write_views(
            file, pairs, backbone, settings,
            autocast=autocast, batch_size=batch_size, workers=workers, on_sample=on_sample,
        )  # fmt: skip
        return cls(file, pairs)

    @property
    def clips(self) -> int:
        """Number of videos."""
        return len(self._kept)

    @cached_property
    def digest(self) -> str:
        """sha256 over what the views were made of and what was left out."""
        made = json.dumps([self.file.layout.made_of, self.file.skipped, self.pairs_per_clip])
        return hashlib.sha256(made.encode()).hexdigest()

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.clips * self.pairs_per_clip

    def name(self, index: int) -> str:
        """Return the name of the video that sample ``index`` was drawn from."""
        return self._names[index // self.pairs_per_clip]

    def __getitem__(self, key: tuple[int, int]) -> CachedSample:
        """Return the views of ``(epoch, index)``, both 0-based.

        Raises:
            IndexError: no such sample.
        """
        epoch, index = key
        if not 0 <= index < len(self) or epoch < 0:
            raise IndexError(f"no sample {index} of epoch {epoch}; an epoch has {len(self)}")
        place, turn = divmod(index, self.pairs_per_clip)
        layout = self.file.layout
        view = (epoch * self.pairs_per_clip + turn) % layout.views
        row = place * layout.views + view
        numpy = extras.require("numpy", extra="train", purpose="reading cached views")
        tokens = torch.from_numpy(numpy.array(self._rows()[row]))
        forward = tokens[: layout.frames]
        backward = tokens[layout.frames :] if layout.perturbed else forward[:-1]
        seed = seed_of(self._seed, self._kept[place], view)
        return CachedSample(forward, backward, layout.grid, seed)

    @staticmethod
    def collate(samples: Sequence[CachedSample]) -> CachedBatch:
        """Stack samples; what a ``DataLoader`` takes."""
        views = Views(
            torch.stack([sample.forward for sample in samples]),
            torch.stack([sample.backward for sample in samples]),
            samples[0].grid,
        )
        return CachedBatch(views, torch.tensor([sample.seed for sample in samples]))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapping behind; every process has its own."""
        return {**self.__dict__, "_mapped": None}

    def _rows(self) -> Any:
        if self._mapped is None:
            self._mapped = self.file.map(self.clips)
        return self._mapped
