"""Views of clips through a frozen backbone: plain ones, and ones with perturbed positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat
from torch import Tensor

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.backbones.positions import Positions, join_positions
from cosettle_adapter.training.losses import Grid

if TYPE_CHECKING:
    from cosettle_adapter.training.objective import ObjectiveSettings


@dataclasses.dataclass(frozen=True)
class Views:
    """What the head is trained on: the frozen backbone's tokens of a batch of clips.

    Attributes:
        forward: ``(B, T, N, C)``, of the frames as they are; ``N = h * w``, row by row.
        backward: ``(B, T - 1, N, C)``, of all frames but the last, with perturbed positions.
        grid: ``(h, w)``.
    """

    forward: Tensor
    backward: Tensor
    grid: Grid


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
        ValueError: another shape of frames or offsets, or a layer or norm that is not there.
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
    images = _normalize(backbone, frames)
    grid = backbone.grid(images.shape[-2], images.shape[-1])
    if settings.pea == "off":
        tokens = _tokens(backbone, rearrange(images, "b t c h w -> (b t) c h w"), layers, norm)
        plain = rearrange(tokens, "(b t) n c -> b t n c", t=length)
        return Views(plain, plain[:, :-1], grid)
    if offsets is None or tuple(offsets.shape) not in ((1, 2), (clips, 2)):
        got = None if offsets is None else tuple(offsets.shape)
        raise ValueError(f"expected offsets (1, 2) or ({clips}, 2) for {clips} clips, got {got}")
    images, positions = _with_perturbed(backbone, images, grid, settings, offsets)
    tokens = _tokens(backbone, images, layers, norm, positions)
    return Views(
        rearrange(tokens[: clips * length], "(b t) n c -> b t n c", t=length),
        rearrange(tokens[clips * length :], "(b t) n c -> b t n c", t=length - 1),
        grid,
    )


def _normalize(backbone: Backbone, frames: Tensor) -> Tensor:
    frames = frames.to(backbone.device, non_blocking=True).float()
    mean, std = (frames.new_tensor(each) for each in (backbone.row.mean, backbone.row.std))
    return (frames - rearrange(mean, "c -> c 1 1")) / rearrange(std, "c -> c 1 1")


def _with_perturbed(
    backbone: Backbone, images: Tensor, grid: Grid, settings: ObjectiveSettings, offsets: Tensor
) -> tuple[Tensor, Positions]:
    """All images to encode, ``(B (2 T - 1), 3, H, W)``, and where their patches are said to be."""
    clips, length = images.shape[:2]
    perturbed = backbone.perturbed_positions(grid, offsets, ratio=settings.pea_ratio)
    variant = torch.arange(1, len(offsets) + 1).expand(clips)
    index = torch.cat(
        [
            torch.zeros(clips * length, dtype=torch.int64),
            repeat(variant, "b -> (b t)", t=length - 1),
        ]
    )
    together = torch.cat(
        [
            rearrange(images, "b t c h w -> (b t) c h w"),
            rearrange(images[:, :-1], "b t c h w -> (b t) c h w"),
        ]
    )
    return together, join_positions(backbone.positions(grid), perturbed, index)


def _tokens(
    backbone: Backbone,
    images: Tensor,
    layers: Sequence[int],
    norm: bool | None,
    positions: Positions | None = None,
) -> Tensor:
    maps = backbone.intermediate_tokens(images, layers, norm=norm, positions=positions)
    return rearrange(torch.cat(maps, dim=1), "b c h w -> b (h w) c")
