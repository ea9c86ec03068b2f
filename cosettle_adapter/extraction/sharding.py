"""Which of many sources are this process's, where several share the work without talking."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from cosettle_adapter.extraction.errors import ExtractionError

Item = TypeVar("Item")

# what torchrun and srun tell the processes they start: which one, of how many, which on its node
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A share of the sources: every ``count``-th, from ``index`` on.

    Attributes:
        index: 0-based.
        count: number of shards.
        local: index among the processes of this machine.
        told_by: where it was said: ``--shard`` or a variable of the launcher.

    Raises:
        ExtractionError: an index that is not below the count.
    """

    index: int = 0
    count: int = 1
    local: int = 0
    told_by: str = "--shard"

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ExtractionError(
                f"{self.told_by} says shard {self.index} of {self.count}; shards are counted from "
                f"0, so 0/{max(self.count, 1)} is the first"
            )

    @property
    def ends_together(self) -> bool:
        """Whether the launcher ends all processes when one fails, as ``torchrun`` does."""
        return self.told_by == "RANK"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``0/4``: the first of four.

        Raises:
            ExtractionError: anything else.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ExtractionError(f"expected a shard such as 0/4, the first of four, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] | None = None) -> Shard:
        """Return the share that ``torchrun`` or ``srun`` gave this process; all where none did."""
        variables = os.environ if variables is None else variables
        for rank, size, local in _LAUNCHERS:
            if rank in variables and size in variables:
                return cls(
                    int(variables[rank]),
                    int(variables[size]),
                    int(variables.get(local, variables[rank])),
                    rank,
                )
        return cls()

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Return this shard's items: the same whoever asks, all of them among all shards."""
        return list(items[self.index :: self.count])

    def device(self, name: str) -> str:
        """Return this process's device: ``cuda`` becomes one GPU a process."""
        if name != "cuda" or self.count == 1 or not torch.cuda.is_available():
            return name
        return f"cuda:{self.local % torch.cuda.device_count()}"
