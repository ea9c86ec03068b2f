"""The paper's eight encoders and its head, written again from their papers in plain PyTorch.

Nothing here knows timm or this package: a state dict in the authors' own layout goes in, features
come out. ``test_conversion`` holds the package against it.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
HEADS, PATCH, SIDE = 12, 16, 14


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What distinguishes one of the eight."""

    class_token: bool = True
    registers: int = 0
    eps: float = 1e-6
    final_norm: bool = True
    layer_scale: bool = False
    by_scale: bool = True  # positions by scale factor with 0.1 added, else by size, antialiased
    clip: bool = False  # OpenAI's names, norm before the blocks, QuickGELU, no patch bias


ENCODERS = {
    "mae-vitb16": Encoder(),
    "ijepa-vitb16": Encoder(class_token=False, final_norm=False),
    "clip-vitb16": Encoder(eps=1e-5, by_scale=False, clip=True),
    "blip-vitb16": Encoder(by_scale=False),
    "mocov3-vitb16": Encoder(),
    "ibot-vitb16": Encoder(),
    "dino-vitb16": Encoder(),
    "dinov2-vitb16-in1k": Encoder(registers=4, layer_scale=True, by_scale=False),
}


def random_state(encoder: Encoder, *, width: int, depth: int, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint's ``model`` with random tensors, under the names its authors use."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + mean

    def linear(name: str, out: int, into: int, separator: str = ".") -> dict[str, Tensor]:
        return {
            f"{name}{separator}weight": random(out, into, scale=into**-0.5),
            f"{name}{separator}bias": random(out, scale=0.1),
        }

    def norm(name: str) -> dict[str, Tensor]:
        return {
            f"{name}.weight": random(width, scale=0.2, mean=1.0),
            f"{name}.bias": random(width, scale=0.2),
        }

    names = CLIP_NAMES if encoder.clip else TIMM_NAMES
    cells = SIDE * SIDE + encoder.class_token
    state = {
        names["patch"] + ".weight": random(width, 3, PATCH, PATCH, scale=0.04),
        names["positions"]: random(*(() if encoder.clip else (1,)), cells, width, scale=0.5),
    }
    if not encoder.clip:
        state[names["patch"] + ".bias"] = random(width, scale=0.1)
    if encoder.class_token:
        state[names["class"]] = random(*((width,) if encoder.clip else (1, 1, width)), scale=0.5)
    if encoder.registers:
        state["register_tokens"] = random(1, encoder.registers, width, scale=0.5)
        state["mask_token"] = random(1, width, scale=0.5)
    if encoder.clip:
        state |= norm("visual.ln_pre")
        state["visual.proj"] = random(width, 32, scale=0.1)
        # the text tower rides along
        state |= {"positional_embedding": random(7, 32, scale=0.1), "logit_scale": random(scale=1)}
        state |= linear("transformer.resblocks.0.mlp.c_fc", 32, 32)
        state["transformer.resblocks.0.attn.in_proj_weight"] = random(96, 32, scale=0.1)
    for index in range(depth):
        block = names["block"].format(index)
        state |= norm(block + names["norm1"]) | norm(block + names["norm2"])
        state |= linear(block + names["qkv"], 3 * width, width, names["qkv_separator"])
        state |= linear(block + names["out"], width, width)
        state |= linear(block + names["fc1"], 4 * width, width)
        state |= linear(block + names["fc2"], width, 4 * width)
        if encoder.layer_scale:
            state[block + "ls1.gamma"] = random(width, scale=0.3)
            state[block + "ls2.gamma"] = random(width, scale=0.3)
    state |= norm(names["norm"])
    head = names["head"]
    state |= linear(head + "adapter_linear", width, width)
    state |= norm(head + "adapter_layer_norm1")
    return state


TIMM_NAMES = {
    "patch": "patch_embed.proj",
    "positions": "pos_embed",
    "class": "cls_token",
    "block": "blocks.{}.",
    "norm1": "norm1",
    "norm2": "norm2",
    "qkv": "attn.qkv",
    "qkv_separator": ".",
    "out": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "norm": "norm",
    "head": "adapter.adapter.",
}
CLIP_NAMES = {
    "patch": "visual.conv1",
    "positions": "visual.positional_embedding",
    "class": "visual.class_embedding",
    "block": "visual.transformer.resblocks.{}.",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "qkv": "attn.in_proj",
    "qkv_separator": "_",
    "out": "attn.out_proj",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
    "norm": "visual.ln_post",
    "head": "visual.adapter.adapter.",
}


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


def features(state: dict[str, Tensor], frames: Tensor, encoder: Encoder, depth: int) -> Tensor:
    """Encoder and head: frames ``(B, 3, H, W)`` uint8 to ``(B, C, h, w)``."""
    names = CLIP_NAMES if encoder.clip else TIMM_NAMES
    width = state[names["norm"] + ".weight"].numel()

    def norm(x: Tensor, name: str, eps: float = encoder.eps) -> Tensor:
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str, separator: str = ".") -> Tensor:
        return F.linear(x, state[f"{name}{separator}weight"], state[f"{name}{separator}bias"])

    images = (frames.float() / 255 - MEAN) / STD
    x = F.conv2d(
        images,
        state[names["patch"] + ".weight"],
        state.get(names["patch"] + ".bias"),
        stride=PATCH,
    )
    batch, _, h, w = x.shape
    x = x.flatten(2).transpose(1, 2)
    positions = state[names["positions"]].reshape(-1, width)
    leading, cells = positions[: encoder.class_token], positions[encoder.class_token :]
    if (h, w) != (SIDE, SIDE):
        square = cells.reshape(1, SIDE, SIDE, width).permute(0, 3, 1, 2)
        if encoder.by_scale:
            factor = ((h + 0.1) / SIDE, (w + 0.1) / SIDE)
            square = F.interpolate(square, scale_factor=factor, mode="bicubic")
        else:
            square = F.interpolate(square, (h, w), mode="bicubic", antialias=True)
        cells = square.permute(0, 2, 3, 1).reshape(h * w, width)
    x = x + cells
    if encoder.class_token:
        token = state[names["class"]].reshape(1, 1, width) + leading
        x = torch.cat([token.expand(batch, -1, -1), x], dim=1)
    if encoder.registers:
        registers = state["register_tokens"].expand(batch, -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
    if encoder.clip:
        x = norm(x, "visual.ln_pre")
    for index in range(depth):
        block = names["block"].format(index)
        qkv = linear(norm(x, block + names["norm1"]), block + names["qkv"], names["qkv_separator"])
        query, key, value = (
            part.reshape(batch, -1, HEADS, width // HEADS).transpose(1, 2)
            for part in qkv.chunk(3, dim=-1)
        )
        scores = query @ key.transpose(-2, -1) * (width // HEADS) ** -0.5
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, -1, width)
        mixed = linear(mixed, block + names["out"])
        x = x + (mixed * state[block + "ls1.gamma"] if encoder.layer_scale else mixed)
        hidden = linear(norm(x, block + names["norm2"]), block + names["fc1"])
        hidden = hidden * torch.sigmoid(1.702 * hidden) if encoder.clip else F.gelu(hidden)
        out = linear(hidden, block + names["fc2"])
        x = x + (out * state[block + "ls2.gamma"] if encoder.layer_scale else out)
    if encoder.final_norm:
        x = norm(x, names["norm"])
    x = x[:, encoder.class_token + encoder.registers :]
    x = norm(
        torch.tanh(linear(x, names["head"] + "adapter_linear")),
        names["head"] + "adapter_layer_norm1",
        1e-5,
    )
    return x.transpose(1, 2).reshape(batch, width, h, w)
