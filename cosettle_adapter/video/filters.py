"""Deinterlacing and tone mapping of decoded frames with FFmpeg's filters."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from cosettle_adapter import imports
from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.selection import HDR, FrameSelection, LostFrames

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

_TONE_MAP = "out_transfer=bt709:out_primaries=bt709:intent=perceptual"  # of the filter "scale"

Items = Generator["tuple[Fraction, VideoFrame] | LostFrames", None, None]


def filtered(items: Items, select: FrameSelection) -> Items:
    """Filter frames as selected; their number, times and order do not change."""
    waiting: deque[tuple[Fraction, VideoFrame] | LostFrames] = deque()  # for output of the graph
    graph: Any = None
    kind = ""
    position = 0
    for item in items:
        if not isinstance(item, LostFrames):
            frame = item[1]
            if _kind(frame) != kind:
                yield from _finished(graph, waiting, at_end=True)
                graph, kind = _graph(frame, select), _kind(frame)
            frame.pts, frame.time_base = position, Fraction(1, 1000)  # containers' may not rise
            position += 1
            graph.push(frame)
        waiting.append(item)
        yield from _finished(graph, waiting)
    yield from _finished(graph, waiting, at_end=True)


def _finished(graph: Any, waiting: deque[Any], *, at_end: bool = False) -> Iterator[Any]:
    """Yield the frames that the graph has finished and the losses before them, in order."""
    if at_end and graph is not None:
        graph.push(None)
    while waiting:
        if isinstance(waiting[0], LostFrames):
            yield waiting.popleft()
            continue
        try:
            frame = graph.pull()
        except (BlockingIOError, EOFError):  # the graph needs another frame, or is empty
            return
        time, _ = waiting.popleft()
        yield time, frame


def _kind(frame: VideoFrame) -> str:
    """Return FFmpeg's description of a frame's size and colours."""
    size = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}"
    return f"{size}:colorspace={frame.colorspace}:range={frame.color_range}:time_base=1/1000"


def _graph(frame: VideoFrame, select: FrameSelection) -> Any:
    """Build the filters for frames of this size and colours."""
    av = imports.require("av.filter", extra="video", purpose="filtering videos")
    graph = av.Graph()
    nodes = [graph.add("buffer", _kind(frame))]
    if select.deinterlace:
        nodes.append(graph.add("bwdif", "mode=send_frame"))
    if select.tone_map and getattr(frame, "color_trc", HDR[0]) in HDR:
        try:
            nodes += [graph.add("scale", _TONE_MAP), graph.add("format", "rgb24")]
        except (LookupError, ValueError) as error:
            needs = "tone_map needs FFmpeg 8: install a newer PyAV, 'av>=16'"
            raise FrameError(f"{needs} ({error})") from error
    nodes.append(graph.add("buffersink"))
    graph.link_nodes(*nodes)
    graph.configure()
    return graph
