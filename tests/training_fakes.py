"""A small encoder and samples made of nothing, for tests of the training loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch.utils.data import Dataset

from cosettle_adapter import Projection
from cosettle_adapter.backbones import REGISTRY, Backbone, BackboneRow, build_backbone
from cosettle_adapter.backbones.weights import fingerprint
from cosettle_adapter.errors import FrameError
from cosettle_adapter.training.data import Sample, generator_of
from cosettle_adapter.training.processes import make_accelerator
from cosettle_adapter.training.settings import TrainSettings
from cosettle_adapter.training.train import Trained, train

from helpers import tiny_state

SIZE = 64

SMALL_VIT = BackboneRow(
    name="small-vit16",
    family="random",
    architecture="vit_tiny_patch16_224",
    patch=16,
    width=32,
    depth=2,
    image_size=SIZE,
    licence="Apache-2.0",
    options={"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": SIZE},
)
SMALL_CLIP = dataclasses.replace(
    REGISTRY["clip-vitb16"],
    options={**REGISTRY["clip-vitb16"].options, "embed_dim": 48, "depth": 2},
    width=48,
    depth=2,
    hub=None,
)

# 24 samples in batches of 4: six steps an epoch, 24 in all
QUICK = TrainSettings(epochs=4, batch_size=4, size=SIZE, base_lr=0.05, seed=3, pea="batch")
ONE_EPOCH = dataclasses.replace(QUICK, epochs=1)


def small_backbone(row: BackboneRow = SMALL_VIT) -> Backbone:
    """The row's architecture with random weights, the same every time."""
    state = tiny_state(row)
    return build_backbone(row, state, fingerprint=fingerprint(state), origin="random")


def distance(first: Projection, second: Projection) -> float:
    """The largest difference between two projections' weights."""
    state = second.state_dict()
    return max(float((t - state[name]).abs().max()) for name, t in first.state_dict().items())


@dataclasses.dataclass
class FakeData(Dataset[Sample]):
    """Blurred noise that moves by a few pixels from frame to frame."""

    samples: int = 24  # of an epoch
    frames: int = 2
    seed: int = 0
    broken: tuple[int, ...] = ()  # samples that are not finite
    missing: tuple[int, ...] = ()  # samples that cannot be read
    skips: tuple[int, ...] = ()  # samples that were drawn in place of a broken video
    seen: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return self.samples

    @property
    def clips(self) -> int:
        return self.samples

    @property
    def digest(self) -> str:
        return f"{self.samples} fakes of {self.frames} frames, seed {self.seed}"

    def name(self, index: int) -> str:
        return f"clip{index:02d}.mp4"

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        self.seen.append(key)
        if index in self.missing:
            raise FrameError(f"{self.name(index)} cannot be read")
        generator = generator_of(self.seed, epoch, index)
        scene = torch.rand(1, 3, 10, 10, generator=generator)
        wide = torch.nn.functional.interpolate(scene, size=(2 * SIZE, 2 * SIZE), mode="bicubic")[0]
        shift = int(torch.randint(4, 12, (), generator=generator))
        views = [wide[:, t * shift : t * shift + SIZE, :SIZE] for t in range(self.frames)]
        frames = torch.stack(views) * (float("nan") if index in self.broken else 1)
        skipped = ((f"gone{index:02d}.mp4", "not a video"),) if index in self.skips else ()
        return Sample(frames, 1000 * epoch + index, skipped)


def train_on_cpu(
    backbone: Backbone,
    output: Path,
    settings: TrainSettings = QUICK,
    data: FakeData | None = None,
    **options: object,
) -> Trained:
    accelerator = make_accelerator("cpu")
    return train(backbone, data or FakeData(), output, settings, accelerator=accelerator, **options)  # type: ignore[arg-type]
