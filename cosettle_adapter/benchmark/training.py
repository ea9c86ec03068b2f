"""A training step, decoding included, beside the official code's; the same with cached views."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.backbones.zoom import crop_corners
from cosettle_adapter.benchmark.bench import Bench, close
from cosettle_adapter.benchmark.clips import frames_of
from cosettle_adapter.benchmark.errors import BenchmarkError
from cosettle_adapter.benchmark.others.bare_backbone import BareBackbone
from cosettle_adapter.benchmark.others.official_step import FourFrames, OfficialModel, train_step
from cosettle_adapter.benchmark.row import Row, Target, faster
from cosettle_adapter.extras import require
from cosettle_adapter.training.batches import Plan, open_data
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.data import load_batches
from cosettle_adapter.training.distribution import make_accelerator
from cosettle_adapter.training.encoding import compile_encoder, encode_views
from cosettle_adapter.training.head import Head, make_optimizer, new_head
from cosettle_adapter.training.losses import objective
from cosettle_adapter.training.settings import ObjectiveSettings, TrainSettings
from cosettle_adapter.training.step import Stepper

NAME = "training"
ABOUT = "a training step, decoding included, beside the official code's; and with cached views"

_VIDEO = (256, 454)
_EPOCHS = 10_000
_NOTE = "one process on either side; both decode in the same number of workers"


def run(bench: Bench) -> Iterator[Row]:
    """Measure clips a second: ours as it is, then with views kept on disk."""
    backbone = bench.adapter.backbone
    if not isinstance(backbone, VisionTransformerBackbone) or backbone.vit.pos_embed is None:
        raise BenchmarkError(
            f"the official code perturbs absolute positions, which {backbone.row.name} has not; "
            "take another --model"
        )
    clips = bench.pick(8, 2)
    batch = bench.batch_size(64 if bench.on_gpu else 4)
    size = bench.whole_patches(bench.settings.size or bench.pick(224, 64))
    folders = image_folders(bench, clips)
    settings = TrainSettings(
        epochs=_EPOCHS,
        batch_size=batch,
        base_lr=1e-4,
        size=size,
        pairs_per_clip=max(1, -(-batch // clips)),
        precision="float16" if bench.on_gpu else "float32",
        workers=bench.settings.workers,
    )
    # Before anything is compiled or autocast, and with the same frames and places.
    official = _Official(bench, settings, folders)
    check = official.check()
    if bench.settings.compile:
        compile_encoder(backbone)
        official.bare.compile()
    what = (
        f"{bench.settings.model}, {batch} clips a step at {size} x {size}, "
        f"{settings.precision} encoder, {settings.workers} workers, {bench.weights}"
    )
    for cached, target in ((0, 2.0), (1, 10.0)):
        words = "a training step with cached views" if cached else "a training step"
        step = _our_steps(bench, folders, settings, cached)
        timed = bench.in_turn(
            f"{NAME}, {words}",
            step,
            official.step,
            repeats=bench.repeats(20 if bench.on_gpu else 4),
        )
        yield faster(
            timed,
            batch,
            unit="clips/s",
            benchmark=NAME,
            title=f"{words}, clips/s against the official code's",
            what=f"{words}: {what}",
            beside="the official code's step: four frames decoded, three encoder calls",
            target=Target(target, at_least=True),
            check=check,
            note=_NOTE,
        )


def image_folders(bench: Bench, clips: int) -> list[Path]:
    """Write clips as folders of JPEG images, as the official code reads them."""
    image_module: Any = require("PIL.Image", extra="train", purpose="writing image files")
    folders = []
    bench.say("rendering clips")
    for clip in range(clips):
        folder = bench.subfolder(f"clips/{clip:03d}")
        frames = frames_of(bench.pick(40, 12), bench.pick(_VIDEO, (72, 96)), seed=clip)
        for index, frame in enumerate(frames):
            pixels = rearrange(frame, "c h w -> h w c").contiguous().numpy()
            image_module.fromarray(pixels).save(folder / f"{index:06d}.jpg", quality=95)
        folders.append(folder)
    return folders


class _Official:
    """The other side, with all that it keeps between steps."""

    def __init__(self, bench: Bench, settings: TrainSettings, folders: list[Path]) -> None:
        adapter, size = bench.adapter, settings.size
        self._settings, self._adapter, self._device = settings, adapter, bench.device
        self._config = settings.head_config(adapter.backbone)
        own = CoSettleAdapter.raw(
            adapter.backbone, layer=self._config.layers[0], norm=self._config.norm
        )
        self.bare = BareBackbone(own, (size, size))
        head = new_head(self._config, init="random", seed=0).to(bench.device)
        self._head: nn.Module = Head(head)
        self._model = OfficialModel(self.bare, self.bare.model, self._head)
        samples = settings.batch_size * 4
        repeated = list(itertools.islice(itertools.cycle(folders), samples))
        data = FourFrames(repeated, size=size)
        self._batches = _forever(
            DataLoader(
                data,
                batch_size=settings.batch_size,
                sampler=RandomSampler(data, replacement=True, num_samples=1_000_000),
                num_workers=settings.workers,
                pin_memory=bench.on_gpu,
            )
        )
        self._optimizer = make_optimizer(self._head, settings)
        self._scaler = torch.amp.GradScaler(bench.device.type, enabled=bench.on_gpu)

    def step(self) -> float:
        frames = next(self._batches).to(self._device, non_blocking=True)
        return train_step(self._model, self._optimizer, self._scaler, frames)

    def check(self) -> str:
        """Compare the two losses on the same frames, with positions cropped at the same place."""
        size, backbone = self._settings.size, self._adapter.backbone
        generator = torch.Generator().manual_seed(0)
        frames = torch.rand(2, 4, 3, size, size, generator=generator).to(self._device)
        offsets = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
        grid = backbone.grid(size, size)
        paper = ObjectiveSettings(pea="batch")
        with torch.no_grad():
            views = encode_views(
                backbone,
                frames[:, (1, 3)],
                layers=self._config.layers,
                norm=self._config.norm,
                settings=paper,
                offsets=offsets,
            )
            ours = objective(self._head, views, paper).total
            row, column = crop_corners(offsets, grid, paper.pea_ratio)
            mean, std = (
                rearrange(frames.new_tensor(each), "c -> c 1 1")
                for each in (backbone.row.mean, backbone.row.std)
            )
            other = self._model((frames - mean) / std, (int(row), int(column)))
        return close("losses of the same frames", ours, other, tolerance=1e-3)


def _our_steps(
    bench: Bench, folders: list[Path], settings: TrainSettings, cached: int
) -> Callable[[], object]:
    settings = dataclasses.replace(settings, cache_views=cached * (settings.pairs_per_clip or 1))
    backbone = bench.adapter.backbone
    accelerator = make_accelerator(bench.settings.device)
    bench.say(f"{NAME}: {'encoding views' if cached else 'opening clips'}")
    data = open_data(
        Corpus.open(folders[0].parent),
        backbone,
        settings,
        accelerator=accelerator,
        views_folder=bench.folder / "views",
    )
    plan = Plan(len(data), settings.batch_size, 1, 1, settings.epochs, seed=0)
    head = Head(new_head(settings.head_config(backbone), init="random", seed=0))
    head = head.to(accelerator.device)
    optimizer = make_optimizer(head, settings)
    stepper = Stepper(accelerator, backbone, data, plan, settings, head, optimizer, {})
    batches = load_batches(
        data,
        plan.batches(),
        collate=data.collate,
        workers=settings.workers,
        pin_memory=bench.on_gpu,
    )
    steps = itertools.count()
    return lambda: stepper.run(next(steps), batches)


def _forever(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from loader
