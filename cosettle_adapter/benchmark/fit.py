"""``fit`` beside one pass of the encoder over the same frames."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.benchmark.bench import Bench, close, in_batches, rounding
from cosettle_adapter.benchmark.clips import film
from cosettle_adapter.benchmark.others.bare_backbone import BareBackbone
from cosettle_adapter.benchmark.row import Row, Target, longer
from cosettle_adapter.training.fit import Fit, FitSettings, fit_projection

NAME = "fit"
ABOUT = "fit beside one encoder pass over the same frames"

_BATCH = 8


def run(bench: Bench) -> Iterator[Row]:
    """Measure a fit of one block, and one that chooses its block on rendered clips."""
    backbone = bench.adapter.backbone
    count = bench.pick(8, 2)
    bench.say("rendering clips")
    clips = [
        film(
            bench.folder / f"fit{clip}.mp4", bench.pick(48, 12), bench.pick((480, 854), (72, 96)),
            seed=clip,
        )
        for clip in range(count)
    ]  # fmt: skip
    size = bench.settings.size or bench.pick(280, 64)
    block = bench.adapter.backbone.block(bench.adapter.config.layers[-1])
    for words, settings in (
        (f"block {block}", FitSettings(layers=(block,), rendered=0, size=size)),
        (
            "choosing a block by rendered clips",
            FitSettings(layers=bench.pick(None, (0, block)), rendered=bench.pick(12, 1), size=size),
        ),
    ):

        def ours(settings: FitSettings = settings) -> Fit:
            return fit_projection(backbone, clips, settings)

        bench.say(f"{NAME}, {words}: noting what is encoded")
        with encoded_images(backbone) as (images, deepest):
            fitted = ours()
        batches = _batches(images, bench)
        bare = {
            size: BareBackbone(CoSettleAdapter.raw(backbone, layer=max(deepest), norm=False), size)
            for size in {(batch.shape[-2], batch.shape[-1]) for batch in batches}
        }

        def other(batches: Sequence[Tensor] = batches, bare: Any = bare) -> None:
            for batch in batches:
                bare[batch.shape[-2], batch.shape[-1]](batch)

        with torch.no_grad():
            first = batches[0]
            check = close(
                "tokens of the deepest block",
                backbone.patch_tokens(first, layer=max(deepest), norm=False),
                bare[first.shape[-2], first.shape[-1]](first),
                tolerance=rounding(bench.dtype),
            )
            if settings.rendered == 0:
                check += "; " + _centred(bench, fitted, batches)
        frames = sum(len(batch) for batch in images)
        yield longer(
            bench.in_turn(f"{NAME}, {words}", ours, other, repeats=bench.repeats(3)),
            benchmark=NAME,
            title=f"`fit`, {words}, time against one encoder pass",
            what=f"fit, {words}: {backbone.row.name}, {count} films of 480p, {frames} frames "
            f"encoded at {size} on the shorter side, {bench.weights}",
            beside=f"timm's own model on the same {frames} frames in memory, batches of {_BATCH}",
            target=Target(1.15, at_least=False),
            check=check,
            note="ours decodes the films, matches patches, solves"
            + (", renders and propagates masks" if settings.rendered else ""),
        )


@contextlib.contextmanager
def encoded_images(backbone: Backbone) -> Iterator[tuple[list[Tensor], set[int]]]:
    """Note every image that a backbone is given, and the blocks that are read, inside the block."""
    images: list[Tensor] = []
    blocks: set[int] = set()
    original = backbone.intermediate_tokens

    def noting(batch: Tensor, layers: Sequence[int], **options: Any) -> list[Tensor]:
        images.append(batch.detach().clone())
        blocks.update(backbone.block(layer) for layer in layers)
        return original(batch, layers, **options)

    vars(backbone)["intermediate_tokens"] = noting
    try:
        yield images, blocks
    finally:
        del vars(backbone)["intermediate_tokens"]


def _batches(images: Sequence[Tensor], bench: Bench) -> list[Tensor]:
    """All images in batches of a good size, one image size at a time."""
    by_size: dict[tuple[int, ...], list[Tensor]] = {}
    for batch in images:
        by_size.setdefault(tuple(batch.shape[1:]), []).append(batch)
    return [
        part.to(bench.dtype)
        for same in by_size.values()
        for part in in_batches(torch.cat(same), _BATCH)
    ]


def _centred(bench: Bench, fitted: Fit, batches: Sequence[Tensor]) -> str:
    """The fitted map must centre the very tokens of those images."""
    projection = fitted.projection.to(bench.device)
    read = CoSettleAdapter.raw(
        bench.adapter.backbone, layer=projection.config.layers[0], norm=False
    )
    tokens = torch.cat(
        [
            rearrange(read.backbone.patch_tokens(batch, layer=read.config.layers[0], norm=False),
                      "b c h w -> (b h w) c").float()
            for batch in batches
        ]
    )  # fmt: skip
    mean = projection.project(tokens.double().mean(0).float())
    return close(
        "the mean of the projected tokens, and 0,",
        mean + 1,
        torch.ones_like(mean),
        tolerance=1e-2,
    )
