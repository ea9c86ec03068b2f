"""Settling a clip beside one pass of the encoder over its frames."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cosettle_adapter.benchmark.bench import Bench, close, in_batches, rounding
from cosettle_adapter.benchmark.clips import frames_of
from cosettle_adapter.benchmark.others.bare_backbone import BareBackbone
from cosettle_adapter.benchmark.row import Row, Target, longer
from cosettle_adapter.closed_form import settle_clip

NAME = "settle"
ABOUT = "settling a clip by its own statistics beside one encoder pass over its frames"

_BATCH = 8


def run(bench: Bench) -> Iterator[Row]:
    """Measure what settling adds to features that are there, for a short clip and a long one."""
    adapter = bench.adapter
    size = (bench.whole_patches(bench.pick(280, 64)), bench.whole_patches(bench.pick(490, 96)))
    for count in (bench.pick(16, 4), bench.pick(64, 6)):
        frames = frames_of(count, size).to(bench.device)
        batches = in_batches(adapter.preprocess(frames).to(bench.dtype), _BATCH)
        bare = BareBackbone(adapter, size)
        with torch.no_grad():
            features = adapter(frames)
            settled = settle_clip(features)
            check = close(
                "settled features",
                adapter.settle(frames)(frames),
                settled,
                tolerance=rounding(bench.dtype),
            )
        yield longer(
            bench.in_turn(
                f"{NAME}, {count} frames",
                lambda features=features: settle_clip(features),  # type: ignore[misc]
                lambda bare=bare, batches=batches: [bare(batch) for batch in batches],  # type: ignore[misc]
                repeats=bench.repeats(5),
            ),
            benchmark=NAME,
            title="`settle_clip`, time against one encoder pass",
            what=f"settle_clip(features): {bench.settings.model}, {count} frames of {size[0]} x "
            f"{size[1]}, {bench.settings.dtype}, {bench.weights}",
            beside=f"timm's own model on the same frames, normalised already, batches of {_BATCH}",
            target=Target(1.0, at_least=False),
            check=check,
        )
