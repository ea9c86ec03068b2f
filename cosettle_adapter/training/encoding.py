"""Views of clips through a frozen backbone: plain ones, and ones with perturbed positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.backbones.backbone import Positions
from cosettle_adapter.training.positions import join_positions, perturbed_positions
from cosettle_adapter.training.seeds import generator_of
from cosettle_adapter.training.settings import ObjectiveSettings

Grid = tuple[int, int]


class Views(NamedTuple):
    """What the head is trained on: the frozen backbone's tokens of a batch of clips.

    Attributes:
        forward: ``(B, T, N, C)``, of the frames as they are; ``N = h * w``, row by row.
        backward: ``(B, T - 1, N, C)``, of all frames but the last, with perturbed positions.
        grid: ``(h, w)``.
    """

    forward: Tensor
    backward: Tensor
    grid: Grid


def draw_offsets(
    settings: ObjectiveSettings, *, seed: int, step: int, sample_seeds: Tensor
) -> Tensor:
    """Draw where the zoomed grid of positions is cropped.

    One place per step is a function of ``seed`` and ``step``; one per sample is a function of that
    sample's own seed. So neither depends on how samples are spread over processes, accumulated or
    resumed.

    Args:
        settings: ``pea`` decides which.
        seed: of the run.
        step: optimiser steps taken so far.
        sample_seeds: ``(B,)`` int64, the seed of each sample.

    Returns:
        ``(1, 2)``, or ``(B, 2)`` for ``sample``: float64 in [0, 1), on the CPU.
    """
    if settings.pea == "sample":
        generators = [generator_of("pea", int(sample)) for sample in sample_seeds]
    else:
        generators = [generator_of("pea", seed, step)]
    return torch.stack([torch.rand(2, generator=g, dtype=torch.float64) for g in generators])


def encode_views(
    backbone: Backbone,
    frames: Tensor,
    *,
    layers: Sequence[int],
    norm: bool | None,
    settings: ObjectiveSettings,
    offsets: Tensor | None,
) -> Views:
    """Encode frames as they are, and all but the last once more with perturbed positions.

    All views go through the backbone in one pass; a caller may wrap it in ``torch.autocast`` or
    ``torch.inference_mode``. With perturbation off, the backward views are the forward ones, and
    nothing is encoded twice.

    Args:
        backbone: the frozen encoder.
        frames: ``(B, T, 3, H, W)``, ``T`` at least 2, floating point, RGB with 0 for black and 1
            for white; what bicubic resizing leaves outside [0, 1] is kept. Normalised here.
        layers: layers to read, concatenated along the channels.
        norm: apply the final norm, as in :meth:`Backbone.patch_tokens`.
        settings: ``pea`` and ``pea_ratio`` count here.
        offsets: ``(1, 2)`` or ``(B, 2)``, from :func:`draw_offsets`; ignored with ``pea`` off.

    Returns:
        Tokens on the backbone's device, in the dtype that it (or autocast) computes in.

    Raises:
        TypeError: frames that are not floating point.
        ValueError: another shape of frames or offsets, or a layer or norm that does not exist.
        GeometryError: sides that do not fit the backbone.
    """
    if not frames.is_floating_point():
        raise TypeError(
            f"expected frames floating point, 0 for black and 1 for white, got {frames.dtype}"
        )
    if frames.ndim != 5 or frames.shape[1] < 2 or frames.shape[2] != 3:
        raise ValueError(
            f"expected frames (B, T, 3, H, W) with T of 2 or more, got {tuple(frames.shape)}"
        )
    clips, length = frames.shape[:2]
    frames = frames.to(backbone.device, non_blocking=True).float()
    mean, std = (frames.new_tensor(each) for each in (backbone.row.mean, backbone.row.std))
    frames = (frames - rearrange(mean, "c -> c 1 1")) / rearrange(std, "c -> c 1 1")
    grid = backbone.grid(frames.shape[-2], frames.shape[-1])
    images = rearrange(frames, "b t c h w -> (b t) c h w")
    positions: Positions | None = None
    if settings.pea != "off":
        if offsets is None or tuple(offsets.shape) not in ((1, 2), (clips, 2)):
            got = None if offsets is None else tuple(offsets.shape)
            raise ValueError(
                f"expected offsets (1, 2) or ({clips}, 2) for {clips} clips, got {got}"
            )
        again = rearrange(frames[:, :-1], "b t c h w -> (b t) c h w")
        perturbed = perturbed_positions(backbone, grid, offsets, ratio=settings.pea_ratio)
        variant = torch.arange(1, len(offsets) + 1).expand(clips)  # 0 is the backbone's own
        own = torch.zeros(len(images), dtype=torch.int64)
        index = torch.cat([own, repeat(variant, "b -> (b t)", t=length - 1)])
        images = torch.cat([images, again])
        positions = join_positions(backbone.positions(grid), perturbed, index)
    maps = backbone.intermediate_tokens(images, layers, norm=norm, positions=positions)
    tokens = rearrange(torch.cat(maps, dim=1), "b c h w -> b (h w) c")
    forward = rearrange(tokens[: clips * length], "(b t) n c -> b t n c", t=length)
    if settings.pea == "off":
        return Views(forward, forward[:, :-1], grid)
    backward = rearrange(tokens[clips * length :], "(b t) n c -> b t n c", t=length - 1)
    return Views(forward, backward, grid)


def compile_encoder(backbone: Backbone, *, backend: str = "inductor") -> None:
    """Compile a backbone's blocks in place, each by itself.

    All blocks of a transformer share one compiled graph, so that this takes seconds rather than
    minutes; an encoder without blocks is compiled whole. What is compiled already stays as it is.

    Args:
        backbone: to compile; nothing happens before it runs.
        backend: of ``torch.compile``.
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
