"""Extracts the frames of a corpus once: a folder of JPEG images for each video."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from einops import rearrange

from cosettle_adapter import imports
from cosettle_adapter.errors import FrameError
from cosettle_adapter.io import atomic_path
from cosettle_adapter.training.corpus import Corpus, Places, Video
from cosettle_adapter.training.data import work_on
from cosettle_adapter.training.errors import (
    TrainingError,
    WorkerEndedError,
    disk_full,
    keep_settings,
)
from cosettle_adapter.video.files import is_video
from cosettle_adapter.video.selection import PendingFrame

SKIPPED_NAME = "skipped.txt"
SETTINGS_NAME = "prepared.json"


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """Which frames to keep, and their size and quality.

    The frames of a training pair are a fraction of the clip apart, so keeping fewer frames, evenly
    spaced, preserves their distance in time. Give only one of every and max_frames.

    Attributes:
        size: shorter side in pixels; smaller frames are not enlarged.
        every: keep every n-th frame.
        max_frames: keep at most this many frames, evenly spaced over the video.
        quality: quality of the JPEG files, 1 to 95.
    """

    size: int = 256
    every: int = 1
    max_frames: int | None = None
    quality: int = 90

    def __post_init__(self) -> None:
        for name in ("size", "every", "max_frames", "quality"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.quality > 95:
            raise ValueError(f"quality must be at most 95, got {self.quality}")
        if self.every > 1 and self.max_frames is not None:
            raise ValueError(
                f"got every {self.every} and max_frames {self.max_frames}; give only one of them"
            )


def prepare(
    data: Places,
    output: str | os.PathLike[str],
    settings: PrepareSettings | None = None,
    *,
    workers: int = 0,
    on_video: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, list[tuple[str, str]]]:
    """Extract the frames of a corpus, keeping its layout: ``<class>/<video>/000000.jpg``.

    The folder of a video gets its name when all its frames are written, so the same call resumes an
    interrupted one.

    ``on_video`` is called with the number of videos done and the total. Returns the number of
    extracted videos, and the unreadable videos and shards with reasons, also in ``skipped.txt``.
    """
    settings = settings or PrepareSettings()
    folder = Path(output).expanduser()
    for place in [data] if isinstance(data, (str, os.PathLike)) else data:
        if Path(place).expanduser().resolve() in [folder.resolve(), *folder.resolve().parents]:
            raise TrainingError(
                f"{folder} lies inside {place}, so its images would be read as videos; choose a "
                "folder outside"
            )
    corpus = Corpus.open(data)
    content = next(folder.iterdir(), None) if folder.is_dir() else None
    if content and not (folder / SETTINGS_NAME).exists():
        raise TrainingError(
            f"{folder} is not empty (it holds {content.name}); choose another folder"
        )
    keep_settings(folder / SETTINGS_NAME, dataclasses.asdict(settings))
    names = folder_names([video.name for video in corpus.videos])
    targets = [folder / name for name in names]
    jobs = [job for job in zip(corpus.videos, targets, strict=True) if not job[1].is_dir()]
    done, skipped = len(corpus) - len(jobs), list(corpus.problems)
    on_video(done, len(corpus))
    with disk_full(
        f"no space left in {folder}; complete videos are kept. Free some space, then run the same "
        "command again to continue"
    ):
        extracted = work_on(functools.partial(_extract, settings), jobs, workers=workers)
        try:
            for (video, _), problem in zip(jobs, extracted, strict=True):
                skipped += [(video.name, str(problem))] if problem else []
                done += 1
                on_video(done, len(corpus))
        except WorkerEndedError as error:
            started = [video.name for video, target in jobs if _unfinished(target).is_dir()]
            if not started:
                raise
            raise WorkerEndedError(
                f"the decoder crashed or ran out of memory on {' or '.join(started)}; remove this "
                "video, or use fewer --workers, and run the same command again"
            ) from error
        skipped.sort()
        with atomic_path(folder / SKIPPED_NAME) as path:
            lines = (f"{name}\t{' '.join(problem.split())}\n" for name, problem in skipped)
            path.write_text("".join(lines), "utf-8")
    count = sum(target.is_dir() for target in targets)
    if not count:
        name, why = skipped[0]
        raise FrameError(
            f"none of the {len(corpus)} videos can be read; the first is {name} ({why})"
        )
    return count, skipped


def folder_names(videos: Sequence[str]) -> list[str]:
    """Return a folder for each video: its name without suffix, or with it if two would be equal."""
    paths = [PurePosixPath(name) for name in videos]
    plain = [path.with_suffix("") if is_video(path) else path for path in paths]
    shared = Counter(plain)
    parents = {parent for path in plain for parent in path.parents}  # folders of other videos
    names = [
        path if shared[path] == 1 and path not in parents else whole
        for path, whole in zip(plain, paths, strict=True)
    ]
    return [re.sub(r"(^|/)\.", r"\1_", name.as_posix()) for name in names]


def _unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


def _extract(settings: PrepareSettings, job: tuple[Video, Path]) -> None:
    """Write the frames of a video into a folder that is renamed when complete."""
    video, target = job
    part = _unfinished(target)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        length = video.length()
        indices = set(range(0, length, settings.every))
        if settings.max_frames is not None:
            count = min(length, settings.max_frames)
            indices = {int((position + 0.5) * length / count) for position in range(count)}
        number = itertools.count()
        for index, frame in enumerate(video.frames()):
            if index in indices:
                write_image(frame, part / f"{next(number):06d}.jpg", settings)
        if not any(part.iterdir()):
            raise FrameError(f"{video.name} has no frames")
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_image(frame: PendingFrame, path: Path, settings: PrepareSettings) -> None:
    """Write a frame as a JPEG file, downscaled to ``settings.size`` if it is larger."""
    image_module = imports.require("PIL.Image", extra="train", purpose="writing image files")
    pixels = rearrange(frame.load(), "c h w -> h w c").contiguous().numpy()
    image = image_module.fromarray(pixels)
    scale = settings.size / min(image.size)
    if scale < 1:
        sides = [max(1, round(side * scale)) for side in image.size]
        image = image.resize(sides, image_module.Resampling.BICUBIC)
    image.save(path, quality=settings.quality)
