"""Views of clips through a frozen backbone: plain ones, then ones with perturbed positions."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.training.data import generator_of
from cosettle_adapter.training.positions import join_positions, perturbed_positions
from cosettle_adapter.training.settings import TrainSettings


def draw_offsets(settings: TrainSettings, *, step: int, sample_seeds: Tensor) -> Tensor:
    """Draw where the zoomed grid of positions is cropped.

    One place per step is a function of the run's seed and ``step``; one per sample is a function
    of that sample's own seed ``(B,)``. So neither depends on how samples are spread over processes,
    accumulated or resumed.

    Returns:
        ``(1, 2)``, or ``(B, 2)`` for ``sample``: float64 in [0, 1), on the CPU.
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

    All views go through the backbone in one pass. With ``pea`` off there are only the first.

    Args:
        backbone: the frozen encoder.
        settings: the layers that are read, precision and perturbation.
        frames: ``(B, T, 3, H, W)`` floating point, RGB with 0 for black and 1 for white; what
            bicubic resizing leaves outside [0, 1] is kept. Normalised here.
        sample_seeds: ``(B,)``, of the offsets of positions.
        step: optimiser steps taken so far.

    Returns:
        Tokens ``(B, I, N, C)`` on the backbone's device: of the T frames, then of the T - 1
        perturbed ones; ``N = h * w``, row by row.

    Raises:
        GeometryError: sides that do not fit the backbone.
    """
    clips, length = frames.shape[:2]
    frames = frames.to(backbone.device, non_blocking=True).float()
    mean, std = (frames.new_tensor(each) for each in (backbone.row.mean, backbone.row.std))
    frames = (frames - rearrange(mean, "c -> c 1 1")) / rearrange(std, "c -> c 1 1")
    grid = backbone.grid(frames.shape[-2], frames.shape[-1])
    images = rearrange(frames, "b t c h w -> (b t) c h w")
    positions = None
    if settings.pea != "off":
        offsets = draw_offsets(settings, step=step, sample_seeds=sample_seeds)
        perturbed = perturbed_positions(backbone, grid, offsets, ratio=settings.pea_ratio)
        variant = torch.arange(1, len(offsets) + 1).expand(clips)  # 0 is the backbone's own
        own = torch.zeros(len(images), dtype=torch.int64)
        index = torch.cat([own, repeat(variant, "b -> (b t)", t=length - 1)])
        again = rearrange(frames[:, :-1], "b t c h w -> (b t) c h w")
        images = torch.cat([images, again])
        positions = join_positions(backbone.positions(grid), perturbed, index)
    config = settings.head_config(backbone)
    dtype = getattr(torch, settings.precision)
    with torch.autocast(backbone.device.type, dtype=dtype, enabled=dtype != torch.float32):
        maps = backbone.intermediate_tokens(
            images, config.layers, norm=config.norm, positions=positions
        )
    tokens = rearrange(torch.cat(maps, dim=1), "b c h w -> b (h w) c")
    forward = rearrange(tokens[: clips * length], "(b t) n c -> b t n c", b=clips)
    backward = rearrange(tokens[clips * length :], "(b t) n c -> b t n c", b=clips)
    return torch.cat([forward, backward], dim=1)


def compile_encoder(backbone: Backbone, *, backend: str = "inductor") -> None:
    """Compile a backbone's blocks in place, each by itself, so that they share one graph.

    An encoder without blocks is compiled whole. What is compiled already stays as it is.
    """
    blocks = [
        block
        for module in backbone.modules()
        for name, group in module.named_children()
        if name == "blocks"
        for block in group.children()
    ]
    for module in blocks or backbone.children():
        if module._compiled_call_impl is None:
            module.compile(backend=backend)
