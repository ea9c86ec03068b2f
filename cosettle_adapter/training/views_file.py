"""The folder that cached views lie in: what they were made of, and how many of them count."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cosettle_adapter.files import atomic_path
from cosettle_adapter.training.data import Skipped
from cosettle_adapter.training.encoding import Grid
from cosettle_adapter.training.errors import DiskFullError, TrainingError

INDEX_NAME = "views.json"
TOKENS_NAME = "tokens.f16"

_INDEX = {"format": "cosettle-views", "version": 1}


@dataclasses.dataclass(frozen=True)
class ViewsFile:
    """A folder of views, as far as it is written.

    Attributes:
        folder: where it is.
        made_of: everything that the tokens depend on.
        clips: videos of the corpus.
        frames: T, frames of a view.
        grid: (h, w) of the tokens.
        channels: C of the tokens.
        done: clips that were dealt with, in the order of the corpus.
        skipped: those of them that could not be read, and why.
    """

    folder: Path
    made_of: Mapping[str, Any]
    clips: int
    frames: int
    grid: Grid
    channels: int
    done: int = 0
    skipped: Skipped = ()

    @property
    def perturbed(self) -> bool:
        """Whether the T - 1 frames with perturbed positions follow the T plain ones."""
        return bool(self.made_of["pea"] == "on")

    @property
    def views(self) -> int:
        """Views of each clip."""
        return int(self.made_of["views"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Images, tokens and channels of a view."""
        images = 2 * self.frames - 1 if self.perturbed else self.frames
        return images, math.prod(self.grid), self.channels

    def bytes_of(self, clips: int) -> int:
        """Bytes of the views of so many clips, in float16."""
        return clips * self.views * math.prod(self.shape) * 2

    @property
    def written(self) -> int:
        """Bytes of tokens that count."""
        return self.bytes_of(self.done - len(self.skipped))

    def read(self) -> ViewsFile:
        """Return the file with what its index says; one without an index is at its beginning.

        Raises:
            TrainingError: it holds other views, or is damaged.
        """
        path = self.folder / INDEX_NAME
        if not path.exists():
            return self
        remedy = f"use another folder, or delete {self.folder}"
        try:
            content = json.loads(path.read_text("utf-8"))
            known = {name: content[name] for name in _INDEX} == _INDEX
            made_of, done = dict(content["made_of"]), int(content["done"])
            skipped = tuple((str(name), str(problem)) for name, problem in content["skipped"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{path} cannot be read ({error!r}); {remedy}") from error
        if not known:
            raise TrainingError(f"{path} is no index of views that this version reads; {remedy}")
        differing = [
            name
            for name in sorted({*made_of, *self.made_of})
            if made_of.get(name, "nothing") != self.made_of.get(name, "nothing")
        ]
        if differing == ["corpus"]:
            raise TrainingError(
                f"the views in {self.folder} were made from other videos: some were added, "
                f"removed, renamed or changed since; {remedy}"
            )
        if differing:
            told = ", ".join(
                f"{n} {_short(made_of.get(n))} (now {_short(self.made_of.get(n))})"
                for n in differing
            )
            raise TrainingError(f"the views in {self.folder} were made with {told}; {remedy}")
        file = dataclasses.replace(self, done=done, skipped=skipped)
        tokens = self.folder / TOKENS_NAME
        size = tokens.stat().st_size if tokens.exists() else 0
        if size < file.written:
            raise TrainingError(
                f"{tokens} is damaged: it has {size} bytes, and its index says that "
                f"{file.written} were written; {remedy}"
            )
        return file

    def write_index(self) -> None:
        """Record how far the folder is, atomically."""
        content = {
            **_INDEX,
            "made_of": self.made_of,
            "layout": "clip, view, image (frames, then those with perturbed positions), token, C",
            "grid": self.grid,
            "channels": self.channels,
            "clips": self.clips,
            "done": self.done,
            "skipped": self.skipped,
        }
        with atomic_path(self.folder / INDEX_NAME) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")


def check_room(file: ViewsFile) -> None:
    """Refuse to begin what the disk cannot hold."""
    missing = file.bytes_of(file.clips - file.done)
    existing = file.folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise DiskFullError(
            f"{file.views} views of {file.clips - file.done} clips take {_gigabytes(missing)}, and "
            f"{existing} has {_gigabytes(free)} free; keep fewer views, use smaller frames, or "
            "another disk"
        )


@contextlib.contextmanager
def room_for_views(file: ViewsFile) -> Iterator[None]:
    """Raise :class:`DiskFullError` where the block runs out of space."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"no room is left in {file.folder} for the views; those of {file.done} of "
            f"{file.clips} clips are kept. Make room for "
            f"{_gigabytes(file.bytes_of(file.clips - file.done))} and run the same again to "
            "continue"
        ) from error


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
