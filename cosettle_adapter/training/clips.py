"""Folders of clips, and pairs of frames from them."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video import probe
from cosettle_adapter.video.files import VIDEO_SUFFIXES
from cosettle_adapter.video.reader import pending_frames

_FAR = 4.0  # seconds; about as much lies between a frame and its keyframe


def find_clips(folder: str | os.PathLike[str]) -> list[Path]:
    """Return every video file below a folder, in order of name; hidden files are left out.

    Raises:
        FrameError: no such folder, or no video in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FrameError(f"{root} is not a folder; clips are read from a folder of video files")
    clips = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
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
        FrameError: the clip cannot be read, or not to its end: after the pairs before that. Or a
            gap below 1.
    """
    if gap < 1:
        raise FrameError(f"the two frames of a pair must be at least 1 frame apart, got {gap}")
    info = probe(clip)
    seconds = info.frames / info.fps if info.frames and info.fps else 0.0
    reach = (gap + 1) / info.fps if info.fps else 0.0
    starts = sorted({max(seconds - reach, 0.0) * index / pairs for index in range(pairs)})
    while starts:
        # Nearer than that, reading on is quicker than decoding from a keyframe again.
        far = (n for n in range(1, len(starts)) if starts[n] - starts[n - 1] > _FAR)
        reading = next(far, len(starts))
        yield from _pairs_from(clip, deque(starts[:reading]), gap)
        starts = starts[reading:]


def _pairs_from(clip: Path, starts: deque[float], gap: int) -> Iterator[Tensor]:
    """Pairs that begin at each of ``starts``, in one reading."""
    begun: deque[tuple[int, Tensor]] = deque()
    with contextlib.closing(pending_frames(clip, starts[0])) as frames:
        for index, frame in enumerate(frames):
            while begun and begun[0][0] + gap == index:
                first, second = begun.popleft()[1], frame.load()
                if first.shape == second.shape:  # else the video changes its size between them
                    yield torch.stack([first, second])
            if not starts and not begun:
                return
            while starts and frame.time >= starts[0]:
                starts.popleft()
                begun.append((index, frame.load()))
