"""Which samples every step sees: a pure function of the seed and the step.

There is one loader for the whole run. It begins at any step, gives the same samples for any number
of processes and workers, and cuts a step into forward passes of equal size.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cosettle_adapter.errors import CosettleError
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.seeds import seed_of

Key = tuple[int, int]
"""Epoch and index of a sample, both 0-based."""


class TrainingData(Protocol):
    """What the loop asks of its samples: pairs from videos, or views kept on disk."""

    @property
    def digest(self) -> str:
        """Hash over the videos and over how samples are drawn from them."""
        ...

    @property
    def clips(self) -> int:
        """Number of videos."""
        ...

    def __len__(self) -> int:
        """Samples of an epoch."""
        ...

    def __getitem__(self, key: Key) -> Any:
        """Return a sample, which depends on nothing but the key."""
        ...

    def name(self, index: int) -> str:
        """Return the name of a sample's clip."""
        ...

    def collate(self, samples: Sequence[Any]) -> Any:
        """Return a batch with ``seeds``, ``skipped``, and ``frames`` or ``views``."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """How samples become steps.

    Attributes:
        samples: of an epoch.
        batch_size: samples a process and forward pass.
        processes: that train together.
        accumulation: forward passes a step.
        epochs: passes over the samples.
        seed: of the order.
    """

    samples: int
    batch_size: int
    processes: int
    accumulation: int
    epochs: int
    seed: int

    @classmethod
    def of(
        cls,
        samples: int,
        *,
        batch_size: int,
        processes: int,
        accumulation: int,
        epochs: int,
        seed: int,
    ) -> Plan:
        """Make a plan, with smaller batches where there are too few samples for one step.

        Raises:
            TrainingError: fewer samples than one each for all processes and forward passes.
        """
        parts = processes * accumulation
        if samples < parts:
            raise TrainingError(
                f"{samples} samples are too few for {processes} processes and {accumulation} "
                "forward passes a step: use fewer of either, more clips, or --pairs-per-clip"
            )
        batch_size = min(batch_size, samples // parts)
        return cls(samples, batch_size, processes, accumulation, epochs, seed)

    @property
    def samples_per_step(self) -> int:
        """Samples that one step sees, over all processes."""
        return self.batch_size * self.processes * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps of an epoch; what is left over is dropped, other samples every epoch."""
        return self.samples // self.samples_per_step

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.epochs * self.steps_per_epoch

    def keys(self, step: int, rank: int) -> list[list[Key]]:
        """Return what one process sees in a step: a list of keys for each forward pass."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        first = within * self.samples_per_step + rank * self.batch_size
        starts = range(first, first + self.samples_per_step, self.batch_size * self.processes)
        starts = starts[: self.accumulation]
        chunks = [order[at : at + self.batch_size].tolist() for at in starts]
        return [[(epoch, index) for index in chunk] for chunk in chunks]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
        return torch.randperm(self.samples, generator=generator)


class StepBatches(Sampler[list[Key]]):
    """The batches of one process from a step to the end of the run."""

    def __init__(self, plan: Plan, *, rank: int = 0, start: int = 0) -> None:
        """Begin at step ``start`` as process ``rank``."""
        self._plan, self._rank, self._start = plan, rank, start

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield the keys of one forward pass after another."""
        for step in range(self._start, self._plan.steps):
            yield from self._plan.keys(step, self._rank)

    def __len__(self) -> int:
        """Forward passes that are left."""
        return (self._plan.steps - self._start) * self._plan.accumulation


def load_batches(
    data: TrainingData, batches: StepBatches, *, workers: int, pin_memory: bool
) -> Iterator[Any]:
    """Yield collated batches in order.

    Raises:
        CosettleError, OSError: a sample could not be had; the same error in one sentence whether
            it was raised here or in a worker.
    """
    loader: DataLoader[Any] = DataLoader(
        _ErrorsAsValues(data),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_CollateUnlessFailed(data.collate),
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_main_process,
        # the loader's own draw stays out of the global state, which checkpoints hold
        generator=torch.Generator().manual_seed(0),
    )
    for fetched in loader:
        if isinstance(fetched, _Failed):
            raise fetched.error
        yield fetched.batch


@dataclasses.dataclass(frozen=True)
class _Failed:
    """An error as a value: pickled by the loader it would become a printed traceback."""

    error: Exception


class _ErrorsAsValues(Dataset[Any]):
    def __init__(self, data: TrainingData) -> None:
        self._data = data

    def __getitem__(self, key: Key) -> Any:
        try:
            return self._data[key]
        except (CosettleError, OSError) as error:
            return _Failed(error)


@dataclasses.dataclass(frozen=True)
class _Fetched:
    """A batch that the loader can bring into memory from which copies to a GPU are fast."""

    batch: Any

    def pin_memory(self) -> _Fetched:
        return _Fetched(_pinned(self.batch))


@dataclasses.dataclass(frozen=True)
class _CollateUnlessFailed:
    collate: Callable[[Sequence[Any]], Any]

    def __call__(self, samples: Sequence[Any]) -> _Fetched | _Failed:
        failed = next((sample for sample in samples if isinstance(sample, _Failed)), None)
        return _Fetched(self.collate(samples)) if failed is None else failed


def _pinned(value: Any) -> Any:
    """Copy the tensors of nested dataclasses into pinned memory."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = dataclasses.fields(value)
    return dataclasses.replace(value, **{f.name: _pinned(getattr(value, f.name)) for f in fields})


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Keep a worker alive on Ctrl-C, which a terminal sends to the whole process group.

    The step that is under way still needs its batches.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
