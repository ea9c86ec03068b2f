"""A clip of any data set, and functions that list clips in folders."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.imports import require
from cosettle_adapter.video import find_images
from cosettle_adapter.video.files import read_image

A = TypeVar("A")
Masks = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, eq=False)
class Clip(Generic[A]):
    """A clip of a data set, whose frames and annotations are read on request.

    Reading raises :class:`~cosettle_adapter.errors.FrameError` if a file is missing or damaged.
    """

    name: str  # as in the data set's lists and papers
    frames: Sequence[Any]  # paths, JPEG bytes, (H, W, 3) uint8 arrays, or functions returning these
    read: Callable[[], A]  # reads the annotations
    annotated: tuple[int, ...] = ()  # frame of each annotation, if annotations belong to frames
    inputs: tuple[Any, ...] = ()  # that the digest covers: like frames, or names
    problem: str | None = None  # why the clip cannot be used; reading it raises this

    def __len__(self) -> int:
        return len(self.frames)

    def read_frame(self, index: int) -> NDArray[np.uint8]:
        """Read one frame: ``(H, W, 3)`` uint8, RGB."""
        self._check()
        frame = self.frames[index]
        frame = frame() if callable(frame) else frame
        if isinstance(frame, Path):
            return rearrange(read_image(frame), "c h w -> h w c").contiguous().numpy()
        if isinstance(frame, bytes):
            with _opened(io.BytesIO(frame), f"frame {index} of {self.name!r}", "an image") as image:
                return np.asarray(image.convert("RGB"))
        return np.array(frame)

    def read_annotations(self) -> A:
        """Read the annotations; their type depends on the data set."""
        self._check()
        return self.read()

    def digest(self) -> str:
        """Return a hash of the clip's frames and annotations."""
        digest = hashlib.sha256(f"{self.name} {len(self)}".encode())
        for part in (part() if callable(part) else part for part in self.inputs):
            if isinstance(part, Path):
                digest.update(f"{part.name} ".encode())
                digest.update(part.read_bytes() if part.is_file() else b"missing")
            elif isinstance(part, np.ndarray):
                digest.update(f"{part.shape} {part.dtype} ".encode() + part.tobytes())
            else:
                digest.update(part if isinstance(part, bytes) else str(part).encode())
        return f"sha256:{digest.hexdigest()}"

    def _check(self) -> None:
        if self.problem is not None:
            raise FrameError(self.problem)


def list_clips(
    kind: str,
    root: Path,
    known: Iterable[str],
    selected: Iterable[str] | None,
    make: Callable[[str], Clip[A]],
) -> list[Clip[A]]:
    """Make the selected clips; a clip that cannot be made carries the error as its problem."""
    clips: list[Clip[A]] = []
    for name in pick(selected, known, f"{kind} {{}} in {root}"):
        try:
            clips.append(make(name))
        except FrameError as error:
            unusable: Clip[Any] = Clip(name, (), tuple, problem=f"{kind} {name!r}: {error}")
            clips.append(unusable)
    return clips


def mask_clip(name: str, images: Path, labels: Path) -> Clip[Masks]:
    """Return a clip of frames with label maps of the same names: the first frame needs one."""
    frames, masks = images_in(images), images_in(labels, lossless=True)
    for folder, files, kind in ((images, frames, "images"), (labels, masks, "PNG masks")):
        if not files:
            raise FrameError(f"expected {kind} in {folder}, found {found_in(folder)}")
    index_of = {path.stem: index for index, path in enumerate(frames)}
    if len(index_of) < len(frames):
        twice = [path.name for index, path in enumerate(frames) if index_of[path.stem] != index]
        raise FrameError(
            f"{images} has several files for the same frame, such as {few(twice)}; keep one file "
            "per frame"
        )
    unmatched = [path.name for path in masks if path.stem not in index_of]
    if unmatched:
        raise FrameError(
            f"masks without a frame in {images}: {few(unmatched)}; a mask must have the name of "
            f"its frame, and the frames are {few([path.name for path in frames])}"
        )
    if masks[0].stem != frames[0].stem:
        raise FrameError(
            f"the first frame, {frames[0].name}, has no mask; expected "
            f"{labels / frames[0].stem}.png. Draw it, or remove the frames before {masks[0].name}"
        )
    annotated = tuple(index_of[path.stem] for path in masks)
    return Clip(name, frames, lambda: read_masks(masks), annotated, (*frames, *masks))


def read_masks(paths: Sequence[Path]) -> Masks:
    """Read label maps of one size: ``(A, H, W)`` uint8."""
    masks = [read_labels(path) for path in paths]
    for path, mask in zip(paths, masks, strict=True):
        if mask.shape != masks[0].shape:
            size, first = (" x ".join(map(str, shape)) for shape in (mask.shape, masks[0].shape))
            raise FrameError(
                f"{path} is {size}, but the clip's first mask is {first}; all must have one size"
            )
    return np.stack(masks)


def read_labels(path: Path, *, colours: bool = False) -> NDArray[np.uint8]:
    """Read a label map: ``(H, W)`` uint8, the palette index or grey value of every pixel.

    With ``colours`` an RGB image is also accepted, and read as 1 where any colour is above 0.
    """
    with _opened(path, path, "a mask") as image:
        if image.mode in ("P", "L", "1"):
            return np.asarray(image).astype(np.uint8)
        if not colours:
            raise FrameError(
                f"{path} is a {image.mode} image, expected a palette (P) or grey (L) PNG whose "
                "values are object ids; use the data set's own annotations, or save your masks "
                "with one number per pixel"
            )
        bright: NDArray[np.bool_] = np.asarray(image.convert("RGB")).max(2) > 0
        return bright.astype(np.uint8)


def image_size(path: Path) -> tuple[int, int]:
    """Return an image's (height, width) from its header."""
    with _opened(path, path, "an image") as image:
        width, height = image.size
        return height, width


def read_list(lists: Sequence[Path]) -> list[str]:
    """Return the clips named in the first existing one of ``lists``.

    The first word of a line is a clip's name, or the path of its folder or of one of its frames.
    """
    path = next(filter(Path.is_file, lists), None)
    if path is None:
        expected, folder = lists[0], lists[0].parent
        near = did_you_mean(expected.name, entries(folder))
        raise FrameError(f"no list of clips {expected}; found {found_in(folder)} in it.{near}")
    paths = [Path(line.split()[0]) for line in read_text(path).splitlines() if line.strip()]
    if not paths:
        raise FrameError(f"{path} names no clips; expected one name per line")
    names = [p.parent.name if p.stem.isdigit() and p.parent.name else p.name for p in paths]
    return list(dict.fromkeys(names))


def read_text(path: Path) -> str:
    """Return the content of a text file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FrameError(f"{path} cannot be read as text: {error}") from error


def clip_folders(
    root: Path, what: str, parts: Sequence[str], official: Sequence[str] = ()
) -> dict[str, Path]:
    """Return the folders of the clips in ``root`` by name, or ``root`` if it is a clip itself.

    A subfolder with any of ``parts`` in it is a clip; ``root`` is one if it has the first of
    ``parts``. The error suggests a nearby folder with the ``official`` layout or with ``parts``.
    """
    if (root / parts[0]).exists():
        return {root.resolve().name: root}
    children = {name: root / name for name in entries(root)}
    clips = {n: path for n, path in children.items() if any((path / p).exists() for p in parts)}
    if not clips:
        raise FrameError(
            f"{root} is not {what}, and has no clips with {' and '.join(parts)} in them; found "
            f"{found_in(root)}."
            + (_nearby(root, official or parts) or _nearby(root, [f"*/{part}" for part in parts]))
        )
    return clips


def data_folder(root: str | Path, what: str, needed: Sequence[str] = ()) -> Path:
    """Return the folder of a data set, after checking that it has all ``needed`` entries."""
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
            + _nearby(path, missing)
        )
    return path


def pick(names: Iterable[str] | None, known: Iterable[str], what: str) -> list[str]:
    """Return the given names, or all known names for None.

    ``what`` describes an unknown name in the error; the name replaces its ``{}``.
    """
    listed = list(known)
    for name in names or ():
        if name not in listed:
            near = did_you_mean(name, listed) or f" It has {len(listed)}: {few(listed)}"
            raise FrameError(f"no {what.format(repr(name))}.{near}")
    return list(dict.fromkeys(listed if names is None else names))


def images_in(folder: Path, *, lossless: bool = False) -> list[Path]:
    """Return the images of a folder in natural order; none if the folder does not exist."""
    paths = find_images(folder) if folder.is_dir() else []
    # a JPEG file is not a label map
    return [path for path in paths if not lossless or path.suffix.lower() not in (".jpg", ".jpeg")]


def images_named(folder: Path, stems: Iterable[str], *, lossless: bool = False) -> list[Path]:
    """Return the image of each stem, or the path where a missing one is expected."""
    existing = {path.stem: path for path in images_in(folder, lossless=lossless)}
    suffix = ".png" if lossless else ".jpg"
    return [existing.get(stem, folder / f"{stem}{suffix}") for stem in stems]


def entries(folder: Path) -> list[str]:
    """Return the sorted visible names in a folder; none if the folder cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def found_in(folder: Path) -> str:
    """Return the first few names in a folder, as text."""
    return few(entries(folder))


def few(names: Sequence[str], limit: int = 9) -> str:
    """Return the first few names, as text."""
    return (", ".join(names[:limit]) or "nothing") + (", ..." if len(names) > limit else "")


def _nearby(root: Path, needed: Sequence[str]) -> str:
    """Suggest a child or the parent of ``root`` that matches all patterns, or a similar name."""
    children = [root / name for name in entries(root) if (root / name).is_dir()]
    for folder in (*children, root.parent):
        if all(any(folder.glob(pattern)) for pattern in needed):
            return f" Did you mean {folder}?"
    first = root / needed[0]
    return did_you_mean(first.name, entries(first.parent))


@contextlib.contextmanager
def _opened(file: Any, name: object, kind: str) -> Iterator[Any]:
    pillow: Any = require("PIL.Image", extra="eval", purpose="reading images")
    try:
        with pillow.open(file) as image:
            yield image
    except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
        raise FrameError(f"{name} cannot be read as {kind}: {error}") from error
