"""Views of clips through a frozen backbone: plain ones, then ones with perturbed positions."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.training.data import generator_of
from cosettle_adapter.training.positions import PerturbedPositions, perturbed_positions
from cosettle_adapter.training.settings import TrainSettings


def draw_offsets(settings: TrainSettings, *, step: int, sample_seeds: Tensor) -> Tensor:
    """Draw where the zoomed grid of positions is cropped: ``(1 or B, 2)`` float64 in [0, 1).

    One place per step is a function of the run's seed and ``step``; one per sample is a function
    of that sample's own seed. So neither depends on how samples are spread over processes,
    accumulated or resumed.
    """
    generators = [generator_of("pea", settings.seed, step)]
    if settings.pea == "sample":
        generators = [generator_of("pea", seed) for seed in sample_seeds.tolist()]
    return torch.stack([torch.rand(2, generator=g, dtype=torch.float64) for g in generators])


@torch.no_grad()
def encode(
    backbone: Backbone, settings: TrainSettings, frames: Tensor, sample_seeds: Tensor, *, step: int
) -> Tensor:
    """Encode frames as they are, and all but the last once more with perturbed positions.

    Args:
        backbone: the frozen encoder.
        settings: the layers that are read, precision and perturbation.
        frames: ``(B, T, 3, H, W)`` floating point RGB, about in [0, 1]; normalised here.
        sample_seeds: ``(B,)``, of the offsets of positions.
        step: optimiser steps taken so far.

    Returns:
        Tokens ``(B, I, N, C)`` on the backbone's device: of the T frames, then of the T - 1
        perturbed ones, unless ``pea`` is off; ``N = h * w``, row by row.

    Raises:
        GeometryError: sides that do not fit the backbone.
    """
    config, dtype = settings.head_config(backbone), getattr(torch, settings.precision)
    frames = frames.to(backbone.device, non_blocking=True).float()
    mean, std = (frames.new_tensor(each) for each in (backbone.row.mean, backbone.row.std))
    frames = (frames - rearrange(mean, "c -> c 1 1")) / rearrange(std, "c -> c 1 1")
    grid = backbone.grid(frames.shape[-2], frames.shape[-1])

    def tokens(frames: Tensor, positions: PerturbedPositions | None = None) -> Tensor:
        images = rearrange(frames, "b t c h w -> (b t) c h w")
        with torch.autocast(backbone.device.type, dtype=dtype, enabled=dtype != torch.float32):
            maps = backbone.intermediate_tokens(
                images, config.layers, norm=config.norm, positions=positions
            )
        return rearrange(torch.cat(maps, dim=1), "(b t) c h w -> b t (h w) c", b=len(frames))

    if settings.pea == "off":
        return tokens(frames)
    offsets = draw_offsets(settings, step=step, sample_seeds=sample_seeds)
    if len(offsets) > 1:
        offsets = repeat(offsets, "b yx -> (b t) yx", t=frames.shape[1] - 1)
    perturbed = perturbed_positions(backbone, grid, offsets, ratio=settings.pea_ratio)
    return torch.cat([tokens(frames), tokens(frames[:, :-1], perturbed)], dim=1)


def compile_encoder(backbone: Backbone, *, backend: str = "inductor") -> None:
    """Compile a backbone's blocks in place, each by itself, so that they share one graph.

    An encoder without blocks is compiled whole. What is compiled already stays as it is.
    """
    groups = [m for name, m in backbone.named_modules() if name.split(".")[-1] == "blocks"]
    blocks = [block for group in groups for block in group.children()]
    for module in blocks or backbone.children():
        if module._compiled_call_impl is None:
            module.compile(backend=backend)
