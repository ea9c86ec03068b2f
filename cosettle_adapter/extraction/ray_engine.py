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
from cosettle_adapter.extraction.many import Job, Outcome, attempt
from cosettle_adapter.extras import require

_PURPOSE = "extraction over a Ray cluster"
# rows carry names and outcomes, never features
_OBJECT_STORE_BYTES = 128 << 20
# workers that may die at one source before it is given up
_DEATHS = 2


@dataclasses.dataclass(frozen=True)
class RayOptions:
    """How an extraction is spread.

    Attributes:
        workers: number of actors, each of which holds the model.
        cpus: processors an actor is given.
        gpus: GPUs an actor is given; a fraction shares one.
        retries: how often what failed is tried again, after everything else; not what can only
            fail again, such as a file that is no video.
    """

    workers: int = 1
    cpus: float = 1
    gpus: float = 0
    retries: int = 1


def extract_with_ray(
    make_adapter: Callable[[], CoSettleAdapter],
    jobs: Sequence[Job],
    *,
    how: RayOptions,
    on_retry: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
    **options: Any,
) -> Iterator[Outcome]:
    """Do jobs with Ray Data, by the function that does them without.

    A running cluster is used (``ray.init`` was called, or ``RAY_ADDRESS`` is set); otherwise one
    is started on this machine, and ended. Sources and outputs must lie where all its machines see
    them. An actor that dies is replaced, and goes on with what it was at.

    Args:
        make_adapter: makes the model, in every actor; it is pickled.
        jobs: sources and outputs.
        how: number of actors, what each is given, and retries.
        on_retry: called with what failed before it is tried again.
        **options: those of :func:`extract`, but for callbacks.

    Yields:
        An outcome a job, as they come; failures at the end.

    Raises:
        MissingExtraError: Ray Data is not installed.
        EngineError: the cluster broke down.
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
    require("ray.data", extra="ray", purpose=_PURPOSE)
    return require("ray", extra="ray", purpose=_PURPOSE)


class _Extractor:
    """What an actor holds: the model, and how to use it."""

    def __init__(
        self, make_adapter: Callable[[], CoSettleAdapter], options: Mapping[str, Any], run: str
    ) -> None:
        self._adapter = make_adapter()
        self._options = options
        self._run = run

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        job = Job(row["source"], Path(row["output"]))
        with deaths(job.output, self._run) as before:
            if before < _DEATHS:
                outcome = self._attempt(job)
            else:
                outcome = Outcome(job, error=f"it killed {before} workers, out of memory perhaps")
        return {"index": row["index"], "outcome": pickle.dumps(outcome)}

    def _attempt(self, job: Job) -> Outcome:
        try:
            return attempt(self._adapter, job, **self._options)
        except (FormatError, MissingExtraError, OSError) as error:
            # what this machine lacks, another may have
            return Outcome(job, error=str(error), transient=not isinstance(error, FormatError))


@contextlib.contextmanager
def deaths(output: Path, run: str) -> Iterator[int]:
    """Yield how many workers of a run have died at an output; none, once the block ends.

    Ray starts dead workers again and again, so what kills them is noted beside the output.
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
    context.max_errored_blocks = -1  # what is lost is told below, and takes no other with it
    rows = [
        {
            "index": index,  # absolute, for an actor's working folder is its own
            "source": str(Path(job.source).expanduser().absolute()),
            "output": str(job.output.absolute()),
        }
        for index, job in enumerate(jobs)
    ]
    # a block a source: what is done is told at once, and what is lost with an actor is one
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Extractor,
        fn_constructor_args=(make_adapter, dict(options), uuid.uuid4().hex),
        compute=ray.data.ActorPoolStrategy(
            size=min(how.workers, len(rows)), max_tasks_in_flight_per_actor=1
        ),
        num_cpus=how.cpus,
        num_gpus=how.gpus,
    )
    told = set()
    try:
        for row in data.iter_rows():
            told.add(row["index"])
            yield dataclasses.replace(pickle.loads(row["outcome"]), job=jobs[row["index"]])
    except ray.exceptions.RayError as error:
        raise EngineError(
            f"Ray broke down with {len(jobs) - len(told)} of {len(jobs)} sources to go; the same "
            f"command goes on from there: {error}"
        ) from error
    for index, job in enumerate(jobs):
        if index not in told:
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
        options |= {
            "num_cpus": max(1, round(how.workers * how.cpus)),
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        ray.init(**options)
    except Exception as error:  # it raises that very class
        raise EngineError(f"no Ray cluster could be reached or started: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
