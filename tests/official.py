"""Vision transformers and the paper's head, written again from their papers in plain PyTorch.

Nothing here knows timm or this package: a state dict in the authors' own layout goes in, features
come out. ``test_convert`` holds the paper's eight encoders against it, ``test_layouts`` others.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
HEADS, PATCH, SIDE = 12, 16, 14
HEAD = ("linear.weight", "linear.bias", "layer_norm1.weight", "layer_norm1.bias")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What distinguishes a vision transformer."""

    class_token: bool = True
    registers: int = 0
    eps: float = 1e-6
    final_norm: bool = True
    layer_scale: bool = False
    by_scale: bool = True  # positions by scale factor with 0.1 added, else by size, antialiased
    pre_norm: bool = False  # norm before the layers, no patch bias
    openai: bool = False  # OpenAI's names, beside its text tower
    act: Callable[[Tensor], Tensor] = F.gelu
    gated: bool = False  # the first half of the hidden layer gates the second
    rotary: bool = False  # DINOv3's positions; keys have no bias
    biased: bool = True  # queries and values


ENCODERS = {
    "mae-vitb16": Encoder(),
    "ijepa-vitb16": Encoder(class_token=False, final_norm=False),
    "clip-vitb16": Encoder(eps=1e-5, by_scale=False, pre_norm=True, openai=True, act=quick_gelu),
    "blip-vitb16": Encoder(by_scale=False),
    "mocov3-vitb16": Encoder(),
    "ibot-vitb16": Encoder(),
    "dino-vitb16": Encoder(),
    "dinov2-vitb16-in1k": Encoder(registers=4, layer_scale=True, by_scale=False),
}

_OPENAI_NAMES = {  # the other seven's names: OpenAI's
    r"^patch_embed\.proj\.": "visual.conv1.",
    r"^pos_embed$": "visual.positional_embedding",
    r"^cls_token$": "visual.class_embedding",
    r"^blocks\.": "visual.transformer.resblocks.",
    r"\.norm([12])\.": r".ln_\1.",
    r"\.attn\.qkv\.": ".attn.in_proj_",
    r"\.attn\.proj\.": ".attn.out_proj.",
    r"\.mlp\.fc1\.": ".mlp.c_fc.",
    r"\.mlp\.fc2\.": ".mlp.c_proj.",
    r"^norm_pre\.": "visual.ln_pre.",
    r"^norm\.": "visual.ln_post.",
    r"^adapter\.": "visual.adapter.",
}


def _name(name: str, encoder: Encoder) -> str:
    for pattern, new in _OPENAI_NAMES.items() if encoder.openai else ():
        name = re.sub(pattern, new, name)
    return name


def random_state(encoder: Encoder, *, width: int, depth: int, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint's ``model`` with random tensors, under the names its authors use."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, scale: float, mean: float = 0.0) -> None:
        state[name] = torch.randn(shape, generator=generator) * scale + mean

    def linear(name: str, out: int, into: int) -> None:
        draw(f"{name}.weight", out, into, scale=into**-0.5)
        draw(f"{name}.bias", out, scale=0.1)

    def norm(name: str) -> None:
        draw(f"{name}.weight", width, scale=0.2, mean=1.0)
        draw(f"{name}.bias", width, scale=0.2)

    batch = () if encoder.pre_norm else (1,)
    draw("patch_embed.proj.weight", width, 3, PATCH, PATCH, scale=0.04)
    if not encoder.rotary:
        draw("pos_embed", *batch, SIDE * SIDE + encoder.class_token, width, scale=0.5)
    if not encoder.pre_norm:
        draw("patch_embed.proj.bias", width, scale=0.1)
    if encoder.class_token:
        draw("cls_token", *batch, *batch, width, scale=0.5)
    if encoder.registers:
        draw("register_tokens", 1, encoder.registers, width, scale=0.5)
        draw("mask_token", 1, width, scale=0.5)
    if encoder.pre_norm:
        norm("norm_pre")
    if encoder.openai:
        draw("visual.proj", width, 32, scale=0.1)
        # the text tower is stored with it
        draw("positional_embedding", 7, 32, scale=0.1)
        draw("logit_scale", scale=1)
        linear("transformer.resblocks.0.mlp.c_fc", 32, 32)
        draw("transformer.resblocks.0.attn.in_proj_weight", 96, 32, scale=0.1)
    for index in range(depth):
        layer = f"blocks.{index}."
        norm(layer + "norm1")
        norm(layer + "norm2")
        linear(layer + "attn.qkv", 3 * width, width)
        if encoder.rotary:
            state[layer + "attn.qkv.bias"].view(3, width)[1 if encoder.biased else slice(None)] = 0
        linear(layer + "attn.proj", width, width)
        linear(layer + "mlp.fc1", 4 * width * (1 + encoder.gated), width)
        linear(layer + "mlp.fc2", width, 4 * width)
        if encoder.layer_scale:
            draw(layer + "ls1.gamma", width, scale=0.3)
            draw(layer + "ls2.gamma", width, scale=0.3)
    norm("norm")
    linear("adapter.adapter.adapter_linear", width, width)
    norm("adapter.adapter.adapter_layer_norm1")
    return {_name(name, encoder): tensor for name, tensor in state.items()}


def save_checkpoint(path: Path, state: dict[str, Tensor], **arguments: object) -> Path:
    """Write what ``misc.save_model`` of the official code writes."""
    content = {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 4,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(blr=1e-4, data_path="somewhere/k400.txt", **arguments),
    }
    torch.save(content, path)
    return path


def tokens(state: dict[str, Tensor], images: Tensor, encoder: Encoder, depth: int) -> Tensor:
    """Normalised images ``(B, 3, H, W)`` to the encoder's patch tokens ``(B, C, h, w)``."""

    def tensor(name: str) -> Tensor:
        return state[_name(name, encoder)]

    width = tensor("norm.weight").numel()

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = tensor(f"{name}.weight"), tensor(f"{name}.bias")
        return F.layer_norm(x, (width,), weight, bias, encoder.eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensor(f"{name}.weight"), tensor(f"{name}.bias"))

    bias = None if encoder.pre_norm else tensor("patch_embed.proj.bias")
    x = F.conv2d(images, tensor("patch_embed.proj.weight"), bias, stride=PATCH)
    batch, _, h, w = x.shape
    x = rearrange(x, "b c h w -> b (h w) c")
    leading: Tensor | float = 0.0
    if not encoder.rotary:
        positions = tensor("pos_embed").reshape(-1, width)
        leading, patches = positions[: encoder.class_token], positions[encoder.class_token :]
        if (h, w) != (SIDE, SIDE):
            square = rearrange(patches, "(h w) c -> 1 c h w", h=SIDE)
            if encoder.by_scale:
                factor = ((h + 0.1) / SIDE, (w + 0.1) / SIDE)
                square = F.interpolate(square, scale_factor=factor, mode="bicubic")
            else:
                square = F.interpolate(square, (h, w), mode="bicubic", antialias=True)
            patches = rearrange(square, "1 c h w -> (h w) c")
        x = x + patches
    if encoder.class_token:
        token = tensor("cls_token").reshape(1, 1, width) + leading
        x = torch.cat([token.expand(batch, -1, -1), x], dim=1)
    if encoder.registers:
        registers = tensor("register_tokens").expand(batch, -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
    prefix = encoder.class_token + encoder.registers
    if encoder.pre_norm:
        x = norm(x, "norm_pre")
    # rotary positions of patch centres in [-1, 1], periods from 1 to 100
    size = width // HEADS
    periods = 100 ** (2 * torch.arange(size // 4) / (size // 2))
    rows = (2 * (torch.arange(h) + 0.5) / h - 1).repeat_interleave(w)
    columns = (2 * (torch.arange(w) + 0.5) / w - 1).repeat(h)
    angles = torch.cat([2 * math.pi * axis[:, None] / periods for axis in (rows, columns)], dim=1)
    cosine, sine = angles.cos().tile(2), angles.sin().tile(2)

    def rotate(part: Tensor) -> Tensor:
        if not encoder.rotary:
            return part
        kept, turned = part[:, :, :prefix], part[:, :, prefix:]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cosine + torch.cat([-second, first], dim=-1) * sine
        return torch.cat([kept, turned], dim=2)

    for index in range(depth):
        layer = f"blocks.{index}."
        qkv = linear(norm(x, layer + "norm1"), layer + "attn.qkv")
        query, key, value = rearrange(qkv, "b n (three a c) -> three b a n c", three=3, a=HEADS)
        scores = rotate(query) @ rotate(key).transpose(-2, -1) * size**-0.5
        mixed = rearrange(scores.softmax(-1) @ value, "b a n c -> b n (a c)")
        mixed = linear(mixed, layer + "attn.proj")
        x = x + (mixed * tensor(layer + "ls1.gamma") if encoder.layer_scale else mixed)
        hidden = linear(norm(x, layer + "norm2"), layer + "mlp.fc1")
        if encoder.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = encoder.act(gate) * hidden
        else:
            hidden = encoder.act(hidden)
        out = linear(hidden, layer + "mlp.fc2")
        x = x + (out * tensor(layer + "ls2.gamma") if encoder.layer_scale else out)
    if encoder.final_norm:
        x = norm(x, "norm")
    return rearrange(x[:, prefix:], "b (h w) c -> b c h w", h=h)


def features(state: dict[str, Tensor], frames: Tensor, encoder: Encoder, depth: int) -> Tensor:
    """Encoder and head: frames ``(B, 3, H, W)`` uint8 to ``(B, C, h, w)``."""
    head = [state[_name(f"adapter.adapter.adapter_{name}", encoder)] for name in HEAD]
    x = tokens(state, (frames.float() / 255 - MEAN) / STD, encoder, depth)
    x = torch.tanh(F.linear(rearrange(x, "b c h w -> b h w c"), *head[:2]))
    return rearrange(F.layer_norm(x, x.shape[-1:], *head[2:], 1e-5), "b h w c -> b c h w")
