"""What the package does on one GPU, part by part; `gpu.sh` runs all parts within five minutes.

    python tests/benchmarks/gpu.py inference -o inference.json

Weights are random and nothing is downloaded. A row that fails leaves its error in the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench import bare_encoder, clip, interleaved, processor, ratios, seconds
from plain import scene
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cosettle_adapter import CoSettleAdapter, Projection, ProjectionConfig
from cosettle_adapter.backbones import Backbone, BackboneRow, build_backbone, lookup
from cosettle_adapter.backbones.architectures import meta_model
from cosettle_adapter.correspondence import LabelPropagator, TemporalFusion
from cosettle_adapter.extraction import extract
from cosettle_adapter.fitting import fit_starter
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.data import Sample, TrainingPairs
from cosettle_adapter.training.prepare import PrepareSettings, prepare
from cosettle_adapter.training.processes import make_accelerator
from cosettle_adapter.training.settings import TrainSettings
from cosettle_adapter.training.train import train
from cosettle_adapter.video import open_frames
from cosettle_adapter.visualization import write_film

_QUICK_ROW = BackboneRow(
    name="quick-vit14", family="random", architecture="vit_tiny_patch16_224", patch=14, width=32,
    depth=4, image_size=56, licence="", options={
        "patch_size": 14, "embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 56,
    },
)  # fmt: skip
_OVERHEAD = 5  # steps of training before timing begins


@dataclasses.dataclass
class Row:
    """One measurement; `per_second` is the median over the rounds."""

    what: str
    per_second: float
    low: float
    high: float
    unit: str = "frames/s"
    flops: float | None = None  # of one frame or pair, counted by PyTorch
    mfu: float | None = None  # share of the measured peak of bfloat16 matrix products
    peak_gib: float | None = None  # memory
    of: float | None = None  # ratio to what it is compared with, which `against` names
    against: str = ""


@dataclasses.dataclass(frozen=True)
class Session:
    device: str
    quick: bool

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 7

    def pick(self, full: Any, quick: Any) -> Any:
        return quick if self.quick else full

    @functools.cache  # noqa: B019  # one session a process
    def adapter(self, name: str) -> CoSettleAdapter:
        backbone = self.backbone(name).to(self.device, self.dtype)
        middle, step = round(backbone.depth * 7 / 12), max(1, round(backbone.depth / 6))
        layers = (middle - step, middle, middle + step)  # what a fit on first use mostly reads
        config = ProjectionConfig(
            backbone=backbone.row.name,
            fingerprint=backbone.fingerprint,
            layers=layers,
            norm=False,
            in_width=3 * backbone.width,
            out_width=backbone.width,
            kind="affine",
            averaging=0.2,
        )
        projection = Projection(config).requires_grad_(False).eval().to(self.device)
        return CoSettleAdapter(backbone, projection)

    def backbone(self, name: str) -> Backbone:
        row = _QUICK_ROW if self.quick else lookup(name)
        generator = torch.Generator().manual_seed(0)
        state = {
            key: torch.empty(tensor.shape).normal_(0, 0.02, generator=generator)
            + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
            for key, tensor in meta_model(row).state_dict().items()
        }
        return build_backbone(row, state, fingerprint="random", origin="random")

    @contextlib.contextmanager
    def memory(self, rows: list[Row]) -> Iterator[None]:
        """Fill in the peak memory of the rows that are measured inside."""
        before = len(rows)
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.cuda:
            for row in rows[before:]:
                row.peak_gib = torch.cuda.max_memory_allocated() / 2**30

    @functools.cached_property
    def peak(self) -> float:
        """FLOP/s of bfloat16 matrix products, the best of several."""
        side = self.pick(8192, 256)
        a, b = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))
        times = interleaved({"product": lambda: a @ b}, rounds=10, device=self.device)["product"]
        return float(2 * side**3 / min(times))


def flops_of(work: Callable[[], object]) -> float:
    # the counter knows the products of plain attention, but not every fused kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def row(what: str, count: int, times: list[float], **more: Any) -> Row:
    speeds = [count / taken for taken in times]
    low, middle, high = statistics.quantiles(speeds, n=4, method="inclusive")
    return Row(what, middle, low, high, **more)


def inference(session: Session) -> Iterator[Row]:
    """Adapter and encoders, eager and as a CUDA graph for each size, then compiled."""
    yield Row("peak of matrix products", session.peak / 1e12, 0, 0, unit="TFLOP/s")
    names = session.pick(("dinov2-vits14", "dinov2-vitb14", "dinov2-vitl14"), ("quick",))
    batches = session.pick({224: 128, 518: 32, 1022: 8}, {56: 2})
    for size, batch in batches.items():
        for name in names:
            yield from _sides(session, name, size, batch, "eager")
    if session.cuda:
        for name, size in (("dinov2-vitb14", 518), ("dinov2-vitl14", 518), ("dinov2-vitb14", 224)):
            yield from _sides(session, name, size, batches[size], "graph")
    for name in session.pick(("dinov2-vitb14", "dinov2-vitl14"), ("quick",)):
        yield from _sides(session, name, *session.pick((518, 32), (56, 2)), "compiled")


def _sides(session: Session, name: str, size: int, batch: int, mode: str) -> Iterator[Row]:
    adapter = session.adapter(name)
    frames = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(session.device)
    images = adapter.preprocess(frames).to(adapter.dtype)
    sides: dict[str, Callable[[], object]] = {
        "adapter": functools.partial(torch.inference_mode()(adapter), frames, batch_size=batch),
        "whole encoder": functools.partial(bare_encoder(adapter, (size, size), stop=False), images),
        "encoder to the same layer": functools.partial(
            bare_encoder(adapter, (size, size), stop=True), images
        ),
    }
    counted = {side: flops_of(work) / batch for side, work in sides.items()}
    if mode == "compiled":
        backend = session.pick("inductor", "eager")
        sides = {side: torch.compile(work, backend=backend) for side, work in sides.items()}
    if mode == "graph":
        sides = {side: _graphed(work) for side, work in sides.items()}
    rows: list[Row] = []
    with session.memory(rows):
        times = interleaved(sides, rounds=session.rounds, device=session.device)
        for side in sides:
            line = row(f"{name}, {size} px, {mode}, {side}", batch, times[side])
            line.flops = counted[side]
            line.mfu = line.flops * line.per_second / session.peak
            if side != "adapter":
                line.against = "adapter's frames/s to these"
                line.of = statistics.median(
                    theirs / ours
                    for theirs, ours in zip(times[side], times["adapter"], strict=True)
                )
            rows.append(line)
    yield from rows


def _graphed(work: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def extraction(session: Session) -> Iterator[Row]:
    """From an H.264 file of 480p to features: where the time goes."""
    adapter = session.adapter("dinov2-vitb14")
    count, size = session.pick((256, 280), (8, 56))
    batch = session.pick(32, 4)
    with tempfile.TemporaryDirectory() as folder:
        film = write_film(
            clip(count, session.pick((480, 854), (96, 160))), Path(folder) / "clip.mp4", fps=25
        )
        frames = torch.cat([chunk.frames for chunk in open_frames(film)]).to(session.device)
        output = Path(folder) / "clip.safetensors"
        sides: dict[str, Callable[[], object]] = {
            "frames in memory": lambda: adapter(frames, size=size, batch_size=batch),
            "decoding alone": lambda: [
                chunk.start for chunk in open_frames(film, chunk_size=batch)
            ],
            "file to features": lambda: [
                chunk.start for chunk in adapter.stream(film, size=size, batch_size=batch)
            ],
            "file to feature file": lambda: extract(
                adapter, film, output, size=size, batch_size=batch, overwrite=True
            ),
        }
        rows: list[Row] = []
        with session.memory(rows):
            times = interleaved(sides, rounds=min(3, session.rounds), device=session.device)
            memory = times["frames in memory"]
            for side in sides:
                line = row(f"dinov2-vitb14, 480p to {size} px, {side}", count, times[side])
                line.of = statistics.median(ratios(memory, times[side]))
                line.against = "to frames in memory"
                rows.append(line)
    yield from rows


class _InMemory(torch.utils.data.Dataset[Sample]):
    """Pairs that are drawn beforehand."""

    digest, skipped = "in memory", ()

    def __init__(self, count: int, size: int) -> None:
        self.count = self.clips = count
        self.pairs = torch.rand(min(count, 64), 2, 3, size, size)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"pair {index}"

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return Sample(self.pairs[key[1] % len(self.pairs)], key[1])


def training(session: Session) -> Iterator[Row]:
    """Pairs/s at the paper's setting, from memory and from prepared JPEG files."""
    size, batch, steps = session.pick((224, 128, 25), (56, 2, 8))
    precision = "bfloat16" if session.cuda else "float32"
    workers = session.pick(min(16, os.cpu_count() or 1), 0)
    for compiled in (False, True) if session.cuda else (False,):
        settings = TrainSettings(
            epochs=1, batch_size=batch, size=size, precision=precision, compile=compiled,
            warmup_epochs=0, pairs_per_clip=1,
        )  # fmt: skip
        what = "compiled, from memory" if compiled else "eager, from memory"
        yield from _steps(session, settings, _InMemory(batch * steps, size), what)
    settings = dataclasses.replace(settings, workers=workers)
    with tempfile.TemporaryDirectory() as name:
        films, count = Path(name) / "films", session.pick(16, 2)
        films.mkdir()
        for index in range(count):
            write_film(
                clip(session.pick(32, 8), session.pick((256, 340), (64, 80))),
                films / f"{index}.mp4", fps=25,
            )  # fmt: skip
        prepare(films, Path(name) / "prepared", PrepareSettings(), workers=workers)
        settings = dataclasses.replace(settings, pairs_per_clip=-(-batch * steps // count))
        pairs = TrainingPairs(Corpus.open(Path(name) / "prepared"), settings)
        yield from _steps(session, settings, pairs, f"from JPEG files, {workers} processes")


def _steps(session: Session, settings: TrainSettings, data: Any, what: str) -> Iterator[Row]:
    backbone = session.backbone("dino-vitb16")
    ends: list[float] = []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, session.memory(rows):
        train(
            backbone, data, folder, settings, accelerator=make_accelerator(session.device),
            overwrite=True, on_step=lambda report: ends.append(time.perf_counter()),
        )  # fmt: skip
        times = [after - before for before, after in itertools.pairwise(ends)]
        line = row(f"training, ViT-B/16, {settings.size} px, {what}", settings.batch_size,
                   times[_OVERHEAD:], unit="pairs/s")  # fmt: skip
        images = torch.zeros(1, 3, settings.size, settings.size, device=session.device)
        line.flops = 3 * flops_of(lambda: backbone.patch_tokens(images))  # three encoder passes
        line.mfu = line.flops * line.per_second / session.peak
        rows.append(line)
    yield from rows


def correspondence(session: Session) -> Iterator[Row]:
    """Label propagation (20 frames, radius 20) and temporal fusion, frame by frame."""
    for grid in session.pick(((34, 63), (60, 107)), ((6, 8),)):
        features, labels = scene(grid, 32, session.pick(768, 16), device=session.device)
        features = features.to(session.dtype)
        for what, new in (
            ("label propagation", lambda labels=labels: LabelPropagator(labels).step),
            ("temporal fusion", lambda: TemporalFusion().push),
        ):
            push = new()
            turn = iter(range(10**9))

            def step(push: Any = push, turn: Any = turn, features: Any = features) -> None:
                at = next(turn) % len(features)
                push(features[at : at + 1])

            for _ in range(22):
                step()
            rows: list[Row] = []
            with session.memory(rows):
                times = interleaved({"step": step}, rounds=30, device=session.device)["step"]
                rows.append(row(f"{what}, {grid[0]} x {grid[1]} patches", 1, times))
            yield from rows


def fitting(session: Session) -> Iterator[Row]:
    """A fit on first use, on the photographs of the package."""
    backbone = session.backbone("dinov2-vitb14").to(session.device)
    rows: list[Row] = []
    with session.memory(rows):
        spent = seconds(lambda: fit_starter(backbone), session.device)
        rows.append(Row("dinov2-vitb14, fit on first use", spent, 0, 0, unit="s"))
    yield from rows


def profile(session: Session) -> Iterator[Row]:
    """Seconds of the operations that take longest in `adapter(frames)`."""
    adapter = session.adapter("dinov2-vitb14")
    size, batch = session.pick((518, 32), (56, 2))
    frames = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(session.device)
    adapter(frames, batch_size=batch)
    with torch.profiler.profile() as profiler:  # of all devices
        adapter(frames, batch_size=batch)
    spent = "self_device_time_total" if session.cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda e: -float(getattr(e, spent, 0)))
    for event in events[:15]:
        taken = float(getattr(event, spent, 0)) / 1e6
        yield Row(f"profile: {event.key}, {event.count} calls", taken, 0, 0, unit="s")


PARTS: dict[str, Callable[[Session], Iterator[Row]]] = {
    part.__name__: part
    for part in (inference, extraction, training, correspondence, fitting, profile)
}


def measure(part: str, session: Session, output: Path) -> None:
    """Write the rows of a part as they come, so that a run that is cut off leaves its rows."""
    if os.environ.get("RANK", "0") != "0":
        for _ in PARTS[part](session):
            pass
        return
    card = torch.cuda.get_device_name() if session.cuda else processor()
    record: dict[str, Any] = {"card": card, "torch": torch.__version__, "part": part, "rows": []}
    try:
        for line in PARTS[part](session):
            record["rows"].append(dataclasses.asdict(line))
            output.write_text(json.dumps(record, indent=1), encoding="utf-8")
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"
        record["traceback"] = traceback.format_exc()
        output.write_text(json.dumps(record, indent=1), encoding="utf-8")
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models: does it run?")
    parser.add_argument("-o", "--output", type=Path, default=Path("part.json"))
    given = parser.parse_args()
    measure(given.part, Session(given.device, given.quick), given.output)


if __name__ == "__main__":
    main()
