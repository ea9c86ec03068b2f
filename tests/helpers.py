"""Tiny stand-ins and paths that several test modules use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cosettle_adapter import Projection, ProjectionConfig
from cosettle_adapter.backbones import BackboneRow, VisionTransformerBackbone
from cosettle_adapter.backbones.architectures import meta_model

REAL = "dinov2-vits14-pypi"

TINY = BackboneRow(
    name="tiny-vit16",
    family="random",
    architecture="vit_tiny_patch16_224",
    patch=16,
    width=192,
    depth=12,
    image_size=224,
    licence="Apache-2.0",
)


def shared_data() -> Path:
    """Folder of the development clips; most checkouts do not have it."""
    return Path(__file__).parents[1].parent / "shared" / "data"


def tiny_state(row: BackboneRow = TINY, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors for a row's architecture, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = meta_model(row)
        return {
            name: torch.randn(tensor.shape) * 0.05 + (1.0 if "norm" in name else 0.0)
            for name, tensor in model.state_dict().items()
        }


def projection_for(
    backbone: VisionTransformerBackbone, *, seed: int = 0, **changes: object
) -> Projection:
    """A random projection that belongs to ``backbone``."""
    config = ProjectionConfig(
        backbone=backbone.row.name,
        fingerprint=backbone.fingerprint,
        layers=(7,),
        norm=False,
        in_width=backbone.width,
        out_width=backbone.width,
    )
    config = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Projection(config).requires_grad_(False).eval()


def write_video(
    path: Path, *, frames: int, height: int, width: int, fps: int = 25, noisy: bool = False
) -> Path:
    """Encode a clip with a moving bright square; ``noisy`` makes the file large."""
    import av

    generator = torch.Generator().manual_seed(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"g": "10"}
        for index in range(frames):
            frame = torch.full((height, width, 3), 40, dtype=torch.uint8)
            if noisy:
                frame = torch.randint(0, 256, frame.shape, dtype=torch.uint8, generator=generator)
            left = (2 * index) % (width - 16)
            frame[8:24, left : left + 16] = 220
            picture = av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def broken_off(path: Path) -> Path:
    """Write the first half of a file beside it, as a download that broke off leaves it."""
    cut = path.with_stem("cut")
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return cut


def small_corpus(put: Callable[[Any, str, object], None], clips: int = 4) -> None:
    """Make the starter corpus small, by ``put(module, name, value)``."""
    from cosettle_adapter import fitting, starter

    for module in (starter, fitting):
        put(module, "CLIPS", clips)
    put(fitting, "_SIDE", 64)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
