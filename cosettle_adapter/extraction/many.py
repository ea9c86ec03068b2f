"""Many sources, one after the other, each into a file of its own; one that fails harms no other."""

from __future__ import annotations

import dataclasses
import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.errors import CosettleError, MissingExtraError
from cosettle_adapter.extraction.errors import FormatError
from cosettle_adapter.extraction.finished import Extraction
from cosettle_adapter.extraction.formats import Format
from cosettle_adapter.extraction.naming import output_names
from cosettle_adapter.extraction.run import extract
from cosettle_adapter.extraction.sources import Source

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """One source and where its features go."""

    source: str
    output: Path


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: the job.
        extraction: what was written, or found finished; ``None`` if it failed.
        error: why it failed, in a sentence; ``None`` if it did not.
        transient: whether it may do better another time: not where source or settings are at
            fault.
    """

    job: Job
    extraction: Extraction | None = None
    error: str | None = None
    transient: bool = False

    @property
    def skipped(self) -> bool:
        """Whether it was finished before."""
        return self.extraction is not None and self.extraction.found == self.extraction.frames


def plan_jobs(sources: Sequence[Source], folder: Path, row: Format) -> list[Job]:
    """Give every source an output in ``folder``, named after it."""
    names = output_names(sources)
    return [
        Job(source.path, folder / f"{name}{row.suffix}")
        for source, name in zip(sources, names, strict=True)
    ]


def extract_many(
    adapter: CoSettleAdapter,
    jobs: Sequence[Job],
    *,
    on_job: Callable[[Job], None] = lambda job: None,
    **options: Any,
) -> Iterator[Outcome]:
    """Do jobs one after the other.

    Args:
        adapter: what computes the features.
        jobs: sources and outputs.
        on_job: called before each.
        **options: those of :func:`extract`.

    Yields:
        An outcome a job, in order.

    Raises:
        OSError: the disk is full, so that the others would fail too.
        FormatError: no such format, or it cannot hold what was asked for.
        MissingExtraError: what reads such sources, or writes such files, is not installed.
    """
    for job in jobs:
        on_job(job)
        yield attempt(adapter, job, **options)


def attempt(adapter: CoSettleAdapter, job: Job, **options: Any) -> Outcome:
    """Do one job, and turn what is wrong with it into its outcome.

    Raises:
        OSError, FormatError, MissingExtraError: as for :func:`extract_many`.
    """
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
