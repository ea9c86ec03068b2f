"""Read individual frames of a video, by their position in what sequential reading delivers."""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.decoder import NotSeekable, decode_video, open_video
from cosettle_adapter.video.selection import LostFrames
from cosettle_adapter.video.sources import FileRange, VideoSource, pyav, reason


class _Index(NamedTuple):
    """Times of frames in increasing order, and of keyframes.

    Without keyframes, frames can only be found by decoding the file from its start.
    """

    times: Sequence[Fraction]
    keys: Sequence[Fraction] = ()


def count_frames(source: VideoSource, *, verify: bool = True) -> int:
    """Count the frames that sequential reading delivers.

    The file is decoded once, and the number is cached while the file does not change. Without
    ``verify``, packets are counted where they have times, a hundred times faster; a damaged file
    may deliver fewer frames.

    Raises:
        FrameError: not a video, or a video without frames.
    """
    return len(_index(source, verify).times)


def read_frames(source: VideoSource, indices: Sequence[int], *, verify: bool = True) -> Tensor:
    """Decode individual frames of a video.

    Frame ``i`` is the one that sequential reading delivers at position ``i``, also in files whose
    frames are stored out of order, unevenly spaced or damaged. Decoding begins at the keyframe
    before each frame, or at the start of a file without usable keyframes; it uses one thread.

    Args:
        source: the video.
        indices: 0-based positions, in any order; they may repeat.
        verify: as in :func:`count_frames`.

    Returns:
        ``(T, 3, H, W)`` uint8, upright, in the order of ``indices``.

    Raises:
        FrameError: not a video, no such frame, frames of several sizes, or, without ``verify``, a
            frame that is damaged.
    """
    index = _index(source, verify)
    if not indices:
        raise FrameError(f"no frames of {source} were requested; give at least one index")
    last = len(index.times) - 1
    outside = [number for number in indices if not 0 <= number <= last]
    if outside:
        raise FrameError(f"{source} has frames 0 to {last}, got index {outside[0]}")
    wanted = sorted(set(indices))
    try:
        found = _from_keyframes(source, index, wanted) if index.keys else {}
    except NotSeekable:
        found = {}
    if len(found) < len(wanted):
        found = _from_start(source, wanted)
    if missing := [number for number in wanted if number not in found]:
        raise FrameError(f"frame {missing[0]} of {source} is damaged")
    sizes = dict.fromkeys(f"{frame.shape[-2]} x {frame.shape[-1]}" for frame in found.values())
    if len(sizes) > 1:
        raise FrameError(f"the frames of {source} are of several sizes: {', '.join(sizes)}")
    return torch.stack([found[number] for number in indices])


def _from_keyframes(source: VideoSource, index: _Index, wanted: Sequence[int]) -> dict[int, Tensor]:
    """Decode from the keyframe before each group of frames; fewer frames where this fails."""
    found: dict[int, Tensor] = {}
    number_at = {index.times[number]: number for number in wanted}

    def key_before(number: int) -> int:
        return max(0, bisect.bisect_right(index.keys, index.times[number]) - 1)

    with open_video(source, threads=False) as video:
        video.needed = number_at
        for key, group in itertools.groupby(wanted, key_before):
            numbers = list(group)
            # frames may refer to others before the keyframe that is shown before them
            for begin in dict.fromkeys((key, max(0, key - 1))):
                with contextlib.closing(video.items_from(index.keys[begin])) as items:
                    for item in items:
                        if isinstance(item, LostFrames) or item[0] > index.times[numbers[-1]]:
                            break
                        time, frame = item
                        if time in number_at and not frame.is_corrupt:
                            found[number_at[time]] = video.pixels(frame)
                        if time == index.times[numbers[-1]]:
                            break
                if all(number in found for number in numbers):
                    break
            else:
                return {}
    return found


def _from_start(source: VideoSource, wanted: Sequence[int]) -> dict[int, Tensor]:
    frames = (item for item in decode_video(source) if not isinstance(item, LostFrames))
    with contextlib.closing(frames):
        upto = enumerate(itertools.islice(frames, wanted[-1] + 1))
        return {number: frame.load() for number, frame in upto if number in set(wanted)}


def _index(source: VideoSource, verify: bool) -> _Index:
    path: Path = source if isinstance(source, Path) else source.path
    end = 0
    if isinstance(source, FileRange):
        end = source.start + source.size
    try:
        status = path.stat()
    except OSError as error:
        raise FrameError(f"{source} cannot be read ({reason(error)})") from error
    if end > status.st_size:
        raise FrameError(f"{source} is cut off: {path.name} ends before it does")
    return _read_index(source, verify, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _read_index(source: VideoSource, verify: bool, modified: int, size: int) -> _Index:
    del modified, size  # a file that changed is another key of the cache
    announced = _packet_index(source)
    if not verify and announced is not None:
        return announced
    delivered = []
    intact = True
    for item in decode_video(source):
        if isinstance(item, LostFrames):
            intact = False
        else:
            delivered.append(Fraction(item.exact))
            intact = intact and not item.concealed
    if announced is not None and intact and list(announced.times) == delivered:
        return announced
    return _Index(delivered)


def _packet_index(source: VideoSource) -> _Index | None:
    """Find frames and keyframes in a video's packets; ``None`` if these are incomplete."""
    with open_video(source, threads=False) as video:
        if not video.timeline.seekable:
            return None
        times: list[int] = []
        keys: list[int] = []
        try:
            for packet in video.container.demux(video.stream):
                if not packet.size or (packet.is_discard and packet.pts is not None):
                    continue
                if packet.pts is None or packet.is_corrupt or not (times or packet.is_keyframe):
                    return None
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
        except (pyav().error.FFmpegError, OSError):
            return None
        if not times or len(set(times)) < len(times) or min(times) < times[0]:
            return None
        return _Index(
            [(time - times[0]) * video.timeline.base for time in sorted(times)],
            [(time - times[0]) * video.timeline.base for time in keys],
        )
