"""Two sides timed in turn, so that a machine's moods fall on both alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Work = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of runs that were made in turn.

    Attributes:
        ours: seconds of each of our runs.
        other: seconds of each run of the other side; ``other[i]`` was made beside ``ours[i]``.
    """

    ours: list[float]
    other: list[float]


def in_turn(
    ours: Work,
    other: Work,
    *,
    repeats: int,
    device: torch.device,
    warmup: int = 1,
    on_pair: Callable[[int, int], None] = lambda done, total: None,
) -> Timed:
    """Time two sides in the order ours, other, other, ours, ours, other, ...

    Args:
        ours: what this package does.
        other: what it is compared with.
        repeats: pairs of runs.
        device: where they compute; a GPU is timed by its own events.
        warmup: pairs that are run before and not counted.
        on_pair: called with the pairs done and their number.
    """
    for _ in range(warmup):
        seconds(ours, device)
        seconds(other, device)
    timed = Timed([], [])
    for index in range(repeats):
        sides: Sequence[tuple[Work, list[float]]] = [(ours, timed.ours), (other, timed.other)]
        for work, found in sides if index % 2 == 0 else reversed(sides):
            found.append(seconds(work, device))
        on_pair(index + 1, repeats)
    return timed


def seconds(work: Work, device: torch.device) -> float:
    """Time one run: by events on a GPU, once all that was asked of it before is done."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    event: Any = torch.cuda.Event
    begin, end = (event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def repeated(work: Work, *, repeats: int, device: torch.device, warmup: int = 1) -> list[float]:
    """Time one side by itself."""
    for _ in range(warmup):
        seconds(work, device)
    return [seconds(work, device) for _ in range(repeats)]
