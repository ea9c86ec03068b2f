"""Other people's names for tensors, against one transformer written again in plain PyTorch.

open_clip's own towers are held against open_clip itself in ``test_open_clip``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.backbones import BackboneRow, build_backbone
from cosettle_adapter.backbones.architectures import load_tensors, meta_model
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.backbones.registry import REGISTRY
from cosettle_adapter.errors import CorruptWeightsError

from helpers import TINY, tiny_state

WIDTH, HEADS, DEPTH, PATCH, SIDE, HIDDEN = 64, 2, 2, 8, 32, 128
PATCHES = (SIDE // PATCH) ** 2
Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A transformer: the timm model that should equal it, and what distinguishes it."""

    architecture: str
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    class_token: bool = True
    registers: int = 0
    eps: float = 1e-6
    act: Callable[[Tensor], Tensor] = F.gelu
    pre_norm: bool = False
    scaled: bool = False
    gated: bool = False
    rotary: bool = False
    biased: bool = True  # queries and values

    @property
    def row(self) -> BackboneRow:
        size = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "patch_size": PATCH}
        ratio = {"mlp_ratio": HIDDEN / WIDTH * (1 + (self.gated and not self.rotary))}
        return BackboneRow(
            name="tiny", family="random", architecture=self.architecture, patch=PATCH,
            width=WIDTH, depth=DEPTH, image_size=SIDE, licence="MIT",
            positions="rotary" if self.rotary else "absolute",
            options={"img_size": SIDE, **size, **ratio, **self.options},
        )  # fmt: skip


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


CLIP = Kind("vit_base_patch16_clip_quickgelu_224", eps=1e-5, act=quick_gelu, pre_norm=True)
SIGLIP = Kind(
    "vit_base_patch16_siglip_224",
    {"act_layer": "gelu_tanh"},
    class_token=False,
    act=functools.partial(F.gelu, approximate="tanh"),
)
VIT = Kind("vit_base_patch16_224")
DINOV2 = Kind("vit_base_patch14_dinov2", scaled=True)
REGISTERS = Kind("vit_base_patch14_reg4_dinov2", registers=4, scaled=True)
GIANT = Kind("vit_giant_patch14_dinov2", scaled=True, gated=True, act=F.silu)
DINOV3 = Kind(
    "vit_small_patch16_dinov3", registers=4, eps=1e-5, scaled=True, rotary=True, biased=False
)
DINOV3_GATED = dataclasses.replace(
    DINOV3, architecture="vit_small_plus_patch16_dinov3", gated=True, act=F.silu
)
DINOV3_BIASED = dataclasses.replace(
    DINOV3, architecture="vit_small_patch16_dinov3_qkvb", biased=True
)


def random_model(kind: Kind) -> Tensors:
    """Tensors under names of our own, of which all layouts are made."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, mean: float = 0.0, scale: float = 0.2) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + mean

    def norm(name: str) -> Tensors:
        return {f"{name}.weight": random(WIDTH, mean=1.0), f"{name}.bias": random(WIDTH)}

    def linear(name: str, out: int, into: int) -> Tensors:
        return {
            f"{name}.weight": random(out, into, scale=into**-0.5),
            f"{name}.bias": random(out),
        }

    model = {"patch.weight": random(WIDTH, 3, PATCH, PATCH, scale=0.1)}
    model |= {} if kind.pre_norm else {"patch.bias": random(WIDTH)}
    model |= norm("norm") | (norm("pre") if kind.pre_norm else {})
    if kind.class_token:
        model["cls"] = random(1, 1, WIDTH)
    if kind.registers:
        model["registers"] = random(1, kind.registers, WIDTH)
    if not kind.rotary:
        model["positions"] = random(1, PATCHES + kind.class_token, WIDTH)
    for index in range(DEPTH):
        for name in "qkvo":
            model |= linear(f"{index}.{name}", WIDTH, WIDTH)
            if kind.rotary and (name == "k" or (name in "qv" and not kind.biased)):
                model[f"{index}.{name}.bias"].zero_()
        for name in ("gate", "up") if kind.gated else ("up",):
            model |= linear(f"{index}.{name}", HIDDEN, WIDTH)
        model |= linear(f"{index}.down", WIDTH, HIDDEN)
        model |= norm(f"{index}.norm1") | norm(f"{index}.norm2")
        if kind.scaled:
            model |= {f"{index}.scale{number}": random(WIDTH) for number in (1, 2)}
    return model


def reference(model: Tensors, kind: Kind, images: Tensor) -> Tensor:
    """Patch tokens ``(B, C, h, w)`` after the final norm."""

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = model[f"{name}.weight"], model[f"{name}.bias"]
        return F.layer_norm(x, (WIDTH,), weight, bias, kind.eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, model[f"{name}.weight"], model[f"{name}.bias"])

    patches = F.conv2d(images, model["patch.weight"], model.get("patch.bias"), stride=PATCH)
    batch, _, h, w = patches.shape
    x = rearrange(patches, "b c h w -> b (h w) c")
    if kind.class_token:
        x = torch.cat([model["cls"].expand(batch, -1, -1), x], dim=1)
    x = x + model.get("positions", 0.0)
    if kind.registers:
        x = torch.cat([x[:, :1], model["registers"].expand(batch, -1, -1), x[:, 1:]], dim=1)
    prefix = kind.class_token + kind.registers
    if kind.pre_norm:
        x = norm(x, "pre")
    # DINOv3: rotary positions of patch centres in [-1, 1], periods from 1 to 100
    size = WIDTH // HEADS
    periods = 100 ** (2 * torch.arange(size // 4) / (size // 2))
    rows = (2 * (torch.arange(h) + 0.5) / h - 1).repeat_interleave(w)
    columns = (2 * (torch.arange(w) + 0.5) / w - 1).repeat(h)
    angles = torch.cat([2 * math.pi * axis[:, None] / periods for axis in (rows, columns)], dim=1)
    cosine, sine = angles.cos().tile(2), angles.sin().tile(2)

    def rotate(part: Tensor) -> Tensor:
        if not kind.rotary:
            return part
        kept, turned = part[:, :, :prefix], part[:, :, prefix:]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cosine + torch.cat([-second, first], dim=-1) * sine
        return torch.cat([kept, turned], dim=2)

    for index in range(DEPTH):
        inner = norm(x, f"{index}.norm1")
        query, key, value = (
            rearrange(linear(inner, f"{index}.{part}"), "b n (a d) -> b a n d", a=HEADS)
            for part in "qkv"
        )
        scores = rotate(query) @ rotate(key).transpose(-2, -1) / size**0.5
        mixed = rearrange(scores.softmax(-1) @ value, "b a n d -> b n (a d)")
        x = x + model.get(f"{index}.scale1", 1.0) * linear(mixed, f"{index}.o")
        inner = norm(x, f"{index}.norm2")
        up = linear(inner, f"{index}.up")
        hidden = kind.act(linear(inner, f"{index}.gate")) * up if kind.gated else kind.act(up)
        x = x + model.get(f"{index}.scale2", 1.0) * linear(hidden, f"{index}.down")
    return rearrange(norm(x, "norm")[:, prefix:], "b (h w) c -> b c h w", h=h)


@dataclasses.dataclass(frozen=True)
class Names:
    """Somebody's names for these tensors; ``beside`` stands in the file and is not the encoder."""

    block: str
    names: Mapping[str, str]
    packed: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    flat: bool = False  # class token and positions without leading dimensions
    beside: tuple[str, ...] = ()

    def file(self, model: Tensors) -> Tensors:
        model = dict(model)
        for index in range(DEPTH):
            for leaf in ("weight", "bias"):
                for whole, parts in self.packed.items():
                    if f"{index}.{parts[0]}.{leaf}" in model:
                        found = [model.pop(f"{index}.{part}.{leaf}") for part in parts]
                        model[f"{index}.{whole}.{leaf}"] = torch.cat(found)
        if self.flat:
            for name in model.keys() & {"cls", "positions"}:
                model[name] = model[name].squeeze(0).squeeze(0)
        return {
            **{self.of(name): tensor for name, tensor in model.items()},
            **{name: torch.zeros(3) for name in self.beside},
        }

    def of(self, name: str) -> str:
        index, dot, inner = name.partition(".")
        prefix = self.block.format(index) if index.isdigit() else ""
        inner = inner if index.isdigit() else name
        module, dot, leaf = inner.rpartition(".")
        return prefix + (self.names[module] + dot + leaf if dot else self.names[leaf])


_EMBEDDINGS = {
    "cls": "embeddings.cls_token", "registers": "embeddings.register_tokens",
    "positions": "embeddings.position_embeddings", "norm": "layernorm",
    "patch": "embeddings.patch_embeddings.projection",
}  # fmt: skip
_SELF = {
    "q": "attention.attention.query", "k": "attention.attention.key",
    "v": "attention.attention.value", "o": "attention.output.dense",
}  # fmt: skip
_SCALES = {f"scale{number}": f"layer_scale{number}.lambda1" for number in (1, 2)}
_PROJECTIONS = {part: f"attention.{part}_proj" for part in "qkvo"}
_NORMS, _MLP = {"norm1": "norm1", "norm2": "norm2"}, {"up": "mlp.fc1", "down": "mlp.fc2"}
_GATES = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
HF_CLIP = Names(
    "encoder.layers.{}.",
    {
        **_MLP, **{part: f"self_attn.{part}_proj" for part in "qkv"}, "o": "self_attn.out_proj",
        "cls": "embeddings.class_embedding", "positions": "embeddings.position_embedding.weight",
        "patch": "embeddings.patch_embedding", "pre": "pre_layrnorm", "norm": "post_layernorm",
        "norm1": "layer_norm1", "norm2": "layer_norm2",
    },
    flat=True,
    beside=("embeddings.position_ids",),
)  # fmt: skip
HF_SIGLIP = dataclasses.replace(HF_CLIP, beside=("head.probe", "head.mlp.fc1.weight"))
HF_VIT = Names(
    "encoder.layer.{}.",
    {
        **_EMBEDDINGS, **_SELF, "norm1": "layernorm_before", "norm2": "layernorm_after",
        "up": "intermediate.dense", "down": "output.dense",
    },
    beside=("pooler.dense.weight", "classifier.bias", "decoder.decoder_embed.weight"),
)  # fmt: skip
HF_DINOV2 = Names(
    "encoder.layer.{}.",
    {**_EMBEDDINGS, **_SELF, **_SCALES, **_NORMS, **_MLP},
    beside=("embeddings.mask_token", "classifier.weight"),
)
HF_GIANT = dataclasses.replace(
    HF_DINOV2,
    names={**HF_DINOV2.names, "in": "mlp.weights_in", "down": "mlp.weights_out"},
    packed={"in": ("gate", "up")},
)
# What transformers 5 calls the same modules in memory, though not in the files it writes.
HF_VIT_IN_MEMORY = Names("layers.{}.", {**HF_VIT.names, **_PROJECTIONS, **_MLP})
HF_GIANT_IN_MEMORY = Names("encoder.layer.{}.", {**HF_DINOV2.names, **_PROJECTIONS, **_GATES})
HF_DINOV3 = Names(
    "layer.{}.",
    {
        **_EMBEDDINGS, **_PROJECTIONS, **_GATES, **_SCALES, **_NORMS,
        "patch": "embeddings.patch_embeddings", "norm": "norm",
    },
    beside=("embeddings.mask_token",),
)  # fmt: skip
META_DINOV3 = Names(
    "blocks.{}.",
    {
        "cls": "cls_token", "registers": "storage_tokens", "patch": "patch_embed.proj",
        "norm": "norm", "qkv": "attn.qkv", "o": "attn.proj", "scale1": "ls1.gamma",
        "scale2": "ls2.gamma", **_MLP, **_NORMS,
    },
    packed={"qkv": ("q", "k", "v")},
    beside=("mask_token", "rope_embed.periods", "blocks.0.attn.qkv.bias_mask"),
)  # fmt: skip
META_GATED = dataclasses.replace(
    META_DINOV3, names={**META_DINOV3.names, "gate": "mlp.w1", "up": "mlp.w2", "down": "mlp.w3"}
)
META_DINOV2 = Names(
    "blocks.{}.",
    {**META_DINOV3.names, "registers": "register_tokens", "positions": "pos_embed"},
    packed={"qkv": ("q", "k", "v")},
    beside=("mask_token",),
)
META_GIANT = dataclasses.replace(
    META_DINOV2,
    names={**META_DINOV2.names, "in": "mlp.w12", "down": "mlp.w3"},
    packed={"qkv": ("q", "k", "v"), "in": ("gate", "up")},
)
CASES = {
    "Hugging Face CLIP": (CLIP, HF_CLIP),
    "Hugging Face SigLIP": (SIGLIP, HF_SIGLIP),
    "Hugging Face ViT": (VIT, HF_VIT),
    "Hugging Face ViT, in memory": (VIT, HF_VIT_IN_MEMORY),
    "Hugging Face DINOv2": (DINOV2, HF_DINOV2),
    "Hugging Face DINOv2 with registers": (REGISTERS, HF_DINOV2),
    "Hugging Face DINOv2 giant": (GIANT, HF_GIANT),
    "Hugging Face DINOv2 giant, in memory": (GIANT, HF_GIANT_IN_MEMORY),
    "Hugging Face DINOv3": (DINOV3, HF_DINOV3),
    "Hugging Face DINOv3, gated": (DINOV3_GATED, HF_DINOV3),
    "Hugging Face DINOv3, biased": (DINOV3_BIASED, HF_DINOV3),
    "Meta DINOv2 with registers": (REGISTERS, META_DINOV2),
    "Meta DINOv2 giant": (GIANT, META_GIANT),
    "Meta DINOv3": (DINOV3, META_DINOV3),
    "Meta DINOv3, gated": (DINOV3_GATED, META_GATED),
    "Meta DINOv3, biased": (DINOV3_BIASED, META_DINOV3),
}


def file_of(case: str, kind: Kind | None = None) -> Tensors:
    known, names = CASES[case]
    file = names.file(random_model(kind or known))
    if names is HF_DINOV3:  # it has no key bias
        file = {name: tensor for name, tensor in file.items() if "k_proj.bias" not in name}
    return file


@pytest.mark.parametrize("case", CASES)
def test_a_converted_file_gives_the_same_tokens(case: str) -> None:
    kind, _ = CASES[case]
    file = file_of(case)
    before = dict(file)
    backbone = build_backbone(kind.row, to_timm(file, kind.row), fingerprint="")
    assert file.keys() == before.keys()
    assert all(file[name] is before[name] for name in file), "the file is left as it was"
    images = torch.randn(2, 3, *((40, 56) if kind.rotary else (SIDE, SIDE)))
    expected = reference(random_model(kind), kind, images)
    torch.testing.assert_close(backbone.patch_tokens(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["Hugging Face CLIP", "Hugging Face ViT", "Meta DINOv3"])
@pytest.mark.parametrize("prefix", ["vision_model.", "module.a_0.backbone."])
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
        ("Hugging Face SigLIP", SIGLIP, "embeddings.class_embedding_2", "class_embedding_2"),
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
    "timm": prefixed(""),
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


def test_registers_and_the_class_position_take_timms_shape() -> None:
    row = REGISTRY["dinov2-vitb16-in1k"]
    shapes = {"cls_token": (1, 1, 8), "pos_embed": (1, 197, 8), "register_tokens": (1, 4, 8)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    converted = to_timm(tensors, row)
    assert converted.keys() == {"cls_token", "pos_embed", "reg_token"}
    assert torch.equal(converted["cls_token"], tensors["cls_token"] + tensors["pos_embed"][:, :1])
    assert torch.equal(converted["pos_embed"], tensors["pos_embed"][:, 1:])
    again = to_timm(converted, row)
    assert torch.equal(again["cls_token"], converted["cls_token"]), "folded once only"


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
