"""Video files, decoded frame by frame with PyAV (extra ``video``), through damage."""

from __future__ import annotations

import contextlib
import itertools
import logging
import struct
from collections.abc import Container, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter import imports
from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.selection import HDR, FrameSelection, LostFrames, PendingFrame
from cosettle_adapter.video.sources import (
    Input,
    VideoSource,
    choose_stream,
    find_device,
    is_encrypted,
    open_container,
    opening_error,
    pyav,
    reason,
)
from cosettle_adapter.video.timeline import Timeline

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

Items = Generator["tuple[Fraction, VideoFrame] | LostFrames", None, None]

# how many seconds before a time to look for a keyframe, in turn, until one is found in time
_SEEK_MARGINS = (0, 2, 16)
_TEXT_CODECS = ("ansi", "bintext", "idf", "xbin")  # FFmpeg reads any text as a video of characters
_OUTPUT_CORRUPT = 0x0008  # AV_CODEC_FLAG_*: frames that the decoder patched up are delivered
_INTERLACED = (2, 3, 4, 5)  # AV_FIELD_*
_DEMUX_ERRORS = 100  # after which the rest of a file is skipped


@dataclass(frozen=True)
class SourceInfo:
    """Properties of a source that are cheap to read; ``None`` where unknown."""

    frames: int | None = None  # for a video, the number in its header
    height: int | None = None  # of the upright frames
    width: int | None = None
    fps: float | None = None  # of a video
    times_from: str = "position"  # or "container", or "frame rate" where a video stores no times
    offset: float = 0.0  # seconds of a container's clock at the first frame, where times are 0


class Video:
    """An open video: one stream of pictures, decoded in display order."""

    def __init__(
        self,
        source: VideoSource | Input,
        container: InputContainer,
        stream: VideoStream,
        select: FrameSelection,
        *,
        threads: bool,
    ) -> None:
        self.source, self.container, self.stream, self.select = source, container, stream, select
        self.timeline = Timeline(container, stream, select.source_fps)
        # without presentation times, frames must come out as their packets go in
        self.threads = threads and self.timeline.has_times
        self.needed: Container[Fraction] | None = None  # times of frames not to be left out
        self.concealed = 0  # frames whose damage the decoder concealed
        self.first_concealed = 0.0  # when the first of them is shown
        self._pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)  # width over height
        self.refusal = ""  # why the selected device does not decode it
        self._begun = False  # whether a frame was decoded that refers to another one
        # shared by all frames: each frame's own would compute its tables again
        self._reformatter = pyav().video.reformatter.VideoReformatter()
        self._turn: tuple[int, int, int, int] | None = None  # (a, b, c, d) of the display matrix

    def items(self) -> Items:
        """Decode to the end: frames with their times, and losses; may raise ThreadsDamaged."""
        timeline = self.timeline
        delayed: VideoFrame | None = None  # until the time of the next frame is known
        for packet in self._packets():
            time = timeline.expect(packet)
            if self.needed is not None:
                spare = time is not None and time - timeline.origin not in self.needed
                self.stream.codec_context.skip_frame = "NONREF" if spare else "DEFAULT"
            try:
                frames = self.stream.decode(packet)
            except pyav().error.FFmpegError as error:
                if timeline.latest is None and packet.size and not packet.is_keyframe:
                    continue  # a recording may begin between keyframes
                if timeline.latest is None and is_encrypted(self.source):
                    raise FrameError(f"{self.source} is encrypted; decrypt it first") from error
                if self.threads:
                    raise ThreadsDamaged from error
                timeline.note(reason(error))
                yield from timeline.undecoded(time)
                continue
            for frame in frames:
                leading = frame.is_corrupt and not frame.key_frame
                if leading and not timeline.damage and not self._begun:
                    continue  # it refers to frames before the first keyframe
                self._begun = self._begun or not (frame.key_frame or frame.is_corrupt)
                if delayed is not None:
                    yield from self._shown(delayed, frame)
                delayed = frame
        if delayed is not None:
            yield from self._shown(delayed, None)
        if not (isinstance(self.source, Input) and self.source.live):
            yield from timeline.lost_at_end()

    def _shown(
        self, frame: VideoFrame, following: VideoFrame | None
    ) -> Iterator[tuple[Fraction, VideoFrame] | LostFrames]:
        timeline = self.timeline
        shown = timeline.time_of(frame, following)
        if shown is None:
            return
        if frame.is_corrupt:
            timeline.note("the decoder concealed errors")
            self.first_concealed = self.first_concealed if self.concealed else float(shown)
            self.concealed += 1
        yield from timeline.lost_before(shown)
        timeline.advance(shown, frame)
        yield shown, frame

    def items_from(self, start: Fraction) -> Items:
        """Decode from a keyframe at or before a time, or raise :class:`NotSeekable`."""
        timeline = self.timeline
        if timeline.seekable and not timeline.started:
            with contextlib.closing(self.items()) as items:
                next(items, None)  # determines the origin of times
        for margin in _SEEK_MARGINS if timeline.seekable else ():
            place = max(start - margin, Fraction(0)) + timeline.origin
            try:
                ticks = int(place / timeline.base)
                self.container.seek(ticks, stream=self.stream, backward=True)
            except (pyav().error.FFmpegError, OSError, ZeroDivisionError):
                break  # not every container supports seeking
            self._begun = False
            timeline.jump()
            items = self.items()
            first = next(items, None)
            if isinstance(first, tuple) and first[0] <= start and first[1].pts is not None:
                yield from itertools.chain([first], items)
                return
            items.close()
        raise NotSeekable

    def _packets(self) -> Iterator[Packet[Any]]:
        """Yield the stream's packets without a truncated last one, then an empty packet."""
        may_be_cut = "mpegts" not in self.container.format.name  # a broadcast may be cut anywhere
        delayed: Packet[Any] | None = None  # a damaged one, dropped if it is the last
        last: Packet[Any] | None = None
        for _ in range(_DEMUX_ERRORS):
            try:
                for packet in self.container.demux():
                    self.timeline.skipped(packet)
                    if packet.stream.index != self.stream.index:
                        continue
                    at_end = not packet.size and packet.dts is None
                    if at_end and last is not None:
                        self._check_end(last)
                    last = packet
                    if delayed is not None:
                        if at_end and may_be_cut:
                            self.timeline.expect(delayed)
                            self.timeline.note("its last packet is cut off")
                        else:
                            yield delayed
                    delayed = packet if packet.is_corrupt and packet.size else None
                    if delayed is None and (packet.size or at_end):
                        yield packet
                return
            except (pyav().error.FFmpegError, OSError) as error:
                connection = OSError, pyav().error.ExitError, pyav().error.HTTPError
                if isinstance(error, connection) and isinstance(self.source, Input):
                    at = f"{float(self.timeline.latest or 0):g} s ({reason(error)})"
                    raise ConnectionError(f"{self.source} was interrupted at {at}") from None
                self.timeline.note(reason(error))

    def _check_end(self, last: Packet[Any]) -> None:
        """Raise an OSError if a URL holds more packets than were received, or does not respond."""
        # demuxers end without an error if FFmpeg cannot reconnect
        complete = 0 < self.stream.frames <= self.timeline.packets
        if not isinstance(self.source, Input) or not self.source.resumable or complete:
            return
        try:
            with open_container(self.source) as again:
                stream = again.streams[self.stream.index]
                if last.dts is not None:
                    again.seek(last.dts, stream=stream, backward=True)
                ends = [(p.dts or 0, p.size) for p in again.demux(stream) if p.size]
        except ValueError:  # invalid data: the file itself is damaged
            return
        except pyav().error.FFmpegError as error:
            raise OSError(reason(error)) from None
        if max(ends, default=(0, 0)) > (last.dts or 0, last.size):
            raise OSError("the sender paused for too long")

    def announce(self) -> None:
        """Warn of unusual properties; :class:`FrameError` if ``source_fps`` is not needed."""
        timeline, codec = self.timeline, self.stream.codec_context
        warnings = []
        if self.select.source_fps is not None and timeline.has_times:
            raise FrameError(f"{self.source} has times of its own; leave out source_fps")
        if self.select.source_fps is None and timeline.is_raw:
            rate = f"{float(1 / timeline.step):g}" if timeline.step else "no"
            warnings.append(f"it stores no times: {rate} frames/s is a guess; give source_fps")
        if self._pixel_aspect != 1 and not self.select.square_pixels:
            aspect = f"{self._pixel_aspect.numerator}:{self._pixel_aspect.denominator}"
            warnings.append(f"its pixels are not square but {aspect}; give square_pixels")
        interlaced = getattr(codec, "field_order", 0) in _INTERLACED  # unknown to older PyAV
        if interlaced and not self.select.deinterlace:
            warnings.append("its frames are interlaced and are read unchanged; give deinterlace")
        if getattr(codec, "color_trc", 0) in HDR and not self.select.tone_map:
            warnings.append("its colours are HDR (PQ or HLG) and are read unchanged; give tone_map")
        if self.refusal:
            warnings.append(f"decoded on the CPU: {self.refusal}")
        for warning in warnings:
            logger.warning("%s: %s", self.source, warning)

    def report(self) -> None:
        """Warn of frames whose damage the decoder concealed."""
        if self.concealed:
            message = "%s is damaged: the decoder concealed it in %d frames, from %g s on"
            logger.warning(message, self.source, self.concealed, self.first_concealed)

    def filtered(self, items: Items) -> Items:
        """Pass decoded frames through FFmpeg's filters as selected."""
        if not self.select.deinterlace and not self.select.tone_map:
            return items
        from cosettle_adapter.video.filters import filtered  # rarely used

        return filtered(items, self.select)

    def pending(self, time: Fraction, frame: VideoFrame) -> PendingFrame:
        """Return a decoded frame whose pixels are converted on request."""
        name = f"the frame at {float(time):g} s"
        return PendingFrame(time, name, partial(self.pixels, frame), frame.is_corrupt)

    def pixels(self, frame: VideoFrame) -> Tensor:
        """Convert a decoded frame to ``(3, H, W)`` uint8 RGB, upright by its display matrix."""
        if self._turn is None:
            # reading side data keeps a frame and its decoder alive until garbage collection, so
            # read that of a small copy, once per file
            thumbnail = frame.reformat(width=16, height=16, format="gray")
            matrix: Any = thumbnail.side_data.get("DISPLAYMATRIX")
            a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20]) if matrix else (1, 0, 0, 0, 1)
            self._turn = (a, b, c, d)
        width = round(frame.width * self._pixel_aspect) if self.select.square_pixels else None
        picture = self._reformatter.reformat(frame, width=width, format="rgb24")
        pixels = rearrange(torch.from_numpy(picture.to_ndarray()), "h w c -> c h w")
        a, b, c, d = self._turn  # x' = a x + c y, y' = b x + d y, rounded to a quarter turn
        if abs(b) + abs(c) > abs(a) + abs(d):
            pixels = rearrange(pixels, "c h w -> c w h")
            a, d = c, b
        mirrored = [axis for axis, factor in ((-1, a), (-2, d)) if factor < 0]
        return pixels.flip(mirrored) if mirrored else pixels


class ThreadsDamaged(Exception):  # noqa: N818  # handled in this module
    """Several threads met damage; only one thread, used next, shows which frames it affects."""


class NotSeekable(Exception):  # noqa: N818  # handled where videos are read
    """Decoding cannot begin at this time: decode from the start of the file."""


@contextlib.contextmanager
def open_video(
    source: VideoSource | Input, select: FrameSelection | None = None, *, threads: bool = True
) -> Iterator[Video]:
    """Open a video and choose its stream; :class:`FrameError` if that fails."""
    select = select or FrameSelection()
    av = pyav()
    imports.require("numpy", extra="video", purpose="reading video files")
    device, refusal = find_device(select.decode_on)
    try:
        container = open_container(source, device)
    except (av.error.FFmpegError, OSError) as error:
        raise opening_error(source, error) from None  # its text may hold the password of a URL
    with container:
        stream = choose_stream(source, container, select.stream_index)
        codec = stream.codec_context
        if codec is None:
            raise FrameError(f"{source} holds video that this FFmpeg cannot decode, or is damaged")
        if codec.name in _TEXT_CODECS:
            raise opening_error(source, ValueError("it looks like text"))
        codec.flags |= _OUTPUT_CORRUPT
        on_device = bool(getattr(codec, "is_hwaccel", False))
        video = Video(source, container, stream, select, threads=threads and not on_device)
        if select.decode_on is not None and not on_device:
            video.refusal = (
                f"{select.decode_on} cannot ({refusal or f'it does not decode {codec.name}'})"
            )
        stream.thread_type = "AUTO" if video.threads else "NONE"
        codec.thread_count = 0 if video.threads else 1
        try:
            yield video
        finally:
            # stop the decoder's threads while other threads can run: PyAV frees a decoder while it
            # holds the interpreter lock, for which a decoder thread that logs would wait
            codec.flush_buffers()


def decode_video(
    source: VideoSource | Input, select: FrameSelection | None = None, *, announce: bool = False
) -> Generator[PendingFrame | LostFrames, None, None]:
    """Return the frames of a video at the times at which they are shown.

    Times are seconds since the first frame, and may be unevenly spaced. Pixels become 8-bit RGB,
    upright by the display matrix; transparency is dropped. Frames before ``select.start`` may be
    left out, but nothing else is selected. Frames lost to damage are reported in their place.

    Raises:
        FrameError: at once if it is not a video; while reading, for a video without frames.
        ConnectionError: the connection to a URL broke.
    """
    frames = _decode(source, select or FrameSelection(), announce)
    next(frames)  # from here on, closing the generator closes the file
    return frames


def _decode(
    source: VideoSource | Input, select: FrameSelection, announce: bool
) -> Generator[PendingFrame | LostFrames, None, None]:
    """Yield a placeholder when the video is open, then its frames; decode again if needed."""
    start = Fraction(select.start or 0)
    done = 0  # items yielded
    once = isinstance(source, Input) and source.once
    opened, empty, seek, threads = False, True, start > 0 and not once, not once
    while True:
        with open_video(source, select, threads=threads) as video:
            if not opened:
                if announce:
                    video.announce()
                yield LostFrames((), "")
                opened = True
            items = video.items_from(start) if seek else video.items()
            try:
                with contextlib.closing(video.filtered(items)) as items:
                    for number, item in enumerate(items):
                        if number < done:
                            continue
                        done += 1
                        empty = empty and isinstance(item, LostFrames)
                        yield item if isinstance(item, LostFrames) else video.pending(*item)
            except ThreadsDamaged:
                threads = False
            except NotSeekable:
                seek = False
            else:
                break
            finally:
                if done:
                    video.report()
    if empty and once:
        raise opening_error(source, ValueError("no frame of it can be decoded"))
    if empty:
        raise FrameError(f"{source} has a video stream, but no frame of it can be decoded")
