"""Inputs of the golden values, made of whole numbers, and what is kept of a result.

Of the package only its photographs are used; nothing here depends on how it is arranged.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import av
import numpy as np
import timm
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file

import cosettle_adapter

COUNT = 64  # numbers of each kind that stand for a tensor


@functools.cache
def photograph(name: str) -> np.ndarray:
    """One of the package's own, (H, W, 3) uint8."""
    (path,) = Path(cosettle_adapter.__file__).parent.rglob(f"{name}.jpg")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def moving(
    name: str, count: int, height: int, width: int, *, cutout: str = "coffee"
) -> torch.Tensor:
    """(T, 3, H, W) uint8: the camera pans and zooms out, a cut-out goes the other way."""
    photo, square = photograph(name), photograph(cutout)[60:100, 60:100]
    frames = []
    for t in range(count):
        rows = (20 + 2 * t + np.arange(height) * (64 + t) // 64) % photo.shape[0]
        columns = (30 + 3 * t + np.arange(width) * (64 + t) // 64) % photo.shape[1]
        frame = photo[rows[:, None], columns]
        left = (width - 45 - 4 * t) % (width - 40)
        frame[height // 3 : height // 3 + 40, left : left + 40] = square
        frames.append(frame)
    return rearrange(torch.from_numpy(np.stack(frames)), "t h w c -> t c h w").contiguous()


def lossless(path: Path, frames: torch.Tensor) -> Path:
    """Write a video file that decodes to exactly these frames, 25 a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[-2:], "bgr0"
        for frame in rearrange(frames, "t c h w -> t h w c"):
            picture = np.ascontiguousarray(frame)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_clips(folder: Path) -> Path:
    """Three clips of 24 frames."""
    folder.mkdir()
    for name, cutout in (("chelsea", "coffee"), ("rocket", "car"), ("pagoda", "elf")):
        lossless(folder / f"{name}.mkv", moving(name, 24, 96, 128, cutout=cutout))
    return folder


def tiny_weights(folder: Path) -> Path:
    """A file for timm's ``test_vit``: 6 blocks of 64 channels."""
    random = np.random.RandomState(0)
    state = {}
    for name, tensor in sorted(timm.create_model("test_vit", num_classes=0).state_dict().items()):
        values = torch.from_numpy(random.randint(-999, 1000, tuple(tensor.shape))).float() / 5000
        state[name] = values + ("norm" in name and name.endswith("weight"))
    save_file(state, folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    """Shape, moments, sums under random signs that every element has a part in, and samples."""
    flat = tensor.detach().double().numpy().ravel()
    random = np.random.RandomState(0)
    signed = flat * random.choice([-1.0, 1.0], flat.size)
    return {
        "shape": list(tensor.shape),
        "mean, deviation": [flat.mean(), flat.std()],
        "norm": [np.linalg.norm(flat)],
        "sums": np.pad(signed, (0, -flat.size % COUNT)).reshape(-1, COUNT).sum(0).tolist(),
        "samples": flat[random.randint(flat.size, size=COUNT)].tolist(),
    }


def described(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: describe(tensor) for name, tensor in sorted(tensors.items())}


def exact(value: Any) -> Any:
    """Strings in place of floats."""
    if isinstance(value, dict):
        return {str(name): exact(each) for name, each in value.items()}
    if isinstance(value, (tuple, list, np.ndarray)):
        return [exact(each) for each in value]
    return repr(float(value))
