"""What our own part costs at every grid, and how propagation grows with its context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cosettle_adapter.benchmark.bench import Bench, close, rounding
from cosettle_adapter.benchmark.clips import frames_of
from cosettle_adapter.benchmark.others.bare_backbone import BareBackbone
from cosettle_adapter.benchmark.propagation import clip_features
from cosettle_adapter.benchmark.row import Row, Table, Target, value
from cosettle_adapter.benchmark.spread import Ratio, Spread
from cosettle_adapter.correspondence import LabelPropagator

NAME = "size"
ABOUT = "our own share of the time from 16 x 16 to 74 x 74 cells; propagation against context"

_CELLS = 2048  # in a batch, about


def run(bench: Bench) -> Iterator[Row | Table]:
    """Measure parts of the adapter beside the backbone, grid by grid; then propagation."""
    rows = []
    sides = bench.pick((16, 24, 32, 48, 64, 74), (4, 6))
    for side in sides:
        row = _grid(bench, side, ends=(sides[0], sides[-1]))
        rows.append(row)
        yield row
    yield Table(
        NAME,
        "Own share against size",
        ("grid", "frames", "backbone, ms/frame", "preprocess", "projection", "own share"),
        [
            (
                row.details["grid"],
                row.details["frames"],
                *(round(row.details[part], 3) for part in ("backbone", "preprocess", "projection")),
                round(row.figure.value, 4),
            )
            for row in rows
        ],
        "medians; uint8 frames of the encoder's own size, so that nothing is resized",
    )
    yield from _context(bench)


def _grid(bench: Bench, side: int, *, ends: tuple[int, int]) -> Row:
    adapter = bench.adapter
    pixels = side * adapter.backbone.patch
    count = bench.settings.batch_size or max(1, min(8, _CELLS // side**2))
    frames = frames_of(count, (pixels, pixels)).to(bench.device)
    images = adapter.preprocess(frames).to(bench.dtype)
    bare = BareBackbone(adapter, (pixels, pixels))
    with torch.no_grad():
        # as the adapter has them: another layout in memory would have to be copied first
        tokens, features = adapter(frames, return_backbone=True)
        check = close(
            "features", features, adapter.projection(bare(images)).to(adapter.dtype),
            tolerance=rounding(bench.dtype),
        )  # fmt: skip
    repeats = bench.repeats(20 if bench.on_gpu else 5)
    what = f"{NAME}, {side} x {side}"
    alone = bench.repeated(f"{what}: backbone", lambda: bare(images), repeats=repeats)
    before = bench.repeated(
        f"{what}: preprocess", lambda: adapter.preprocess(frames), repeats=3 * repeats
    )
    with torch.no_grad():
        after = bench.repeated(
            f"{what}: projection",
            lambda: adapter.projection(tokens).to(adapter.dtype),
            repeats=3 * repeats,
        )
    backbone, own = Spread.of(alone), (Spread.of(before), Spread.of(after))
    low, middle, high = (
        _share(sum(getattr(part, name) for part in own), getattr(backbone, against))
        for name, against in (("low", "high"), ("median", "median"), ("high", "low"))
    )
    per_frame = 1e3 / count
    return Row(
        benchmark=NAME,
        title="our own share of the time, {0} x {0} to {1} x {1} cells, at most".format(*ends),
        what=f"our own share at {side} x {side} cells: {bench.settings.model}, {count} frames of "
        f"{pixels} x {pixels}, {bench.settings.dtype}",
        beside="the backbone by itself",
        figure=Ratio(middle, low, high),
        form="{:.2%}",
        unit="ms/frame",
        ours=Spread.of([per_frame * (a + b) for a, b in zip(before, after, strict=True)]),
        other=Spread.of([per_frame * second for second in alone]),
        target=Target(0.03, at_least=False),
        check=check,
        note="preprocessing and projection timed by themselves; the interval is of quartiles",
        details={
            "grid": f"{side} x {side}",
            "frames": count,
            "backbone": per_frame * backbone.median,
            "preprocess": per_frame * own[0].median,
            "projection": per_frame * own[1].median,
        },
        samples={"backbone": alone, "preprocess": before, "projection": after},
    )


def _share(own: float, backbone: float) -> float:
    return own / (own + backbone)


def _context(bench: Bench) -> Iterator[Row | Table]:
    grid = bench.pick((34, 63), (8, 12))
    contexts = bench.pick((5, 10, 20, 40), (2, 4, 6))
    channels = bench.pick(384, 32)
    repeats = bench.repeats(5)
    medians: list[float] = []
    for context in contexts:
        features, labels = clip_features(grid, context + 2 + repeats, channels, device=bench.device)
        propagator = LabelPropagator(labels, context=context, protocol="dino")
        frames = iter(features)
        for _ in range(context + 1):
            propagator.step(next(frames))

        def step(propagator: LabelPropagator = propagator, frames: object = frames) -> None:
            propagator.step(next(frames))  # type: ignore[call-overload]

        measured = bench.repeated(f"{NAME}: context of {context}", step, repeats=repeats)
        medians.append(1e3 * Spread.of(measured).median)
    fixed, each, explained = line(contexts, medians)
    words = f"{grid[0]} x {grid[1]} cells of {channels} channels"
    yield Table(
        NAME,
        f"Propagation against context, {words}",
        ("preceding frames", "ms/frame"),
        [(context, round(median, 2)) for context, median in zip(contexts, medians, strict=True)],
        f"{fixed:.1f} ms + {each:.2f} ms for each preceding frame",
    )
    yield value(
        [explained],
        unit="of the variance",
        form="{:.3f}",
        benchmark=NAME,
        title="label propagation, variance of its time that a line in the context explains",
        what=f"how much of the time of propagation a line in its context explains, {words}",
        beside="a least-squares line",
        target=Target(0.98, at_least=True),
        details={"fixed_ms": fixed, "each_ms": each},
    )


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Fit a straight line by least squares.

    Returns:
        Intercept, slope, and the share of the variance of ``y`` that it explains.
    """
    across, up = (torch.tensor(values, dtype=torch.float64) for values in (x, y))
    matrix = torch.stack([torch.ones_like(across), across], dim=1)
    fixed, slope = torch.linalg.lstsq(matrix, up[:, None]).solution[:, 0].tolist()
    left = (up - fixed - slope * across).square().sum()
    total = (up - up.mean()).square().sum()
    return fixed, slope, float(1 - left / total) if total else 1.0
