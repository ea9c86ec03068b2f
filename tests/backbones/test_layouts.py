"""Other people's names for tensors, against the transformer of ``official``.

open_clip's own towers are held against open_clip itself in ``test_open_clip``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping

import pytest
import torch
from einops import rearrange
from official import HEADS, PATCH, SIDE, Encoder, quick_gelu, random_state, tokens
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.backbones import BackboneRow, build_backbone
from cosettle_adapter.backbones.architectures import load_tensors, meta_model
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.backbones.registry import REGISTRY
from cosettle_adapter.errors import CorruptWeightsError

from helpers import TINY, tiny_state

WIDTH, DEPTH = 96, 2
Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Kind:
    """An encoder, and the timm model that should equal it."""

    architecture: str
    encoder: Encoder
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @property
    def row(self) -> BackboneRow:
        ratio = 8 if self.encoder.gated and not self.encoder.rotary else 4
        size = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "patch_size": PATCH}
        return BackboneRow(
            name="tiny", family="random", architecture=self.architecture, patch=PATCH,
            width=WIDTH, depth=DEPTH, image_size=SIDE * PATCH, licence="MIT",
            positions="rotary" if self.encoder.rotary else "absolute",
            options={"img_size": SIDE * PATCH, "mlp_ratio": ratio, **size, **self.options},
        )  # fmt: skip


CLIP = Kind("vit_base_patch16_clip_quickgelu_224", Encoder(eps=1e-5, pre_norm=True, act=quick_gelu))
SIGLIP = Kind(
    "vit_base_patch16_siglip_224",
    Encoder(class_token=False, act=functools.partial(F.gelu, approximate="tanh")),
    {"act_layer": "gelu_tanh"},
)
VIT = Kind("vit_base_patch16_224", Encoder())
DINOV2 = Kind("vit_base_patch14_dinov2", Encoder(layer_scale=True))
REGISTERS = Kind("vit_base_patch14_reg4_dinov2", Encoder(layer_scale=True, registers=4))
GIANT = Kind("vit_giant_patch14_dinov2", Encoder(layer_scale=True, gated=True, act=F.silu))
_ROTARY = Encoder(registers=4, eps=1e-5, layer_scale=True, rotary=True, biased=False)
DINOV3 = Kind("vit_small_patch16_dinov3", _ROTARY)
DINOV3_GATED = Kind(
    "vit_small_plus_patch16_dinov3", dataclasses.replace(_ROTARY, gated=True, act=F.silu)
)
DINOV3_BIASED = Kind("vit_small_patch16_dinov3_qkvb", dataclasses.replace(_ROTARY, biased=True))


# Tables of patterns and replacements, applied in order to the names of ``official``.

Names = dict[str, str]

_SCALES = {r"\.ls(\d)\.gamma": r".layer_scale\1.lambda1"}
_ATTENTION = {  # queries, keys and values apart
    r"attn\.([qkv])\.": r"attention.\1_proj.", r"attn\.proj": "attention.o_proj"
}  # fmt: skip
_GATES = {
    r"mlp\.gate": "mlp.gate_proj", r"mlp\.(up|fc1)": "mlp.up_proj", r"mlp\.fc2": "mlp.down_proj"
}  # fmt: skip
_EMBEDDINGS = {
    r"^(cls_token|register_tokens|mask_token)": r"embeddings.\1",
    r"^pos_embed": "embeddings.position_embeddings",
    r"^patch_embed\.proj": "embeddings.patch_embeddings.projection",
    r"^norm\.": "layernorm.",
}
_SELF = {
    r"attn\.q\.": "attention.attention.query.", r"attn\.k\.": "attention.attention.key.",
    r"attn\.v\.": "attention.attention.value.", r"attn\.proj": "attention.output.dense",
}  # fmt: skip
_BLOCKS = {r"^blocks": "encoder.layer"}
_VIT_NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
HF_CLIP = {
    r"^blocks": "encoder.layers", r"attn\.([qkv])\.": r"self_attn.\1_proj.",
    r"attn\.proj": "self_attn.out_proj", "^cls_token": "embeddings.class_embedding",
    "^pos_embed": "embeddings.position_embedding.weight",
    r"^patch_embed\.proj": "embeddings.patch_embedding", "^norm_pre": "pre_layrnorm",
    r"^norm\.": "post_layernorm.", r"\.norm(\d)": r".layer_norm\1",
}  # fmt: skip
HF_VIT = {
    **_BLOCKS, **_EMBEDDINGS, **_SELF, **_VIT_NORMS, r"\.mlp\.fc1": ".intermediate.dense",
    r"\.mlp\.fc2": ".output.dense",
}  # fmt: skip
# What transformers 5 calls the same modules in memory, though not in the files it writes.
HF_VIT_IN_MEMORY = {"^blocks": "layers", **_EMBEDDINGS, **_ATTENTION, **_VIT_NORMS}
HF_DINOV2 = {**_BLOCKS, **_EMBEDDINGS, **_SELF, **_SCALES}
HF_GIANT = {**HF_DINOV2, "fc1": "weights_in", "fc2": "weights_out"}
HF_GIANT_IN_MEMORY = {**_BLOCKS, **_EMBEDDINGS, **_ATTENTION, **_GATES, **_SCALES}
HF_DINOV3 = {
    "^blocks": "layer", r"^patch_embed\.proj": "embeddings.patch_embeddings", r"^norm\.": "norm.",
    **{k: v for k, v in _EMBEDDINGS.items() if "token" in k}, **_ATTENTION, **_GATES, **_SCALES,
}  # fmt: skip
META_DINOV2: Names = {}
META_GIANT = {"fc1": "w12", "fc2": "w3"}
META_DINOV3 = {"register_tokens": "storage_tokens"}
META_GATED = {**META_DINOV3, r"mlp\.gate": "mlp.w1", r"mlp\.up": "mlp.w2", "fc2": "w3"}

_CLIP_BESIDE = ("embeddings.position_ids",)
_META_BESIDE = ("rope_embed.periods", "blocks.0.attn.qkv.bias_mask")
CASES: dict[str, tuple[Kind, Names, tuple[str, ...]]] = {  # with what stands beside the encoder
    "Hugging Face CLIP": (CLIP, HF_CLIP, _CLIP_BESIDE),
    "Hugging Face SigLIP": (SIGLIP, HF_CLIP, ("head.probe", "head.mlp.fc1.weight")),
    "Hugging Face ViT": (VIT, HF_VIT, ("pooler.dense.weight", "decoder.decoder_embed.weight")),
    "Hugging Face ViT, in memory": (VIT, HF_VIT_IN_MEMORY, ()),
    "Hugging Face DINOv2": (DINOV2, HF_DINOV2, ("embeddings.mask_token", "classifier.weight")),
    "Hugging Face DINOv2 with registers": (REGISTERS, HF_DINOV2, ()),
    "Hugging Face DINOv2 giant": (GIANT, HF_GIANT, ()),
    "Hugging Face DINOv2 giant, in memory": (GIANT, HF_GIANT_IN_MEMORY, ()),
    "Hugging Face DINOv3": (DINOV3, HF_DINOV3, ()),
    "Hugging Face DINOv3, gated": (DINOV3_GATED, HF_DINOV3, ()),
    "Hugging Face DINOv3, biased": (DINOV3_BIASED, HF_DINOV3, ()),
    "Meta DINOv2 with registers": (REGISTERS, META_DINOV2, ()),
    "Meta DINOv2 giant": (GIANT, META_GIANT, ("mask_token",)),
    "Meta DINOv3": (DINOV3, META_DINOV3, _META_BESIDE),
    "Meta DINOv3, gated": (DINOV3_GATED, META_GATED, _META_BESIDE),
    "Meta DINOv3, biased": (DINOV3_BIASED, META_DINOV3, _META_BESIDE),
}


def file_of(case: str, kind: Kind | None = None) -> Tensors:
    """A file as somebody writes it, by default of the kind that the case is about."""
    known, names, beside = CASES[case]
    encoder = (kind or known).encoder
    file = random_state(encoder, width=WIDTH, depth=DEPTH)
    splits = {"attn.qkv": ("attn.q", "attn.k", "attn.v")} if "Hugging Face" in case else {}
    if encoder.gated and any("gate" in name for name in names):
        splits["mlp.fc1"] = ("mlp.gate", "mlp.up")
    for whole, parts in splits.items():
        for name in [name for name in file if f"{whole}." in name]:
            pieces = file.pop(name).chunk(len(parts))
            file |= {name.replace(whole, part): t for part, t in zip(parts, pieces, strict=True)}
    renamed = {}
    for name, tensor in file.items():
        for pattern, new in names.items():
            name = re.sub(pattern, new, name)
        renamed[name] = tensor.squeeze(0) if names is HF_CLIP and "position" in name else tensor
    if names is HF_DINOV3:  # it has no key bias
        renamed = {name: tensor for name, tensor in renamed.items() if "k_proj.bias" not in name}
    return renamed | {name: torch.zeros(3) for name in beside}


@pytest.mark.parametrize("case", CASES)
def test_a_converted_file_gives_the_same_tokens(case: str) -> None:
    kind, file = CASES[case][0], file_of(case)
    before = dict(file)
    backbone = build_backbone(kind.row, to_timm(file, kind.row), fingerprint="")
    assert file.keys() == before.keys()
    assert all(file[name] is before[name] for name in file), "the file is left as it was"
    h, w = (5, 7) if kind.encoder.rotary else (SIDE, SIDE)
    images = torch.randn(2, 3, h * PATCH, w * PATCH)
    state = random_state(kind.encoder, width=WIDTH, depth=DEPTH)
    expected = tokens(state, images, kind.encoder, DEPTH)
    torch.testing.assert_close(backbone.patch_tokens(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("prefix", "case"),
    [
        ("vision_model.", "Hugging Face CLIP"),
        ("module.a_0.backbone.", "Hugging Face ViT"),
        ("module.a_0.backbone.", "Meta DINOv3"),
    ],
)
def test_whatever_stands_before_the_names(prefix: str, case: str) -> None:
    file, row = file_of(case), CASES[case][0].row
    expected = to_timm(file, row)
    whole = {prefix + name: tensor.bfloat16() for name, tensor in file.items()}
    whole["text_model.encoder.layers.0.self_attn.q_proj.weight"] = torch.zeros(4, 4)
    found = to_timm(whole, row)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)


@pytest.mark.parametrize(
    ("case", "kind", "extra", "listed"),
    [
        ("Hugging Face CLIP", CLIP, "encoder.layers.0.self_attn.gate", "blocks.0.self_attn.gate"),
        ("Hugging Face DINOv2", DINOV2, "encoder.layer.1.mlp.extra.weight", "1.mlp.extra.weight"),
        ("Hugging Face ViT", VIT, "embeddings.distillation_token", "distillation_token"),
        ("Meta DINOv3", DINOV3, "surprise.weight", "surprise.weight"),
        # biases that this model does not have
        ("Hugging Face DINOv3", DINOV3_BIASED, None, "blocks.0.attn.q_bias"),
        ("Meta DINOv3", DINOV3_BIASED, None, "blocks.0.attn.q_bias"),
    ],
)
def test_nothing_is_dropped_silently(case: str, kind: Kind, extra: str | None, listed: str) -> None:
    row = CASES[case][0].row
    file = file_of(case, kind) | ({} if extra is None else {extra: torch.zeros(1)})
    with pytest.raises(CorruptWeightsError, match=rf"tiny: Unexpected.*{re.escape(listed)}"):
        load_tensors(meta_model(row), to_timm(file, row), row.name)


def test_a_query_without_its_key_is_listed() -> None:
    file = file_of("Hugging Face CLIP")
    del file["encoder.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(CorruptWeightsError, match=r"Missing.*1\.attn\.qkv.*Unexp.*1\.attn\.q\.w"):
        build_backbone(CLIP.row, to_timm(file, CLIP.row), fingerprint="")


# timm's names inside somebody's training code

SMALL = dataclasses.replace(TINY, depth=2, options={"depth": 2})
STATE = tiny_state(SMALL)


def prefixed(prefix: str, change: float = 0.0) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor + change for name, tensor in STATE.items()}


def ones(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(2, 2) for name in names}


TRAINING = {
    "wrapped twice": prefixed("module.module."),
    "MAE with its decoder": {
        **prefixed(""),
        **ones("mask_token", "decoder_embed.weight", "decoder_pos_embed"),
        "decoder_blocks.0.norm1.weight": torch.ones(8),
    },
    "MoCo v3": {
        **prefixed("module.base_encoder.", 1.0),
        **prefixed("module.momentum_encoder."),
        **ones("module.momentum_encoder.head.0.weight", "module.predictor.0.weight"),
    },
    "BLIP": {
        **prefixed("visual_encoder."),
        **prefixed("visual_encoder_m.", 1.0),
        **ones("text_encoder.embeddings.word_embeddings.weight", "itm_head.weight"),
    },
    "DINO's teacher": {**prefixed("backbone."), **ones("head.mlp.0.weight")},
    "DINOv2's teacher": {
        **prefixed("module.backbone."),
        **ones("module.backbone.mask_token", "module.dino_head.mlp.0.weight"),
    },
    "DINOv2's teacher, in chunks": {
        re.sub(r"^blocks\.(\d+)", r"module.backbone.blocks.0.\1", name): tensor
        for name, tensor in prefixed("").items()
        if name.startswith("blocks.")
    }
    | {f"module.backbone.{n}": t for n, t in STATE.items() if not n.startswith("blocks.")},
    "TimeT": {
        **prefixed("feature_extractor.backbone."),
        **ones("prototypes", "feature_extractor.head.0.weight"),
    },
    "NeCo": {**prefixed(""), **ones("mask_token", "projection_head.0.weight")},
    "iBOT": {**prefixed(""), **ones("masked_embed", "head.weight")},
    "with the authors' head": {**prefixed(""), **ones("adapter.adapter.adapter_linear.weight")},
    "pooled by mean": {re.sub("^norm\\.", "fc_norm.", n): t for n, t in STATE.items()},
}


@pytest.mark.parametrize("layout", TRAINING)
def test_every_layout_becomes_timms(layout: str) -> None:
    found = to_timm(TRAINING[layout], SMALL)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


def test_two_encoders_that_cannot_be_told_apart_are_an_error() -> None:
    with pytest.raises(CorruptWeightsError, match=r"several encoders \(left\., right\.\)"):
        to_timm({**prefixed("left."), **prefixed("right.")}, SMALL)


def test_the_class_position_is_folded_into_the_token_once() -> None:
    row = REGISTRY["dinov2-vitb16-in1k"]
    shapes = {"cls_token": (1, 1, 8), "pos_embed": (1, 197, 8), "register_tokens": (1, 4, 8)}
    converted = to_timm({name: torch.randn(shape) for name, shape in shapes.items()}, row)
    again = to_timm(converted, row)
    assert again.keys() == converted.keys() == {"cls_token", "pos_embed", "reg_token"}
    assert torch.equal(again["cls_token"], converted["cls_token"])


def test_blip_positions_come_down_to_224_as_its_authors_do_it() -> None:
    stored = torch.randn(1, 24 * 24 + 1, 8)
    state = {"cls_token": torch.zeros(1, 1, 8), "pos_embed": stored}
    square = rearrange(stored[:, 1:], "1 (h w) c -> 1 c h w", h=24)
    square = F.interpolate(square, (14, 14), mode="bicubic")
    expected = torch.cat([stored[:, :1], rearrange(square, "1 c h w -> 1 (h w) c")], dim=1)
    torch.testing.assert_close(to_timm(state, REGISTRY["blip-vitb16"])["pos_embed"], expected)
    tensors = {**prefixed(""), "pos_embed": torch.zeros(1, 24 * 24 + 1, 192)}
    with pytest.raises(CorruptWeightsError, match=r"mismatch for pos_embed.*\[1, 577, 192\]"):
        load_tensors(meta_model(SMALL), to_timm(tensors, SMALL), SMALL.name)
