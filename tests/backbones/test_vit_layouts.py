"""DINOv3 in Meta's and Hugging Face's names, against DINOv3 written again in plain PyTorch."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.backbones import build_backbone, lookup
from cosettle_adapter.backbones.architectures import check_tensors, meta_model
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.errors import CorruptWeightsError

WIDTH, HEADS, DEPTH, PATCH = 384, 6, 2, 16
PLAIN = "timm:vit_small_patch16_dinov3"
GATED = "timm:vit_small_plus_patch16_dinov3"
BIASED = "timm:vit_small_patch16_dinov3_qkvb"


def row(name: str):
    return dataclasses.replace(lookup(name), depth=DEPTH, options={"depth": DEPTH})


def random_model(*, gated: bool, biased: bool) -> dict[str, Tensor]:
    """Tensors under names of our own, of which both layouts are made."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, mean: float = 0.0, scale: float = 0.1) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + mean

    model = {
        "cls": random(1, 1, WIDTH),
        "registers": random(1, 4, WIDTH),
        "patch.weight": random(WIDTH, 3, PATCH, PATCH),
        "patch.bias": random(WIDTH),
        "norm.weight": random(WIDTH, mean=1.0),
        "norm.bias": random(WIDTH),
    }
    hidden = 4 * WIDTH
    for index in range(DEPTH):
        layers = {"q": WIDTH, "k": WIDTH, "v": WIDTH, "o": WIDTH, "up": hidden}
        layers |= {"gate": hidden} if gated else {}
        for layer, width in layers.items():
            model[f"{index}.{layer}.weight"] = random(width, WIDTH, scale=WIDTH**-0.5)
            zero = layer == "k" or (layer in "qv" and not biased)
            model[f"{index}.{layer}.bias"] = random(width) * (not zero)
        model[f"{index}.down.weight"] = random(WIDTH, hidden, scale=hidden**-0.5)
        model[f"{index}.down.bias"] = random(WIDTH)
        for layer in ("norm1", "norm2"):
            model[f"{index}.{layer}.weight"] = random(WIDTH, mean=1.0)
            model[f"{index}.{layer}.bias"] = random(WIDTH)
        model[f"{index}.scale1"], model[f"{index}.scale2"] = random(WIDTH), random(WIDTH)
    return model


def meta_names(model: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "cls_token": model["cls"],
        "storage_tokens": model["registers"],
        "mask_token": torch.zeros(1, WIDTH),
        "rope_embed.periods": torch.ones(16),
        "patch_embed.proj.weight": model["patch.weight"],
        "patch_embed.proj.bias": model["patch.bias"],
        "norm.weight": model["norm.weight"],
        "norm.bias": model["norm.bias"],
    }
    gated = "0.gate.weight" in model
    mlp = {"gate": "w1", "up": "w2", "down": "w3"} if gated else {"up": "fc1", "down": "fc2"}
    for index in range(DEPTH):
        block = f"blocks.{index}."
        for leaf in ("weight", "bias"):
            names[f"{block}attn.qkv.{leaf}"] = torch.cat(
                [model[f"{index}.{part}.{leaf}"] for part in "qkv"]
            )
            names[f"{block}attn.proj.{leaf}"] = model[f"{index}.o.{leaf}"]
            for ours, theirs in (mlp | {"norm1": "norm1", "norm2": "norm2"}).items():
                module = f"mlp.{theirs}" if ours in mlp else theirs
                names[f"{block}{module}.{leaf}"] = model[f"{index}.{ours}.{leaf}"]
        names[f"{block}attn.qkv.bias_mask"] = torch.ones(3 * WIDTH)
        names[f"{block}ls1.gamma"] = model[f"{index}.scale1"]
        names[f"{block}ls2.gamma"] = model[f"{index}.scale2"]
    return names


def hugging_face_names(model: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "embeddings.cls_token": model["cls"],
        "embeddings.mask_token": torch.zeros(1, 1, WIDTH),
        "embeddings.register_tokens": model["registers"],
        "embeddings.patch_embeddings.weight": model["patch.weight"],
        "embeddings.patch_embeddings.bias": model["patch.bias"],
        "norm.weight": model["norm.weight"],
        "norm.bias": model["norm.bias"],
    }
    modules = {part: f"attention.{part}_proj" for part in "qkvo"}
    modules |= {part: f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    modules |= {"norm1": "norm1", "norm2": "norm2"}
    for index in range(DEPTH):
        for ours, theirs in modules.items():
            for leaf in ("weight", "bias"):
                if f"{index}.{ours}.{leaf}" in model and not (ours == "k" and leaf == "bias"):
                    names[f"layer.{index}.{theirs}.{leaf}"] = model[f"{index}.{ours}.{leaf}"]
        for number in (1, 2):
            names[f"layer.{index}.layer_scale{number}.lambda1"] = model[f"{index}.scale{number}"]
    return names


def reference(model: dict[str, Tensor], images: Tensor) -> Tensor:
    """DINOv3: rotary positions of patch centres in [-1, 1], periods from 1 to 100."""
    cells = F.conv2d(images, model["patch.weight"], model["patch.bias"], stride=PATCH)
    batch, _, h, w = cells.shape
    prefix = torch.cat([model["cls"], model["registers"]], dim=1)
    x = torch.cat([prefix.expand(batch, -1, -1), cells.flatten(2).transpose(1, 2)], dim=1)
    size = WIDTH // HEADS
    periods = 100 ** (2 * torch.arange(size // 4) / (size // 2))
    rows = (2 * (torch.arange(h) + 0.5) / h - 1).repeat_interleave(w)
    columns = (2 * (torch.arange(w) + 0.5) / w - 1).repeat(h)
    angles = torch.cat([2 * math.pi * axis[:, None] / periods for axis in (rows, columns)], dim=1)
    cosine, sine = angles.cos().tile(2), angles.sin().tile(2)

    def rotate(part: Tensor) -> Tensor:
        kept, turned = part[:, :, :5], part[:, :, 5:]
        first, second = turned.chunk(2, dim=-1)
        return torch.cat(
            [kept, turned * cosine + torch.cat([-second, first], dim=-1) * sine], dim=2
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, model[f"{name}.weight"], model[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), model[f"{name}.weight"], model[f"{name}.bias"], 1e-5)

    for index in range(DEPTH):
        inner = norm(x, f"{index}.norm1")
        query, key, value = (
            linear(inner, f"{index}.{part}").reshape(batch, -1, HEADS, size).transpose(1, 2)
            for part in "qkv"
        )
        scores = rotate(query) @ rotate(key).transpose(-2, -1) / size**0.5
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, -1, WIDTH)
        x = x + model[f"{index}.scale1"] * linear(mixed, f"{index}.o")
        inner = norm(x, f"{index}.norm2")
        hidden = linear(inner, f"{index}.up")
        if f"{index}.gate.weight" in model:
            hidden = F.silu(linear(inner, f"{index}.gate")) * hidden
        else:
            hidden = F.gelu(hidden)
        x = x + model[f"{index}.scale2"] * linear(hidden, f"{index}.down")
    patches = norm(x, "norm")[:, 5:]
    return patches.transpose(1, 2).reshape(batch, WIDTH, h, w)


NAMES = {"Meta": meta_names, "Hugging Face": hugging_face_names}


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize(
    ("name", "gated", "biased"),
    [(PLAIN, False, False), (GATED, True, False), (BIASED, False, True)],
)
def test_dinov3_equals_its_paper(layout: str, name: str, gated: bool, biased: bool) -> None:
    model = random_model(gated=gated, biased=biased)
    tensors = to_timm(NAMES[layout](model), row(name))
    backbone = build_backbone(row(name), tensors, fingerprint="sha256:0")
    images = torch.randn(2, 3, 5 * PATCH, 8 * PATCH)
    torch.testing.assert_close(
        backbone.patch_tokens(images), reference(model, images), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("layout", NAMES)
def test_biases_are_never_dropped_silently(layout: str) -> None:
    tensors = to_timm(NAMES[layout](random_model(gated=False, biased=True)), row(PLAIN))
    with pytest.raises(CorruptWeightsError, match=r"4 unexpected \(blocks.0.attn.q_bias"):
        check_tensors(meta_model(row(PLAIN)), tensors, row(PLAIN))


@pytest.mark.parametrize("layout", NAMES)
def test_what_nobody_knows_is_listed(layout: str) -> None:
    tensors = NAMES[layout](random_model(gated=False, biased=False))
    tensors["surprise.weight"] = torch.ones(1)
    with pytest.raises(CorruptWeightsError, match=r"1 unexpected \(surprise.weight\)"):
        check_tensors(meta_model(row(PLAIN)), to_timm(tensors, row(PLAIN)), row(PLAIN))
