"""Many sources over the machines of a Ray cluster, or the processors of one (extra ``ray``)."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.errors import MissingExtraError
from cosettle_adapter.extraction.run import Job, Outcome, attempt
from cosettle_adapter.extraction.settings import EngineError, FormatError
from cosettle_adapter.imports import require

_OBJECT_STORE_BYTES = 128 << 20  # only names and outcomes are passed, never features


@dataclasses.dataclass(frozen=True)
class RayOptions:
    """How an extraction is spread over a Ray cluster.

    Attributes:
        workers: models at work at once, each in a process of its own.
        cpus_per_worker: processors a worker is given.
        gpus_per_worker: GPUs a worker is given; a fraction shares one.
        retries: how often videos that failed are tried again, after all others; those that can
            only fail again are not.
    """

    workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float | None = None
    retries: int = 1


def require_ray() -> Any:
    """Import Ray, or raise :class:`MissingExtraError`."""
    return require("ray", extra="ray", purpose="extraction over a Ray cluster")


def extract_with_ray(
    make_adapter: Callable[[], CoSettleAdapter],
    jobs: Sequence[Job],
    *,
    how: RayOptions,
    on_retry: Callable[[Outcome], None] = lambda outcome: None,
    **options: Any,
) -> Iterator[Outcome]:
    """Do jobs in the workers of a Ray cluster; yield an outcome each, as they come.

    A running cluster is used (``ray.init`` was called, or ``RAY_ADDRESS`` is set); otherwise one
    is started on this machine, and ended. Sources and outputs must lie where all its machines see
    them. A worker that dies is replaced, and what it was doing is resumed, once.

    Args:
        make_adapter: makes the model, in every worker; it is pickled.
        jobs: sources and outputs.
        how: number of workers, what each is given, and retries.
        on_retry: called with what failed before it is tried again.
        **options: arguments of :func:`extract`, other than callbacks.

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
        idle = [start.remote(make_adapter, options) for _ in range(min(how.workers, len(jobs)))]
        waiting = collections.deque((job, how.retries) for job in jobs)
        running: dict[Any, tuple[Job, int, Any]] = {}
        while waiting or running:
            while waiting and idle:
                (job, retries), worker = waiting.popleft(), idle.pop()
                # a worker has a working folder of its own
                source = str(Path(job.source).expanduser().absolute())
                there = Job(source, job.output.absolute())
                running[worker.attempt.remote(there)] = job, retries, worker
            (done, *_), _ = ray.wait(list(running))
            job, retries, worker = running.pop(done)
            idle.append(worker)
            try:
                outcome = dataclasses.replace(ray.get(done), job=job)
            except ray.exceptions.ActorDiedError as error:  # twice, or it could not start
                outcome = Outcome(job, error=f"its worker died: {error}", transient=True)
            except ray.exceptions.RayError as error:
                raise EngineError(
                    f"Ray failed with {len(waiting) + len(running) + 1} of {len(jobs)} sources to "
                    f"go; the same command resumes from there: {error}"
                ) from error
            if outcome.error is not None and outcome.transient and retries:
                on_retry(outcome)
                waiting.append((job, retries - 1))
            else:
                yield outcome


class _Worker:
    """What a process of the cluster holds: the model, and how to use it."""

    def __init__(self, make_adapter: Callable[[], CoSettleAdapter], options: Any) -> None:
        self._adapter, self._options = make_adapter(), options

    def attempt(self, job: Job) -> Outcome:
        try:
            return attempt(self._adapter, job, **self._options)
        except (FormatError, MissingExtraError, OSError) as error:
            # what this machine lacks, another may have
            return Outcome(job, error=str(error), transient=not isinstance(error, FormatError))


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
