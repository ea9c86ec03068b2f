"""Frames extracted once: a corpus of videos as a folder of JPEG images for each."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from cosettle_adapter.errors import FrameError
from cosettle_adapter.files import atomic_path
from cosettle_adapter.training.corpora.corpus import Corpus, Video
from cosettle_adapter.training.corpora.index import INDEX_NAME, CorpusIndex, read_index
from cosettle_adapter.training.corpora.jpeg_folders import Job, count_images, run_jobs
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.video.files import VIDEO_SUFFIXES

SKIPPED_NAME = "skipped.txt"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """Which frames are kept, and how.

    The paper's pairs are a share of the clip apart, so that thinning a clip evenly leaves them at
    the same distance in time. Only one of ``every``, ``fps`` and ``max_frames`` may be given.

    Attributes:
        size: shorter side in pixels; smaller frames are not enlarged.
        every: keep every n-th frame.
        fps: keep so many frames a second.
        max_frames: keep at most so many, spread evenly over the video.
        quality: of the JPEG files, 1 to 95.
    """

    size: int = 256
    every: int = 1
    fps: float | None = None
    max_frames: int | None = None
    quality: int = 90

    def __post_init__(self) -> None:
        for name, most in (("size", None), ("every", None), ("max_frames", None), ("quality", 95)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= (most or value):
                limits = f"from 1 to {most}" if most else "at least 1"
                raise ValueError(f"{name} must be {limits}, got {value}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be positive, got {self.fps}")
        given = [self.every > 1, self.fps is not None, self.max_frames is not None]
        if sum(given) > 1:
            raise ValueError("give only one of every, fps and max_frames")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` did.

    Attributes:
        folder: where the images are; a corpus that :meth:`Corpus.open` reads.
        videos: videos in it that were asked for.
        frames: their images.
        found: how many of the videos were there already.
        skipped: videos and shards that could not be read, and why; ``skipped.txt`` has them too.
    """

    folder: Path
    videos: int
    frames: int
    found: int
    skipped: tuple[tuple[str, str], ...]


def prepare(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    settings: PrepareSettings | None = None,
    *,
    workers: int = 1,
    on_video: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Extract the frames of a corpus, in the layout that it has: ``<class>/<video>/000000.jpg``.

    A folder appears under its name once all its frames are there, so a run that was stopped is
    continued by the same call. Videos that break are left out and told. At the end an index is
    written, with which the corpus opens at once.

    Args:
        data: as for :meth:`Corpus.open`.
        output: a new or empty folder, or one that the same settings were used on before.
        settings: see :class:`PrepareSettings`.
        workers: processes; more than 1 are started anew, so a script needs the usual
            ``if __name__ == "__main__":``.
        on_video: called with the videos done and their number.

    Raises:
        FrameError: there are no videos, or none can be read.
        TrainingError: the folder holds something else, or lies among the videos.
        DiskFullError: no room is left; whole videos are kept.
    """
    settings = settings or PrepareSettings()
    folder = Path(output).expanduser()
    _check_apart(data, folder)
    corpus = Corpus.open(data)
    known = _begin(folder, dataclasses.asdict(settings))
    names = folder_names(corpus.videos)
    frames: dict[str, int] = {}
    skipped = list(corpus.problems)
    jobs = []
    for video, name in zip(corpus.videos, names, strict=True):
        if (folder / name).is_dir() and (count := known.get(name) or count_images(folder / name)):
            frames[name] = count
        else:
            jobs.append(Job(video, folder / name, settings))
    found = len(frames)
    on_video(found, len(names))
    for job, result in run_jobs(jobs, workers=workers):
        if isinstance(result, int):
            frames[job.target.relative_to(folder).as_posix()] = result
        else:
            logger.info("skipped %s: %s", job.video.name, result)
            skipped.append((job.video.name, result))
        on_video(len(frames) + len(skipped) - len(corpus.problems), len(names))
    skipped.sort()
    _write_skipped(folder, skipped)
    if not frames:
        name, problem = skipped[0]
        raise FrameError(
            f"none of the {len(names)} videos can be read; the first of them: {name} ({problem})"
        )
    still = {name: count for name, count in known.items() if (folder / name).is_dir()}
    every = dict(sorted({**still, **frames}.items()))
    CorpusIndex(dataclasses.asdict(settings), every, complete=True).write(folder)
    return Prepared(folder, len(frames), sum(frames.values()), found, tuple(skipped))


def folder_names(videos: Sequence[Video]) -> list[str]:
    """Return a folder for each video: its name without suffix, or with it where two would meet."""
    plain = [_without_suffix(video.name) for video in videos]
    shared = Counter(plain)
    parents = {parent.as_posix() for name in plain for parent in PurePosixPath(name).parents}
    taken: set[str] = set()
    names = []
    for video, name in zip(videos, plain, strict=True):
        # a folder with images in it is no folder of videos
        clear = name if shared[name] == 1 and name not in parents else video.name
        parts = [f"_{part[1:]}" if part.startswith(".") else part for part in clear.split("/")]
        candidate, copy = "/".join(parts), 2
        while candidate in taken or candidate in parents:
            candidate, copy = f"{'/'.join(parts)}~{copy}", copy + 1
        taken.add(candidate)
        names.append(candidate)
    return names


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return path.with_suffix("").as_posix() if path.suffix.lower() in VIDEO_SUFFIXES else name


def _check_apart(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], folder: Path
) -> None:
    real = folder.resolve()
    for place in [data] if isinstance(data, (str, os.PathLike)) else data:
        below = Path(place).expanduser()
        if below.is_dir() and real.is_relative_to(below.resolve()):
            raise TrainingError(
                f"{folder} lies in {place}, whose videos are read, so its images would be taken "
                "for videos; choose a folder outside"
            )


def _begin(folder: Path, settings: Mapping[str, Any]) -> Mapping[str, int]:
    """Mark a folder as ours, and return the images that an index counts in it."""
    index = read_index(folder)
    if index is None:
        held = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        if held:
            raise TrainingError(
                f"{folder} is not empty (it holds {held[0]}) and has no {INDEX_NAME}; "
                "choose an empty folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        CorpusIndex(settings).write(folder)
        return {}
    differing = [name for name in settings if index.settings.get(name) != settings[name]]
    if differing:
        told = ", ".join(
            f"{name} {index.settings.get(name)} (now {settings[name]})" for name in differing
        )
        raise TrainingError(
            f"the images in {folder} were extracted with {told}; use another folder, or delete it"
        )
    return index.frames


def _write_skipped(folder: Path, skipped: Sequence[tuple[str, str]]) -> None:
    path = folder / SKIPPED_NAME
    if not skipped:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary:
        lines = (f"{name}\t{' '.join(problem.split())}\n" for name, problem in skipped)
        temporary.write_text("".join(lines), "utf-8")
