"""Frames extracted once: a corpus of videos as a folder of JPEG images for each."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor

from cosettle_adapter import imports
from cosettle_adapter.errors import FrameError
from cosettle_adapter.io import atomic_path
from cosettle_adapter.training.corpus import Corpus, Video
from cosettle_adapter.training.discovery import INDEX_NAME, read_index, write_index
from cosettle_adapter.training.errors import DiskFullError, TrainingError
from cosettle_adapter.video.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from cosettle_adapter.video.selection import PendingFrame

SKIPPED_NAME = "skipped.txt"

logger = logging.getLogger(__name__)

Result = int | str
"""The number of images written, or why there are none."""

_CRASHED = "its decoder crashed the process that read it"

_stop: Event | None = None


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """Which frames are kept, and how.

    The paper's pairs are a share of the clip apart, so thinning a clip evenly leaves them at the
    same distance in time. Only one of every, fps and max_frames may be given.

    Attributes:
        size: shorter side in pixels; smaller frames are not enlarged.
        every: keep every n-th frame.
        fps: keep so many frames per second.
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
        if (self.every > 1) + (self.fps is not None) + (self.max_frames is not None) > 1:
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
    resumed by the same call. Videos that cannot be read are left out and listed. At the end an
    index is written, with which the corpus opens at once.

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
    for place in [data] if isinstance(data, (str, os.PathLike)) else data:
        below = Path(place).expanduser()
        if below.is_dir() and folder.resolve().is_relative_to(below.resolve()):
            raise TrainingError(
                f"{folder} lies in {place}, whose videos are read, so its images would be taken "
                "for videos; choose a folder outside"
            )
    corpus = Corpus.open(data)
    known = _begin(folder, dataclasses.asdict(settings))
    frames: dict[str, int] = {}
    skipped = list(corpus.problems)
    jobs = []
    for video, name in zip(corpus.videos, folder_names(corpus.videos), strict=True):
        if (folder / name).is_dir() and (count := known.get(name) or count_images(folder / name)):
            frames[name] = count
        else:
            jobs.append(Job(video, folder / name, settings))
    found = len(frames)
    on_video(found, len(corpus))
    for job, result in run_jobs(jobs, workers=workers):
        if isinstance(result, int):
            frames[job.target.relative_to(folder).as_posix()] = result
        else:
            logger.info("skipped %s: %s", job.video.name, result)
            skipped.append((job.video.name, result))
        on_video(len(frames) + len(skipped) - len(corpus.problems), len(corpus))
    skipped.sort()
    if skipped:
        with atomic_path(folder / SKIPPED_NAME) as path:
            lines = (f"{name}\t{' '.join(problem.split())}\n" for name, problem in skipped)
            path.write_text("".join(lines), "utf-8")
    else:
        (folder / SKIPPED_NAME).unlink(missing_ok=True)
    if not frames:
        name, problem = skipped[0]
        raise FrameError(
            f"none of the {len(corpus)} videos can be read; the first of them: {name} ({problem})"
        )
    still = {name: count for name, count in known.items() if (folder / name).is_dir()}
    every = dict(sorted({**still, **frames}.items()))
    write_index(folder, dataclasses.asdict(settings), every)
    return Prepared(folder, len(frames), sum(frames.values()), found, tuple(skipped))


def folder_names(videos: Sequence[Video]) -> list[str]:
    """Return a folder for each video: its name without suffix, or with it where two would meet."""
    plain = [_without_suffix(video.name) for video in videos]
    shared = Counter(plain)
    parents = {parent.as_posix() for name in plain for parent in PurePosixPath(name).parents}
    names: dict[str, None] = {}
    for video, name in zip(videos, plain, strict=True):
        # a folder with images in it is no folder of videos
        clear = name if shared[name] == 1 and name not in parents else video.name
        parts = [f"_{part[1:]}" if part.startswith(".") else part for part in clear.split("/")]
        candidate, copy = "/".join(parts), 2
        while candidate in names or candidate in parents:
            candidate, copy = f"{'/'.join(parts)}~{copy}", copy + 1
        names[candidate] = None
    return list(names)


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return path.with_suffix("").as_posix() if path.suffix.lower() in VIDEO_SUFFIXES else name


def _begin(folder: Path, settings: dict[str, Any]) -> dict[str, int]:
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
        write_index(folder, settings)
        return {}
    before = index["settings"]
    differing = [name for name in settings if before.get(name) != settings[name]]
    if differing:
        told = ", ".join(f"{n} {before.get(n)} (now {settings[n]})" for n in differing)
        raise TrainingError(
            f"the images in {folder} were extracted with {told}; use another folder, or delete it"
        )
    frames: dict[str, int] = index["frames"]
    return frames


# --- videos to folders of images, several at a time ---


class Job(NamedTuple):
    """A video and the folder that its images go to."""

    video: Video
    target: Path
    settings: PrepareSettings

    @property
    def temporary(self) -> Path:
        """Where the images lie until they are complete."""
        return self.target.with_name(f".{self.target.name}.part")


def run_jobs(jobs: Iterable[Job], *, workers: int) -> Iterator[tuple[Job, Result]]:
    """Extract frames, several videos at a time, in whatever order they are done.

    Raises:
        DiskFullError: no room is left; whole videos are kept.
    """
    if workers <= 1:
        for job in jobs:
            yield job, extract(job)
        return
    waiting = iter(jobs)
    crashed: list[Job] = []
    done = False
    while not done:
        done = yield from _run_pool(waiting, workers, crashed)
        # one of those under way crashed its process; each alone shows which
        for job in crashed:
            yield job, _extract_alone(job)
        crashed.clear()


def extract(job: Job) -> Result:
    """Write the frames of one video; its folder appears once it is complete.

    Raises:
        DiskFullError: no room is left.
        OSError: the folder cannot be written.
    """
    if job.target.is_dir() and (count := count_images(job.target)):
        return count
    temporary = job.temporary
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        count = 0
        with contextlib.closing(job.video.frames()) as frames:
            for frame in _wanted(job, frames):
                if _stop is not None and _stop.is_set():
                    return "interrupted"
                _write_jpeg(frame.load(), temporary / f"{count:06d}.jpg", job.settings)
                count += 1
        if not count:
            return f"{job.video.name} has no frames"
        temporary.replace(job.target)
        return count
    except FrameError as error:
        return str(error) or type(error).__name__
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"no room is left for the frames of {job.video.name} in {job.target.parent}; what is "
            "complete is kept. Make room and run the same again to continue"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def count_images(folder: Path) -> int:
    """Count the images in a folder."""
    with os.scandir(folder) as entries:
        return sum(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries)


def _wanted(job: Job, frames: Iterable[PendingFrame]) -> Iterator[PendingFrame]:
    settings = job.settings
    if settings.max_frames is not None:
        length = job.video.length()
        kept = min(length, settings.max_frames)
        chosen = {int((place + 0.5) * length / kept) for place in range(kept)}
        yield from (frame for index, frame in enumerate(frames) if index in chosen)
    elif settings.fps is not None:
        if job.video.is_folder:
            raise FrameError(f"{job.video.name} is a folder of images, which have no times")
        latest = -1
        for frame in frames:  # the first of each 1 / fps seconds; containers round times
            tick = math.floor((frame.time + 1e-3) * settings.fps)
            if tick > latest:
                latest = tick
                yield frame
    else:
        yield from (frame for index, frame in enumerate(frames) if index % settings.every == 0)


def _write_jpeg(pixels: Tensor, path: Path, settings: PrepareSettings) -> None:
    image_module = imports.require("PIL.Image", extra="train", purpose="writing image files")
    image = image_module.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().numpy())
    scale = settings.size / min(image.size)
    if scale < 1:
        sides = [max(1, round(side * scale)) for side in image.size]
        image = image.resize(sides, image_module.Resampling.BICUBIC)
    image.save(path, quality=settings.quality)


def _run_pool(
    waiting: Iterator[Job], workers: int, crashed: list[Job]
) -> Generator[tuple[Job, Result], None, bool]:
    """Work through jobs until they are done (then return True) or a process crashes."""
    running: dict[Future[Result], Job] = {}
    with _pool(workers) as pool:
        while True:
            try:
                while len(running) < 4 * workers and (job := next(waiting, None)) is not None:
                    # noted first: a broken pool refuses it
                    crashed.append(job)
                    running[pool.submit(extract, job)] = job
                    crashed.pop()
                if not running:
                    return True
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    result = future.result()
                    yield running.pop(future), result
            except BrokenProcessPool:
                crashed.extend(running.values())
                return False


def _extract_alone(job: Job) -> Result:
    try:
        with _pool(1) as pool:
            return pool.submit(extract, job).result()
    except BrokenProcessPool:
        shutil.rmtree(job.temporary, ignore_errors=True)
        return _CRASHED


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    # new processes and no forks, which would inherit the threads of progress bars and of torch
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (stop,))
    try:
        yield pool
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(stop: Any) -> None:
    """Leave Ctrl-C to the main process, which says when to stop."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
