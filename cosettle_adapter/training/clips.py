"""Folders of clips, and pairs of frames from them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.frames import open_frames, probe
from cosettle_adapter.frames.files import VIDEO_SUFFIXES


def find_clips(folder: str | os.PathLike[str]) -> list[Path]:
    """Return every video file below a folder, in order of name.

    Raises:
        FrameError: no such folder, or no video in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FrameError(f"{root} is not a folder; clips are read from a folder of video files")
    clips = sorted(path for path in root.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not clips:
        raise FrameError(f"no video files below {root} ({', '.join(VIDEO_SUFFIXES)})")
    return clips


def neighbouring_frames(clip: Path, *, pairs: int, gap: int) -> Iterator[Tensor]:
    """Yield pairs of frames ``gap`` frames apart, spread evenly over a clip.

    Args:
        clip: a video file.
        pairs: how many to take; a short clip gives fewer.
        gap: distance in frames.

    Yields:
        ``(2, 3, H, W)`` uint8.

    Raises:
        FrameError: the clip cannot be read.
    """
    info = probe(clip)
    seconds = info.frames / info.fps if info.frames and info.fps else 0.0
    reach = (gap + 1) / info.fps if info.fps else 0.0
    starts = [max(seconds - reach, 0.0) * index / pairs for index in range(pairs)]
    for start in sorted(set(starts)):
        chunks = open_frames(clip, start=start, every=gap, max_frames=2, chunk_size=2)
        frames = next(chunks).frames
        if len(frames) == 2:
            yield frames
