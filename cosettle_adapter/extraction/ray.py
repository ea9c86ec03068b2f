"""Many sources over the machines of a Ray cluster, or the processors of one (extra ``ray``)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.errors import MissingExtraError
from cosettle_adapter.extraction.errors import EngineError, FormatError
from cosettle_adapter.extraction.run import Job, Outcome, attempt
from cosettle_adapter.imports import require

_OBJECT_STORE_BYTES = 128 << 20  # rows hold names and outcomes, never features
_MOST_DEATHS = 2  # workers that may die at one source before it is given up


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


def extract_with_ray(
    make_adapter: Callable[[], CoSettleAdapter],
    jobs: Sequence[Job],
    *,
    how: RayOptions,
    on_retry: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
    **options: Any,
) -> Iterator[Outcome]:
    """Do jobs with Ray Data.

    A running cluster is used (``ray.init`` was called, or ``RAY_ADDRESS`` is set); otherwise one
    is started on this machine, and ended. Sources and outputs must lie where all its machines see
    them. A worker that dies is replaced, and what it was doing is resumed.

    Args:
        make_adapter: makes the model, in every worker; it is pickled.
        jobs: sources and outputs.
        how: number of workers, what each is given, and retries.
        on_retry: called with what failed before it is tried again.
        **options: arguments of :func:`extract`, other than callbacks.

    Yields:
        An outcome a job, as they come; failures at the end.

    Raises:
        MissingExtraError: Ray Data is not installed.
        EngineError: the cluster failed.
    """
    ray = require_ray()
    if not jobs:
        return
    left = list(jobs)
    with _cluster(ray, how):
        for attempts_left in reversed(range(how.retries + 1)):
            failed = []
            for outcome in _one_pass(ray, make_adapter, left, how, options):
                if outcome.error is None:
                    yield outcome
                else:
                    failed.append(outcome)
            again = [outcome for outcome in failed if outcome.transient and attempts_left]
            yield from (outcome for outcome in failed if outcome not in again)
            if not again:
                return
            on_retry(again)
            left = [outcome.job for outcome in again]


def require_ray() -> Any:
    """Import Ray with Ray Data.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    purpose = "extraction over a Ray cluster"
    require("ray.data", extra="ray", purpose=purpose)
    return require("ray", extra="ray", purpose=purpose)


class _Worker:
    """What an actor holds: the model, and how to use it."""

    def __init__(
        self, make_adapter: Callable[[], CoSettleAdapter], options: Mapping[str, Any], run: str
    ) -> None:
        self._adapter = make_adapter()
        self._options = options
        self._run = run

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        job = Job(row["source"], Path(row["output"]))
        with counted_deaths(job.output, self._run) as deaths:
            try:
                if deaths < _MOST_DEATHS:
                    outcome = attempt(self._adapter, job, **self._options)
                else:
                    outcome = Outcome(job, error=f"it killed {deaths} workers: out of memory?")
            except (FormatError, MissingExtraError, OSError) as error:
                # what this machine lacks, another may have
                transient = not isinstance(error, FormatError)
                outcome = Outcome(job, error=str(error), transient=transient)
        return {"index": row["index"], "outcome": pickle.dumps(outcome)}


@contextlib.contextmanager
def counted_deaths(output: Path, run: str) -> Iterator[int]:
    """Yield how many workers of this run have died at an output, until the block ends.

    Ray restarts dead workers without end, so each notes beside the output that it has begun.
    """
    note = output.with_name(f".{output.name}.workers")
    try:
        noted_run, _, count = note.read_text().partition(" ")
        before = int(count) if noted_run == run else 0
    except (OSError, ValueError):
        before = 0
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(f"{run} {before + 1}")
    try:
        yield before
    finally:
        note.unlink(missing_ok=True)


def _one_pass(
    ray: Any,
    make_adapter: Callable[[], CoSettleAdapter],
    jobs: Sequence[Job],
    how: RayOptions,
    options: Mapping[str, Any],
) -> Iterator[Outcome]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # what is lost is reported below, and stops nothing else
    rows = [
        {
            "index": index,  # absolute paths, since a worker has a working folder of its own
            "source": str(Path(job.source).expanduser().absolute()),
            "output": str(job.output.absolute()),
        }
        for index, job in enumerate(jobs)
    ]
    # a block a source: outcomes come at once, and one source is lost with a worker at most
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Worker,
        fn_constructor_args=(make_adapter, dict(options), uuid.uuid4().hex),
        compute=ray.data.ActorPoolStrategy(
            size=min(how.workers, len(rows)), max_tasks_in_flight_per_actor=1
        ),
        num_cpus=how.cpus_per_worker,
        num_gpus=how.gpus_per_worker or 0,
    )
    reported = set()
    try:
        for row in data.iter_rows():
            reported.add(row["index"])
            yield dataclasses.replace(pickle.loads(row["outcome"]), job=jobs[row["index"]])
    except ray.exceptions.RayError as error:
        raise EngineError(
            f"Ray failed with {len(jobs) - len(reported)} of {len(jobs)} sources to go; the same "
            f"command resumes from there: {error}"
        ) from error
    for index, job in enumerate(jobs):
        if index not in reported:
            yield Outcome(job, error="Ray lost it; its log says why", transient=True)


@contextlib.contextmanager
def _cluster(ray: Any, how: RayOptions) -> Iterator[None]:
    """Use the cluster that is there, or have one on this machine while the block runs."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # plans and hints about bars
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "include_dashboard": False,
    }
    if not os.environ.get("RAY_ADDRESS"):
        options["num_cpus"] = max(1, round(how.workers * how.cpus_per_worker))
        options["object_store_memory"] = _OBJECT_STORE_BYTES
    try:
        ray.init(**options)
    except Exception as error:  # it raises that very class
        raise EngineError(f"no Ray cluster could be reached or started: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
