"""Which videos the things a user typed mean: folders, lists, patterns and shards; none is opened.

WebDataset shards are indexed by the positions of their members, because training reads single
frames of single videos in random order; the ``webdataset`` library reads shards front to back.
"""

from __future__ import annotations

import csv
import glob
import itertools
import json
import logging
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.imports import require
from cosettle_adapter.io import atomic_path
from cosettle_adapter.video.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES

INDEX_NAME = "cosettle_corpus.json"
SHARD_SUFFIX = ".tar"
LIST_SUFFIXES = (".csv", ".lst", ".txt", ".tsv")
EXPECTED = (
    "a folder of videos or of folders of images, a list of paths (.txt or .csv), a pattern such as "
    "'clips/*.mp4', or shards such as 'shards-{000..009}.tar'"
)

_INDEX = {"format": "cosettle-corpus", "version": 1}
_ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tgz", ".xz", ".zip", ".zst")
_COLUMN_NAMES = {"file", "filename", "name", "path", "video", "video_path"}
_TRIED = 1000

logger = logging.getLogger(__name__)


class Found(NamedTuple):
    """A video, before it has a name.

    Attributes:
        path: of a video file, a folder of images, or the archive it lies in.
        base: the folder that its name is relative to.
        start: first byte in the archive.
        size: bytes in the archive, or None.
        member: name in the archive.
        frames: number of images in the folder, where an index has it.
        real: path without links, where links may lead to it.
    """

    path: str
    base: str
    start: int = 0
    size: int | None = None
    member: str = ""
    frames: int | None = None
    real: str = ""


@dataclass
class Discovery:
    """What was found.

    Attributes:
        videos: in order; those of a folder by name, those of a list as listed.
        problems: shards and folders that could not be read, and why.
        others: names of files that are no videos.
    """

    videos: list[Found] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def discover(source: str | os.PathLike[str]) -> Discovery:
    """Find the videos that one of the things a user typed means.

    Raises:
        FrameError: no such thing, or no video in it.
    """
    text = os.fspath(source)
    found = Discovery()
    if "://" in text or text.startswith("pipe:"):
        raise FrameError(f"{text} is a URL; videos are read from disks, so download it first")
    paths = [path for pattern in _expand_braces(text) for path in _matching(pattern)]
    for path in paths:
        _add(found, path)
    if not paths:
        _refuse_missing(text)
    if not found.videos:
        _refuse_empty(text, found)
    return found


def _expand_braces(text: str) -> list[str]:
    if "{" not in text or Path(text).expanduser().exists():
        return [text]
    braces = require("braceexpand", extra="train", purpose="a pattern with braces")
    try:
        return list(braces.braceexpand(text, escape=False))
    except braces.UnbalancedBracesError:
        return [text]


def _matching(pattern: str) -> list[Path]:
    expanded = Path(pattern).expanduser()
    if expanded.exists():
        return [expanded.absolute()]
    if not glob.has_magic(pattern):
        return []
    names = sorted(glob.glob(str(expanded), recursive=True))  # noqa: PTH207  # it knows "**" and dots
    return [Path(name).absolute() for name in names]


def _add(found: Discovery, path: Path) -> None:
    suffix = path.suffix.lower()
    if path.is_dir():
        _add_folder(found, path)
    elif suffix == SHARD_SUFFIX:
        _add_shard(found, str(path), str(path.parent))
    elif suffix in VIDEO_SUFFIXES:
        found.videos.append(Found(str(path), str(path.parent)))
    elif suffix in LIST_SUFFIXES:
        for line in read_list(path):
            if line.lower().endswith(SHARD_SUFFIX):
                _add_shard(found, line, str(path.parent))
            else:
                found.videos.append(Found(line, str(path.parent)))
    elif suffix in IMAGE_SUFFIXES:
        raise FrameError(
            f"{path} is a single image; give the folder that holds folders of images, one a video"
        )
    elif suffix in _ARCHIVES:
        raise FrameError(f"{path} is compressed; unpack it and give the folder or the .tar files")
    else:
        found.others[path.name] += 1


def _refuse_missing(text: str) -> None:
    path = Path(text).expanduser()
    if glob.has_magic(text) or "{" in text:
        raise FrameError(f"pattern {text} matches nothing; expected {EXPECTED}")
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, [name for name in names if not name.startswith(".")])
    raise FrameError(f"{path} does not exist.{hint} Expected {EXPECTED}")


def _refuse_empty(text: str, found: Discovery) -> None:
    if found.problems:
        name, problem = found.problems[0]
        more = f", and {len(found.problems) - 1} more like it" if len(found.problems) > 1 else ""
        problem = problem if problem.startswith(name) else f"{name}: {problem}"
        raise FrameError(f"{text} gives no video: {problem}{more}")
    others = sorted(found.others)
    held = f"{sum(found.others.values())} other files, such as {', '.join(others[:3])}"
    unpack = any(name.lower().endswith(_ARCHIVES) for name in others)
    raise FrameError(
        f"no videos in {text}: looked for video files ({', '.join(VIDEO_SUFFIXES)}), folders of "
        f"images ({', '.join(IMAGE_SUFFIXES)}) and {SHARD_SUFFIX} shards, and found "
        f"{held if others else 'nothing'}{'; unpack the archives' if unpack else ''}"
    )


# --- folders ---


def _add_folder(found: Discovery, root: Path) -> None:
    """Add what lies below a folder, in order of name."""
    index = read_index(root)
    if index is not None and index["complete"]:
        if _is_current(index["frames"], root):
            frames = sorted(index["frames"].items())
            found.videos += [Found(f"{root}/{n}", str(root), frames=count) for n, count in frames]
            return
        problem = "other folders are there than it lists, so it was not used"
        found.problems.append((f"{root / INDEX_NAME}", problem))
    videos = len(found.videos)
    images: list[Found] = []
    occupied: set[str] = set()  # folders with something below them
    visited: set[str] = set()  # real places, whatever links lead there
    real_root = os.path.realpath(root)

    def unreadable(error: OSError) -> None:
        problem = f"the folder cannot be read ({error.strerror or error})"
        found.problems.append((str(error.filename), problem))

    for folder, below, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        inside = real.startswith(f"{real_root}/") and os.path.islink(folder)  # noqa: PTH114
        if real in visited or inside:
            below.clear()
            continue
        visited.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        pictures = False
        for name in sorted(name for name in names if not name.startswith(".")):
            path, lowered = f"{folder}/{name}", name.lower()
            if lowered.endswith(IMAGE_SUFFIXES):
                pictures = True
            elif lowered.endswith(VIDEO_SUFFIXES):
                found.videos.append(Found(path, str(root), real=os.path.realpath(path)))
                _occupy(occupied, folder, root)
            elif lowered.endswith(SHARD_SUFFIX):
                _add_shard(found, path, str(root))
                _occupy(occupied, folder, root)
            else:
                found.others[name] += 1
        if pictures:
            images.append(Found(folder, str(root), real=real))
            _occupy(occupied, os.path.dirname(folder), root)  # noqa: PTH120
    # images beside videos are previews of them; images beside notes are frames
    found.videos += [each for each in images if each.path not in occupied]
    found.videos[videos:] = sorted(
        found.videos[videos:], key=lambda video: (video.path.replace(os.sep, "/"), video.start)
    )


def _occupy(occupied: set[str], folder: str, root: Path) -> None:
    """Note a folder and those above it, as far as the root."""
    while folder not in occupied and len(folder) >= len(str(root)):
        occupied.add(folder)
        folder = os.path.dirname(folder)  # noqa: PTH120


# --- the index that `cosettle-adapter prepare` leaves beside the folders it wrote ---


def write_index(
    folder: Path,
    settings: Mapping[str, Any],
    frames: Mapping[str, int] | None = None,
) -> None:
    """Write the index of a corpus, atomically.

    Args:
        folder: of the corpus.
        settings: how the frames were extracted.
        frames: frames of each folder by its path below ``folder``; ``None`` before all are written.
    """
    content = {
        **_INDEX,
        "settings": settings,
        "frames": frames or {},
        "complete": frames is not None,
    }
    with atomic_path(folder / INDEX_NAME) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")


def read_index(folder: Path) -> dict[str, Any] | None:
    """Return the index in ``folder``, or None if there is none that can be used."""
    path = folder / INDEX_NAME
    try:
        content = json.loads(path.read_text("utf-8"))
        if {name: content[name] for name in _INDEX} != _INDEX:
            raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
        frames = {str(name): int(count) for name, count in content["frames"].items()}
        return {
            "settings": dict(content["settings"]),
            "frames": frames,
            "complete": bool(content["complete"]),
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is ignored: %s", path, error)
        return None


def _is_current(frames: Mapping[str, int], root: Path) -> bool:
    """Tell whether the folders below ``root`` are those of the index; no frame is listed."""
    below: defaultdict[str, set[str]] = defaultdict(set)
    for name in frames:
        parts = name.split("/")
        for depth, part in enumerate(parts):
            below["/".join(parts[:depth])].add(part)
    try:
        return all(_folders_in(root / parent) == names for parent, names in below.items())
    except OSError:
        return False


def _folders_in(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {each.name for each in entries if not each.name.startswith(".") and each.is_dir()}


# --- shards ---


def _add_shard(found: Discovery, path: str, base: str) -> None:
    """Add the videos of a shard, or what is wrong with it; only headers of members are read."""
    videos: list[Found] = []
    others: list[str] = []
    problem = ""
    try:
        length = Path(path).stat().st_size
        # "r:" and not "r": members of a compressed archive have no position
        with tarfile.open(path, "r:") as archive:
            for member in _members(archive):
                name = PurePosixPath(member.name)
                if not member.isreg() or name.name.startswith("."):
                    continue
                if name.suffix.lower() not in VIDEO_SUFFIXES:
                    others.append(name.name)
                elif member.offset_data + member.size > length:
                    problem = f"it is cut off within {member.name}"
                    break
                else:
                    at = (member.offset_data, member.size, member.name)
                    videos.append(Found(path, base, *at))
    except tarfile.TarError as error:
        problem = f"it is damaged ({error})"
        if not videos:
            problem = f"it is no uncompressed tar archive ({error}); unpack a compressed one"
    except OSError as error:
        problem = f"it cannot be read ({error.strerror or error})"
    if not videos and not problem:
        held = ", ".join(others[:3]) or "nothing"
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        kinds = ", ".join(VIDEO_SUFFIXES)
        problem = f"it holds no video files ({kinds}); it holds {held}{more}"
    if problem:
        found.problems.append((path, problem))
    found.videos += videos


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        yield member


# --- lists of paths, one per line, in the dialects that people have ---


def _first_of_csv(line: str) -> str:
    try:
        return next(csv.reader([line], skipinitialspace=True), [""])[0]
    except csv.Error:
        return ""


_DIALECTS: tuple[Callable[[str], str], ...] = (
    lambda line: line,
    _first_of_csv,
    lambda line: line.partition("\t")[0],
    lambda line: line.rsplit(maxsplit=1)[0],
    lambda line: line.rsplit(maxsplit=2)[0],
)


def read_list(path: Path) -> list[str]:
    """Read which videos a file lists.

    A line is a path, alone or followed by a label, a number of frames or both, after a comma, a
    tab or a space. Paths are relative to the file's folder, or else to the working folder. The
    first path that exists decides for all lines. Empty lines, lines that begin with ``#``, and
    a line of column names at the top are left out.

    Returns:
        Absolute paths in the order of the file.

    Raises:
        FrameError: the file cannot be read, is empty, or none of its first paths exists.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FrameError(f"{path} cannot be read as a list of videos: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise FrameError(f"{path} lists no videos: it has no line with a path")
    bases = list(dict.fromkeys([path.parent.absolute(), Path.cwd()]))
    for line, base, dialect in itertools.product(lines[:_TRIED], bases, _DIALECTS):
        name = dialect(line)
        if name and os.path.exists(_absolute(base, name)):  # noqa: PTH110
            if dialect(lines[0]).lower() in _COLUMN_NAMES:
                lines = lines[1:]
            return [_absolute(base, dialect(line)) for line in lines]
    shown = lines[min(1, len(lines) - 1)]
    raise FrameError(
        f"{path} lists {len(lines)} videos, but none of the first {min(_TRIED, len(lines))} lines "
        f"names a file or folder below {' or '.join(map(str, bases))}; the lines look like "
        f"{shown[:80]!r}, expected a path and perhaps a label after a comma or a space"
    )


def _absolute(base: Path, name: str) -> str:
    name = os.path.expanduser(name) if name.startswith("~") else name  # noqa: PTH111
    return os.path.normpath(os.path.join(base, name))  # noqa: PTH118  # Path takes five times as long
