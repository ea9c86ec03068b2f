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


def listed(differing: Sequence[str]) -> str:
    """Name the first few of what differs."""
    return ", ".join(differing[:4]) + (", ..." if len(differing) > 4 else "")
