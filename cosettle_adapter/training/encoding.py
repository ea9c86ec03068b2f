"""Encodes clips with a frozen backbone, with plain positions and with those of the paper's PEA.

Under PEA (section 3.2) positions do not reveal where a patch is: absolute positions are those of a
crop of the zoomed grid, rotary angles those at the coordinates of that crop. For an encoder without
positions that can be replaced, the image is shifted instead.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from cosettle_adapter.backbones import Backbone, Positions, VisionTransformerBackbone
from cosettle_adapter.errors import GeometryError
from cosettle_adapter.training.data import generator_of
from cosettle_adapter.training.settings import TrainSettings

Grid = tuple[int, int]

_SHRINK = 2.0**-20
_FREQUENCIES = {"bands": _SHRINK, "inv_freq": _SHRINK, "freqs": _SHRINK, "periods": 1 / _SHRINK}
_CLOSE = 1e-3


def draw_offsets(settings: TrainSettings, *, step: int, sample_seeds: Tensor) -> Tensor:
    """Draw the corner of each crop of the zoomed grid: ``(1 or B, 2)`` float64 in [0, 1)."""
    generators = [generator_of("pea", settings.seed, step)]
    if settings.pea == "sample":
        generators = [generator_of("pea", seed) for seed in sample_seeds.tolist()]
    return torch.stack([torch.rand(2, generator=g, dtype=torch.float64) for g in generators])


@torch.no_grad()
def encode(
    backbone: Backbone, settings: TrainSettings, frames: Tensor, sample_seeds: Tensor, *, step: int
) -> Tensor:
    """Encode all frames with plain positions and all but the last with perturbed ones as well.

    ``frames`` are ``(B, T, 3, H, W)`` floating-point RGB in about [0, 1], not normalised.

    Returns:
        Tokens ``(B, I, N, C)`` on the backbone's device: of the T plain frames, then of the T - 1
        perturbed ones unless ``pea`` is off; ``N = h * w``, row by row.
    """
    config, dtype = settings.head_config(backbone), getattr(torch, settings.precision)
    frames = frames.to(backbone.device, non_blocking=True).float()
    mean, std = (frames.new_tensor(v) for v in (backbone.row.mean, backbone.row.std))
    frames = (frames - rearrange(mean, "c -> c 1 1")) / rearrange(std, "c -> c 1 1")
    grid = backbone.grid(frames.shape[-2], frames.shape[-1])

    def tokens(frames: Tensor, norm: bool, positions: PerturbedPositions | None = None) -> Tensor:
        images = rearrange(frames, "b t c h w -> (b t) c h w")
        with torch.autocast(backbone.device.type, dtype=dtype, enabled=dtype != torch.float32):
            maps = backbone.intermediate_tokens(
                images, config.layers, norm=norm, positions=positions
            )
        return rearrange(torch.cat(maps, dim=1), "(b t) c h w -> b t (h w) c", b=len(frames))

    if settings.pea == "off":
        return tokens(frames, config.norm)
    offsets = draw_offsets(settings, step=step, sample_seeds=sample_seeds)
    if len(offsets) > 1:
        offsets = repeat(offsets, "b yx -> (b t) yx", t=frames.shape[1] - 1)
    perturbed = perturbed_positions(backbone, grid, offsets, ratio=settings.pea_ratio)
    views = tokens(frames[:, :-1], settings.perturbed_norm(backbone), perturbed)
    return torch.cat([tokens(frames, config.norm), views], dim=1)


def compile_encoder(backbone: Backbone, *, backend: str = "inductor") -> None:
    """Compile a backbone in place, block by block, so that all blocks share one graph."""
    groups = [m for name, m in backbone.named_modules() if name.split(".")[-1] == "blocks"]
    blocks = [block for group in groups for block in group.children()]
    for module in blocks or backbone.children():
        if module._compiled_call_impl is None:
            module.compile(backend=backend)


@dataclasses.dataclass(frozen=True)
class PerturbedPositions(Positions):
    """Positions with a leading dimension of B (one set per image) or 1 (the same for all)."""

    shift: Tensor | None = None  # (1 or B, 2): patches by which to roll the images down and right

    def check_like(self, own: Positions, grid: Grid, *, images: int) -> None:
        """Check nothing: ``perturbed_positions`` makes them for this backbone and grid."""

    def rotations(self) -> Any:
        """``(1 or B, 1, h * w, 2 D)``, or ``(depth, 1 or B, heads, h * w, 2 D)``."""
        if self.rotary is None:
            return None
        if self.rotary.ndim == 3:
            return rearrange(self.rotary, "b n d -> b 1 n d")
        return rearrange(self.rotary, "b depth heads n d -> depth b heads n d")

    def before(self, images: Tensor, backbone: Backbone) -> Tensor:
        """Roll the images by whole patches."""
        if self.shift is None:
            return images
        if backbone.stride != backbone.patch:
            raise GeometryError(
                f"images cannot be shifted by whole patches if patches overlap (patch "
                f"{backbone.patch}, stride {backbone.stride}); use the default stride"
            )
        return _roll(images, self.shift * backbone.patch)

    def after(self, tokens: Tensor) -> Tensor:
        """Roll the feature maps back."""
        return tokens if self.shift is None else _roll(tokens, -self.shift)


def perturbed_positions(
    backbone: Backbone, grid: Grid, offsets: Tensor, *, ratio: float = 10.0
) -> PerturbedPositions:
    """Return positions that do not reveal where a patch is.

    A CNN or windowed encoder infers positions from zero padding and windows, so its images are
    rolled by up to ``ratio / (1 + ratio)`` of a side and its feature maps rolled back. ``offsets``
    ``(1 or B, 2)`` in [0, 1) are (row, column) of each crop, as a fraction of the possible ones.
    """
    if not isinstance(backbone, VisionTransformerBackbone):
        corners = zip(crop_corners(offsets, grid, ratio), grid, strict=True)
        shifts = [corner * side // zoomed_side(side, ratio) for corner, side in corners]
        return PerturbedPositions(shift=torch.stack(shifts, dim=1))
    absolute, rotary = backbone.positions(grid).absolute, None
    if absolute is not None:
        absolute = perturb_positions(
            absolute, offsets, grid=grid, prefix=backbone.prefix_positions, ratio=ratio
        )
    if backbone.rope is not None:
        angles = rotary_angles(backbone.rope[0], grid)
        rotary = perturb_rotary(angles, offsets, grid=grid, ratio=ratio, device=backbone.device)
    return PerturbedPositions(absolute, rotary)


def perturb_positions(
    positions: Tensor, offsets: Tensor, *, grid: Grid, prefix: int, ratio: float = 10.0
) -> Tensor:
    """Perturb absolute positions: zoom the grid, then crop a grid of the original size.

    ``interpolate_and_crop_pos_embed`` of the official code, bicubic without antialiasing.
    ``positions`` ``(1, prefix + h * w, C)`` become ``(B, prefix + h * w, C)`` of at least float32;
    the first ``prefix``, of class and register tokens, are unchanged.
    """
    precise = positions if positions.dtype == torch.float64 else positions.float()
    leading, patches = precise[:, :prefix], precise[0, prefix:]
    rows, columns = (
        _zoom_weights(side, ratio, precise.dtype)[first[:, None] + torch.arange(side)].to(
            precise.device
        )
        for side, first in zip(grid, crop_corners(offsets, grid, ratio), strict=True)
    )
    # Bicubic resizing is separable, so only the crops are computed, not the whole zoomed grid.
    with torch.autocast(precise.device.type, enabled=False):
        patches = rearrange(patches, "(h w) c -> h w c", h=grid[0])
        cropped = torch.einsum(
            "bih,bhjc->bijc", rows, torch.einsum("bjw,hwc->bhjc", columns, patches)
        )
    cropped = rearrange(cropped, "b h w c -> b (h w) c")
    return torch.cat([leading.expand(len(cropped), -1, -1), cropped], dim=1)


def _zoom_weights(side: int, ratio: float, dtype: torch.dtype) -> Tensor:
    """Weight of each patch in PyTorch's bicubic zoom, ``(zoomed, side)``, on the CPU."""
    patches = rearrange(torch.eye(side, dtype=dtype), "c side -> 1 c side 1")
    size = (zoomed_side(side, ratio), 1)
    zoomed = F.interpolate(patches, size=size, mode="bicubic", align_corners=False)
    return rearrange(zoomed, "1 c zoomed 1 -> zoomed c")


def rotary_angles(rope: nn.Module, grid: Grid) -> Tensor:
    """Recover the rotation angles of a timm rotary embedding, which returns sines and cosines.

    These determine an angle only up to full turns, so frequencies are lowered a million times.
    Returns float64 radians ``(h * w, D)``, or ``(depth, heads, h * w, D)`` if layers differ.
    """
    with torch.inference_mode(False), torch.no_grad():
        slow: Any = copy.deepcopy(rope)
        for name, tensor in (*slow.named_parameters(), *slow.named_buffers()):
            if name in _FREQUENCIES:
                tensor.mul_(_FREQUENCIES[name])
        sines, cosines = slow.get_embed(shape=list(grid)).double().chunk(2, dim=-1)
        angles = torch.atan2(sines, cosines) / _SHRINK
        true: Any = rope
        embedded = true.get_embed(shape=list(grid)).double()
    if not torch.allclose(torch.cat([angles.sin(), angles.cos()], -1), embedded, atol=_CLOSE):
        raise ValueError(
            f"rotary positions of {type(rope).__name__} cannot be perturbed: this version of timm "
            "stores their frequencies in an unknown way; use --pea off or another version of timm"
        )
    return angles


def perturb_rotary(
    angles: Tensor, offsets: Tensor, *, grid: Grid, ratio: float, device: torch.device
) -> Tensor:
    """Compute rotary positions at the coordinates of a crop of the zoomed grid.

    Exact, because angles ``(..., h * w, D)`` are linear in the coordinates. Returns
    ``(B, ..., h * w, 2 D)`` float32 on ``device``, sines then cosines.
    """
    patches = rearrange(angles.double(), "... (h w) d -> ... h w d", h=grid[0])
    first_row, first_column = crop_corners(offsets, grid, ratio)
    down = _along(patches[..., :, 0, :], first_row, grid[0], ratio)
    across = _along(patches[..., 0, :, :], first_column, grid[1], ratio) - patches[..., 0, :1, :]
    down = rearrange(down, "b ... h d -> b ... h 1 d")
    across = rearrange(across, "b ... w d -> b ... 1 w d")
    # By the angle addition theorem only rows and columns need float64 and the transfer.
    sin_y, cos_y, sin_x, cos_x = (
        table.to(device, torch.float32)
        for table in (down.sin(), down.cos(), across.sin(), across.cos())
    )
    rotary = torch.cat([sin_y * cos_x + cos_y * sin_x, cos_y * cos_x - sin_y * sin_x], dim=-1)
    return rearrange(rotary, "b ... h w d -> b ... (h w) d")


def _along(angles: Tensor, first: Tensor, side: int, ratio: float) -> Tensor:
    """Angles ``(..., side, D)`` along one axis at the crops' coordinates: ``(B, ..., side, D)``."""
    zoom = side / zoomed_side(side, ratio)
    # Patch k of the zoomed grid lies at (k + 0.5) * zoom - 0.5 of the original grid.
    patches = rearrange(first.double(), "b -> b 1") + torch.arange(side) + 0.5
    coordinates = (patches * zoom - 0.5).to(angles.device)
    # A single row has slope 0, which shifts all patches equally.
    slope = (angles[..., -1, :] - angles[..., 0, :]) / max(side - 1, 1)
    coordinates = rearrange(coordinates, f"b side -> b {'1 ' * (angles.ndim - 2)}side 1")
    return angles[..., :1, :] + coordinates * rearrange(slope, "... d -> ... 1 d")


def crop_corners(offsets: Tensor, grid: Grid, ratio: float) -> tuple[Tensor, Tensor]:
    """Return the first row and first column of each crop in the zoomed grid: two ``(B,)`` int64."""
    sides = torch.tensor(grid)
    zoomed = torch.tensor([zoomed_side(side, ratio) for side in grid])
    first_row, first_column = (offsets.cpu().double() * (zoomed - sides + 1)).long().unbind(1)
    return first_row, first_column


def zoomed_side(side: int, ratio: float) -> int:
    """Return the patches per side after zooming: 154 for 14 at the paper's ratio of 10."""
    return int((1 + ratio) * side)


def _roll(images: Tensor, shift: Tensor) -> Tensor:
    """Roll each of ``(B, C, H, W)`` down and right by its own ``(B or 1, 2)``."""
    pairs = zip(images, shift.expand(len(images), 2).tolist(), strict=True)
    return torch.stack([image.roll(by, dims=(1, 2)) for image, by in pairs])
