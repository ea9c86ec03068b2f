"""One crop of the positions a step, or one for each sample: what it is worth, measured.

``pytest tests/training/test_pea_modes.py --run-slow -s`` prints the figures that the docstring of
``ObjectiveSettings`` quotes.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

import pytest
import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter import CoSettleAdapter, Projection, ProjectionConfig
from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.training.encoding import Views, draw_offsets
from cosettle_adapter.training.losses import objective
from cosettle_adapter.training.positions import perturbed_positions
from cosettle_adapter.training.settings import ObjectiveSettings
from cosettle_adapter.video.synthetic import photographs, render_clip

pytest.importorskip("skimage")

SIDE, CLIPS, HELD_OUT, PLACES, BATCH = 140, 64, 16, 16, 32
SETTINGS = ObjectiveSettings()
Mode = Literal["batch", "sample"]


@dataclasses.dataclass(frozen=True)
class Tokens:
    forward: Tensor  # (clips, 2, N, C)
    backward: Tensor  # (places, clips, N, C)
    grid: tuple[int, int]

    def draw(self, mode: Mode, generator: torch.Generator) -> Views:
        clips = torch.randint(CLIPS - HELD_OUT, (BATCH,), generator=generator)
        count = 1 if mode == "batch" else BATCH
        places = torch.randint(PLACES, (count,), generator=generator).expand(BATCH)
        return Views(self.forward[clips], self.backward[places, clips][:, None], self.grid)

    def held_out(self, place: int) -> Views:
        clips = slice(CLIPS - HELD_OUT, CLIPS)
        return Views(self.forward[clips], self.backward[place, clips][:, None], self.grid)


def rendered_tokens(backbone: VisionTransformerBackbone) -> Tokens:
    photos = list(photographs().values())
    frames = torch.stack(
        [
            render_clip(
                photos[index % len(photos)],
                cutout=photos[(index + 1 + index // len(photos)) % len(photos)],
                frames=2,
                size=(SIDE, SIDE),
                photometric=0.5,
                seed=index,
            ).frames
            for index in range(CLIPS)
        ]
    )
    adapter = CoSettleAdapter.raw(backbone)
    here, there = (adapter.preprocess(frames[:, index]) for index in (0, 1))
    grid = backbone.grid(SIDE, SIDE)
    offsets = draw_offsets(
        ObjectiveSettings(pea="sample"), seed=0, step=0, sample_seeds=torch.arange(PLACES)
    )

    def tokens(images: Tensor, offset: Tensor | None = None) -> Tensor:
        positions = None if offset is None else perturbed_positions(backbone, grid, offset[None])
        maps = backbone.patch_tokens(images, positions=positions)
        return rearrange(maps, "b c h w -> b (h w) c")

    forward = torch.stack([tokens(here), tokens(there)], dim=1)
    return Tokens(forward, torch.stack([tokens(here, offset) for offset in offsets]), grid)


def new_head(width: int, seed: int) -> Projection:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Projection(
            ProjectionConfig("any", "any", (0,), norm=True, in_width=width, out_width=width)
        )


def variance_components(head: Projection, tokens: Tokens) -> dict[str, float]:
    """Analysis of variance of one clip's gradient: what clips, places and both together add.

    Summed over every seventh weight; unbiased, so a component can come out below zero.
    """
    gradients = torch.stack(
        [
            torch.stack([_gradient(head, tokens, clip, place) for place in range(PLACES)])
            for clip in range(CLIPS - HELD_OUT)
        ]
    )
    clips, places = gradients.shape[:2]
    by_clip, by_place = gradients.mean(1, keepdim=True), gradients.mean(0, keepdim=True)
    rest = gradients - by_clip - by_place + gradients.mean((0, 1))
    both = float(rest.square().sum()) / ((clips - 1) * (places - 1))
    return {
        "clip": float(by_clip.var(0).sum()) - both / places,
        "place": float(by_place.var(1).sum()) - both / clips,
        "both": both,
    }


def _gradient(head: Projection, tokens: Tokens, clip: int, place: int) -> Tensor:
    head.zero_grad()
    views = Views(tokens.forward[[clip]], tokens.backward[place, [clip]][:, None], tokens.grid)
    objective(head.project, views, SETTINGS).total.backward()
    flat = [rearrange(each.grad, "... -> (...)") for each in head.parameters()]  # type: ignore[arg-type]
    return torch.cat(flat)[::7].double()


def ratio_of_variances(components: dict[str, float], clips: int) -> float:
    """Variance of a step's gradient with a place for each sample, over that with one for all."""
    together = components["clip"] + components["both"]
    return (together + components["place"]) / (together + clips * components["place"])


def train(head: Projection, tokens: Tokens, mode: Mode, *, steps: int, seed: int) -> float:
    """Train a head and return its loss on clips that it was not trained on."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(head.project, tokens.draw(mode, generator), SETTINGS).total.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        losses = [objective(head.project, tokens.held_out(k), SETTINGS) for k in range(PLACES)]
    return sum(float(each.total) for each in losses) / PLACES


@pytest.mark.slow
def test_a_place_for_each_sample_leaves_less_to_chance(
    real_backbone: VisionTransformerBackbone,
) -> None:
    tokens = rendered_tokens(real_backbone)
    width = tokens.forward.shape[-1]
    begun = new_head(width, 0)
    train(begun, tokens, "batch", steps=30, seed=9)
    for when, head in {"at the start": new_head(width, 0), "after 30 steps": begun}.items():
        components = variance_components(head, tokens)
        ratios = {clips: ratio_of_variances(components, clips) for clips in (32, 256)}
        _say(f"variance of the gradient {when}, sample / batch, at 32 and 256 clips: {ratios}")
        assert ratios[256] < ratios[32] < 1
    modes: tuple[Mode, Mode] = ("batch", "sample")
    losses = {
        mode: [train(new_head(width, seed), tokens, mode, steps=60, seed=seed) for seed in (0, 1)]
        for mode in modes
    }
    _say(f"loss on other clips after 60 steps, two seeds: {losses}")
    means = {mode: sum(each) / len(each) for mode, each in losses.items()}
    assert means["sample"] == pytest.approx(means["batch"], rel=0.02)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
