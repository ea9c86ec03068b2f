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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.backbones import BackboneRow, build_backbone
from cosettle_adapter.backbones.architectures import load_tensors, meta_model
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.backbones.registry import REGISTRY
from cosettle_adapter.backbones.vit import resize_positions
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
    "cls": "embeddings.cls_token",
    "registers": "embeddings.register_tokens",
    "positions": "embeddings.position_embeddings",
    "patch": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_SELF = {part: f"attention.attention.{name}" for part, name in
         (("q", "query"), ("k", "key"), ("v", "value"))}  # fmt: skip
_SCALES = {f"scale{number}": f"layer_scale{number}.lambda1" for number in (1, 2)}
_PROJECTIONS = {part: f"attention.{part}_proj" for part in "qkvo"}
_NORMS = {"norm1": "norm1", "norm2": "norm2"}
HF_CLIP = Names(
    "encoder.layers.{}.",
    {
        "cls": "embeddings.class_embedding",
        "positions": "embeddings.position_embedding.weight",
        "patch": "embeddings.patch_embedding",
        "pre": "pre_layrnorm",
        "norm": "post_layernorm",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "o": "self_attn.out_proj",
        **{part: f"self_attn.{part}_proj" for part in "qkv"},
    },
    flat=True,
    beside=("embeddings.position_ids",),
)
HF_SIGLIP = dataclasses.replace(HF_CLIP, beside=("head.probe", "head.mlp.fc1.weight"))
HF_VIT = Names(
    "encoder.layer.{}.",
    {
        **_EMBEDDINGS,
        **_SELF,
        "o": "attention.output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
    beside=("pooler.dense.weight", "classifier.bias", "decoder.decoder_embed.weight"),
)
HF_DINOV2 = Names(
    "encoder.layer.{}.",
    {
        **_EMBEDDINGS, **_SELF, **_SCALES, **_NORMS, "o": "attention.output.dense",
        "up": "mlp.fc1", "down": "mlp.fc2",
    },
    beside=("embeddings.mask_token", "classifier.weight"),
)  # fmt: skip
HF_GIANT = dataclasses.replace(
    HF_DINOV2,
    names={**HF_DINOV2.names, "in": "mlp.weights_in", "down": "mlp.weights_out"},
    packed={"in": ("gate", "up")},
)
# What transformers 5 calls the same modules in memory, though not in the files it writes.
_GATES = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
HF_VIT_IN_MEMORY = Names(
    "layers.{}.", {**HF_VIT.names, **_PROJECTIONS, "up": "mlp.fc1", "down": "mlp.fc2"}
)
HF_GIANT_IN_MEMORY = Names("encoder.layer.{}.", {**HF_DINOV2.names, **_PROJECTIONS, **_GATES})
HF_DINOV3 = Names(
    "layer.{}.",
    {
        **_PROJECTIONS, **_GATES, **_SCALES, **_NORMS,
        "cls": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "patch": "embeddings.patch_embeddings",
        "norm": "norm",
    },
    beside=("embeddings.mask_token",),
)  # fmt: skip
META_DINOV3 = Names(
    "blocks.{}.",
    {
        "cls": "cls_token", "registers": "storage_tokens", "patch": "patch_embed.proj",
        "norm": "norm", "qkv": "attn.qkv", "o": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2",
        "scale1": "ls1.gamma", "scale2": "ls2.gamma", **_NORMS,
    },
    packed={"qkv": ("q", "k", "v")},
    beside=("mask_token", "rope_embed.periods", "blocks.0.attn.qkv.bias_mask"),
)  # fmt: skip
META_GATED = dataclasses.replace(
    META_DINOV3, names={**META_DINOV3.names, "gate": "mlp.w1", "up": "mlp.w2", "down": "mlp.w3"}
)
META_DINOV2 = Names(
    "blocks.{}.",
    {
        **META_DINOV3.names, "registers": "register_tokens", "positions": "pos_embed",
        "in": "mlp.w12",
    },
    packed={"qkv": ("q", "k", "v")},
    beside=("mask_token",),
)  # fmt: skip
META_GIANT = dataclasses.replace(
    META_DINOV2,
    names={**META_DINOV2.names, "down": "mlp.w3"},
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_file_gives_the_same_tokens(case: str, dtype: torch.dtype) -> None:
    kind, _ = CASES[case]
    file = {name: tensor.to(dtype) for name, tensor in file_of(case).items()}
    before = dict(file)
    converted = to_timm(file, kind.row)
    assert {tensor.dtype for tensor in converted.values()} == {dtype}
    assert file.keys() == before.keys()
    assert all(file[name] is before[name] for name in file), "the file is left as it was"
    if dtype == torch.float32:
        backbone = build_backbone(kind.row, converted, fingerprint="")
        size = (40, 56) if kind.rotary else (SIDE, SIDE)
        images = torch.randn(2, 3, *size)
        expected = reference(random_model(kind), kind, images)
        found = backbone.patch_tokens(images)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


parts = st.text("abcdefgh_0123", min_size=1, max_size=6)


@settings(max_examples=8, deadline=None)
@given(
    prefix=st.lists(parts, max_size=3).map(lambda names: "".join(f"{n}." for n in names)),
    case=st.sampled_from(["Hugging Face CLIP", "Hugging Face ViT", "Meta DINOv3"]),
)
def test_whatever_stands_before_the_names(prefix: str, case: str) -> None:
    file, row = file_of(case), CASES[case][0].row
    expected = to_timm(file, row)
    beside = {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}
    whole = {
        **{prefix + name: tensor for name, tensor in file.items()},
        **(beside if prefix else {}),
    }
    found = to_timm(whole, row)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("case", "extra"),
    [
        ("Hugging Face CLIP", "encoder.layers.0.self_attn.gate"),
        ("Hugging Face SigLIP", "embeddings.class_embedding_2"),
        ("Hugging Face DINOv2", "encoder.layer.1.mlp.extra.weight"),
        ("Hugging Face ViT", "embeddings.distillation_token"),
        ("Hugging Face DINOv3", "surprise.weight"),
        ("Meta DINOv3", "surprise.weight"),
    ],
)
def test_what_is_not_recognised_is_listed_under_its_own_name(case: str, extra: str) -> None:
    row = CASES[case][0].row
    converted = to_timm({**file_of(case), extra: torch.zeros(1)}, row)
    with pytest.raises(CorruptWeightsError, match=rf"1 unexpected \({re.escape(extra)}"):
        load_tensors(meta_model(row), converted, row.name)


def test_a_query_without_its_key_is_listed() -> None:
    tensors = file_of("Hugging Face CLIP")
    del tensors["encoder.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(CorruptWeightsError) as caught:
        build_backbone(CLIP.row, to_timm(tensors, CLIP.row), fingerprint="")
    assert re.search(r"missing[^;]*blocks\.1\.attn\.qkv\.weight", str(caught.value))
    assert re.search(r"unexpected[^;]*layers\.1\.self_attn\.q_proj\.weight", str(caught.value))


@pytest.mark.parametrize("case", ["Hugging Face DINOv3", "Meta DINOv3"])
def test_biases_are_never_dropped_silently(case: str) -> None:
    tensors = to_timm(file_of(case, DINOV3_BIASED), DINOV3.row)
    with pytest.raises(CorruptWeightsError, match=r"4 unexpected \(blocks.0.attn.q_bias"):
        load_tensors(meta_model(DINOV3.row), tensors, DINOV3.row.name)


def test_two_towers_in_one_file() -> None:
    tower = file_of("Hugging Face CLIP")
    both = {f"{who}.{name}": t for who in ("student", "teacher") for name, t in tower.items()}
    with pytest.raises(CorruptWeightsError, match=r"found 2 \('student\.', 'teacher\.'\); save"):
        to_timm(both, CLIP.row)


def test_timms_own_names_have_no_mark() -> None:
    for name in ("dinov2-vits14-reg", "dinov3-vits16", "siglip2-vitb16", "dinov3-convnext-base"):
        names = meta_model(REGISTRY[name]).state_dict()
        assert not [layout.name for layout in LAYOUTS if layout.prefixes(names)]


# timm's names inside somebody's training code


SMALL = dataclasses.replace(TINY, depth=2, options={"depth": 2})
STATE = {name: t for name, t in tiny_state(SMALL).items() if name in meta_model(SMALL).state_dict()}


def prefixed(prefix: str, change: float = 0.0) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor + change for name, tensor in STATE.items()}


def is_state(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[n], STATE[n]) for n in STATE)


TRAINING = {
    "timm": prefixed(""),
    "distributed": prefixed("module."),
    "wrapped twice": prefixed("module.module."),
    "MAE with its decoder": {
        **prefixed(""),
        "mask_token": torch.ones(1, 1, 8),
        "decoder_embed.weight": torch.ones(8, 8),
        "decoder_blocks.0.norm1.weight": torch.ones(8),
        "decoder_pos_embed": torch.ones(1, 197, 8),
    },
    "MoCo v3": {
        **prefixed("module.base_encoder.", 1.0),
        **prefixed("module.momentum_encoder."),
        "module.momentum_encoder.head.0.weight": torch.ones(2, 2),
        "module.predictor.0.weight": torch.ones(2, 2),
    },
    "BLIP": {
        **prefixed("visual_encoder."),
        **prefixed("visual_encoder_m.", 1.0),
        "text_encoder.embeddings.word_embeddings.weight": torch.ones(3, 3),
        "itm_head.weight": torch.ones(2, 2),
        "image_queue": torch.ones(2, 2),
    },
    "I-JEPA": prefixed("module."),
    "DINO's teacher": {**prefixed("backbone."), "head.mlp.0.weight": torch.ones(2, 2)},
    "DINO, distributed": {
        **prefixed("module.backbone."),
        "module.head.mlp.0.weight": torch.ones(2, 2),
    },
    "DINOv2's teacher": {
        **prefixed("backbone."),
        "backbone.mask_token": torch.ones(1, 8),
        "dino_head.mlp.0.weight": torch.ones(2, 2),
        "ibot_head.last_layer.weight_g": torch.ones(2, 2),
    },
    "iBOT": {**prefixed(""), "masked_embed": torch.ones(1, 8), "head.weight": torch.ones(2, 2)},
    "with the authors' head": {
        **prefixed(""),
        "adapter.adapter.adapter_linear.weight": torch.ones(2, 2),
    },
}


@pytest.mark.parametrize("layout", TRAINING)
def test_every_layout_becomes_timms(layout: str) -> None:
    assert is_state(to_timm(dict(TRAINING[layout]), SMALL))


def test_what_nobody_knows_is_left_to_be_noticed() -> None:
    tensors = {**prefixed("backbone."), "backbone.surprise.weight": torch.ones(1)}
    converted = to_timm(tensors, SMALL)
    assert "surprise.weight" in converted
    with pytest.raises(CorruptWeightsError, match=r"1 unexpected \(surprise.weight\)"):
        load_tensors(meta_model(SMALL), converted, SMALL.name)


def test_two_encoders_that_cannot_be_told_apart_are_an_error() -> None:
    with pytest.raises(CorruptWeightsError, match=r"several encoders \(left\., right\.\)"):
        to_timm({**prefixed("left."), **prefixed("right.")}, SMALL)


def test_a_norm_behind_mean_pooling_is_the_final_norm() -> None:
    tensors = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: tensor
        for name, tensor in prefixed("").items()
    }
    assert "fc_norm.weight" in tensors
    assert is_state(to_timm(tensors, SMALL))


def test_registers_and_the_class_position_take_timms_shape() -> None:
    row = REGISTRY["dinov2-vitb16-in1k"]
    tensors = {
        "cls_token": torch.randn(1, 1, 8),
        "pos_embed": torch.randn(1, 197, 8),
        "register_tokens": torch.randn(1, 4, 8),
        "mask_token": torch.zeros(1, 8),
    }
    converted = to_timm(dict(tensors), row)
    assert converted.keys() == {"cls_token", "pos_embed", "reg_token"}
    assert torch.equal(converted["cls_token"], tensors["cls_token"] + tensors["pos_embed"][:, :1])
    assert torch.equal(converted["pos_embed"], tensors["pos_embed"][:, 1:])
    again = to_timm(dict(converted), row)
    assert torch.equal(again["cls_token"], converted["cls_token"]), "folded once only"


def test_blip_positions_come_down_to_224_as_its_authors_do_it() -> None:
    row = REGISTRY["blip-vitb16"]
    stored = torch.randn(1, 24 * 24 + 1, 8)
    state = {"cls_token": torch.zeros(1, 1, 8), "pos_embed": stored}
    converted = to_timm(dict(state), row)
    expected = resize_positions(
        stored, (14, 14), source_grid=(24, 24), prefix=1, interpolation="size"
    )
    assert torch.equal(converted["pos_embed"], expected)
    assert converted["pos_embed"].shape == (1, 197, 8)


def test_other_rows_refuse_positions_of_another_grid() -> None:
    tensors = {**prefixed(""), "pos_embed": torch.zeros(1, 24 * 24 + 1, 192)}
    with pytest.raises(CorruptWeightsError, match=r"1 misshapen \(pos_embed is \(1, 577, 192\)"):
        load_tensors(meta_model(SMALL), to_timm(tensors, SMALL), SMALL.name)
