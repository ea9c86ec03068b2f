"""What the package costs, beside its encoder and beside plain ways to do the same.

    python tests/benchmarks/costs.py --page                      all rows into BENCHMARKS.md
    python tests/benchmarks/costs.py inference --device cuda --dtype bfloat16

Both sides of a row are interleaved in one run; a figure is the median of the ratios of rounds.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from bench import (
    Figure,
    Options,
    bare_encoder,
    clip,
    figure,
    in_process,
    interleaved,
    machine,
    parse,
    ratios,
    store,
)
from plain import (
    boundary_f,
    boundary_f_by_distance,
    dense_labels,
    near_patches,
    object_masks,
    scene,
)
from rich.console import Console
from safetensors.torch import save_file
from startup import first_use, load

from cosettle_adapter import CoSettleAdapter, fit
from cosettle_adapter.closed_form import settle_clip
from cosettle_adapter.correspondence import LabelPropagator, TemporalFusion
from cosettle_adapter.evaluation import masks as ours_masks
from cosettle_adapter.extraction import extract
from cosettle_adapter.training.fit import split
from cosettle_adapter.video import open_frames
from cosettle_adapter.visualization import write_film


def inference(options: Options) -> Iterator[Figure]:
    adapter = options.adapter()
    for size in options.pick(((224, 224), (280, 490), (518, 518)), ((56, 70),)):
        frames = clip(options.pick(4, 2), size).to(options.device)
        images = adapter.preprocess(frames).to(options.torch_dtype)
        whole, same = (bare_encoder(adapter, size, stop=stop) for stop in (False, True))
        found = interleaved(
            {
                "ours": functools.partial(adapter, frames, batch_size=len(frames)),
                "whole": functools.partial(whole, images),
                "same": functools.partial(same, images),
            },
            rounds=options.rounds,
            device=options.device,
        )
        words = f"`adapter(frames)`, {size[0]} x {size[1]}, frames/s against the"
        yield figure(f"{words} whole encoder", ratios(found["whole"], found["ours"]), at_least=1.15)
        yield figure(
            f"{words} encoder up to the same layer",
            ratios(found["same"], found["ours"]),
            at_least=0.97,
        )


def fusion(options: Options) -> Iterator[Figure]:
    grid = options.pick((34, 63), (4, 5))
    encoders = {"ViT-S/14": "vit_small_patch14_dinov2", "ViT-B/14": "vit_base_patch14_dinov2"}
    for name, architecture in options.pick(encoders, {"ViT-S/14": encoders["ViT-S/14"]}).items():
        size = (14 * grid[0], 14 * grid[1])
        encoder: Any = timm.create_model(architecture, img_size=size).eval().to(options.device)
        image = torch.randn(1, 3, *size, device=options.device)
        features, _ = scene(grid, 64, encoder.num_features, device=options.device)
        for mode in ("symmetric", "causal"):
            fuse = TemporalFusion(mode)  # type: ignore[arg-type]
            turn = iter(range(10**6))

            def fused(fuse: Any = fuse, turn: Any = turn, features: Any = features) -> None:
                t = next(turn) % len(features)
                fuse.push(features[t : t + 1])

            with torch.inference_mode():
                for _ in range(4):
                    fused()
                found = interleaved(
                    {"fusion": fused, "encoder": lambda: encoder.forward_features(image)},  # noqa: B023
                    rounds=options.rounds,
                    device=options.device,
                )
            yield figure(
                f"temporal fusion, {mode}, {grid[0]} x {grid[1]} patches, time of {name}'s encoder",
                [100 * share for share in ratios(found["fusion"], found["encoder"])],
                unit="%",
                at_most=5 if name == "ViT-B/14" else None,
            )
        memory = {
            with_fusion: in_process(_FUSION_MEMORY, architecture, *map(str, grid), with_fusion)
            for with_fusion in ("", "fused")
        }
        yield figure(
            f"temporal fusion, peak memory above {name}'s encoder",
            [memory["fused"] - memory[""]],
            unit="MiB",
            at_most=150,
        )


_FUSION_MEMORY = """
import sys, timm, torch
from bench import peak_mebibytes
from plain import scene
from cosettle_adapter.correspondence import TemporalFusion
architecture, h, w, fused = sys.argv[1:]
torch.set_num_threads(2)
encoder = timm.create_model(architecture, img_size=(14 * int(h), 14 * int(w))).eval()
features, _ = scene((int(h), int(w)), 8, encoder.num_features)
fusion = TemporalFusion()
with torch.inference_mode():
    for t in range(8):
        encoder.forward_features(torch.randn(1, 3, 14 * int(h), 14 * int(w)))
        if fused:
            fusion.push(features[t : t + 1])
print(peak_mebibytes())
"""


def stream(options: Options) -> Iterator[Figure]:
    adapter = options.adapter()
    count, size = options.pick(48, 8), options.pick(280, 56)
    with tempfile.TemporaryDirectory() as name:
        film = write_film(
            clip(count, options.pick((480, 854), (96, 160))), Path(name) / "clip.mp4", fps=25
        )
        images = torch.cat(
            [adapter.preprocess(chunk.frames, size=size) for chunk in open_frames(film)]
        )
        same = bare_encoder(adapter, (images.shape[-2], images.shape[-1]), stop=True)
        found = interleaved(
            {
                "file": lambda: extract(
                    adapter, film, Path(name) / "clip.safetensors", size=size, overwrite=True
                ),
                "memory": lambda: [same(part) for part in images.split(8)],
            },
            rounds=options.rounds,
            device=options.device,
        )
    yield figure(
        "mp4 to feature file, frames/s against the encoder on frames in memory",
        ratios(found["memory"], found["file"]),
        at_least=0.9,
    )
    short, long = options.pick((1_000, 10_000), (20, 40))
    memory = [in_process(_STREAM_MEMORY, str(frames)) for frames in (short, long)]
    yield figure(
        f"fused stream, peak memory of {long:,} frames against {short:,}",
        [memory[1] / memory[0]],
        at_most=1.05,
    )


_STREAM_MEMORY = """
import sys, timm, torch
from bench import peak_mebibytes
from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import load_backbone
import tempfile, pathlib
from safetensors.torch import save_file
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "weights.safetensors"
    model = timm.create_model("test_vit.r160_in1k", num_classes=0)
    save_file(model.state_dict(), file)
    adapter = CoSettleAdapter.raw("timm:test_vit.r160_in1k", backbone_weights=file)
photo = torch.randint(0, 256, (3, 48, 320), dtype=torch.uint8)
frames = (photo[..., t % 256 : t % 256 + 64] for t in range(int(sys.argv[1])))
for chunk in adapter.stream(frames, temporal_fusion="symmetric"):
    pass
print(peak_mebibytes())
"""


def many(options: Options) -> Iterator[Figure]:
    """On a CPU with a tiny encoder, which waits for frames more than a real one would."""
    count, size = options.pick(400, 3), options.pick(224 if options.device != "cpu" else 112, 64)
    frames = clip(16 * count, options.pick((240, 320), (64, 80)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = options.adapter() if options.device != "cpu" else _tiny(folder)
        long = write_film(frames, folder / "long.mp4", fps=25)
        short = [
            write_film(part, folder / f"{number}.mp4", fps=25)
            for number, part in enumerate(frames.split(16))
        ]
        found = interleaved(
            {
                "long": lambda: [0 for _ in adapter.stream(long, batch_size=32, size=size)],
                "many": lambda: [0 for _ in adapter.stream_many(short, size=size)],
            },
            rounds=-(-options.rounds // 3),
            device=options.device,
        )
    yield figure(
        f"`stream_many`, {count} clips of 16 frames at batch 32, frames/s against one long video",
        ratios(found["long"], found["many"]),
        at_least=0.9,
    )


def _tiny(folder: Path) -> CoSettleAdapter:
    """The smallest encoder of timm, with random weights."""
    model = timm.create_model("test_vit.r160_in1k", num_classes=0)
    weights = folder / "weights.safetensors"
    save_file(model.state_dict(), weights)
    return CoSettleAdapter.raw("timm:test_vit.r160_in1k", backbone_weights=weights)


def propagation(options: Options) -> Iterator[Figure]:
    context, radius, topk = options.pick(20, 3), 12, 5
    for grid in options.pick(((34, 63), (60, 107)), ((6, 8),)):
        rounds = max(1, options.rounds // 3)
        features, labels = scene(
            grid, context + rounds + 3, options.pick(384, 16), device=options.device
        )
        near = near_patches(grid, radius, like=labels)
        propagator = LabelPropagator(
            labels, context=context, radius=radius, topk=topk, temperature=0.1, protocol="dino"
        )
        rest = iter(features)
        before = [propagator.step(next(rest)) for _ in range(context + 1)]
        now = functools.partial(
            dense_labels, features[context + 1], list(features[: context + 1]),
            before, near, topk=topk,
        )  # fmt: skip
        same = propagator.step(next(rest)).argmax(0) == now().argmax(0)
        if (share := float(same.double().mean())) < 0.999:
            raise SystemExit(f"only {share:.2%} of the labels are those of the dense side")
        times = interleaved(
            {"ours": lambda: propagator.step(next(rest)), "dense": now},  # noqa: B023
            rounds=rounds,
            device=options.device,
        )
        yield figure(
            f"label propagation, {grid[0]} x {grid[1]} patches, speed against dense affinities",
            ratios(times["dense"], times["ours"]),
            at_least=5,
        )


def masks(options: Options) -> Iterator[Figure]:
    truth, guesses = object_masks(options.pick(20, 2), options.pick((480, 854), (48, 80)))
    pairs = list(zip(truth, guesses, strict=True))
    for name, plainly in (("dilation", boundary_f), ("distance transform", boundary_f_by_distance)):
        found = interleaved(
            {
                "ours": lambda: [ours_masks.boundary_f(*pair) for pair in pairs],
                "plain": lambda plainly=plainly: [plainly(*pair) for pair in pairs],  # type: ignore[misc]
            },
            rounds=options.rounds,
        )
        yield figure(
            f"F of masks at 480p, speed against SciPy's {name}",
            ratios(found["plain"], found["ours"]),
            at_least=5,
        )


def settling(options: Options) -> Iterator[Figure]:
    adapter = options.adapter()
    size = options.pick((280, 490), (56, 70))
    frames = clip(options.pick(16, 4), size).to(options.device)
    images = adapter.preprocess(frames).to(options.torch_dtype)
    same = bare_encoder(adapter, size, stop=True)
    features = adapter(frames)
    found = interleaved(
        {
            "settle": lambda: settle_clip(features),
            "encoder": lambda: [same(part) for part in images.split(8)],
        },
        rounds=options.rounds,
        device=options.device,
    )
    yield figure(
        "`settle_clip`, time against one encoder pass",
        ratios(found["settle"], found["encoder"]),
        at_most=1,
    )


def fits(options: Options) -> Iterator[Figure]:
    """Of 12 clips by one layer, and choosing the layer: against the encoder on the same frames."""
    adapter = options.adapter()
    size, clips, pairs = options.pick((280, 490), (56, 70)), options.pick(12, 2), 4
    batch = adapter.preprocess(clip(1, size)).to(options.torch_dtype).expand(8, -1, -1, -1)
    whole = bare_encoder(adapter, size, stop=False)
    with tempfile.TemporaryDirectory() as name:
        for index in range(clips):
            write_film(clip(options.pick(40, 12), size), Path(name) / f"{index}.mp4", fps=25)
        fitted_on = len(split(range(clips))[0])
        work = functools.partial(fit, adapter.backbone, Path(name), pairs=pairs, size=min(size))
        found = interleaved(
            {
                "one": lambda: work(layers=(adapter.backbone.depth - 1,)),
                "chosen": work,
                "encoder": lambda: [whole(batch) for _ in range(fitted_on)],
            },
            rounds=options.pick(3, 1),
            device=options.device,
        )
    for name, what in (("one", "one layer"), ("chosen", "choosing layers")):
        yield figure(
            f"`fit`, {what}, time against one encoder pass",
            ratios(found[name], found["encoder"]),
            at_most=1.15,
        )


_ALL = (inference, fusion, stream, many, load, first_use, propagation, masks, settling, fits)
COSTS: dict[str, Callable[[Options], Iterator[Figure]]] = {
    function.__name__: function for function in _ALL
}


def main() -> None:
    given = parse(__doc__, COSTS)
    torch.set_num_threads(given.threads)
    options = Options(
        given.model, given.device, given.dtype, 2 if given.quick else given.rounds, given.quick
    )
    console, where, figures = Console(width=200), machine(given), []
    console.print(where)
    for name in given.only or COSTS:
        with console.status(name):
            for row in COSTS[name](options):
                figures.append(row)
                console.print(str(row), markup=False, highlight=False)
                store(given, where, figures)  # a run that is cut off leaves its rows


if __name__ == "__main__":
    main()
