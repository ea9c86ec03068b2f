"""J and F beside a plain version of their definitions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from cosettle_adapter.benchmark.bench import Bench, close
from cosettle_adapter.benchmark.others import plain_masks
from cosettle_adapter.benchmark.row import Row, Target, longer
from cosettle_adapter.benchmark.spread import Ratio
from cosettle_adapter.evaluation.metrics import boundary_f, region_similarity

NAME = "masks"
ABOUT = "J and F of masks beside a plain NumPy and SciPy version of the definition"

Measure = Callable[..., float]

_DILATION = "SciPy's dilation"
_DISTANCE = "SciPy's distance transform"
_COUNTING = "NumPy"


def run(bench: Bench) -> Iterator[Row]:
    """Measure J and F together, and each by itself, on masks of 480p."""
    size = bench.pick((480, 854), (48, 80))
    count = bench.pick(20, 4)
    pairs = list(zip(*object_masks(count, size), strict=True))
    j = (region_similarity, plain_masks.region_similarity)
    f = (boundary_f, plain_masks.boundary_f)
    by_distance = (boundary_f, plain_masks.boundary_f_by_distance)
    for together, measures, plain, target in (
        ("J and F", (j, f), _DILATION, Target(5, at_least=True)),
        ("J and F", (j, by_distance), _DISTANCE, Target(5, at_least=True)),
        ("F", (f,), _DILATION, None),
        ("J", (j,), _COUNTING, None),
    ):
        found = [
            torch.tensor([[both[which](*pair) for both in measures] for pair in pairs])
            for which in (0, 1)
        ]
        check = close(together, *found, tolerance=1e-6)

        def work(which: int, measures: Sequence[tuple[Measure, Measure]] = measures) -> None:
            for pair in pairs:
                for both in measures:
                    both[which](*pair)

        timed = bench.in_turn(
            f"{NAME}, {together}",
            partial(work, 0),
            partial(work, 1),
            repeats=bench.repeats(7),
        )
        row = longer(
            timed,
            scale=1e3 / count,
            unit="ms/frame",
            benchmark=NAME,
            title=f"{together} of masks at {size[0]}p, speed against {plain}",
            what=f"{together} of one object in frames of {size[0]} x {size[1]}",
            beside=f"whole-frame masks, {plain}",
            check=check,
        )
        yield dataclasses.replace(
            row,
            figure=Ratio.of(timed.other, timed.ours),
            form="{:.2f} x as fast",
            target=target,
        )


def object_masks(count: int, size: tuple[int, int]) -> tuple[Any, Any]:
    """Return masks of an object of irregular outline, and guesses a few pixels off.

    The object fills about a twelfth of the frame, which is what DAVIS's do on average.

    Returns:
        Two boolean arrays ``(count, H, W)``.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = size
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)[None] * width / height
    coarse = torch.randn(count, 2, height // 12, width // 12, generator=generator)
    outline = F.interpolate(coarse, size=size, mode="bicubic")
    drift = torch.linspace(-0.5, 0.5, count)
    distance = ((x - drift[:, None, None]) ** 2 + y**2).sqrt()
    truth = distance + 0.06 * outline[:, 0] < 0.43
    guess = distance + 0.06 * outline[:, 0] + 0.02 * outline[:, 1] < 0.44
    return truth.numpy(), guess.numpy()
