"""The file that says which frame folders lie below it, so that nobody need look."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosettle_adapter.files import atomic_path

INDEX_NAME = "cosettle_corpus.json"

_FORMAT = "cosettle-corpus"
_VERSION = 1

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CorpusIndex:
    """What ``cosettle-adapter prepare`` leaves beside the folders it wrote.

    Attributes:
        settings: how the frames were extracted.
        frames: frames of each folder by its path below the index, with forward slashes.
        complete: whether all folders were written; before, the index only tells the settings.
    """

    settings: Mapping[str, Any]
    frames: Mapping[str, int] = dataclasses.field(default_factory=dict)
    complete: bool = False

    def write(self, folder: Path) -> None:
        """Write the index into ``folder``, or leave an earlier one untouched."""
        content = {"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(self)}
        with atomic_path(folder / INDEX_NAME) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")


def read_index(folder: Path) -> CorpusIndex | None:
    """Return the index in ``folder``, or None if there is none that can be used."""
    path = folder / INDEX_NAME
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != _FORMAT or content["version"] != _VERSION:
            raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
        frames = {str(name): int(count) for name, count in content["frames"].items()}
        return CorpusIndex(dict(content["settings"]), frames, bool(content["complete"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is ignored: %s", path, error)
        return None


def is_current(index: CorpusIndex, folder: Path) -> bool:
    """Tell whether the folders below ``folder`` are those of the index.

    Only the folders that hold them are listed, not the frames.
    """
    by_parent: defaultdict[str, set[str]] = defaultdict(set)
    for name in index.frames:
        *parents, leaf = name.split("/")
        by_parent["/".join(parents)].add(leaf)
        for depth in range(len(parents)):
            by_parent["/".join(parents[:depth])].add(parents[depth])
    for parent, leaves in by_parent.items():
        try:
            with os.scandir(folder / parent) as entries:
                there = {
                    entry.name
                    for entry in entries
                    if not entry.name.startswith(".") and entry.is_dir()
                }
        except OSError:
            return False
        if there != leaves:
            return False
    return True
