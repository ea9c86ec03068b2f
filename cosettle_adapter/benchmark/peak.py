"""How much of a device's own best an encoder reaches, and how much of its memory it takes."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from cosettle_adapter.benchmark.timing import Work, repeated

_SIDES = {"cuda": 8192, "cpu": 2048}
_REPEATS = {"cuda": 100, "cpu": 5}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations a second of a large square matrix product; the best of several."""
    side, repeats = _SIDES.get(device.type, 2048), _REPEATS.get(device.type, 5)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = min(repeated(lambda: a @ b, repeats=repeats, device=device, warmup=2))
    return 2 * side**3 / best


def peak_gib(work: Work, device: torch.device) -> float:
    """Return the most GPU memory that was allocated during one run, both models included."""
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def operations(work: Work) -> int:
    """Count the floating-point operations of matrix products and convolutions in one run."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
