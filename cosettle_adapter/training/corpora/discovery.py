"""Which videos the things a user typed mean: folders, lists, patterns and shards."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.training.corpora.found import Discovery, Found
from cosettle_adapter.training.corpora.index import INDEX_NAME, is_current, read_index
from cosettle_adapter.training.corpora.listing import LIST_SUFFIXES, read_list
from cosettle_adapter.training.corpora.shards import SHARD_SUFFIX
from cosettle_adapter.video.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES

EXPECTED = (
    "a folder of videos or of folders of images, a list of paths (.txt or .csv), a pattern such as "
    "'clips/*.mp4', or shards such as 'shards-{000..009}.tar'"
)

_ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tgz", ".xz", ".zip", ".zst")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def discover(source: str | os.PathLike[str]) -> Discovery:
    """Find the videos that one of the things a user typed means; none is opened.

    Raises:
        FrameError: no such thing, or no video in it.
    """
    text = os.fspath(source)
    found = Discovery()
    if Path(text).expanduser().exists():
        _add(found, Path(text).expanduser().absolute())
    elif "://" in text or text.startswith("pipe:"):
        raise FrameError(f"{text} is a URL; videos are read from disks, so download it first")
    else:
        paths = [path for pattern in _expand_braces(text) for path in _matching(pattern)]
        for path in paths:
            _add(found, path)
        if not paths:
            _refuse_missing(text)
    if not found.videos:
        _refuse_empty(text, found)
    return found


def _add(found: Discovery, path: Path) -> None:
    suffix = path.suffix.lower()
    if path.is_dir():
        _add_folder(found, path)
    elif suffix == SHARD_SUFFIX:
        found.add_shard(str(path), str(path.parent))
    elif suffix in VIDEO_SUFFIXES:
        found.videos.append(Found(str(path), str(path.parent)))
    elif suffix in LIST_SUFFIXES:
        for line in read_list(path):
            if line.lower().endswith(SHARD_SUFFIX):
                found.add_shard(line, str(path.parent))
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


def _add_folder(found: Discovery, root: Path) -> None:
    index = read_index(root)
    if index is not None and index.complete:
        if is_current(index, root):
            found.videos += [
                Found(f"{root}/{name}", str(root), frames=count)
                for name, count in sorted(index.frames.items())
            ]
            return
        found.problems.append(
            (f"{root / INDEX_NAME}", "other folders are there than it says, so it was not used")
        )
    found.add_folder(str(root))


def _expand_braces(pattern: str) -> Iterator[str]:
    """Yield what a shell would make of ``{a,b}`` and ``{000..009}``."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    ends = _RANGE.fullmatch(match[1])
    if ends is not None:
        first, last = int(ends[1]), int(ends[2])
        width = len(ends[1]) if ends[1].startswith("0") else 0
        step = 1 if last >= first else -1
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    else:
        choices = match[1].split(",")
    for choice, rest in itertools.product(choices, [pattern[match.end() :]]):
        yield from _expand_braces(f"{pattern[: match.start()]}{choice}{rest}")


def _matching(pattern: str) -> list[Path]:
    expanded = Path(pattern).expanduser()
    if expanded.exists():
        return [expanded.absolute()]
    if not glob.has_magic(pattern):
        return []
    names = sorted(glob.glob(str(expanded), recursive=True))  # noqa: PTH207  # it knows "**" and dots
    return [Path(name).absolute() for name in names]


def _refuse_missing(text: str) -> None:
    path = Path(text).expanduser()
    if glob.has_magic(text) or _BRACES.search(text):
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
    hint = ""
    if any(name.lower().endswith(_ARCHIVES) for name in others):
        hint = "; unpack the archives"
    raise FrameError(
        f"no videos in {text}: looked for video files ({', '.join(VIDEO_SUFFIXES)}), folders of "
        f"images ({', '.join(IMAGE_SUFFIXES)}) and {SHARD_SUFFIX} shards, and found "
        f"{held if others else 'nothing'}{hint}"
    )
