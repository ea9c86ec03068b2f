"""Rows for folders saved by transformers: weights, ``config.json``, ``preprocessor_config.json``.

Their backbones return the patch tokens of ``last_hidden_state``. As for open_clip, the architecture
is one of timm's with options, and :mod:`cosettle_adapter.backbones.layouts` renames the tensors.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from cosettle_adapter.backbones.registry import TRANSFORMERS
from cosettle_adapter.backbones.rows import BackboneRow
from cosettle_adapter.errors import CorruptWeightsError, UnknownModelError, WeightsUnavailableError

CONFIG_FILE = "config.json"


_VIT = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 224,
    "patch_size": 16, "qkv_bias": True, "num_register_tokens": 0,
}  # fmt: skip
_CLIP = {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_CLIP_ROW = {"final_norm": False, "note": "no final norm, as in last_hidden_state"}
_SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_patches": 256}
_DINOV2 = {"patch_size": 14, "layer_norm_eps": 1e-6, "mlp_ratio": 4, "layerscale_value": 1.0}
_REGISTERS = {**_DINOV2, "patch_size": 16, "num_register_tokens": 4}
_DINOV3 = {
    "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "rope_theta": 100.0,
    "layer_norm_eps": 1e-5, "layerscale_value": 1.0, "query_bias": True, "value_bias": True,
}  # fmt: skip
_DINOV3_ROW = {"architecture": "vit_small_patch16_dinov3", "positions": "rotary"}
_NO_CLASS = {"class_token": False}
# By model type: defaults of the config that differ from ViT's, timm's options, the row's fields.
_KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "clip_vision_model": (_CLIP, {"pre_norm": True}, _CLIP_ROW),
    "siglip_vision_model": (_SIGLIP, _NO_CLASS, {}),
    "siglip2_vision_model": (_SIGLIP, _NO_CLASS, {"interpolation": "bilinear+antialias"}),
    "dinov2": (_DINOV2, {}, {}),
    "dinov2_with_registers": (
        _REGISTERS, {"no_embed_class": True}, {"interpolation": "size+antialias"}
    ),
    "dinov3_vit": (_DINOV3, {}, _DINOV3_ROW),
    "vit": ({}, {}, {}),
    "vit_mae": ({}, {}, {}),
    "ijepa": ({}, _NO_CLASS, {}),
}  # fmt: skip
_TOWERS = ("clip", "siglip", "siglip2")  # with a text tower
_ACTIVATIONS = {  # timm's names
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu",
    "quick_gelu": "quick_gelu", "silu": "silu", "swish": "silu",
}  # fmt: skip
# the only values that timm's models support
_ONLY = {"num_channels": 3, "key_bias": False, "proj_bias": True, "mlp_bias": True}


def folder_row(folder: Path) -> BackboneRow:
    """Return the row ``transformers:<folder>`` of a folder saved by transformers."""
    folder = folder.resolve()
    row = architecture_row(folder, mean=(0.0,) * 3, std=(1.0,) * 3)
    files = [folder / f"{name}_config.json" for name in ("preprocessor", "processor")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise WeightsUnavailableError(
            f"{folder} has no {files[0].name}, so the mean and standard deviation of its images "
            "are unknown: copy the file from the original model, or name a registered model of the "
            "same architecture and pass this folder as backbone_weights"
        )
    config = _read_json(file)
    config = config.get("image_processor", config)
    if not config.get("do_normalize", True):
        return row
    if not config.keys() >= {"image_mean", "image_std"}:
        raise CorruptWeightsError(f"{file} has no image_mean and image_std")
    return replace(row, mean=tuple(config["image_mean"]), std=tuple(config["image_std"]))


def architecture_row(folder: Path, **fields: Any) -> BackboneRow:
    """Return the row that ``config.json`` describes, with other ``fields`` as given."""
    file = folder / CONFIG_FILE
    stored = _read_json(file)
    kind = str(stored.get("model_type"))
    if kind in _TOWERS:
        kind, stored = f"{kind}_vision_model", stored.get("vision_config") or {}
    if kind not in _KINDS:
        raise UnknownModelError(
            f"{file} has the model_type {kind!r}, expected one of {', '.join((*_TOWERS, *_KINDS))}"
        )
    defaults, kind_options, kind_fields = _KINDS[kind]
    config = {**_VIT, **defaults, **stored}
    width, patch, side = (config[name] for name in ("hidden_size", "patch_size", "image_size"))
    gated = bool(config.get("use_swiglu_ffn") or config.get("use_gated_mlp"))
    rotary = kind == "dinov3_vit"
    unsupported = [name for name, value in _ONLY.items() if config.get(name, value) != value]
    sides = ("patch_size", "image_size")
    unsupported += [name for name in sides if not isinstance(config[name], int)]
    known = ("silu" if gated else "gelu",) if rotary else tuple(_ACTIVATIONS)
    unsupported += ["hidden_act"] * (config["hidden_act"] not in known)
    unsupported += ["value_bias"] * (rotary and config["value_bias"] != config["query_bias"])
    if unsupported:
        listed = ", ".join(f"{name}={config[name]!r}" for name in unsupported)
        raise UnknownModelError(f"{file} is not supported: timm has no model with {listed}")
    if kind == "siglip2_vision_model":  # it takes images of any size
        side = math.isqrt(config["num_patches"]) * patch
    hidden = width * config["mlp_ratio"] if "mlp_ratio" in config else config["intermediate_size"]
    registers = config["num_register_tokens"]
    row = {"architecture": "vit_base_patch16_224", "interpolation": "size", **kind_fields}
    options = {
        "img_size": side, "patch_size": patch, "embed_dim": width, "qkv_bias": config["qkv_bias"],
        "depth": config["num_hidden_layers"], "num_heads": config["num_attention_heads"],
        "init_values": config.get("layerscale_value"),
        "norm_layer": functools.partial(nn.LayerNorm, eps=config["layer_norm_eps"]),
        **kind_options,
    }  # fmt: skip
    if rotary:
        options |= {"qkv_bias": config["query_bias"], "num_reg_tokens": registers}
        options |= {"rope_temperature": config["rope_theta"], "swiglu_mlp": gated}
    else:
        options |= {"reg_tokens": registers, "act_layer": _ACTIVATIONS[config["hidden_act"]]}
    if gated and not rotary:  # timm's model that packs gates and values
        row["architecture"], options["act_layer"] = "vit_giant_patch14_dinov2", "silu"
        hidden = 2 * ((hidden * 2 // 3 + 7) // 8 * 8)
    options["mlp_ratio"] = (hidden + 0.5) / width  # timm rounds down
    return BackboneRow(
        name=TRANSFORMERS + folder.name,
        family=f"transformers {kind.removesuffix('_vision_model')}",
        patch=patch, width=width, depth=options["depth"], licence="unstated", image_size=side,
        options=options, folder=folder, **row, **fields,
    )  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise CorruptWeightsError(f"{path} is not a JSON object: {error}") from error
