"""Seeds of everything that training draws at random: pure functions of counters."""

from __future__ import annotations

import hashlib
import json
import operator

import torch


def seed_of(*parts: int | str) -> int:
    """Mix numbers and words into a seed; the same on every machine, and unrelated to any other.

    Args:
        parts: what the draw belongs to, such as the run's seed, ``"order"`` and the epoch.

    Returns:
        A number in [0, 2^63), which a tensor of int64 holds.
    """
    plain = [part if isinstance(part, str) else operator.index(part) for part in parts]
    digest = hashlib.sha256(json.dumps(plain).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_of(*parts: int | str) -> torch.Generator:
    """Return a generator on the CPU, seeded with :func:`seed_of` of ``parts``."""
    return torch.Generator().manual_seed(seed_of(*parts))
