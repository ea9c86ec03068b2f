"""``from_pretrained`` beside timm reading the same file; what importing the package adds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones.weights import save_tensors
from cosettle_adapter.benchmark import importing
from cosettle_adapter.benchmark.bench import Bench, close
from cosettle_adapter.benchmark.errors import BenchmarkError
from cosettle_adapter.benchmark.others import plain_loading
from cosettle_adapter.benchmark.row import Row, Target, longer, value

NAME = "load"
ABOUT = "from_pretrained from a warm cache beside timm; what the import adds"

_MODULES = {
    "import cosettle_adapter": "cosettle_adapter",
    "from cosettle_adapter import CoSettleAdapter": "cosettle_adapter.adapter",
}


def run(bench: Bench) -> Iterator[Row]:
    """Measure seconds to a model on the CPU, and the milliseconds of our own modules."""
    yield _loading(bench)
    yield from _importing(bench)


def _loading(bench: Bench) -> Row:
    settings = bench.settings
    backbone = bench.adapter.backbone
    row = backbone.row
    if row.kind != "vit":
        raise BenchmarkError(f"load is for transformers; {row.name} is read as feature maps")
    vit: Any = backbone.vit
    file = bench.folder / "model.safetensors"
    save_tensors({name: tensor.cpu() for name, tensor in vit.state_dict().items()}, file)
    bench.adapter.save_pretrained(bench.folder / "projection")
    # With weights of one's own, the file is what is given; else the cache that was just filled.
    own = settings.random_weights or settings.backbone_weights is not None
    if own and row.fingerprint is not None and settings.random_weights:
        raise BenchmarkError(
            f"{row.name} is only ever loaded with the tensors of its fingerprint, so load cannot "
            "be measured with --random-weights; leave it away, or take another --model"
        )
    name = str(bench.folder / "projection") if own else settings.model

    def ours() -> CoSettleAdapter:
        return CoSettleAdapter.from_pretrained(
            name,
            backbone_weights=file if own else None,
            cache_dir=settings.cache_dir,
            local_files_only=True,
        )

    def other() -> torch.nn.Module:
        return plain_loading.load(row, file)

    loaded, plain = ours().backbone, other()
    there = plain.state_dict()
    mine: Any = loaded.vit
    for key, tensor in mine.state_dict().items():
        close(f"the tensors {key}", tensor, there[key], tolerance=0)
    timed = bench.in_turn(NAME, ours, other, repeats=bench.repeats(10))
    size = file.stat().st_size / 2**20
    return longer(
        timed,
        scale=1e3,
        unit="ms",
        benchmark=NAME,
        title="`from_pretrained`, warm cache, time against timm",
        what=f"from_pretrained: {settings.model}, {size:.0f} MiB, cache warm, to the CPU",
        beside="timm.create_model(checkpoint_path=the same tensors), unverified",
        target=Target(1.2, at_least=False),
        check=f"all {len(there)} tensors are equal",
        note="ours includes the projection, and the sha256 of every tensor",
    )


def _importing(bench: Bench) -> Iterator[Row]:
    for what, module in _MODULES.items():
        measured: list[float] = []
        importing.added_in_a_child(module)
        for turn in range(bench.settings.repeats or bench.pick(7, 1)):
            bench.say(f"{NAME}: {what} in a process of its own, {turn + 1}")
            measured.append(1e3 * importing.added_in_a_child(module))
        yield value(
            measured,
            unit="ms",
            form="{:.0f} ms",
            benchmark=NAME,
            title=f"`{what}`, on top of what it must import",
            what=f"what `{what}` adds",
            beside=f"after {', '.join(importing.NEEDED)}, which it must import",
            target=Target(50, at_least=False),
            check="each in a process of its own, byte code cached",
        )
