"""A clip of any data set, and what listing data sets has in common.

Listing never fails for one bad clip: what is wrong with it is its ``problem``, and reading anything
of it raises that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import numpy as np

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.evaluation.images import read_frame, read_labels
from cosettle_adapter.imports import require
from cosettle_adapter.video import FrameSelection, find_images

if TYPE_CHECKING:
    from numpy.typing import NDArray

A = TypeVar("A")
T = TypeVar("T")

ALL_FRAMES = FrameSelection()
_LOSSY = (".jpg", ".jpeg")  # no format for label maps


@dataclasses.dataclass(frozen=True, eq=False)
class Clip(Generic[A]):
    """A clip of a data set; frames and annotations are read when asked for.

    Attributes:
        name: name within the data set, as its own lists and papers have it.
        frames: where each frame comes from: image files, JPEG files in memory, or arrays
            ``(H, W, 3)`` uint8.
        read: reads the annotations; :meth:`read_annotations` calls it.
        annotated: frame of each annotation, ascending; empty where that has no meaning.
        inputs: everything the clip is made of: files, bytes or arrays.
        problem: why the clip cannot be used, or None.
    """

    name: str
    frames: Sequence[Any]
    read: Callable[[], A]
    annotated: tuple[int, ...] = ()
    inputs: tuple[Any, ...] = ()
    problem: str | None = None

    def __len__(self) -> int:
        return len(self.frames)

    def read_frame(self, index: int) -> NDArray[np.uint8]:
        """Read one frame: ``(H, W, 3)`` uint8, RGB.

        Raises:
            FrameError: the clip has a problem, or the frame is missing or damaged.
        """
        self._check()
        frame = self.frames[index]
        if isinstance(frame, Path):
            return read_frame(frame)
        return _decode(frame, self.name, index) if isinstance(frame, bytes) else np.array(frame)

    def read_annotations(self) -> A:
        """Read the annotations; their form is that of the data set.

        Raises:
            FrameError: the clip has a problem, or its annotations are missing or damaged.
        """
        self._check()
        return self.read()

    def digest(self) -> str:
        """Return a hash of everything that the clip is made of."""
        digest = hashlib.sha256(f"{self.name} {len(self)}".encode())
        for part in self.inputs:
            if isinstance(part, Path):
                digest.update(f"{part.name} ".encode())
                digest.update(part.read_bytes() if part.is_file() else b"missing")
            elif isinstance(part, np.ndarray):
                digest.update(f"{part.shape} {part.dtype} ".encode() + part.tobytes())
            else:
                digest.update(part if isinstance(part, bytes) else str(part).encode())
        return f"sha256:{digest.hexdigest()}"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in ("read_masks", "read_joints"):
                raise AttributeError(f"a clip has no attribute {name!r}")
            warnings.warn(f"{name}: use read_annotations", DeprecationWarning, stacklevel=2)
            return self.read_annotations

    def _check(self) -> None:
        if self.problem is not None:
            raise FrameError(self.problem)


def bad_clip(name: str, problem: str) -> Clip[Any]:
    """Return a clip of which nothing but the problem is known."""

    def read() -> NoReturn:
        raise FrameError(problem)

    return Clip(name, (), read, problem=problem)


def choose(frames: Sequence[T], select: FrameSelection) -> list[T]:
    """Return the frames that a selection keeps; its seconds are positions over ``fps`` (1)."""
    times = [index / (select.fps or 1.0) for index in range(len(frames))]
    start, end = select.start or 0.0, select.end
    kept = [
        frame
        for frame, time in zip(frames, times, strict=True)
        if start <= time and (end is None or time < end)
    ]
    return kept[:: select.every][: select.max_frames]


def read_masks(paths: Iterable[Path]) -> NDArray[np.uint8]:
    """Read label maps of one size: ``(A, H, W)`` uint8.

    Raises:
        FrameError: one is damaged, neither a palette nor a grey image, or of another size.
    """
    masks: list[NDArray[np.uint8]] = []
    for path in paths:
        masks.append(read_labels(path))
        if masks[-1].shape != masks[0].shape:
            got, first = (" x ".join(map(str, mask.shape)) for mask in (masks[-1], masks[0]))
            raise FrameError(
                f"{path} is {got}, but the clip's first mask is {first}; all must have one size"
            )
    return np.stack(masks)


def data_folder(root: str | Path, what: str, needed: Sequence[str] = ()) -> Path:
    """Return the folder of a data set after a check that it is one.

    Args:
        root: the path.
        what: what it should be, as ``"the folder of DAVIS"``.
        needed: names or relative paths that must be in it.

    Raises:
        FrameError: it does not exist, is no folder or lacks something; says where it may be.
    """
    path = Path(root).expanduser()
    if not path.is_dir():
        if path.exists():
            raise FrameError(f"{path} is a file, expected {what}")
        near = did_you_mean(path.name, entries(path.parent))
        raise FrameError(f"{path} does not exist, expected {what}.{near}")
    missing = [name for name in needed if not (path / name).exists()]
    if missing:
        raise FrameError(
            f"{path} is not {what}: expected {', '.join(missing)} in it, found {found_in(path)}."
            + nearby(path, missing)
        )
    return path


def nearby(root: Path, needed: Sequence[str]) -> str:
    """Return a hint at a folder below or above that has what is needed, or at a similar name."""
    children = [root / name for name in entries(root) if (root / name).is_dir()]
    for folder in (*children, root.parent):
        if all(any(folder.glob(pattern)) for pattern in needed):
            return f" Did you mean {folder}?"
    return did_you_mean(Path(needed[0]).parts[0], [child.name for child in children])


def pick(names: Iterable[str] | None, known: Iterable[str], what: str) -> list[str]:
    """Return the names that are wanted, all of the known ones for None.

    Args:
        names: the ones wanted.
        known: all that there are.
        what: what they are and where, with ``{}`` for the name: ``"clip {} in DAVIS"``.

    Raises:
        FrameError: a name is not known; says which are similar, or the first few.
    """
    listed = list(known)
    for name in names or ():
        if name not in listed:
            near = did_you_mean(name, listed) or f" It has {len(listed)}: {few(listed)}"
            raise FrameError(f"no {what.format(repr(name))}.{near}")
    return listed if names is None else list(names)


def entries(folder: Path) -> list[str]:
    """Return the names in a folder, sorted, without hidden ones; none if it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def found_in(folder: Path) -> str:
    """Return the first few names in a folder, as text."""
    return few(entries(folder))


def few(names: Sequence[str], limit: int = 9) -> str:
    """Return the first few of some names, as text."""
    return (", ".join(names[:limit]) or "nothing") + (", ..." if len(names) > limit else "")


def images_in(folder: Path) -> tuple[Path, ...]:
    """Return the images of a folder in natural order; none if there is no such folder."""
    return tuple(find_images(folder)) if folder.is_dir() else ()


def files_named(stems: Iterable[str], found: Iterable[Path], fallback: Path) -> list[Path]:
    """Return the files of some stems, whatever their suffix.

    Args:
        stems: names without suffix.
        found: the files that there are.
        fallback: folder and suffix, as ``masks/*.png``, of the path of one that is not there.
    """
    held = {path.stem: path for path in found}
    return [held.get(stem, fallback.with_name(f"{stem}{fallback.suffix}")) for stem in stems]


def label_maps_in(folder: Path) -> tuple[Path, ...]:
    """Return the images of a folder that can be label maps: all but JPEG."""
    return tuple(path for path in images_in(folder) if path.suffix.lower() not in _LOSSY)


def _decode(stored: bytes, name: str, index: int) -> NDArray[np.uint8]:
    pillow: Any = require("PIL.Image", extra="eval", purpose="reading frames")
    try:
        with pillow.open(io.BytesIO(stored)) as opened:
            return np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
        raise FrameError(f"frame {index} of {name!r} cannot be read: {error}") from error
