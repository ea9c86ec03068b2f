"""A training step as the paper's published code makes it.

It stands for ``sample_two_frames_tuple``, ``DoubleTupleRandomResizedCrop``, ``forward_adapter`` and
``train_one_epoch`` of github.com/yafeng19/Co-Settle (at 3a01eb0): four frames of a folder of JPEG
images are decoded and squashed to the square, cropped and normalised, of which the second and the
fourth are used; the encoder runs once on each, and once more on the second with a perturbed grid
of positions, under ``no_grad``; the head runs three times; cycle and KL losses; AdamW on the head.
On a GPU it runs under float16 autocast with a gradient scaler, as there. The wrapper for several
processes around the whole model is left away: with one process it only adds to the time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from cosettle_adapter.extras import require
from cosettle_adapter.training.samples.augmentation import apply_crop, draw_crop

if TYPE_CHECKING:
    from collections.abc import Callable

_GAP = 0.15
_TEMPERATURE = 0.03
_RATIO = 10.0
_LAMBDA = 3.0
_EPSILON = 1e-6
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FourFrames(Dataset[Tensor]):
    """Four normalised frames of each folder of images, of which a step uses two."""

    def __init__(self, folders: Sequence[Path], *, size: int) -> None:
        """Draw one sample from each of ``folders``, squares of ``size``."""
        self._folders, self._size = list(folders), size

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._folders)

    def __getitem__(self, index: int) -> Tensor:
        """Return ``(4, 3, S, S)``: the frames before the two that are used, and these."""
        files = sorted(self._folders[index].iterdir())
        gap = int(_GAP * len(files))
        second = random.randrange(1, len(files) - gap)
        fourth = second + gap
        chosen = (second - 1, second, fourth - 1, fourth)
        frames = torch.stack([self._read(files[at]) for at in chosen])
        crop = draw_crop(
            self._size,
            self._size,
            generator=torch.Generator().manual_seed(random.getrandbits(48)),
        )
        cropped = torch.cat([apply_crop(frame[None], crop, self._size) for frame in frames])
        mean, std = (rearrange(torch.tensor(each), "c -> c 1 1") for each in (_MEAN, _STD))
        return (cropped - mean) / std

    def _read(self, file: Path) -> Tensor:
        image_module: Any = require("PIL.Image", extra="train", purpose="reading image files")
        numpy: Any = require("numpy", extra="train", purpose="reading image files")
        with image_module.open(file) as image:
            squashed = image.convert("RGB").resize(
                (self._size, self._size), image_module.Resampling.BILINEAR
            )
        pixels = torch.from_numpy(numpy.array(squashed))
        return rearrange(pixels, "h w c -> c h w").float() / 255


class OfficialModel(nn.Module):
    """Encoder and head; its forward pass is the loss."""

    def __init__(
        self, encoder: Callable[[Tensor], Tensor], vit: Any, head: Callable[[Tensor], Tensor]
    ) -> None:
        """Train ``head`` on ``encoder``'s tokens; ``vit`` is what holds its positions."""
        super().__init__()
        self._encoder, self._vit, self._head = encoder, vit, head
        self._positions: Tensor = vit.pos_embed.detach()
        self._prefix = 0 if vit.no_embed_class else int(vit.num_prefix_tokens)

    def forward(self, frames: Tensor, corner: tuple[int, int] | None = None) -> Tensor:
        """Return the loss of ``(B, 4, 3, S, S)`` frames; positions cropped at ``corner``."""
        first, second = frames[:, 1], frames[:, 3]
        with torch.no_grad():
            plain = self._tokens(first, self._positions)
            perturbed = self._tokens(first, self._cropped(plain.shape[1], corner))
            other = self._tokens(second, self._positions)
        heads = [self._head(plain), self._head(other), self._head(perturbed)]
        projected = F.normalize(torch.stack(heads, dim=1).float(), dim=-1)
        original = F.normalize(torch.stack([plain, other, perturbed], dim=1).float(), dim=-1)
        divergence = F.kl_div(
            F.log_softmax(projected, dim=-1), F.softmax(original, dim=-1), reduction="batchmean"
        )
        return _cycle_loss(projected) + _LAMBDA * divergence

    def _tokens(self, images: Tensor, positions: Tensor) -> Tensor:
        self._vit.pos_embed.data = positions
        maps = self._encoder(images)
        self._vit.pos_embed.data = self._positions
        return rearrange(maps, "b c h w -> b (h w) c").clone()

    def _cropped(self, cells: int, corner: tuple[int, int] | None) -> Tensor:
        side = round(cells**0.5)
        zoomed = int((1 + _RATIO) * side)
        row, column = corner or (random.randint(0, zoomed - side), random.randint(0, zoomed - side))
        square = rearrange(self._positions[:, self._prefix :], "b (h w) c -> b c h w", h=side)
        large = F.interpolate(
            square.float(), size=(zoomed, zoomed), mode="bicubic", align_corners=False
        )
        crop = large[:, :, row : row + side, column : column + side]
        moved = rearrange(crop, "b c h w -> b (h w) c").to(self._positions)
        return torch.cat([self._positions[:, : self._prefix], moved], dim=1)


def train_step(
    model: OfficialModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    frames: Tensor,
) -> float:
    """Make one step and return its loss."""
    with torch.autocast(frames.device.type, dtype=torch.float16, enabled=scaler.is_enabled()):
        loss: Tensor = model(frames)
    found = float(loss.detach())
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return found


def _cycle_loss(projected: Tensor) -> Tensor:
    """Walk from the first frame to the second and back to the perturbed first."""
    side = round(projected.shape[2] ** 0.5)
    clips = len(projected)
    maps = rearrange(projected, "b t (h w) c -> (b t) c h w", h=side)
    pooled = F.avg_pool2d(maps, kernel_size=2, stride=2)
    nodes = rearrange(pooled, "(b t) c h w -> b t (h w) c", b=clips)
    affinity = torch.einsum("btnc,btmc->btnm", nodes[:, :-1], nodes[:, 1:])
    walks = F.softmax(affinity / _TEMPERATURE, dim=-1)
    round_trip = walks[:, 0] @ walks[:, 1]
    logits = rearrange(torch.log(round_trip + _EPSILON), "b n m -> (b n) m")
    home = torch.arange(round_trip.shape[-1], device=logits.device).repeat(clips)
    return F.cross_entropy(logits, home)
