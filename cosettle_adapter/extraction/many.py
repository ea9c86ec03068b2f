"""Extract features of many sources: find them, name the outputs, shard the work and do it.

Sources are processed one after another, or by the workers of a Ray cluster (extra ``ray``).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import glob
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import torch

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.errors import CosettleError, FrameError, MissingExtraError
from cosettle_adapter.extraction.formats import Format
from cosettle_adapter.extraction.run import Extraction, extract
from cosettle_adapter.extraction.settings import EngineError, ExtractionError, FormatError
from cosettle_adapter.imports import require
from cosettle_adapter.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, find_images, find_videos
from cosettle_adapter.video.files import is_image, is_video, natural_key, resolve
from cosettle_adapter.video.sources import as_input, short_name, without_secrets

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_KINDS = f"videos ({', '.join(VIDEO_SUFFIXES)}) nor images ({', '.join(IMAGE_SUFFIXES)})"
# environment variables of launchers: index of the process, their number, index on its machine
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # srun
)
_OBJECT_STORE_BYTES = 128 << 20  # holds only names and outcomes, never features


@dataclasses.dataclass(frozen=True)
class Source:
    """One video, or the images of one clip."""

    path: str  # a file, a folder of images, or a pattern of images
    kind: Literal["video", "images"]
    name: PurePosixPath  # path in the folder it was found in; its output is named after it


@dataclasses.dataclass(frozen=True)
class Job:
    """A source and the output file for its features."""

    source: str
    output: Path


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a job: an extraction, or the reason why it failed."""

    job: Job
    extraction: Extraction | None = None
    error: str | None = None
    transient: bool = False  # a retry may succeed: neither source nor settings are at fault

    @property
    def skipped(self) -> bool:
        """Whether an earlier run had finished it."""
        return self.extraction is not None and self.extraction.found == self.extraction.frames


@dataclasses.dataclass(frozen=True)
class Shard:
    """A share of the sources: every ``count``-th, starting from ``index`` (0-based)."""

    index: int = 0
    count: int = 1
    local: int = 0  # index among the processes of this machine
    given_by: str = "--shard"  # or an environment variable of a launcher

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ExtractionError(
                f"{self.given_by} gives shard {self.index} of {self.count}, expected an index "
                f"from 0: the first is 0/{max(self.count, 1)}"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse text such as ``0/4``, the first of four."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ExtractionError(f"expected a shard such as 0/4, the first of four, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> Shard:
        """Return this process's shard under ``torchrun`` or ``srun``; otherwise all sources."""
        for rank, size, local in _LAUNCHERS:
            if rank in variables and size in variables:
                index = int(variables[rank])
                return cls(index, int(variables[size]), int(variables.get(local, index)), rank)
        return cls()

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Return this shard's items."""
        return list(items[self.index :: self.count])

    def device(self, name: str) -> str:
        """Return this process's device: ``cuda`` becomes one GPU per process."""
        if name != "cuda" or self.count == 1 or not torch.cuda.is_available():
            return name
        return f"cuda:{self.local % torch.cuda.device_count()}"


@dataclasses.dataclass(frozen=True)
class RayOptions:
    """How an extraction is distributed over a Ray cluster.

    Attributes:
        workers: number of processes, each with its own copy of the model.
        cpus_per_worker: CPUs per worker.
        gpus_per_worker: GPUs per worker; a fraction shares one GPU.
        retries: how often a worker retries a source after an error that may be temporary.
    """

    workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float | None = None
    retries: int = 1


def find_sources(given: Iterable[str | os.PathLike[str]]) -> list[Source]:
    """Find the sources that files, folders and patterns stand for, each once, in order.

    A folder of images is one source. In a folder of videos, at any depth, each video is a source;
    in a folder with neither, each subfolder of images. Hidden files are ignored.

    Raises:
        FrameError: a path does not exist, or holds nothing usable, or images beside videos.
    """
    sources = (source for path in given for source in _find(os.fspath(path)))
    return list({_location(source.path): source for source in sources}.values())


def plan_jobs(sources: Sequence[Source], folder: Path, form: Format) -> list[Job]:
    """Assign every source an output in ``folder``, named after it.

    ``clip.mp4`` becomes ``clip``. Names that coincide, ignoring case, become ``clip.mp4``, then
    ``morning/clip``, relative to the folder that holds all sources, then ``morning/clip.mp4``.
    """
    parents = [_folders(source) for source in sources]
    shared = max(1, len(os.path.commonprefix(parents)))  # noqa: RUF071  # of tuples
    spellings = [_spellings(source, shared, number) for number, source in enumerate(sources, 1)]
    names = [shortest for shortest, *_ in spellings]
    for length in range(1, 5):
        counts = collections.Counter(map(str.casefold, names))
        names = [
            longer[length] if counts[name.casefold()] > 1 else name
            for name, longer in zip(names, spellings, strict=True)
        ]
    outputs = (folder / f"{name}{form.suffix}" for name in names)
    return [Job(source.path, output) for source, output in zip(sources, outputs, strict=True)]


def extract_many(
    adapter: CoSettleAdapter,
    jobs: Sequence[Job],
    *,
    on_job: Callable[[Job], None] = lambda job: None,
    **options: Any,
) -> Iterator[Outcome]:
    """Process jobs one after another and yield their outcomes; a failed job affects no other.

    ``on_job`` is called before each job; ``options`` are those of :func:`extract`. Errors that
    would affect all jobs (a full disk, an unsuitable format, a missing package) are raised.
    """
    for job in jobs:
        on_job(job)
        yield _attempt(adapter, job, **options)


def extract_with_ray(
    make_adapter: Callable[[], CoSettleAdapter],
    jobs: Sequence[Job],
    *,
    how: RayOptions,
    **options: Any,
) -> Iterator[Outcome]:
    """Process jobs in the workers of a Ray cluster; yield their outcomes as they finish.

    A running cluster is used if ``ray.init`` was called or ``RAY_ADDRESS`` is set; otherwise one is
    started on this machine and stopped at the end. All machines must have access to sources and
    outputs. A worker that dies is replaced, and its job is resumed once.

    ``make_adapter`` is pickled and creates the model in every worker; ``options`` are those of
    :func:`extract`, other than callbacks.

    Raises:
        MissingExtraError, EngineError: Ray is not installed, or the cluster failed.
    """
    ray = require_ray()
    if not jobs:
        return
    with _cluster(ray, how):
        start = ray.remote(_Worker).options(
            num_cpus=how.cpus_per_worker,
            num_gpus=how.gpus_per_worker or 0,
            max_restarts=-1,
            max_task_retries=1,  # if the worker dies
        )
        count = min(how.workers, len(jobs))
        idle = [start.remote(make_adapter, how.retries, options) for _ in range(count)]
        waiting, running = collections.deque(jobs), dict[Any, tuple[Job, Any]]()
        while waiting or running:
            while waiting and idle:
                job, worker = waiting.popleft(), idle.pop()
                # a worker has its own working folder
                source = job.source
                if as_input(source) is None:
                    source = str(Path(source).expanduser().absolute())
                absolute = Job(source, job.output.absolute())
                running[worker.attempt.remote(absolute)] = job, worker
            (done, *_), _ = ray.wait(list(running))
            job, worker = running.pop(done)
            idle.append(worker)
            try:
                yield dataclasses.replace(ray.get(done), job=job)
            except ray.exceptions.ActorDiedError as error:  # died twice, or could not start
                yield Outcome(job, error=f"its worker died: {error}")
            except ray.exceptions.RayError as error:
                raise EngineError(
                    f"Ray failed with {len(waiting) + len(running) + 1} of {len(jobs)} sources "
                    f"left; run the same command again to resume: {error}"
                ) from error


def require_ray() -> Any:
    """Import Ray, or raise :class:`MissingExtraError`."""
    return require("ray", extra="ray", purpose="extraction over a Ray cluster")


class _Worker:
    """A worker process: its model and the options of its extractions."""

    def __init__(
        self, make_adapter: Callable[[], CoSettleAdapter], retries: int, options: Any
    ) -> None:
        self._adapter, self._retries, self._options = make_adapter(), retries, options

    def attempt(self, job: Job) -> Outcome:
        for _ in range(1 + self._retries):
            try:
                outcome = _attempt(self._adapter, job, **self._options)
            except (FormatError, MissingExtraError, OSError) as error:
                return Outcome(job, error=str(error))
            if not outcome.transient:
                break
        return outcome


@contextlib.contextmanager
def _cluster(ray: Any, how: RayOptions) -> Iterator[None]:
    """Use the running cluster, or start one on this machine during the block."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False}
    if not os.environ.get("RAY_ADDRESS"):
        options["num_cpus"] = max(1, round(how.workers * how.cpus_per_worker))
        options["object_store_memory"] = _OBJECT_STORE_BYTES
    try:
        ray.init(logging_level=logging.ERROR, **options)
    except Exception as error:  # ray raises Exception itself
        raise EngineError(f"no Ray cluster could be reached or started: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _attempt(adapter: CoSettleAdapter, job: Job, **options: Any) -> Outcome:
    """Process one job; raise errors that would affect all jobs, return others in the outcome."""
    try:
        return Outcome(job, extract(adapter, job.source, job.output, **options))
    except (FormatError, MissingExtraError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        logger.debug("%s failed", without_secrets(job.source), exc_info=True)
        transient = not isinstance(error, CosettleError)
        message = str(error) or type(error).__name__
        if isinstance(error, RuntimeError) and "memory" in message:  # torch's of a CPU and of CUDA
            message = f"memory does not suffice; give a smaller size or batch_size ({message})"
        return Outcome(job, error=message, transient=transient)


def _find(text: str) -> Iterator[Source]:
    path = Path(text).expanduser()
    if path.is_dir():
        yield from _in_folder(path)
    elif path.exists() or as_input(text) or not glob.has_magic(text):
        kind: Literal["video", "images"] = "images" if isinstance(resolve(text), list) else "video"
        yield Source(text, kind, PurePosixPath(short_name(text)))
    else:
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207  # supports "**" and hidden names
        paths = [Path(name) for name in sorted(names, key=natural_key)]
        usable = [path for path in paths if path.is_dir() or is_video(path)]
        if paths and all(map(is_image, paths)):
            folder = PurePosixPath(paths[0].parent.resolve().name or "images")
            yield Source(text, "images", folder)
        elif not usable:
            matches = f"{paths[0]}, but neither {_KINDS}" if paths else "nothing"
            raise FrameError(f"pattern {text} matches {matches}")
        for path in usable:
            yield from _find(str(path))


def _in_folder(root: Path) -> Iterator[Source]:
    images, videos = find_images(root), find_videos(root, recursive=True)
    if images and videos:
        raise FrameError(
            f"{root} holds images ({images[0].name}) and videos ({videos[0].name}); expected "
            f"only one kind. Give '{root}/*{images[0].suffix}' for the images as one source, or "
            f"'{root}/*{videos[0].suffix}' for the videos"
        )
    if images:
        yield Source(str(root), "images", PurePosixPath(root.resolve().name or "images"))
        return
    folders = dict.fromkeys(image.parent for image in find_images(root, recursive=True))
    if not videos and not folders:
        raise FrameError(f"{root} holds neither {_KINDS}")
    for path in videos or folders:
        name = PurePosixPath(path.relative_to(root).as_posix())
        yield Source(str(path), "video" if videos else "images", name)


def _location(path: str) -> Path:
    """Return the absolute path, which identifies a source."""
    return Path(path).expanduser().absolute()


def _folders(source: Source) -> tuple[str, ...]:
    """Return the folders of a source, which may become part of the name of its output."""
    return _location(without_secrets(source.path)).parent.parts


def _spellings(source: Source, shared: int, number: int) -> tuple[str, ...]:
    """Names for an output, from short to long; all paths share their first ``shared`` parts."""
    name, full = source.name, PurePosixPath(*_folders(source)[shared:], source.name.name)
    stem, full_stem = name, full
    if source.kind == "video":
        stem, full_stem = name.with_suffix(""), full.with_suffix("")
    return str(stem), str(name), str(full_stem), str(full), f"{full_stem}-{number}"
