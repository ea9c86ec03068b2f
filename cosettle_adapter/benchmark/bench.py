"""What all benchmarks are given: a model, a device, sizes, and a folder for what they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import HubOptions
from cosettle_adapter.benchmark.errors import BenchmarkError
from cosettle_adapter.benchmark.models import load_model
from cosettle_adapter.benchmark.timing import Timed, Work, in_turn, repeated

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and how often.

    Attributes:
        model: registered name, ``timm:<tag>`` or ``open_clip:<arch>/<tag>``; a projection folder.
        random_weights: fill the architecture with random numbers, which takes no download and
            costs the same time.
        backbone_weights: a file of the backbone's weights.
        device: torch device.
        dtype: of the backbone: float32, bfloat16, float16.
        compile: compile the blocks of both sides' encoders.
        repeats: pairs of runs, in place of each benchmark's own number.
        batch_size: frames or clips at a time, likewise.
        size: shorter side of the frames in pixels, likewise.
        workers: processes that decode for training, on either side.
        quick: small sizes and two repeats: to see that everything works, not to learn how fast.
        offline: never touch the network.
        cache_dir: cache in place of ``HF_HOME``.
    """

    model: str = "dinov2-vits14-pypi"
    random_weights: bool = False
    backbone_weights: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    repeats: int | None = None
    batch_size: int | None = None
    size: int | None = None
    workers: int = 0
    quick: bool = False
    offline: bool = False
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("batch_size", 1), ("size", 1), ("workers", 0)):
            given = getattr(self, name)
            if given is not None and given < least:
                raise BenchmarkError(f"{name} must be at least {least}, got {given}")
        device = torch.device(self.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise BenchmarkError(f"--device {self.device} was asked for, but there is no GPU here")


class Bench:
    """The surroundings of a benchmark."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        *,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Measure with ``settings``, write into ``folder``, and ``say`` what is being done."""
        self.settings, self.folder, self.say = settings, folder, say
        self.device = torch.device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.quick = settings.quick
        self.on_gpu = self.device.type == "cuda"

    @cached_property
    def adapter(self) -> CoSettleAdapter:
        """The model; loaded when a benchmark first asks for it."""
        settings = self.settings
        self.say(f"loading {settings.model}")
        return load_model(
            settings.model,
            random_weights=settings.random_weights,
            weights=settings.backbone_weights,
            device=self.device,
            dtype=self.dtype,
            options=HubOptions(cache_dir=settings.cache_dir, local_files_only=settings.offline),
        )

    @property
    def weights(self) -> str:
        """What the weights are, in a word."""
        return "random weights" if self.settings.random_weights else "its own weights"

    def pick(self, full: T, quick: T) -> T:
        """Return a size, or the one for ``--quick``."""
        return quick if self.quick else full

    def repeats(self, full: int) -> int:
        """Return the number of pairs of runs."""
        return self.settings.repeats or self.pick(full, 2)

    def batch_size(self, full: int) -> int:
        """Return the number of frames or clips at a time."""
        return self.settings.batch_size or self.pick(full, 2)

    def whole_patches(self, pixels: int) -> int:
        """Return the nearest side that is a whole number of patches."""
        patch = self.adapter.backbone.patch
        return max(1, round(pixels / patch)) * patch

    def in_turn(
        self, what: str, ours: Work, other: Work, *, repeats: int, warmup: int = 1
    ) -> Timed:
        """Time two sides in turn, saying how far it is."""
        self.say(f"{what}: warming up")
        return in_turn(
            ours,
            other,
            repeats=repeats,
            warmup=warmup,
            device=self.device,
            on_pair=lambda done, total: self.say(f"{what}: {done} of {total} pairs"),
        )

    def repeated(self, what: str, work: Work, *, repeats: int) -> list[float]:
        """Time one side."""
        self.say(what)
        return repeated(work, repeats=repeats, device=self.device)

    def subfolder(self, name: str) -> Path:
        """Return a new folder below this bench's own."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def in_batches(images: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Return views of ``size`` images each, fewer in the last."""
    return [images[start : start + size] for start in range(0, len(images), size)]


def close(what: str, ours: torch.Tensor, other: torch.Tensor, *, tolerance: float) -> str:
    """Make sure that two sides computed the same, and say how closely.

    Args:
        what: that is compared.
        ours: what this package computed.
        other: what the other side did.
        tolerance: of the largest difference, as a share of the other side's largest value.

    Raises:
        BenchmarkError: they differ by more, or in shape.
    """
    if ours.shape != other.shape:
        raise BenchmarkError(
            f"{what}: {tuple(ours.shape)} here and {tuple(other.shape)} beside it; there is no "
            "point in timing the two"
        )
    ours, other = ours.detach().double().cpu(), other.detach().double().cpu()
    largest = max(float(other.abs().max()), 1e-12)
    difference = float((ours - other).abs().max()) / largest
    if not difference <= tolerance:
        raise BenchmarkError(
            f"{what} differ by {difference:.2g} of the largest, more than {tolerance:.2g}: the two "
            "sides do not compute the same, so there is no point in timing them"
        )
    return f"{what} within {difference:.1e}"


def rounding(dtype: torch.dtype) -> float:
    """Return by how much, as a share, two orders of the same sums may differ."""
    return 1e-3 if dtype == torch.float32 else 5e-2
