"""The paper's shortcut: a head can close cycles by knowing where patches are, and PEA forbids it.

Pairs of unrelated photographs have nothing to follow. The cycle over them can close because the
way home ends on the frame where it began, or because tokens tell their places; on three unrelated
photographs (there on one, back on another) nothing but places is left.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter import Projection, ProjectionConfig
from cosettle_adapter.backbones import Backbone, VisionTransformerBackbone
from cosettle_adapter.training.encoding import draw_offsets, perturbed_positions
from cosettle_adapter.training.losses import objective
from cosettle_adapter.training.settings import TrainSettings
from cosettle_adapter.video.geometry import resize
from cosettle_adapter.video.synthetic import photographs

pytest.importorskip("skimage")

PEA = TrainSettings(pea="batch", separability_weight=0.0)
OFF = dataclasses.replace(PEA, pea="off")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Tokens of crops of photographs: plain, and under each of several perturbations."""

    photo: Tensor  # (F,)
    plain: Tensor  # (F, N, C)
    perturbed: Tensor  # (K, F, N, C)
    grid: tuple[int, int]

    def draw(
        self, count: int, among: slice, generator: torch.Generator, *, home: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Indices (out, there, home) of pictures of other photographs each; ``home`` is where the
        way back leads to: the ``same`` picture it began on, or an ``other``."""
        candidates = torch.arange(len(self.photo))[among]
        rows: list[Tensor] = []
        while len(rows) < count:
            three = candidates[torch.randperm(len(candidates), generator=generator)[:3]]
            if len(self.photo[three].unique()) == 3:
                rows.append(three)
        first, second, third = torch.stack(rows).unbind(1)
        return first, second, first if home == "same" else third

    def views(self, drawn: tuple[Tensor, Tensor, Tensor], perturbation: int | None) -> Tensor:
        out, there, home = drawn
        back = self.plain if perturbation is None else self.perturbed[perturbation]
        return torch.stack([self.plain[out], self.plain[there], back[home]], dim=1)


def encode_pictures(
    backbone: Backbone, *, count: int, side: int, layer: int, perturbations: int
) -> Pictures:
    photos = list(photographs().values())
    generator = torch.Generator().manual_seed(0)
    photo = torch.arange(count) % len(photos)
    crops = []
    for index in photo.tolist():
        sides = photos[index].shape[-2:]
        large = int(torch.randint(side, min(sides) + 1, (), generator=generator))
        top, left = (
            int(torch.randint(0, whole - large + 1, (), generator=generator)) for whole in sides
        )
        crop = photos[index][None, :, top : top + large, left : left + large]
        crop = resize(crop, (side, side)) / 255
        # any way up, for the sky is above and light falls from there
        turns, mirrored = torch.randint(0, 4, (2,), generator=generator).tolist()
        crop = crop.rot90(turns, dims=(2, 3))
        crops.append(crop.flip(3) if mirrored % 2 else crop)
    grid = backbone.grid(side, side)
    mean, std = (
        torch.tensor(each)[:, None, None] for each in (backbone.row.mean, backbone.row.std)
    )
    images = (torch.cat(crops) - mean) / std
    tokens = []
    for step in range(-1, perturbations):
        offsets = draw_offsets(PEA, step=step, sample_seeds=photo)
        positions = None if step < 0 else perturbed_positions(backbone, grid, offsets)
        maps = backbone.patch_tokens(images, layer=layer, norm=True, positions=positions)
        tokens.append(rearrange(maps, "f c h w -> f (h w) c"))
    return Pictures(photo, tokens[0], torch.stack(tokens[1:]), grid)


def train_head(
    pictures: Pictures, among: slice, settings: TrainSettings, *, steps: int
) -> Projection:
    width = pictures.plain.shape[-1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Projection(
            ProjectionConfig("any", "any", (0,), norm=True, in_width=width, out_width=width)
        )
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        drawn = pictures.draw(12, among, generator, home="same")
        perturbation = None if settings.pea == "off" else step % len(pictures.perturbed)
        optimizer.zero_grad()
        views = pictures.views(drawn, perturbation)
        objective(head.project, views, pictures.grid, PEA).total.backward()
        optimizer.step()
    return head


def accuracy(
    head: Projection, pictures: Pictures, among: slice, perturbation: int | None, *, home: str
) -> float:
    drawn = pictures.draw(64, among, torch.Generator().manual_seed(2), home=home)
    with torch.no_grad():
        views = pictures.views(drawn, perturbation)
        return float(objective(head.project, views, pictures.grid, PEA).accuracy)


@pytest.mark.parametrize(
    ("side", "count", "perturbations", "steps"),
    [(112, 42, 2, 20), pytest.param(196, 72, 8, 80, marks=pytest.mark.slow)],  # the paper's grid
)
def test_pea_takes_the_shortcut_away(
    real_backbone: VisionTransformerBackbone, side: int, count: int, perturbations: int, steps: int
) -> None:
    """Cycle accuracy of heads on block 6, on pictures and an offset they were not trained on."""
    pictures = encode_pictures(
        real_backbone, count=count, side=side, layer=5, perturbations=perturbations + 1
    )
    seen, unseen = slice(0, count - 18), slice(count - 18, count)
    known = dataclasses.replace(pictures, perturbed=pictures.perturbed[:-1])
    without, with_pea = (train_head(known, seen, each, steps=steps) for each in (OFF, PEA))
    for home in ("same", "other"):
        # Without PEA the head learns places: every cycle closes, on whatever pictures.
        assert accuracy(without, pictures, unseen, None, home=home) > 0.9
    # With it, no more than a picture gives by being the same as itself, and no places.
    assert accuracy(with_pea, pictures, unseen, perturbations, home="same") < 0.35
    chance = 4 / math.prod(pictures.grid)
    assert accuracy(with_pea, pictures, unseen, perturbations, home="other") < 2 * chance
