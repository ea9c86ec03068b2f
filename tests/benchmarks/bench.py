"""What the benchmark scripts share: interleaved ratios, peak memory, clips, and a table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from cosettle_adapter import CoSettleAdapter, __version__
from cosettle_adapter.video import render_clip

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
PAGE = Path(__file__).parents[2] / "weights_cards" / "BENCHMARKS.md"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured: `python tests/benchmarks/costs.py --help`."""

    model: str
    device: str
    dtype: str
    rounds: int
    quick: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def pick(self, full: Any, quick: Any) -> Any:
        return quick if self.quick else full

    def adapter(self) -> CoSettleAdapter:
        return CoSettleAdapter.from_pretrained(
            self.model, device=self.device, dtype=self.torch_dtype
        )


@dataclasses.dataclass(frozen=True)
class Figure:
    """One row: a ratio or a value with its quartiles, and the target it is held to."""

    what: str
    median: float
    low: float
    high: float
    unit: str = "x"
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g} {self.unit}"
        return "" if self.at_most is None else f"≤ {self.at_most:g} {self.unit}"

    @property
    def missed(self) -> bool:
        return (self.at_least is not None and self.median < self.at_least) or (
            self.at_most is not None and self.median > self.at_most
        )

    def __str__(self) -> str:
        figure = f"{self.median:.3g} {self.unit}{' (missed)' if self.missed else ''}"
        spread = f"{self.low:.3g} to {self.high:.3g}"
        return f"| {self.what} | {self.target} | {figure} | {spread} |"


def figure(what: str, values: Iterable[float], **target: Any) -> Figure:
    found = list(values)
    low, middle, high = (
        statistics.quantiles(found, n=4, method="inclusive") if found[1:] else found * 3
    )
    return Figure(what, middle, low, high, **target)


def interleaved(
    sides: dict[str, Callable[[], object]], *, rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each side; a round times every side once, in alternating order."""
    for work in sides.values():
        seconds(work, device)  # a warm-up
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name, work in list(sides.items())[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(seconds(work, device))
    return found


def ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def in_process(script: str, *arguments: str) -> float:
    """Run code in a process of its own; what it prints last is the figure."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    )
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def peak_mebibytes() -> float:
    """Peak memory of this process; ru_maxrss would begin with that of the parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def clip(count: int, size: tuple[int, int]) -> Tensor:
    """A clip `(count, 3, H, W)` uint8 over smooth noise, back and forth where it is long."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, size[0] // 8, size[1] // 8, generator=generator)
    photo = torch.nn.functional.interpolate(noise, size=size, mode="bicubic")[0].clamp(0, 1)
    frames = render_clip((photo * 255).to(torch.uint8), frames=min(count, 48), size=size).frames
    order = [*range(len(frames)), *reversed(range(len(frames)))]
    return frames[[order[t % len(order)] for t in range(count)]]


def bare_encoder(
    adapter: CoSettleAdapter, size: tuple[int, int], *, stop: bool
) -> Callable[[Tensor], object]:
    """timm's model for one image size: all of it, or up to the last layer the projection reads."""
    row = adapter.backbone.row
    options = {"num_classes": 0, "img_size": size, **row.options}
    with torch.device(adapter.device):  # initialising a large model on a CPU takes seconds
        model: Any = timm.create_model(row.architecture, **options).eval().to(adapter.dtype)
    layers = list(adapter.config.layers)
    if not stop:
        return torch.inference_mode()(model.forward_features)
    return torch.inference_mode()(
        lambda images: model.forward_intermediates(
            images, indices=layers, stop_early=True, intermediates_only=True, norm=False
        )
    )


def parse(description: str, names: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("only", nargs="*", choices=[*names, []], help="all by default")
    parser.add_argument("--model", default="dinov2-vits14-pypi")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("-o", "--output", type=Path, help="figures as JSON")
    parser.add_argument("--page", action="store_true", help=f"write them into {PAGE.name}")
    return parser.parse_args()


def machine(options: argparse.Namespace) -> str:
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else processor()
    return (
        f"{where}, {torch.get_num_threads()} threads, {options.model}, {options.dtype}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, "
        f"cosettle-adapter {__version__}, load {os.getloadavg()[0]:.1f} at the start"
    )


def processor() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return text.partition("model name")[2].partition(":")[2].partition("\n")[0].strip()


def store(options: argparse.Namespace, where: str, figures: list[Figure]) -> None:
    if options.output is not None:
        rows = [{**dataclasses.asdict(row), "missed": row.missed} for row in figures]
        options.output.write_text(json.dumps({"machine": where, "figures": rows}, indent=2))
    if options.page:
        table = ["| what | target | median | quartiles |", "|---|---|---|---|", *map(str, figures)]
        write_on_page(BEGIN, END, "\n".join([where, "", *table]))


def write_on_page(begin: str, end: str, text: str, page: Path = PAGE) -> None:
    """Replace what is between two marks of BENCHMARKS.md."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
