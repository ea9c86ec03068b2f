"""Opening a video's stream with PyAV (extra ``video``), and pixels from its decoded frames."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter import extras
from cosettle_adapter.errors import FrameError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# (a, b, c, d) of a display matrix
Turn = tuple[int, int, int, int]

# FFmpeg takes any text for a film of characters
_TEXT_CODECS = ("ansi", "bintext", "idf", "xbin")
_ATTACHED_PICTURE = 0x0400  # AV_DISPOSITION_ATTACHED_PIC: the cover of a song
_LOADERS = {".npy": "numpy.load", ".npz": "numpy.load", ".pt": "torch.load", ".pth": "torch.load"}


@dataclass(frozen=True)
class FileRange:
    """A file that lies inside another one, such as an uncompressed member of a tar archive.

    Attributes:
        path: the file it lies in.
        start: its first byte.
        size: its length in bytes.
        name: what it is called there.
    """

    path: Path
    start: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"

    @property
    def suffix(self) -> str:
        """The suffix of its name, ``.mp4``."""
        return PurePosixPath(self.name).suffix


VideoSource = Path | FileRange


@contextlib.contextmanager
def open_stream(source: VideoSource) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video and find the stream of its pictures.

    Args:
        source: a file, or where in a file it lies; nothing is copied out.

    Raises:
        FrameError: no such file, not a video, or one that cannot be decoded.
        MissingExtraError: PyAV or numpy is not installed.
    """
    purpose = "reading video files"
    av = extras.require("av", extra="video", purpose=purpose)
    extras.require("numpy", extra="video", purpose=purpose)
    hint = "it is no video, or its end, which holds the index, is missing"
    if source.suffix.lower() in _LOADERS:
        hint = f"load it with {_LOADERS[source.suffix.lower()]} and pass the frames"
    try:
        container = av.open(_url(source), metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        raise FrameError(f"{source} cannot be read as a video ({reason(error)}); {hint}") from error
    with container:
        streams = [
            stream
            for stream in container.streams.video
            if not int(getattr(stream, "disposition", 0) or 0) & _ATTACHED_PICTURE
        ]
        if not streams:
            kinds = ", ".join(stream.type for stream in container.streams) or "none"
            raise FrameError(f"{source} has no video stream (streams: {kinds})")
        if streams[0].codec_context is None:
            raise FrameError(f"{source} holds video that this FFmpeg cannot decode, or is damaged")
        if streams[0].codec_context.name in _TEXT_CODECS:
            raise FrameError(f"{source} cannot be read as a video (it looks like text); {hint}")
        try:
            yield container, streams[0]
        finally:
            # the decoder's threads come to rest while others may run: PyAV frees a decoder with
            # the interpreter locked, and a thread that is logging would wait for that lock
            streams[0].codec_context.flush_buffers()


def frame_pixels(frame: VideoFrame, turn: Turn) -> Tensor:
    """Convert a decoded frame to (3, H, W) uint8 RGB, upright."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    return rearrange(upright(pixels, turn), "h w c -> c h w")


def display_matrix(frame: VideoFrame) -> Turn:
    """Return how a frame is to be turned, which is the same for all frames of a file."""
    # a frame asked for its side data is kept alive, with its decoder, until garbage is collected,
    # so ask a small copy, and once a file
    thumbnail = frame.reformat(width=16, height=16, format="gray")
    matrix: Any = thumbnail.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    return a, b, c, d


def upright(pixels: Tensor, turn: Turn) -> Tensor:
    """Turn and mirror (H, W, C) pixels: x' = a x + c y, y' = b x + d y, nearest quarter turn."""
    a, b, c, d = turn
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = rearrange(pixels, "h w c -> w h c")
        a, d = c, b
    return pixels.flip([axis for axis, sign in ((0, d), (1, a)) if sign < 0])


def reason(error: BaseException) -> str:
    """Return an error's text without its number and file name."""
    return str(getattr(error, "strerror", None) or error)


def _url(source: VideoSource) -> str:
    # the prefix keeps a colon in a file's name from reading as a protocol
    if isinstance(source, Path):
        return f"file:{source}"
    end = source.start + source.size
    return f"subfile,,start,{source.start},end,{end},,:file:{source.path}"
