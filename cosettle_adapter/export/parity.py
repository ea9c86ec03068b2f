"""Whether an exported file computes what the model computes: both are run on the same frames."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import MissingExtraError
from cosettle_adapter.export.errors import ExportError
from cosettle_adapter.video import as_frames, photographs, render_clip
from cosettle_adapter.video.resampling import resize

FRAMES = 3
# Of the largest feature. Kernels differ by far less than what a wrong graph does.
_ALLOWED = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclasses.dataclass(frozen=True)
class Parity:
    """A comparison of an exported file with the model in PyTorch.

    Attributes:
        runtime: what ran the file, with its version.
        frames: how many frames were compared.
        difference: largest absolute difference of any feature.
        largest: largest absolute feature.
    """

    runtime: str
    frames: int
    difference: float
    largest: float

    def __str__(self) -> str:
        return (
            f"{self.runtime} is within {self.difference:.1e} of PyTorch on {self.frames} frame(s) "
            f"(largest feature {self.largest:.3g})"
        )


def compare(runtime: str, found: Tensor, expected: Tensor) -> Parity:
    """Compare features of a runtime with PyTorch's.

    Args:
        runtime: name and version, for the report.
        found: ``(N, C, h, w)`` that the file computed.
        expected: ``(N, C, h, w)`` that the model computed; its dtype says what is close.

    Raises:
        ExportError: they differ by more than rounding, or in shape, or hold NaN.
    """
    dtype = str(expected.dtype).removeprefix("torch.")
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    if found.shape != expected.shape:
        raise ExportError(
            f"{runtime} returns {tuple(found.shape)}, PyTorch {tuple(expected.shape)}: the file "
            "was not kept"
        )
    difference = float((found - expected).abs().max())
    parity = Parity(runtime, len(expected), difference, float(expected.abs().max()))
    if not difference <= _ALLOWED[dtype] * max(parity.largest, 1e-6):
        raise ExportError(
            f"{runtime} differs from PyTorch by {difference:.3g} where features reach "
            f"{parity.largest:.3g}, more than rounding explains in {dtype}: the file was not "
            "kept. check=False (--no-check) keeps it for a look at it"
        )
    return parity


def frames_to_compare(given: Any, size: tuple[int, int], count: int | None) -> Tensor:
    """Return the frames on which file and model are compared.

    Args:
        given: frames of any kind and size, or ``None`` for rendered ones: a camera that moves
            over a photograph, or over a texture where scikit-image is not installed.
        size: (H, W) of the exported model.
        count: how many frames; ``None`` keeps all that are given.

    Returns:
        ``(N, 3, H, W)`` uint8; the last one is repeated where there are too few.
    """
    if given is None:
        frames = _rendered(size, count or FRAMES)
    else:
        frames = as_frames(given)
        frames = rearrange(frames, "... c h w -> (...) c h w")
        scale = 1 if frames.dtype == torch.uint8 else 255
        if frames.shape[-2:] != size:
            frames = resize(frames, size)
        frames = (frames.float() * scale).round().to(torch.uint8)
    if count is None:
        return frames
    return frames[torch.arange(count).clamp(max=len(frames) - 1)]


def _rendered(size: tuple[int, int], count: int) -> Tensor:
    try:
        photo = photographs()["coffee"]
    except MissingExtraError:
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(1, 3, 24, 32, generator=generator)
        texture = F.interpolate(noise, size=(240, 320), mode="bicubic")[0]
        photo = (texture.clamp(0, 1) * 255).to(torch.uint8)
    return render_clip(photo, frames=count, size=size).frames
