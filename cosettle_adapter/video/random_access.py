"""Given frames of a video, each decoded from the keyframe before it."""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.video.decoder import Video, VideoSource, open_video, pyav, reason

if TYPE_CHECKING:
    from av.packet import Packet

# how many keyframes before the nearest one decoding begins, in turn; then at the file's start
_ATTEMPTS = (0, 1, None)


class _Index(NamedTuple):
    """Where frames and keyframes are: presentation times in ticks, in increasing order.

    In files that hold no times, or those of other frames, places are positions counted from 0, and
    there are no keyframes to begin at.
    """

    places: Sequence[int]
    keys: Sequence[int] = ()


def count_frames(source: VideoSource) -> int:
    """Count the frames of a video without decoding them; errors of :func:`read_frames`."""
    return len(_index(source).places)


def read_frames(source: VideoSource, indices: Sequence[int]) -> Tensor:
    """Decode given frames of a video and as few others as possible.

    Frame ``i`` is the one that decoding the whole file would deliver at position ``i``, also where
    frames are coded out of order or unevenly spaced. One thread decodes from the keyframe before
    each frame, or from the start of files without times.

    Returns (T, 3, H, W) uint8, upright, in the order of ``indices``, which may repeat.

    Raises:
        FrameError: not a video, no such frame, or a frame that cannot be decoded undamaged.
        TruncatedVideoError: it ends before the length its header promises.
    """
    index = _index(source)
    if not indices:
        raise FrameError(f"no frames of {source} were asked for; give at least one index")
    last = len(index.places) - 1
    outside = [number for number in indices if not 0 <= number <= last]
    if outside:
        raise FrameError(f"{source} has frames 0 to {last}, got index {outside[0]}")
    problem = ""
    for back in _ATTEMPTS if index.keys else (None,):

        def begin(number: int, back: int | None = back) -> int | None:
            """The keyframe where decoding begins for a frame; None: the start of the file."""
            if back is None:
                return None
            nearest = bisect.bisect_right(index.keys, index.places[number]) - 1
            return index.keys[max(0, nearest - back)]

        found: dict[int, Tensor] = {}
        try:
            with open_video(source, threads=False) as video:
                for key, group in itertools.groupby(sorted(set(indices)), begin):
                    found |= _decode(video, index, key, list(group))
            frames = [found[number] for number in indices]
            break
        except (FrameError, pyav().error.FFmpegError, OSError) as error:
            problem = reason(error)
    else:
        raise FrameError(f"{source} cannot be decoded where it should: {problem}")
    sizes = dict.fromkeys(f"{frame.shape[-2]} x {frame.shape[-1]}" for frame in frames)
    if len(sizes) > 1:
        raise FrameError(f"the frames of {source} are of several sizes: {', '.join(sizes)}")
    return torch.stack(frames)


def _decode(video: Video, index: _Index, key: int | None, numbers: list[int]) -> dict[int, Tensor]:
    """Decode increasing numbers from a keyframe, or the file's start, else FrameError."""
    wanted = {index.places[number]: number for number in numbers}
    found: dict[int, Tensor] = {}
    last, codec = index.places[numbers[-1]], video.stream.codec_context

    def spare(packet: Packet[Any]) -> None:
        """Leave out frames that are not wanted and that no other frame refers to."""
        needless = index.keys and packet.pts is not None and packet.pts not in wanted
        codec.skip_frame = "NONREF" if needless else "DEFAULT"

    if key is not None:
        video.seek(key)
    with contextlib.closing(video.frames(spare)) as decoded:
        for position, frame in enumerate(decoded):
            place = frame.pts if index.keys else position
            if place in wanted:
                number = wanted.pop(place)
                if frame.is_corrupt:
                    raise FrameError(f"frame {number} is damaged")
                found[number] = video.pixels(frame)
            if not wanted:
                return found
            if place is not None and place > last:
                break
    raise FrameError(f"decoding does not lead to frame {min(wanted.values())}")


def _index(source: VideoSource) -> _Index:
    """Find a video's frames in its packets, a hundred times faster than decoding them."""
    path = source if isinstance(source, Path) else source.path
    try:
        status = path.stat()
    except OSError as error:
        raise FrameError(f"{source} cannot be read ({reason(error)})") from error
    if not isinstance(source, Path) and source.start + source.size > status.st_size:
        message = f"{source} ends early: {path.name} ends before it does"
        raise TruncatedVideoError(message, frames_read=0)
    return _read_index(source, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _read_index(source: VideoSource, modified: int, size: int) -> _Index:
    del modified, size  # a file that changed is another key of the cache
    with open_video(source, threads=False) as video:
        try:
            packets = [
                (packet.is_keyframe, packet.is_discard, packet.pts, packet.dts, packet.duration)
                for packet in video.packets()
                if packet.size
            ]
        except (pyav().error.FFmpegError, OSError) as error:
            message = f"{source} breaks off ({reason(error)})"
            raise TruncatedVideoError(message, frames_read=0) from error
        # a recording may begin between keyframes, and what an edit list cuts away is not shown
        begun = list(itertools.dropwhile(lambda packet: not packet[0], packets)) or packets
        shown = [packet for packet in begun if not packet[1]]
        if not shown:
            raise FrameError(f"{source} has a video stream, but no frame in it")
        times = [time for _, _, time, *_ in shown if time is not None]
        timed = len(times) == len(shown)
        lasting = [(packet[4] or 0) * video.base or video.step for packet in shown]
        moments = [number * video.step for number in range(len(shown))]
        if timed:
            origin = min(times) if video.stream.start_time is None else video.stream.start_time
            moments = [(time - origin) * video.base for time in times]
        for moment, lasts in sorted(zip(moments, lasting, strict=True)):
            video.saw_frame(moment, lasts)
        video.check_complete(len(shown), from_start=True)
        # frames coded in another order than they are shown in, whose times do not say which
        reordered = getattr(video.stream.codec_context, "has_b_frames", False)
        if not timed or (reordered and all(packet[2] == packet[3] for packet in shown)):
            return _Index(range(len(shown)))
        keys = sorted(time for time, packet in zip(times, shown, strict=True) if packet[0])
        return _Index(sorted(set(times)), keys or [min(times)])
