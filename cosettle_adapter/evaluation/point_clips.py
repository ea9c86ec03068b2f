"""TAP-Vid: videos with tracked points, published as pickles, which are read without executing them.

A pickle is a program: it names functions, and unpickling calls them. This unpickler knows only the
names that NumPy writes for an array, and refuses all others before it calls anything. It replaces
NumPy's functions by ones that only record shape, type and bytes; arrays are built from these
records afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.adapter import CoSettleAdapter, Size
from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.evaluation.clips import Clip, entries, found_in, list_clips
from cosettle_adapter.evaluation.points import (
    QueryMode,
    queries_first,
    queries_strided,
    tapvid_metrics,
    track_queries,
)
from cosettle_adapter.evaluation.run import ClipScores, Protocol, save_positions
from cosettle_adapter.imports import require
from cosettle_adapter.video.geometry import Geometry

TAPVID = "a pickle of TAP-Vid (tapvid_davis.pkl, 0000_of_0010.pkl, ...) or a folder of them"
_RASTER = 256  # side in pixels of the square frame in which the measures are defined
_KEYS = ("video", "points", "occluded")
# numbers, booleans, fixed-length byte and text strings, and objects, which must be bytes
_TYPES = re.compile(r"b1|[iu][1248]|f[248]|[SU][1-9][0-9]{0,8}|O8?")


@dataclasses.dataclass(frozen=True)
class PointProtocol:
    """All settings of a point-tracking evaluation besides features, data and queries.

    Attributes:
        source: code or paper that the values are from.
        raster: side in pixels of the square to which frames are first reduced (Lanczos), and then
            resized (bilinear); None resizes them directly (bicubic).
        size: (height, width) of the encoded frames; None for a shorter side of 480.
        radius_argmax, temperature, unit_queries: as in
            :func:`~cosettle_adapter.correspondence.track_points`.
        hidden: cycle error in patches above which a point counts as hidden.
    """

    source: str
    raster: int | None = None
    size: tuple[int, int] | None = None
    radius_argmax: float = 2.0
    temperature: float = 0.05
    unit_queries: bool = True
    hidden: float = 2.0

    def preprocess(self, adapter: CoSettleAdapter, frames: Tensor, *, size: Size) -> Tensor:
        """Resize and normalise frames ``(T, 3, H, W)`` uint8 for the backbone."""
        if self.raster is not None:
            image: Any = require("PIL.Image", extra="eval", purpose="resizing frames")
            sides, rule = (self.raster, self.raster), image.Resampling.LANCZOS
            pictures = map(image.fromarray, rearrange(frames, "t c h w -> t h w c").cpu().numpy())
            reduced = np.stack([np.asarray(picture.resize(sides, rule)) for picture in pictures])
            images = rearrange(torch.from_numpy(reduced), "t h w c -> t c h w").float() / 255
            frames = F.interpolate(images, size, mode="bilinear")
        return adapter.preprocess(frames, size=size)


PointProtocolName = Literal["best", "chrono"]
POINT_PROTOCOLS: dict[PointProtocolName, PointProtocol] = {
    "best": PointProtocol("this package"),
    # Chrono's code: a radius below 5, an inverse temperature of 20
    "chrono": PointProtocol(
        "positions as in Chrono (arXiv 2501.12218): compare delta_avg only; its OA and AJ use "
        "occlusion that is learned from labels",
        raster=_RASTER, size=(896, 896), radius_argmax=4.5, temperature=1 / 20, unit_queries=False,
    ),
}  # fmt: skip


class Tracks(NamedTuple):
    """Annotated tracks of a video."""

    points: NDArray[np.float64]  # (N, T, 2) (x, y) as shares of the frame's width and height
    occluded: NDArray[np.bool_]  # (N, T); where true, the point is undefined


def tapvid_clips(path: str | Path, *, clips: Sequence[str] | None = None) -> list[Clip[Tracks]]:
    """List the videos of a pickle of TAP-Vid, or of all pickles in a folder.

    A file is a dict of videos by name or a list of videos, each with ``video`` (uint8 frames or
    JPEG files), ``points`` and ``occluded``. It is read without being executed: anything but
    arrays, strings and numbers is refused. At most two pickles are in memory at a time.
    """
    path = Path(path).expanduser()
    if not path.exists():
        near = did_you_mean(path.name, entries(path.parent))
        raise FrameError(f"{path} does not exist, expected {TAPVID}.{near}")
    files = [path] if path.is_file() else sorted(path.glob("[!.]*.pkl"))
    if not files:
        raise FrameError(f"{path} holds no .pkl, expected {TAPVID}; found {found_in(path)}")
    videos = functools.lru_cache(maxsize=1)(_videos)
    file_of = {name: file for file in files for name in videos(file)}

    @functools.lru_cache(maxsize=1)
    def content(name: str) -> tuple[list[Any], Tracks]:
        file = file_of[name]
        try:
            return _content(videos(file)[name])
        except FrameError as error:
            raise FrameError(f"{file}: {error}") from error

    def clip(name: str) -> Clip[Tracks]:
        def frame(index: int) -> Any:
            return content(name)[0][index]

        def annotations() -> Tracks:
            return content(name)[1]

        frames = [functools.partial(frame, index) for index in range(len(content(name)[0]))]
        parts = (*frames, lambda: annotations().points, lambda: annotations().occluded)
        return Clip(name, frames, annotations, inputs=parts)

    return list_clips("TAP-Vid video", path, file_of, clips, clip)


def tapvid_protocol(
    data: Path,
    *,
    clips: Sequence[str] | None = None,
    mode: QueryMode = "first",
    protocol: PointProtocolName = "best",
) -> Protocol[Tracks]:
    """Return the benchmark on TAP-Vid: points are tracked to their nearest neighbours.

    ``protocol`` is one of :data:`POINT_PROTOCOLS`.
    """
    record = POINT_PROTOCOLS[protocol]
    tracking = ("radius_argmax", "temperature", "unit_queries")
    options: dict[str, Any] = {name: getattr(record, name) for name in tracking}

    def size(clip: Clip[Tracks]) -> tuple[int, int]:
        if record.size is not None:
            return record.size
        height, width = clip.read_frame(0).shape[:2]
        return round(480 * height / min(height, width)), round(480 * width / min(height, width))

    def score(
        clip: Clip[Tracks], features: Tensor, geometry: Geometry, predictions: Path | None
    ) -> ClipScores:
        """Track every query and score it on a 256 x 256 raster."""
        truth = clip.read_annotations()
        sample = queries_first if mode == "first" else queries_strided
        queries = sample(truth.occluded, truth.points * _RASTER)
        height, width = geometry.frame
        to_frame = torch.tensor([width, height], dtype=torch.float64) / _RASTER
        points = torch.from_numpy(queries.points)
        places = points[:, 1:].flip(-1) * to_frame
        xy, error = track_queries(features, points[:, 0], places, geometry, **options)
        save_positions(xy.numpy(), predictions)
        guess, hidden = (xy / to_frame).numpy(), (error > record.hidden).numpy()
        result = tapvid_metrics(
            queries.points, queries.occluded, queries.tracks, hidden, guess, mode
        )
        shares = (result.delta_avg, result.occlusion_accuracy, result.average_jaccard)
        return ClipScores(dict(zip(measures, shares, strict=True)))

    measures = ("delta_avg", "OA", "AJ")
    shown = record.size or "shorter side 480"
    settings = {"protocol": protocol, "mode": mode, **vars(record), "size": shown}

    return Protocol(
        "tapvid", measures, lambda: tapvid_clips(data, clips=clips), size, score, settings,
        preprocess=record.preprocess,
    )  # fmt: skip


def _videos(path: Path) -> dict[str, Any]:
    content = _loaded(path)
    if isinstance(content, (list, tuple)):
        return {f"{path.stem}_{index:04d}": entry for index, entry in enumerate(content)}
    if not isinstance(content, Mapping):
        raise FrameError(f"{path} holds a {type(content).__name__}, expected {TAPVID}")
    if content.keys() >= set(_KEYS):
        raise FrameError(f"{path} holds a single video, expected a dict or a list of videos")
    return {str(name): entry for name, entry in content.items()}


def _content(entry: Any) -> tuple[list[Any], Tracks]:
    """Return the frames of a video, arrays or JPEG files, and its tracks."""
    if not isinstance(entry, Mapping) or not set(_KEYS) <= set(entry):
        content = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
        raise FrameError(f"got {content}, expected {', '.join(_KEYS)}")
    try:
        video, points, occluded = (_array(entry[key]) for key in _KEYS)
    except (TypeError, ValueError) as error:
        raise FrameError(f"invalid array: {error}") from error
    points, occluded = np.asarray(points), np.asarray(occluded)
    if isinstance(video, np.ndarray) and video.dtype.kind == "S":
        video = video.tolist()
    if isinstance(video, np.ndarray):
        frames = list(video) if video.dtype == np.uint8 and video.shape[3:] == (3,) else []
    else:
        jpegs = isinstance(video, (list, tuple)) and all(isinstance(f, bytes) for f in video)
        frames = list(video) if jpegs else []
    if not frames:
        raise FrameError("got no frames, expected uint8 (T, H, W, 3) or T JPEG files")
    if (
        points.dtype.kind not in "fiu"
        or points.shape[1:] != (len(frames), 2)
        or occluded.shape != points.shape[:2]
        or not np.isin(occluded, (0, 1)).all()
    ):
        raise FrameError(
            f"got points of shape {points.shape} and occlusion of shape {occluded.shape}, "
            f"expected numbers (N, {len(frames)}, 2) and booleans (N, {len(frames)})"
        )
    return frames, Tracks(points.astype(np.float64), occluded.astype(bool))


def _loaded(path: Path) -> Any:
    """Read a pickle without executing it; its arrays are returned as :class:`_Array` records."""
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except FrameError as error:
        raise FrameError(
            f"{path} was not loaded: it {error}, but a pickle of annotations holds only arrays, "
            "strings and numbers; do not trust it, and download the data set again from its authors"
        ) from error
    except Exception as error:  # damaged bytes can fail in any way
        raise FrameError(
            f"{path} cannot be read as a pickle of arrays: {type(error).__name__}: {error}"
        ) from error


class _Type:
    """Record of an array's type."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _TYPES.fullmatch(code):
            raise FrameError(f"has an array of type {code!r}")
        self.code: str = code
        self.order: Any = "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """Record of an array; a pickle passes its content to the constructor or sets it later."""

    def __init__(self, *content: Any) -> None:
        self.content = content  # type, bytes, shape, order

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        self.content = (kind, data, shape, "F" if fortran else "C")


class _Unpickler(pickle.Unpickler):
    """Resolves only the names that NumPy's arrays need."""

    def find_class(self, module: str, name: str) -> Any:
        # new functions for every call, because a pickle can set attributes of a function
        known = {
            "numpy.ndarray": None,  # an argument of _reconstruct, which ignores it
            "numpy.dtype": lambda *args: _Type(*args),
            "_codecs.encode": lambda text, _: str(text).encode("latin-1"),
            "__builtin__.bytes": lambda: b"",  # empty bytes in old protocols
            "numpy._core.multiarray._reconstruct": lambda *_: _Array(),
            "numpy._core.multiarray.scalar": lambda *_: None,  # no annotation is a scalar
            "numpy._core.numeric._frombuffer": lambda data, *rest: _Array(rest[0], data, *rest[1:]),
        }
        full = f"{module}.{name}".replace("numpy.core.", "numpy._core.")  # before NumPy 2
        if full not in known:
            raise FrameError(f"asks for {module}.{name}")
        return known[full]


def _array(value: Any) -> Any:
    """Build the array of a record, as a view of its bytes; return an object array as a list."""
    if not isinstance(value, _Array):
        return value
    kind, data, shape, order = value.content  # raises ValueError if the pickle set no content
    if not isinstance(kind, _Type):
        raise ValueError("it has no type")
    if kind.code.startswith("O"):
        return data
    return np.ndarray(shape, np.dtype(kind.code).newbyteorder(kind.order), data, order=order)
