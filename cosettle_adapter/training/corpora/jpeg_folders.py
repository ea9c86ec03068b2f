"""Videos to folders of JPEG images, several at a time."""

from __future__ import annotations

import contextlib
import errno
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING, Any

from einops import rearrange
from torch import Tensor

from cosettle_adapter import extras
from cosettle_adapter.errors import FrameError
from cosettle_adapter.training.corpora.corpus import Video
from cosettle_adapter.training.errors import DiskFullError
from cosettle_adapter.video.files import IMAGE_SUFFIXES
from cosettle_adapter.video.timeline import PendingFrame

if TYPE_CHECKING:
    from cosettle_adapter.training.corpora.preparation import PrepareSettings

Result = int | str
"""The number of images written, or why there are none."""

_CRASHED = "its decoder crashed the process that read it"

_stop: Event | None = None


@dataclass(frozen=True)
class Job:
    """A video and the folder that its images go to."""

    video: Video
    target: Path
    settings: PrepareSettings


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
        # one of those under way crashed its process; each alone tells which
        for job in crashed:
            yield job, _extract_alone(job)
        crashed.clear()


def extract(job: Job) -> Result:
    """Write the frames of one video; its folder appears once it is whole.

    Raises:
        DiskFullError: no room is left.
        OSError: the folder cannot be written.
    """
    if job.target.is_dir() and (count := count_images(job.target)):
        return count
    temporary = _temporary(job)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            count = _write_frames(job, temporary)
        except FrameError as error:
            return str(error) or type(error).__name__
        temporary.replace(job.target)
        return count
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"no room is left for the frames of {job.video.name} in {job.target.parent}; what is "
            "whole is kept. Make room and run the same again to go on"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def count_images(folder: Path) -> int:
    """Count the images in a folder."""
    with os.scandir(folder) as entries:
        return sum(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries)


def _temporary(job: Job) -> Path:
    return job.target.with_name(f".{job.target.name}.part")


def _write_frames(job: Job, folder: Path) -> int:
    count = 0
    with contextlib.closing(job.video.frames()) as frames:
        for frame in _wanted(job, frames):
            if _stop is not None and _stop.is_set():
                raise FrameError("interrupted")
            _write_jpeg(frame.load(), folder / f"{count:06d}.jpg", job.settings)
            count += 1
    if not count:
        raise FrameError(f"{job.video.name} has no frames")
    return count


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
        yield from _at_rate(frames, settings.fps)
    else:
        yield from (frame for index, frame in enumerate(frames) if index % settings.every == 0)


def _at_rate(frames: Iterable[PendingFrame], fps: float) -> Iterator[PendingFrame]:
    """Yield the first frame of each ``1 / fps`` seconds."""
    latest = -1
    for frame in frames:
        # times of containers are rounded to a millisecond or so
        tick = math.floor((frame.time + 1e-3) * fps)
        if tick > latest:
            latest = tick
            yield frame


def _write_jpeg(pixels: Tensor, path: Path, settings: PrepareSettings) -> None:
    image_module = extras.require("PIL.Image", extra="train", purpose="writing image files")
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
                    # put down first: a broken pool refuses it
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
        shutil.rmtree(_temporary(job), ignore_errors=True)
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
