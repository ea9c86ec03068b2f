"""A name for the output of each of many sources, that says which source it is of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from cosettle_adapter.extraction.sources import Source


def output_names(sources: Sequence[Source]) -> list[str]:
    """Name outputs after their sources, relative to the output folder and without a suffix.

    ``clip.mp4`` becomes ``clip``. Where that is taken, the source's suffix stays (``clip.mp4``),
    then the folders it lies in come before it (``morning/clip``), until names differ, also on
    disks that take ``A`` for ``a``. A name depends on the sources alone.

    Args:
        sources: all of them, each another one.
    """
    levels = [0] * len(sources)
    while True:
        names = [_name(*numbered, levels[numbered[0]]) for numbered in enumerate(sources)]
        counts = Counter(name.casefold() for name in names)
        taken = [index for index, name in enumerate(names) if counts[name.casefold()] > 1]
        if not taken:
            return names
        for index in taken:
            levels[index] += 1


def _name(index: int, source: Source, level: int) -> str:
    above, with_suffix = divmod(level, 2)
    name = source.name
    if source.kind == "video" and not with_suffix:
        name = name.with_suffix("")
    outside = source.location.parts[1 : -len(source.name.parts)]
    if above > len(outside):  # the very same path but for capital letters
        return f"{name}-{index + 1}"
    return str(PurePosixPath(*outside[len(outside) - above :], name))
