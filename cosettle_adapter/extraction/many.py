"""Many sources: which are meant, what their outputs are called, whose share they are, doing them.

They are done one after the other, or by the workers of a Ray cluster (extra ``ray``).
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

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_KINDS = f"videos ({', '.join(VIDEO_SUFFIXES)}) nor images ({', '.join(IMAGE_SUFFIXES)})"
# what launchers tell the processes they start: which one, of how many, which on its machine
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # srun
)
_OBJECT_STORE_BYTES = 128 << 20  # only names and outcomes are passed, never features


@dataclasses.dataclass(frozen=True)
class Source:
    """One thing to extract features of."""

    path: str  # a file, a folder of images, or a pattern of images
    kind: Literal["video", "images"]
    name: PurePosixPath  # relative to the folder it was found in: what its output is called after


@dataclasses.dataclass(frozen=True)
class Job:
    """One source and where its features go."""

    source: str
    output: Path


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a job: an extraction, or why it failed."""

    job: Job
    extraction: Extraction | None = None
    error: str | None = None
    transient: bool = False  # neither source nor settings are at fault, so try again

    @property
    def skipped(self) -> bool:
        """Whether it was finished before."""
        return self.extraction is not None and self.extraction.found == self.extraction.frames


@dataclasses.dataclass(frozen=True)
class Shard:
    """A share of the sources: every ``count``-th, from ``index`` (0-based) on."""

    index: int = 0
    count: int = 1
    local: int = 0  # index among the processes of this machine
    given_by: str = "--shard"  # or a variable of the launcher

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ExtractionError(
                f"{self.given_by} says shard {self.index} of {self.count}; shards are counted from "
                f"0, so 0/{max(self.count, 1)} is the first"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``0/4``, the first of four."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ExtractionError(f"expected a shard such as 0/4, the first of four, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> Shard:
        """Return the share that ``torchrun`` or ``srun`` gave this process; all without either."""
        for rank, size, local in _LAUNCHERS:
            if rank in variables and size in variables:
                index = int(variables[rank])
                return cls(index, int(variables[size]), int(variables.get(local, index)), rank)
        return cls()

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Return this shard's items."""
        return list(items[self.index :: self.count])

    def device(self, name: str) -> str:
        """Return this process's device: ``cuda`` becomes one GPU a process."""
        if name != "cuda" or self.count == 1 or not torch.cuda.is_available():
            return name
        return f"cuda:{self.local % torch.cuda.device_count()}"


@dataclasses.dataclass(frozen=True)
class RayOptions:
    """How an extraction is spread over a Ray cluster.

    Attributes:
        workers: models at work at once, each in a process of its own.
        cpus_per_worker: processors a worker is given.
        gpus_per_worker: GPUs a worker is given; a fraction shares one.
        retries: how often a worker tries again what failed, unless it can only fail again.
    """

    workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float | None = None
    retries: int = 1


def find_sources(given: Iterable[str | os.PathLike[str]]) -> list[Source]:
    """Find what files, folders and patterns mean, each once, in the order given.

    A folder of images is one source. A folder of videos, at any depth, is as many; one that holds
    neither, but folders of images below it, is as many as those. Hidden files are ignored. What
    does not exist or holds nothing usable, or images beside videos, is a :class:`FrameError`.
    """
    found = (source for each in given for source in _find(os.fspath(each)))
    return list({_location(source): source for source in found}.values())


def plan_jobs(sources: Sequence[Source], folder: Path, form: Format) -> list[Job]:
    """Give every source an output in ``folder``, named after it.

    ``clip.mp4`` becomes ``clip``. Where names coincide, also but for capital letters, it becomes
    ``clip.mp4``, then ``morning/clip``, from the folder that holds all sources, then both.
    """
    parents = [_location(source).parent.parts for source in sources]
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
    return [Job(each.path, output) for each, output in zip(sources, outputs, strict=True)]


def extract_many(
    adapter: CoSettleAdapter,
    jobs: Sequence[Job],
    *,
    on_job: Callable[[Job], None] = lambda job: None,
    **options: Any,
) -> Iterator[Outcome]:
    """Do jobs one after the other and yield their outcomes; one that fails affects no other.

    ``on_job`` is called before each; ``options`` are those of :func:`extract`. Where all others
    would fail too (a full disk, a format that cannot hold the features, a missing package), the
    error is raised.
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
    """Do jobs in the workers of a Ray cluster; yield their outcomes as they come.

    A running cluster is used (``ray.init`` was called, or ``RAY_ADDRESS`` is set); otherwise one
    is started on this machine, and ended. Sources and outputs must lie where all its machines see
    them. A worker that dies is replaced, and what it was doing is resumed, once.

    ``make_adapter`` is pickled and makes the model in every worker; ``options`` are those of
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
            max_task_retries=1,  # where the worker died
        )
        count = min(how.workers, len(jobs))
        idle = [start.remote(make_adapter, how.retries, options) for _ in range(count)]
        waiting, running = collections.deque(jobs), dict[Any, tuple[Job, Any]]()
        while waiting or running:
            while waiting and idle:
                job, worker = waiting.popleft(), idle.pop()
                # a worker has a working folder of its own
                source = str(Path(job.source).expanduser().absolute())
                there = Job(source, job.output.absolute())
                running[worker.attempt.remote(there)] = job, worker
            (done, *_), _ = ray.wait(list(running))
            job, worker = running.pop(done)
            idle.append(worker)
            try:
                yield dataclasses.replace(ray.get(done), job=job)
            except ray.exceptions.ActorDiedError as error:  # twice, or it could not start
                yield Outcome(job, error=f"its worker died: {error}")
            except ray.exceptions.RayError as error:
                raise EngineError(
                    f"Ray failed with {len(waiting) + len(running) + 1} of {len(jobs)} sources to "
                    f"go; the same command resumes from there: {error}"
                ) from error


def require_ray() -> Any:
    """Import Ray, or raise :class:`MissingExtraError`."""
    return require("ray", extra="ray", purpose="extraction over a Ray cluster")


class _Worker:
    """What a process of the cluster holds: the model, and how to use it."""

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
    """Use the cluster that is there, or have one on this machine while the block runs."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False}
    if not os.environ.get("RAY_ADDRESS"):
        options["num_cpus"] = max(1, round(how.workers * how.cpus_per_worker))
        options["object_store_memory"] = _OBJECT_STORE_BYTES
    try:
        ray.init(logging_level=logging.ERROR, **options)
    except Exception as error:  # it raises that very class
        raise EngineError(f"no Ray cluster could be reached or started: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _attempt(adapter: CoSettleAdapter, job: Job, **options: Any) -> Outcome:
    """Do one job; return what is wrong with it as its outcome, raise what would stop all."""
    try:
        return Outcome(job, extract(adapter, job.source, job.output, **options))
    except (FormatError, MissingExtraError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        logger.debug("%s failed", job.source, exc_info=True)
        transient = not isinstance(error, CosettleError)
        return Outcome(job, error=str(error) or type(error).__name__, transient=transient)


def _find(text: str) -> Iterator[Source]:
    path = Path(text).expanduser()
    if path.is_dir():
        yield from _in_folder(path)
    elif path.exists() or not glob.has_magic(text):
        kind: Literal["video", "images"] = "video" if isinstance(resolve(text), Path) else "images"
        yield Source(text, kind, PurePosixPath(path.name))
    else:
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207  # it knows "**" and dots
        paths = [Path(name) for name in sorted(names, key=natural_key)]
        usable = [each for each in paths if each.is_dir() or is_video(each)]
        if paths and all(map(is_image, paths)):
            folder = PurePosixPath(paths[0].parent.resolve().name or "images")
            yield Source(text, "images", folder)
        elif not usable:
            found = f"{paths[0]}, but neither {_KINDS}" if paths else "nothing"
            raise FrameError(f"pattern {text} matches {found}")
        for each in usable:
            yield from _find(str(each))


def _in_folder(root: Path) -> Iterator[Source]:
    images, videos = find_images(root), find_videos(root, recursive=True)
    if images and videos:
        raise FrameError(
            f"{root} holds images ({images[0].name}) beside videos ({videos[0].name}): is it "
            f"one source or many? Give '{root}/*{images[0].suffix}' for the images as one "
            f"source, or '{root}/*{videos[0].suffix}' for the videos"
        )
    if images:
        yield Source(str(root), "images", PurePosixPath(root.resolve().name or "images"))
        return
    below = dict.fromkeys(image.parent for image in find_images(root, recursive=True))
    if not videos and not below:
        raise FrameError(f"{root} holds neither {_KINDS}")
    for path in videos or below:
        name = PurePosixPath(path.relative_to(root).as_posix())
        yield Source(str(path), "video" if videos else "images", name)


def _location(source: Source) -> Path:
    """Return the absolute path, by which the same source given twice is recognised."""
    return Path(source.path).expanduser().absolute()


def _spellings(source: Source, shared: int, number: int) -> tuple[str, ...]:
    """Names for an output, ever longer; the first ``shared`` parts of all sources' paths agree."""
    name, full = source.name, PurePosixPath(*_location(source).parts[shared:-1], source.name.name)
    plain, plain_full = (
        each.with_suffix("") if source.kind == "video" else each for each in (name, full)
    )
    return str(plain), str(name), str(plain_full), str(full), f"{plain_full}-{number}"
