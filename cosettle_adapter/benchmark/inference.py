"""``adapter(frames)`` beside timm's backbone alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cosettle_adapter.benchmark.bench import Bench, close, rounding
from cosettle_adapter.benchmark.clips import frames_of
from cosettle_adapter.benchmark.others.bare_backbone import BareBackbone
from cosettle_adapter.benchmark.peak import matmul_peak, operations, peak_gib
from cosettle_adapter.benchmark.row import Row, Target, faster, value
from cosettle_adapter.benchmark.spread import Spread
from cosettle_adapter.training.compilation import compile_encoder

NAME = "inference"
ABOUT = "adapter(frames) beside the bare timm backbone on the same normalised batch"

_BESIDE = "timm's own model on the same batch, normalised already, to the same block"


def run(bench: Bench) -> Iterator[Row]:
    """Measure frames a second, and on a GPU the share of what its matrix products reach."""
    adapter = bench.adapter
    side = bench.whole_patches(bench.settings.size or bench.pick(518 if bench.on_gpu else 224, 64))
    count = bench.batch_size(32 if bench.on_gpu else 8)
    frames = frames_of(count, (side, side)).to(bench.device)
    images = adapter.preprocess(frames).to(bench.dtype)
    bare = BareBackbone(adapter, (side, side))
    # of the model as it is written: a compiled one hides its products from the counter
    performed = operations(lambda: adapter(frames, batch_size=count))
    if bench.settings.compile:
        compile_encoder(adapter.backbone)
        bare.compile()
    with torch.no_grad():
        tokens, _ = adapter(frames, return_backbone=True, batch_size=count)
        check = close("tokens", tokens, bare(images), tolerance=rounding(bench.dtype))
    what = (
        f"adapter(frames): {bench.settings.model}, {count} uint8 frames of {side} x {side}, "
        f"{bench.settings.dtype}{', compiled' if bench.settings.compile else ''}, {bench.weights}"
    )
    timed = bench.in_turn(
        NAME,
        lambda: adapter(frames, batch_size=count),
        lambda: bare(images),
        repeats=bench.repeats(100 if bench.on_gpu else 40),
        warmup=bench.pick(10 if bench.on_gpu else 1, 1),
    )
    details: dict[str, Any] = {"layers": list(adapter.config.layers), "head": adapter.config.kind}
    memory = ""
    if bench.on_gpu:
        details["peak_gib"] = peak_gib(lambda: adapter(frames, batch_size=count), bench.device)
        details["peak_gib_beside"] = peak_gib(lambda: bare(images), bench.device)
        memory = "at most {peak_gib:.2f} GiB allocated, beside it {peak_gib_beside:.2f}".format(
            **details
        )
    yield faster(
        timed,
        count,
        unit="frames/s",
        benchmark=NAME,
        title="`adapter(frames)`, frames/s against the bare timm backbone",
        what=what,
        beside=_BESIDE,
        target=Target(0.97, at_least=True),
        check=check,
        note=memory,
        details=details,
    )
    bench.say("measuring the largest matrix product")
    peak = matmul_peak(bench.device, bench.dtype)
    held = bench.on_gpu and bench.dtype == torch.bfloat16
    yield value(
        [performed / second / peak for second in timed.ours],
        unit="of the peak",
        form="{:.1%}",
        benchmark=NAME,
        title=f"`adapter(frames)`, share of the {bench.settings.dtype} matrix-product peak",
        what=f"share of the {bench.settings.dtype} matrix-product peak: {what}",
        beside=f"a large square matrix product, {peak / 1e12:.3g} TFLOP/s",
        target=Target(0.40, at_least=True) if held else None,
        check=f"{performed / 1e9:.1f} GFLOP counted in products and convolutions",
        details={
            "peak_flops": peak,
            "operations": performed,
            "seconds": vars(Spread.of(timed.ours)),
        },
    )
