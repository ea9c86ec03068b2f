"""DINO-Tracker's two config files, of which only what must change is changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cosettle_adapter.dino_tracker.cells import FRAME, PATCH
from cosettle_adapter.dino_tracker.errors import DinoTrackerError

_SIZE = {"video_resh": str(FRAME[0]), "video_resw": str(FRAME[1])}


@dataclass(frozen=True)
class Config:
    """One of its config files, as it has to be for our features.

    Attributes:
        original: the file in the checkout.
        text: what it has to say.
        changed: whether that differs from the file.
    """

    original: Path
    text: str
    changed: bool

    def path(self, folder: Path) -> Path:
        """The file to give DINO-Tracker: the checkout's own, or one in ``folder``."""
        return folder / "config" / self.original.name if self.changed else self.original

    def write(self, folder: Path) -> None:
        """Write it into ``folder`` if the checkout's does not do."""
        if self.changed:
            path = self.path(folder)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(self.text.encode())

    def value(self, key: str) -> str:
        """Return the value of a top-level key, as it is written.

        Raises:
            DinoTrackerError: no such key, or more than one.
        """
        return _line(self.text, key, self.original)["value"]


def preprocessing_config(repo: Path, stride: int) -> Config:
    """Return ``config/preprocessing.yaml`` for features at ``stride``."""
    return _with(repo / "config" / "preprocessing.yaml", {**_SIZE, "dino_stride": str(stride)})


def training_config(repo: Path, stride: int) -> Config:
    """Return ``config/train.yaml`` for features at ``stride``."""
    values = {**_SIZE, "stride": str(stride), "dino_patch_size": str(PATCH)}
    return _with(repo / "config" / "train.yaml", values)


def _with(path: Path, values: Mapping[str, str]) -> Config:
    """Put values in their places; comments, order and everything else stay byte for byte."""
    original = text = path.read_bytes().decode()
    for key, value in values.items():
        begin, end = _line(text, key, path).span("value")
        text = text[:begin] + value + text[end:]
    return Config(path, text, changed=text != original)


def _line(text: str, key: str, path: Path) -> re.Match[str]:
    pattern = rf"^{re.escape(key)}[ \t]*:[ \t]*(?P<value>[^\s#]+)[ \t]*(?:#.*)?\r?$"
    found = list(re.finditer(pattern, text, flags=re.MULTILINE))
    if len(found) != 1:
        raise DinoTrackerError(
            f"{path} has {len(found)} lines '{key}: ...' in place of one; it is not the config "
            "of the DINO-Tracker known here (November 2024)"
        )
    return found[0]
