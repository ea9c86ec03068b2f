"""Whether what lies under an output's name is what a run was asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cosettle_adapter.extraction.errors import OutputExistsError
from cosettle_adapter.extraction.record import differences
from cosettle_adapter.extraction.sidecar import read_sidecar, sidecar_path

ANEW = "begin anew with --overwrite (overwrite=True), or give the output another name"


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What :func:`extract` wrote.

    Attributes:
        path: the feature file; its sidecar lies beside it, as ``PATH.json``.
        frames: number of frames in it.
        shape: ``(C, h, w)`` of one frame's features.
        truncated: why the source ended early, or ``None`` if it was read to its end.
        found: how many of the frames an earlier run had written; all, if it had finished.
    """

    path: Path
    frames: int
    shape: tuple[int, int, int]
    truncated: str | None = None
    found: int = 0


def find_finished(path: Path, record: Mapping[str, Any]) -> Extraction | None:
    """Return what lies under ``path`` if it is what a run was asked for, ``None`` if nothing is.

    Raises:
        OutputExistsError: something else is there.
    """
    if not path.exists():
        return None
    there = read_sidecar(path)
    if there is None:
        raise OutputExistsError(
            f"{path} is there already, without {sidecar_path(path).name} that tells what it is; "
            f"{ANEW}"
        )
    if record["source_identity"] is None:
        raise OutputExistsError(f"{path} is there already; {ANEW}")
    differing = differences({name: there.get(name) for name in record}, record, manner=False)
    if differing:
        raise OutputExistsError(f"{path} is there already: {listed(differing)}; {ANEW}")
    frames, channels, height, width = there["shape"]
    return Extraction(path, frames, (channels, height, width), there["truncated"], frames)


def check_recipe(path: Path, record: Mapping[str, Any]) -> None:
    """Refuse features by one recipe beside features of the same backbone by another.

    One neighbour of ``path`` that has a recipe is looked at, since all were let in by this.

    Raises:
        OutputExistsError: that neighbour's projection was fitted by another recipe.
    """
    ours = record["projection"]["recipe"]
    for sidecar in path.parent.glob("*.json") if ours is not None else ():
        there = read_sidecar(sidecar.with_suffix(""))
        if there is None or there.get("fingerprint") != record["fingerprint"]:
            continue
        theirs = there["projection"].get("recipe")
        if theirs not in (ours, None):
            raise OutputExistsError(
                f"{path.parent} holds features by recipe {theirs} ({sidecar.stem}), which cannot "
                f"be compared with those by recipe {ours} that {path.name} would hold: pin the "
                f"one by recipe={theirs}, or give another folder"
            )
        if theirs is not None:
            return


def listed(differing: Sequence[str]) -> str:
    """Name the first few of what differs."""
    return ", ".join(differing[:4]) + (", ..." if len(differing) > 4 else "")
