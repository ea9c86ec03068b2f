"""Label propagation beside a dense implementation: time, peak memory, and the same labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.benchmark import child
from cosettle_adapter.benchmark.bench import Bench
from cosettle_adapter.benchmark.errors import BenchmarkError
from cosettle_adapter.benchmark.machine import free_gib
from cosettle_adapter.benchmark.others import dense_propagation
from cosettle_adapter.benchmark.row import Row, Target, longer
from cosettle_adapter.benchmark.spread import Ratio, Spread
from cosettle_adapter.correspondence import LabelPropagator

NAME = "propagation"
ABOUT = "label propagation at 480p beside the dense one of DINO's evaluation script"

CONTEXT = 20
_RADIUS, _TOPK = 12, 5
_LABELS = 4
_AGREEING = 0.999
_GIB = 2**30
_BESIDE = "the dense affinity of DINO's script"


def run(bench: Bench) -> Iterator[Row]:
    """Measure one more frame of a clip whose context is full, at both patch sizes of 480p."""
    for grid in bench.pick([(34, 63), (60, 107)], [(8, 12)]):
        context = bench.pick(CONTEXT, 4)
        channels = bench.pick(384, 32)
        needed = _dense_gib(grid, context)
        if not _fits(bench, needed):
            bench.say(
                f"{NAME}: {grid[0]} x {grid[1]} is left out: the dense side needs {needed:.0f} GiB"
            )
            continue
        yield _time(bench, grid, context, channels)
        row = _memory(bench, grid, context, channels)
        if row is not None:
            yield row


def clip_features(
    grid: tuple[int, int], frames: int, channels: int, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return features of a scene that drifts, with noise, and soft labels of its first frame.

    Returns:
        ``(frames, channels, h, w)`` and ``(4, h, w)``.
    """
    generator = torch.Generator().manual_seed(0)
    scene = torch.randn(1, channels, *(max(2, side // 4) for side in grid), generator=generator)
    scene = F.interpolate(scene, size=grid, mode="bicubic")[0]
    noise = torch.randn(frames, channels, *grid, generator=generator)
    features = torch.stack([scene.roll(t // 4, -1) for t in range(frames)]) + 0.5 * noise
    blobs = torch.randn(1, _LABELS, *(max(2, side // 8) for side in grid), generator=generator)
    labels = (4 * F.interpolate(blobs, size=grid, mode="bilinear")[0]).softmax(0)
    return features.to(device), labels.to(device)


class _Sides:
    """A clip as far as its context is full, and what each side does with one more frame."""

    def __init__(
        self, grid: tuple[int, int], context: int, channels: int, extra: int, device: torch.device
    ) -> None:
        self._context = context
        self._features, labels = clip_features(grid, context + 1 + extra, channels, device=device)
        self._near = dense_propagation.neighbourhood(grid, _RADIUS, like=labels)
        self._propagator = LabelPropagator(
            labels,
            context=context,
            radius=_RADIUS,
            topk=_TOPK,
            temperature=dense_propagation.TEMPERATURE,
            protocol="dino",
        )
        self.ours: list[Tensor] = []
        self.other: list[Tensor] = []
        for _ in range(context + 1):
            self.step()

    def step(self) -> None:
        """Our next frame; the first ones fill the context."""
        self.ours.append(self._propagator.step(self._features[len(self.ours)]))

    def dense_step(self) -> None:
        """The dense side's next frame, from the same labels of the frames before it."""
        now = self._context + 1 + len(self.other)
        at = [0, *range(now - self._context, now)]
        self.other.append(
            dense_propagation.propagate(
                self._features[now],
                [self._features[t] for t in at],
                [self.ours[t] for t in at],
                self._near,
                topk=_TOPK,
            )
        )

    def check(self) -> str:
        """Make sure that both sides found the same labels."""
        ours = torch.stack(self.ours[self._context + 1 :][: len(self.other)])
        other = torch.stack(self.other)
        same = float((ours.argmax(1) == other.argmax(1)).double().mean())
        mean = float((ours - other).abs().double().mean())
        if same < _AGREEING or mean > 1 - _AGREEING:
            raise BenchmarkError(
                f"only {same:.3%} of the labels are those of the dense side (soft labels differ by "
                f"{mean:.1e} in the mean): there is no point in timing the two"
            )
        return f"{same:.3%} of cells have the same label; soft labels differ by {mean:.0e}"


def _time(bench: Bench, grid: tuple[int, int], context: int, channels: int) -> Row:
    repeats = bench.repeats(10 if bench.on_gpu else 5)
    bench.say(f"{NAME}: filling the context, {grid[0]} x {grid[1]}")
    sides = _Sides(grid, context, channels, repeats + 1, bench.device)
    timed = bench.in_turn(
        f"{NAME}, {grid[0]} x {grid[1]}", sides.step, sides.dense_step, repeats=repeats
    )
    row = longer(
        timed,
        scale=1e3,
        unit="ms/frame",
        benchmark=NAME,
        title=f"label propagation, {grid[0]} x {grid[1]} cells, speed against dense",
        what=f"time of a frame: {_words(grid, context, channels)}",
        beside=_BESIDE,
        check=sides.check(),
    )
    return dataclasses.replace(
        row,
        figure=Ratio.of(timed.other, timed.ours),
        form="{:.2f} x as fast",
        target=Target(5, at_least=True),
    )


def _memory(bench: Bench, grid: tuple[int, int], context: int, channels: int) -> Row | None:
    peaks: dict[str, list[float]] = {"ours": [], "other": []}
    whole: dict[str, float] = {}
    for side in peaks:
        bench.say(f"{NAME}: memory of {'ours' if side == 'ours' else 'the dense side'}")
        try:
            measured = child.call(
                __name__,
                "peak_of_a_frame",
                side=side,
                grid=grid,
                context=context,
                channels=channels,
                device=str(bench.device),
            )
        except BenchmarkError as error:
            bench.say(f"memory is left out: {error}")
            return None
        peaks[side].append(measured["above"] / 2**20)
        whole[side] = measured["peak"] / 2**20
    return Row(
        benchmark=NAME,
        title=f"label propagation, {grid[0]} x {grid[1]} cells, memory against dense",
        what=f"peak memory of a frame above what the clip itself takes: "
        f"{_words(grid, context, channels)}",
        beside=_BESIDE,
        figure=Ratio.of(peaks["ours"], peaks["other"]),
        form="{:.3f} x",
        unit="MiB",
        ours=Spread.of(peaks["ours"]),
        other=Spread.of(peaks["other"]),
        target=Target(0.25, at_least=False),
        check="each in a process of its own",
        details={"process_mib": whole},
        samples={"ours_mib": peaks["ours"], "other_mib": peaks["other"]},
    )


def peak_of_a_frame(
    side: str, grid: list[int], context: int, channels: int, device: str
) -> dict[str, int]:
    """Propagate one frame in this process; return its peak memory in bytes, and above the clip."""
    where = torch.device(device)
    sides = _Sides((grid[0], grid[1]), context, channels, 1, where)
    work = sides.step if side == "ours" else sides.dense_step
    if where.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return {"above": peak - before, "peak": peak}
    child.forget_peak()
    before = child.resident_bytes()
    work()
    peak = child.peak_bytes()
    return {"above": max(peak - before, 1), "peak": peak}


def _words(grid: tuple[int, int], context: int, channels: int) -> str:
    return (
        f"{grid[0]} x {grid[1]} cells of {channels} channels, the first and {context} preceding "
        f"frames, radius {_RADIUS}, top {_TOPK}"
    )


def _dense_gib(grid: tuple[int, int], context: int) -> float:
    """The affinity, its copy in another order, what top-k sorts, and the comparison's bytes."""
    cells = grid[0] * grid[1]
    return (context + 1) * cells**2 * 4 * 3.5 / _GIB


def _fits(bench: Bench, gib: float) -> bool:
    if bench.on_gpu:
        return gib * _GIB < torch.cuda.mem_get_info(bench.device)[0]
    free = free_gib()
    return free is None or gib < 0.8 * free
