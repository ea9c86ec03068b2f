"""Text files that list videos, one a line, in the dialects that people have."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from cosettle_adapter.errors import FrameError

LIST_SUFFIXES = (".csv", ".lst", ".txt", ".tsv")

_COLUMN_NAMES = {"file", "filename", "name", "path", "video", "video_path"}
_TRIED = 1000
_SHOWN = 80  # characters


def _whole(line: str) -> str:
    return line


def _first_of_csv(line: str) -> str:
    try:
        return next(csv.reader([line], skipinitialspace=True), [""])[0]
    except csv.Error:
        return ""


def _first_of_tabs(line: str) -> str:
    return line.partition("\t")[0]


def _before_last_space(line: str) -> str:
    return line.rsplit(maxsplit=1)[0]


def _before_last_two(line: str) -> str:
    return line.rsplit(maxsplit=2)[0]


_DIALECTS: tuple[Callable[[str], str], ...] = (
    _whole,
    _first_of_csv,
    _first_of_tabs,
    _before_last_space,
    _before_last_two,
)


def read_list(path: Path) -> list[str]:
    """Read which videos a file lists.

    A line is a path, alone or followed by a label, a number of frames or both, after a comma, a
    tab or a space. Paths are relative to the file's folder, or else to the working folder. Which
    of these holds is found out with the first path that exists, and taken to hold for all lines:
    nothing else is looked up. Empty lines, lines that begin with ``#``, and a line of column names
    at the top are left out.

    Args:
        path: the file, UTF-8.

    Returns:
        Absolute paths in the order of the file.

    Raises:
        FrameError: the file cannot be read, is empty, or none of its first paths exists.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FrameError(f"{path} cannot be read as a list of videos: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise FrameError(f"{path} lists no videos: it has no line with a path")
    dialect, base = _find_dialect(path, lines)
    if dialect(lines[0]).lower() in _COLUMN_NAMES:
        lines = lines[1:]
    return [_absolute(base, dialect(line)) for line in lines]


def _absolute(base: Path, name: str) -> str:
    name = os.path.expanduser(name) if name.startswith("~") else name  # noqa: PTH111
    return os.path.normpath(os.path.join(base, name))  # noqa: PTH118  # Path takes five times as long


def _find_dialect(path: Path, lines: list[str]) -> tuple[Callable[[str], str], Path]:
    bases = [path.parent.absolute()]
    if Path.cwd() != bases[0]:
        bases.append(Path.cwd())
    for dialect, base, name in _readings(lines[:_TRIED], bases):
        if name and os.path.exists(_absolute(base, name)):  # noqa: PTH110
            return dialect, base
    shown = lines[min(1, len(lines) - 1)]
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    places = " or ".join(str(base) for base in bases)
    raise FrameError(
        f"{path} lists {len(lines)} videos, but none of the first {min(_TRIED, len(lines))} lines "
        f"names a file or folder below {places}; the lines look like {shown!r}, expected a path "
        "and perhaps a label after a comma or a space"
    )


def _readings(
    lines: list[str], bases: list[Path]
) -> Iterator[tuple[Callable[[str], str], Path, str]]:
    for line in lines:
        for base, dialect in itertools.product(bases, _DIALECTS):
            yield dialect, base, dialect(line)
