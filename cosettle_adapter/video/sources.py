"""Sources that FFmpeg opens: files, parts of files, URLs, pipes, devices and file objects."""

from __future__ import annotations

import functools
import http.client
import io
import logging
import os
import re
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosettle_adapter import imports
from cosettle_adapter.errors import FrameError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

_TIMEOUT = 15.0  # seconds without data after which a connection fails
_HEADER_BYTES = 1 << 20  # read at both ends of a file to find out whether it is encrypted
_ATTACHED_PICTURE, _DEFAULT = 0x0400, 0x0001  # AV_DISPOSITION_*: the cover of a song, the default
_LIVE = ("rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp")
_FFMPEG = ("ftp", "http", "https", "mmsh", *_LIVE)  # fsspec opens other schemes
_HTTP = {  # FFmpeg resumes a broken connection with a Range request
    "reconnect": "1",
    "reconnect_delay_max": "16",
    "rw_timeout": f"{_TIMEOUT * 1e6:.0f}",
}


@dataclass(frozen=True)
class FileRange:
    """A file that lies inside another one, such as an uncompressed member of a tar archive."""

    path: Path  # the enclosing file
    start: int  # its first byte
    size: int  # its length in bytes
    name: str  # its name in the enclosing file

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"


VideoSource = Path | FileRange


@dataclass(frozen=True, eq=False)
class Input:
    """A video that is not a file: a URL, a pipe, a device or an open file object."""

    name: str  # in messages, without passwords
    target: Any  # what PyAV opens
    files: Any = None  # the fsspec file system that opens the target, if any
    live: bool = False  # sends frames in real time
    once: bool = False  # can be read only once, and not from the start again
    opening: dict[str, Any] = field(default_factory=dict)  # keywords of ``av.open``

    def __str__(self) -> str:
        return self.name

    @property
    def resumable(self) -> bool:
        """Whether FFmpeg can request the rest after an interruption."""
        return self.files is None and "://" in str(self.target) and not (self.live or self.once)

    def version(self) -> str | None:
        """Return an identifier that changes with the content, ``None`` if the server has none."""
        try:
            if self.files is not None:
                return f"{self.name} {self.files.ukey(self.target)}"
            if str(self.target).startswith("http") and not self.live:
                # signed URLs allow GET only; the body is not read
                with urllib.request.urlopen(self.target, timeout=_TIMEOUT) as response:
                    tag = response.headers["ETag"] or response.headers["Last-Modified"]
                    return tag and f"{self.name} {tag} {response.headers['Content-Length']}"
        except (OSError, ValueError, http.client.HTTPException):
            pass
        return None


def as_input(source: Any) -> Input | None:
    """Return the input for a URL, ``-``, a camera's number or a file object, else ``None``."""
    if isinstance(source, Input):
        return source
    if isinstance(source, int) and not isinstance(source, bool):
        return _camera(source)
    if hasattr(source, "readable"):
        if isinstance(source, io.TextIOBase):
            raise FrameError("got a text file object; open the file with mode 'rb'")
        name = getattr(source, "name", None) or f"the {type(source).__name__}"
        return Input(str(name), source, once=not source.seekable())
    if not isinstance(source, (str, os.PathLike)):
        return None
    text = os.fspath(source)
    # the command line replaces "-" with /dev/stdin, which may be a file
    if text == "-" or (text == "/dev/stdin" and not Path(text).is_file()):
        return Input("standard input", "pipe:0", once=True)
    scheme, separator, _ = text.partition("://")
    if not separator or not re.fullmatch(r"[a-z][a-z0-9+.:-]+", scheme):
        if Path(text).is_char_device():
            return Input(text, text, live=True, opening={"format": "v4l2"})
        return Input(text, f"file:{text}", once=True) if Path(text).is_fifo() else None
    if scheme in _FFMPEG:
        timed = {"options": _HTTP} if scheme.startswith("http") else {"timeout": _TIMEOUT}
        return Input(without_secrets(text), text, live=scheme in _LIVE, opening=timed)
    fsspec = imports.require("fsspec.core", extra="fsspec", purpose=f"reading {scheme}:// URLs")
    try:
        files, place = fsspec.url_to_fs(text)
    except (ImportError, ValueError) as error:  # the package of a scheme, or no such scheme
        raise FrameError(f"{without_secrets(text)} cannot be opened ({error})") from error
    return Input(without_secrets(text), place, files=files)


def short_name(source: str | os.PathLike[str]) -> str:
    """Return the last part of a path or URL."""
    text = os.fspath(source)
    if text == "-":
        return "stdin"
    return Path(without_secrets(text)).name


def without_secrets(url: str) -> str:
    """Leave out a URL's user name and password, and its query, which may hold a signature."""
    return re.sub(r"(?<=://)[^/]*@|\?.*", "", url, flags=re.DOTALL) if "://" in url else url


@functools.cache
def find_device(name: str | None) -> tuple[Any, str]:
    """Return PyAV's context for decoding on a device, or ``None`` and the reason."""
    if name is None:
        return None, ""
    hardware = imports.require("av.codec.hwaccel", extra="video", purpose="decoding on a device")
    kind, _, number = name.partition(":")
    known = [device.name for device in hardware.HWDeviceType if device.value]
    if kind not in known:
        expected = f"one of {', '.join(known)}, or left out for the CPU"
        raise FrameError(f"decode_on must be {expected}, got {name!r}")
    device = hardware.HWAccel(kind, number or None, allow_software_fallback=True)
    try:
        device.create(pyav().Codec("h264", "r"))
    except pyav().error.FFmpegError as error:
        return None, reason(error)
    except NotImplementedError:  # the device may decode other codecs
        pass
    return device, ""


def open_container(source: VideoSource | Input, device: Any = None) -> Any:
    """Open a source with PyAV, or raise PyAV's error or an OSError."""
    options: dict[str, Any] = {"metadata_errors": "replace", "hwaccel": device}
    # the prefix keeps a colon in a name from reading as a protocol
    target: Any = f"file:{source}"
    if isinstance(source, FileRange):
        end = source.start + source.size
        target = f"subfile,,start,{source.start},end,{end},,:file:{source.path}"
    elif isinstance(source, Input):
        target = source.target
        if source.files is not None:
            try:
                target = source.files.open(target, "rb")
            except Exception as error:  # fsspec packages raise errors of any type
                raise OSError(reason(error)) from error
        elif hasattr(target, "seek") and not source.once:
            target.seek(0)
        options |= source.opening
    return pyav().open(target, **options)


def choose_stream(
    source: VideoSource | Input, container: InputContainer, index: int | None
) -> VideoStream:
    """Return the stream with this index; by default the file's default, else its largest one."""

    def disposition(stream: VideoStream) -> int:
        return int(getattr(stream, "disposition", 0) or 0)

    streams = [s for s in container.streams.video if not disposition(s) & _ATTACHED_PICTURE]
    kinds = ", ".join(f"{stream.index}: {stream.type}" for stream in container.streams) or "none"
    if index is not None:
        chosen = [stream for stream in streams if stream.index == index]
        if not chosen:
            raise FrameError(f"{source} has no video stream {index} (streams: {kinds})")
        return chosen[0]
    if not streams:
        raise FrameError(f"{source} has no video stream (streams: {kinds})")
    best = max(
        streams,
        key=lambda s: (disposition(s) & _DEFAULT, (s.width or 0) * (s.height or 0), -s.index),
    )
    if len(streams) > 1:
        others = ", ".join(str(stream.index) for stream in streams if stream is not best)
        message = "%s: reading video stream %d (%d x %d); others by stream_index: %s"
        logger.info(message, source, best.index, best.height, best.width, others)
    return best


def opening_error(source: VideoSource | Input, error: BaseException) -> FrameError:
    """Return the error for a source that cannot be opened, with a hint."""
    hint = "it is not a video, or its end, which holds the index, is missing"
    if str(source).lower().endswith((".npy", ".npz", ".pt", ".pth")):
        hint = "load it with numpy.load or torch.load and pass the frames"
    elif isinstance(source, Input) and not isinstance(error, ValueError):  # not invalid data
        hint = "check the name, whether the sender is running, and whether you may read it"
    elif isinstance(source, Input) and source.once:
        hint = "it may be empty; a pipe needs a format without an index at its end, such as MPEG-TS"
    return FrameError(f"{source} cannot be read as a video ({reason(error)}); {hint}")


def is_encrypted(source: VideoSource | Input) -> bool:
    """Whether an MP4 file declares its pictures encrypted, which PyAV does not report."""
    if isinstance(source, Input):
        return False
    if isinstance(source, Path):
        source = FileRange(source, 0, source.stat().st_size, source.name)
    length = min(source.size, _HEADER_BYTES)
    with source.path.open("rb") as file:
        for offset in (0, source.size - length):  # where indexes are
            file.seek(source.start + offset)
            header = file.read(length)
            if b"encv" in header and b"sinf" in header:
                return True
    return False


def reason(error: BaseException) -> str:
    """Return an error's text without its number and file name."""
    return str(getattr(error, "strerror", None) or error)


def pyav() -> Any:
    """Import PyAV, or say which extra brings it."""
    return imports.require("av", extra="video", purpose="reading video files")


def _camera(number: int) -> Input:
    name = f"camera {number}"
    if sys.platform == "darwin":
        opening = {"format": "avfoundation", "options": {"framerate": "30"}}
        return Input(name, str(number), live=True, opening=opening)
    if sys.platform == "win32":
        device = imports.require("av.device", extra="video", purpose="listing cameras")
        cameras = [d.name for d in device.enumerate_input_devices("dshow")
                   if "video" in d.media_types]  # fmt: skip
        if not 0 <= number < len(cameras):
            raise FrameError(f"there is no {name}; cameras: {', '.join(cameras) or 'none'}")
        return Input(name, f"video={cameras[number]}", live=True, opening={"format": "dshow"})
    return Input(name, f"/dev/video{number}", live=True, opening={"format": "v4l2"})
