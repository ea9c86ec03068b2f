"""Vision transformers as Hugging Face names them, and DINOv3 as Meta and Hugging Face do."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from cosettle_adapter.backbones.layout import Layout, Tensors
from cosettle_adapter.backbones.renaming import Tower, fold_class_position, layouts, table

_HF_VIT = Tower(
    marks=("encoder.layer.0.layernorm_before.weight", "layers.0.layernorm_before.weight"),
    names=table(
        {
            "embeddings.cls_token": "cls_token",
            "embeddings.register_tokens": "reg_token",
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.patch_embeddings.projection": "patch_embed.proj",
            "layernorm": "norm",
        },
        {
            "norm1": "norm1",
            "layernorm_before": "norm1",
            "attention.attention.query": "attn.q",
            "attention.attention.key": "attn.k",
            "attention.attention.value": "attn.v",
            "attention.output.dense": "attn.proj",
            "layer_scale1.lambda1": "ls1.gamma",
            "norm2": "norm2",
            "layernorm_after": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
            "mlp.weights_in": "mlp.fc1",
            "mlp.weights_out": "mlp.fc2",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
            "layer_scale2.lambda1": "ls2.gamma",
            # In memory, though not in its files, transformers 5 has these.
            "attention.q_proj": "attn.q",
            "attention.k_proj": "attn.k",
            "attention.v_proj": "attn.v",
            "attention.o_proj": "attn.proj",
            "mlp.gate_proj": "mlp.gate",
            "mlp.up_proj": "mlp.up",
            "mlp.down_proj": "mlp.fc2",
        },
        blocks=("encoder.layer", "layers"),
    ),
    dropped=("embeddings.mask_token", "pooler.", "classifier.", "decoder."),
)
_HF_DINOV2 = dataclasses.replace(
    _HF_VIT, marks=("encoder.layer.0.layer_scale1.lambda1",), finish=fold_class_position
)


def _read_biases(tensors: Tensors) -> None:
    """Without key bias, timm keeps the two others apart, or leaves them out where all are zero."""
    for name in [name for name in tensors if name.endswith(".attn.qkv.bias")]:
        query, _, value = tensors.pop(name).chunk(3)
        _keep_biases(tensors, name.removesuffix("qkv.bias"), query, value)
    for name in [name for name in tensors if name.endswith(".attn.q.bias")]:
        prefix = name.removesuffix("q.bias")
        if f"{prefix}v.bias" in tensors:
            _keep_biases(tensors, prefix, tensors.pop(name), tensors.pop(f"{prefix}v.bias"))


def _keep_biases(tensors: Tensors, prefix: str, query: Tensor, value: Tensor) -> None:
    if bool(query.any()) or bool(value.any()):
        tensors[f"{prefix}q_bias"], tensors[f"{prefix}v_bias"] = query, value


def _finish_meta(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".attn.qkv.bias_mask")]:
        del tensors[name]  # says again which bias is zero
    _read_biases(tensors)


def _finish_hugging_face(tensors: Tensors) -> None:
    _read_biases(tensors)
    for gate in [name for name in tensors if ".mlp.fc1_g." in name]:
        block, _, leaf = gate.partition(".mlp.fc1_g.")
        up = f"{block}.mlp.fc1.{leaf}"
        if up in tensors:
            tensors[f"{block}.mlp.fc1_x.{leaf}"] = tensors.pop(up)


_META_DINOV3 = Tower(
    marks=("storage_tokens",),
    names=table(
        {"storage_tokens": "reg_token"},
        {
            "ls1.gamma": "gamma_1",
            "ls2.gamma": "gamma_2",
            "mlp.w1": "mlp.fc1_g",
            "mlp.w2": "mlp.fc1_x",
            "mlp.w3": "mlp.fc2",
        },
        blocks=("blocks",),
    ),
    dropped=("mask_token", "rope_embed.", "local_cls_norm."),
    finish=_finish_meta,
)
_HF_DINOV3 = Tower(
    marks=("embeddings.patch_embeddings.weight",),
    names=table(
        {
            "embeddings.cls_token": "cls_token",
            "embeddings.register_tokens": "reg_token",
            "embeddings.patch_embeddings": "patch_embed.proj",
            "norm": "norm",
        },
        {
            "norm1": "norm1",
            "attention.q_proj": "attn.q",
            "attention.k_proj": "attn.k",
            "attention.v_proj": "attn.v",
            "attention.o_proj": "attn.proj",
            "layer_scale1.lambda1": "gamma_1",
            "norm2": "norm2",
            "mlp.gate_proj": "mlp.fc1_g",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
            "layer_scale2.lambda1": "gamma_2",
        },
        blocks=("layer", "model.layer"),
    ),
    dropped=("embeddings.mask_token", "rope_embeddings."),
    finish=_finish_hugging_face,
)

VIT_LAYOUTS: tuple[Layout, ...] = layouts(
    {
        "Meta DINOv3": _META_DINOV3,
        "Hugging Face DINOv3": _HF_DINOV3,
        "Hugging Face DINOv2": _HF_DINOV2,
        "Hugging Face ViT or MAE": _HF_VIT,
    }
)
