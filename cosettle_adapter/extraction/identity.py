"""Whether a source is still what it was, told without reading all of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosettle_adapter.video.files import resolve

_SAMPLES = 16
_SAMPLE_BYTES = 64 << 10


def source_name(source: Any) -> str:
    """Return what a source is called in a feature file."""
    if isinstance(source, (str, os.PathLike)):
        return Path(source).name
    return type(source).__name__


def identify(source: Any) -> str | None:
    """Return a hash by which a file, or images in files, are known again.

    It covers names, sizes and samples of the content, not times, so a copy is the same.

    Args:
        source: as for :func:`cosettle_adapter.video.open_frames`.

    Returns:
        ``sha256:...``; ``None`` for frames in memory and iterators.

    Raises:
        FrameError: no such file.
    """
    if isinstance(source, (str, os.PathLike)):
        found = resolve(source)
        return _hash([found] if isinstance(found, Path) else found)
    listed = isinstance(source, (list, tuple)) and len(source) > 0
    if listed and all(isinstance(item, (str, os.PathLike)) for item in source):
        return _hash([Path(item) for item in source])
    return None


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    sizes = [file.stat().st_size for file in files]
    for file, size in zip(files, sizes, strict=True):
        # a single file may be renamed; among several, names are the order
        digest.update(f"{file.name if len(files) > 1 else ''}\0{size}\n".encode())
    each = max(1, _SAMPLES // len(files))
    for index in sorted({len(files) * sample // _SAMPLES for sample in range(_SAMPLES)}):
        with files[index].open("rb") as content:
            for place in range(each):
                last = max(0, sizes[index] - _SAMPLE_BYTES)
                content.seek(last * place // max(1, each - 1))
                digest.update(content.read(_SAMPLE_BYTES))
    return f"sha256:{digest.hexdigest()}"
