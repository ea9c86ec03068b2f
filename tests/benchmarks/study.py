"""The study of FIT.md: label propagation by many ways to make features of a few layers.

    python tests/benchmarks/study.py --data DAVIS@3 MORE [--only NAME ...]

Every folder is a part, in DAVIS's layout (``@3``: every third frame of its clips), and at most 20
frames of a clip are taken, at 280 x 490. What is stored (means, deviations, axes) comes from the
other parts, so that nothing is fitted on a clip that it is scored on. Printed are J&F of each part
and of all clips, the difference to layer 7 centred by the clip's mean with its 95 % interval
(paired bootstrap over clips), and the clip that loses most by it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.closed_form import settle_clip
from cosettle_adapter.correspondence import average_neighbours, fusion, temporal_fusion
from cosettle_adapter.evaluation import davis_clips, evaluate_sequence
from cosettle_adapter.evaluation.run import mean
from cosettle_adapter.evaluation.tables import paired_interval
from cosettle_adapter.video import FrameSelection, open_frames

MODEL, SIZE, WIDTH, FRAMES = "dinov2-vits14-pypi", (280, 490), 384, 20
LAYERS = (4, 5, 6, 7, 8, 9, 11)
BASELINE = "7 centred by the clip"


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    name: str
    part: str
    layers: dict[int, Tensor]  # (T, C, h, w) float16
    masks: Any


class Study:
    def __init__(self, clips: Sequence[Clip]) -> None:
        self.clips = clips

    @functools.cache  # noqa: B019
    def moments(self, layer: int, part: str) -> tuple[Tensor, Tensor]:
        """Mean token and deviation of a layer on the clips of the other parts."""
        clips = [clip.layers[layer].float() for clip in self.clips if clip.part != part]
        mean = torch.stack([reduce(clip, "t c h w -> c 1 1", "mean") for clip in clips]).mean(0)
        return mean, torch.stack([(clip - mean).square().mean() for clip in clips]).mean().sqrt()

    def stored(self, clip: Clip, layers: Sequence[int]) -> Tensor:
        """Layers centred by the stored mean, each divided by its own deviation."""
        parts = []
        for layer in layers:
            mean, deviation = self.moments(layer, clip.part)
            parts.append((clip.layers[layer].float() - mean) / deviation)
        return torch.cat(parts, dim=1)

    @functools.cache  # noqa: B019
    def axes(self, layers: tuple[int, ...], part: str) -> Tensor:
        outer: Any = 0
        for clip in self.clips:
            if clip.part != part:
                other = dataclasses.replace(clip, part=part)
                tokens = rearrange(self.stored(other, layers)[::4], "t c h w -> (t h w) c")
                outer = outer + tokens.T @ tokens
        return torch.linalg.eigh(outer.double()).eigenvectors.flip(1)[:, :WIDTH].float()

    def joined(self, clip: Clip, *layers: int, share: float = 0.0) -> Tensor:
        """What the recipe makes: stored(), on the principal axes, averaged within the frame."""
        turned = einsum(
            self.stored(clip, layers), self.axes(layers, clip.part), "t c h w, c d -> t d h w"
        )
        return average_neighbours(turned, share)

    def fused(self, clip: Clip, features: Tensor, layer: int | None = 7, **options: Any) -> Tensor:
        tokens = features if layer is None else clip.layers[layer].float()
        guide = fusion.fusion_guide(tokens, [tokens.shape[1]])
        return temporal_fusion(features, guide, **options)


def centred(maps: Tensor, over: str = "1 c 1 1") -> Tensor:
    return maps - reduce(maps, f"t c h w -> {over}", "mean")


def running(maps: Tensor) -> Tensor:
    """Each frame minus the mean of the frames up to it."""
    sums = reduce(maps, "t c h w -> t c 1 1", "mean").cumsum(0)
    return maps - sums / rearrange(torch.arange(1.0, len(maps) + 1), "t -> t 1 1 1")


def variants(study: Study) -> dict[str, Callable[[Clip], Tensor]]:
    def layer(clip: Clip, number: int) -> Tensor:
        return clip.layers[number].float()

    made: dict[str, Callable[[Clip], Tensor]] = {BASELINE: lambda clip: centred(layer(clip, 7))}
    made["11, final norm"] = lambda clip: layer(clip, 11)
    for number in (5, 6, 8, 9):
        made[f"{number} centred by the clip"] = lambda clip, n=number: centred(layer(clip, n))
    made |= {
        "7 centred by the stored mean": lambda clip: study.stored(clip, (7,)),
        "7 centred by the frame": lambda clip: centred(layer(clip, 7), "t c 1 1"),
        "7 centred by a running mean": lambda clip: running(layer(clip, 7)),
        "7 settled on the clip": lambda clip: settle_clip(layer(clip, 7)),
        "5+7": lambda clip: study.joined(clip, 5, 7),
        "5+7, averaged 0.3": lambda clip: study.joined(clip, 5, 7, share=0.3),
        "7+9, averaged 0.3": lambda clip: study.joined(clip, 7, 9, share=0.3),
        "4+6+8, averaged 0.2": lambda clip: study.joined(clip, 4, 6, 8, share=0.2),
        "5+7+9, not reduced": lambda clip: study.stored(clip, (5, 7, 9)),
        "5+7+9": lambda clip: study.joined(clip, 5, 7, 9),
        "5+7+9, averaged 0.2": lambda clip: study.joined(clip, 5, 7, 9, share=0.2),
        "5+7+9, averaged 0.3": lambda clip: study.joined(clip, 5, 7, 9, share=0.3),
    }

    def recipe(clip: Clip) -> Tensor:
        return study.joined(clip, 5, 7, 9, share=0.2)

    made |= {
        "recipe, fused": lambda clip: study.fused(clip, recipe(clip)),
        "recipe, fused by its own matches": lambda clip: study.fused(clip, recipe(clip), None),
        "recipe, fused causally": lambda clip: study.fused(clip, recipe(clip), mode="causal"),
        "recipe, fused, window 3": lambda clip: study.fused(clip, recipe(clip), window=3),
        "recipe, fused, window 5": lambda clip: study.fused(clip, recipe(clip), window=5),
        "7 centred, fused": lambda clip: study.fused(clip, centred(layer(clip, 7))),
    }
    return made


def read(model: str, roots: Sequence[str], frames: int, positions: str | None) -> list[Clip]:
    adapter = CoSettleAdapter.raw(model)
    if positions is not None:
        row: Any = dataclasses.replace(adapter.backbone.row, interpolation=positions)
        adapter.backbone.row = row
    norms = [layer == adapter.backbone.depth - 1 for layer in LAYERS]
    clips = []
    for root in roots:
        path, _, every = root.partition("@")
        for sequence in davis_clips(
            path, select=FrameSelection(every=int(every or 1), max_frames=frames)
        ):
            parts = []
            shown = (sequence.read_frame(index) for index in range(len(sequence)))
            for chunk in open_frames(shown, chunk_size=4):
                images = adapter.preprocess(chunk.frames, size=SIZE)
                maps = adapter.backbone.intermediate_tokens(images, LAYERS, norm=norms)
                parts.append([each.half() for each in maps])
            by_layer = zip(LAYERS, zip(*parts, strict=True), strict=True)
            layers = {number: torch.cat(maps) for number, maps in by_layer}
            clips.append(Clip(sequence.name, Path(path).name, layers, sequence.read_annotations()))
    return clips


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--positions", help="how positions are resized, in place of the row's")
    options = parser.parse_args()
    clips = read(MODEL, options.data, FRAMES, options.positions)
    every = variants(Study(clips))
    baseline: list[float] = []
    parts = list(dict.fromkeys(clip.part for clip in clips))
    print("| features |", " | ".join(parts), "| all | over layer 7 centred | worst clip |")
    print("|---" * (len(parts) + 4) + "|")
    for name in [BASELINE, *(n for n in options.only or every if n != BASELINE)]:
        scores = [100 * evaluate_sequence(every[name](c), c.masks).j_and_f for c in clips]
        baseline = baseline or scores
        gains = [a - b for a, b in zip(scores, baseline, strict=True)]
        low, high = paired_interval(gains)
        worst = min(range(len(clips)), key=gains.__getitem__)
        means = [
            mean([s for s, c in zip(scores, clips, strict=True) if c.part == p]) for p in parts
        ]
        print(
            f"| {name} |",
            " | ".join(f"{each:.1f}" for each in means),
            f"| {mean(scores):.1f} | {mean(gains):+.1f} [{low:+.1f}, {high:+.1f}] "
            f"| {gains[worst]:+.1f} ({clips[worst].name}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
