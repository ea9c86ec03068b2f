"""The machine that figures were measured on, in words and numbers."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

import timm
import torch

from cosettle_adapter.version import __version__

_PROCESSORS = Path("/proc/cpuinfo")
_MEMORY = Path("/proc/meminfo")
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a reader needs to place a figure.

    Attributes:
        cpu: model.
        cores: that this process may use.
        threads: that torch uses.
        memory_gib: main memory; ``None`` where it is not told.
        load: mean number of busy processes over the last minute when measuring began; above a
            few tenths, others were at work and figures are worth less.
        gpu: model and memory of the device that was measured on; ``None`` on a CPU.
        system: operating system and architecture.
        versions: of Python and of the libraries.
    """

    cpu: str
    cores: int
    threads: int
    memory_gib: float | None
    load: float | None
    gpu: str | None
    system: str
    versions: dict[str, str]

    def __str__(self) -> str:
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.0f} GiB"
        parts = [
            *([self.gpu] if self.gpu else []),
            f"{self.cpu}, {self.cores} cores, {self.threads} threads{memory}",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
        ]
        if self.load is not None:
            parts.append(f"load {self.load:.1f} at the start")
        return "; ".join(parts)


def describe(device: torch.device) -> Machine:
    """Describe this machine."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB"
    return Machine(
        cpu=_field(_PROCESSORS, "model name") or platform.processor() or platform.machine(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        memory_gib=_kib(_field(_MEMORY, "MemTotal")),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        gpu=gpu,
        system=f"{platform.system()} {platform.machine()}",
        versions={
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "cosettle-adapter": __version__,
        },
    )


def free_gib() -> float | None:
    """Return the memory that can be had without swapping; ``None`` where it is not told."""
    return _kib(_field(_MEMORY, "MemAvailable"))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _field(path: Path, name: str) -> str | None:
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _kib(text: str | None) -> float | None:
    return None if text is None else int(text.split()[0]) * 1024 / _GIB
