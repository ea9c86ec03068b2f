"""The folder that cached views lie in: their layout, and an index that tells how far it is."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cosettle_adapter import extras
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.files import atomic_path
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.objective import ObjectiveSettings
from cosettle_adapter.training.samples.dataset import Skipped, TrainingPairs

INDEX_NAME = "views.json"
TOKENS_NAME = "tokens.f16"

_FORMAT = "cosettle-views"
_VERSION = 1
_BYTES = 2  # of a float16


@dataclasses.dataclass(frozen=True)
class ViewsLayout:
    """How views lie in a file, and what they were made of.

    Attributes:
        clips: videos of the corpus.
        views: of each clip.
        frames: T, frames of a view.
        perturbed: whether the T - 1 frames with perturbed positions follow.
        grid: (h, w) of the tokens.
        channels: C of the tokens.
        layers: blocks that were read.
        chunk: clips that are written at a time.
        made_of: all that the tokens depend on, for telling folders apart.
    """

    clips: int
    views: int
    frames: int
    perturbed: bool
    grid: tuple[int, int]
    channels: int
    layers: tuple[int, ...]
    chunk: int
    made_of: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        pairs: TrainingPairs,
        backbone: Backbone,
        settings: ObjectiveSettings,
        *,
        layers: Sequence[int],
        norm: bool | None,
        views: int,
        autocast: torch.dtype | None,
        batch_size: int,
    ) -> ViewsLayout:
        """Plan the views of a corpus.

        Raises:
            ValueError: a number out of range, or no such layer.
            GeometryError: the size does not fit the backbone.
        """
        for name, value in (("views", views), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        blocks = tuple(backbone.block(layer) for layer in layers)
        perturbed = settings.pea != "off"
        made_of = {
            "backbone": backbone.row.name,
            "fingerprint": backbone.fingerprint,
            "stride": backbone.stride,
            "layers": list(blocks),
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
        return cls(
            clips=pairs.clips,
            views=views,
            frames=pairs.frames,
            perturbed=perturbed,
            grid=backbone.grid(pairs.size, pairs.size),
            channels=sum(backbone.widths[block] for block in blocks),
            layers=blocks,
            chunk=max(1, math.ceil(batch_size / views)),
            made_of=made_of,
        )

    @property
    def images(self) -> int:
        """Encoded images of a view."""
        return 2 * self.frames - 1 if self.perturbed else self.frames

    @property
    def clip_bytes(self) -> int:
        """Bytes of a clip's views."""
        cells = self.grid[0] * self.grid[1]
        return self.views * self.images * cells * self.channels * _BYTES

    @property
    def total_bytes(self) -> int:
        """Bytes of all views, if every video can be read."""
        return self.clips * self.clip_bytes


@dataclasses.dataclass(frozen=True)
class ViewsFile:
    """A folder of views, as far as it is written.

    Attributes:
        folder: where it is.
        layout: how views lie in it.
        done: clips that were dealt with, in the order of the corpus.
        skipped: those of them that could not be read, and why.
    """

    folder: Path
    layout: ViewsLayout
    done: int = 0
    skipped: Skipped = ()

    @classmethod
    def open(cls, folder: Path, layout: ViewsLayout) -> ViewsFile:
        """Read how far a folder is; one without an index is at its beginning.

        Raises:
            TrainingError: it holds other views, or is damaged.
        """
        path = folder / INDEX_NAME
        if not path.exists():
            return cls(folder, layout)
        remedy = f"use another folder, or delete {folder}"
        try:
            content = json.loads(path.read_text("utf-8"))
            made_of, done = dict(content["made_of"]), int(content["done"])
            skipped = tuple((str(name), str(problem)) for name, problem in content["skipped"])
            known = (content["format"], content["version"]) == (_FORMAT, _VERSION)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{path} cannot be read ({error}); {remedy}") from error
        if not known:
            raise TrainingError(f"{path} is no index of views that this version reads; {remedy}")
        _compare(folder, made_of, dict(layout.made_of), remedy)
        file = cls(folder, layout, done, skipped)
        tokens = folder / TOKENS_NAME
        there = tokens.stat().st_size if tokens.exists() else 0
        if there < file.bytes_written:
            raise TrainingError(
                f"{tokens} is damaged: it has {there} bytes, and its index says that "
                f"{file.bytes_written} were written; {remedy}"
            )
        return file

    @property
    def complete(self) -> bool:
        """Whether every clip was dealt with."""
        return self.done == self.layout.clips

    @property
    def bytes_written(self) -> int:
        """Bytes of tokens that count."""
        return (self.done - len(self.skipped)) * self.layout.clip_bytes

    def write_index(self) -> None:
        """Say how far the folder is, in one stroke."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "made_of": self.layout.made_of,
            "layout": "clip, view, image (frames, then those with perturbed positions), token, C",
            "grid": self.layout.grid,
            "channels": self.layout.channels,
            "clips": self.layout.clips,
            "done": self.done,
            "skipped": self.skipped,
        }
        with atomic_path(self.folder / INDEX_NAME) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")

    def map(self, clips: int) -> Any:
        """Map the tokens into memory: a read-only array (clips * views, images, N, C)."""
        numpy = extras.require("numpy", extra="train", purpose="reading cached views")
        layout = self.layout
        shape = (clips * layout.views, layout.images, math.prod(layout.grid), layout.channels)
        return numpy.memmap(self.folder / TOKENS_NAME, numpy.float16, mode="r", shape=shape)


def _compare(
    folder: Path, made_of: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str
) -> None:
    differing = [
        name
        for name in sorted({*made_of, *wanted})
        if made_of.get(name, "nothing") != wanted.get(name, "nothing")
    ]
    if not differing:
        return
    if differing == ["corpus"]:
        raise TrainingError(
            f"the views in {folder} were made from other videos: some were added, removed, "
            f"renamed or changed since; {remedy}"
        )
    told = ", ".join(
        f"{name} {_short(made_of.get(name))} (now {_short(wanted.get(name))})" for name in differing
    )
    raise TrainingError(f"the views in {folder} were made with {told}; {remedy}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
