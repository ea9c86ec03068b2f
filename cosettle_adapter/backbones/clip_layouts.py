"""Image towers as OpenAI, open_clip and Hugging Face's CLIP and SigLIP name them.

Tensors cannot tell QuickGELU from GELU, nor one epsilon from another: the row says that.
"""

from __future__ import annotations

import dataclasses
import re

from cosettle_adapter.backbones.layout import Layout, Tensors
from cosettle_adapter.backbones.renaming import Tower, layouts, only_prefix, table


def _add_bias(tensors: Tensors) -> None:
    """Without a norm before the blocks, timm's patches have a bias; in CLIPA they have none."""
    kernel = tensors.get("patch_embed.proj.weight")
    if kernel is not None and "norm_pre.weight" not in tensors:
        tensors.setdefault("patch_embed.proj.bias", kernel.new_zeros(len(kernel)))


_OPENAI = Tower(
    marks=("ln_post.weight",),
    names=table(
        {
            "conv1": "patch_embed.proj",
            "class_embedding": "cls_token",
            "positional_embedding": "pos_embed",
            "ln_pre": "norm_pre",
            "ln_post": "norm",
        },
        {
            "ln_1": "norm1",
            "attn.in_proj_weight": "attn.qkv.weight",
            "attn.in_proj_bias": "attn.qkv.bias",
            "attn.out_proj": "attn.proj",
            "ls_1": "ls1",
            "ln_2": "norm2",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
            "ls_2": "ls2",
        },
        blocks=("transformer.resblocks",),
    ),
    dropped=("proj", "adapter."),  # a released checkpoint has the authors' head in the tower
    finish=_add_bias,
)
_COCA = dataclasses.replace(  # its last norm is for what the pooling makes of the patch tokens
    _OPENAI, marks=("attn_pool.query",), dropped=("proj", "attn_pool.", "ln_post.")
)

_RESIDUAL = {
    "conv1": "conv1_1x1.conv",
    "bn1": "conv1_1x1.bn",
    "conv2": "conv2_kxk.conv",
    "bn2": "conv2_kxk.bn",
    "conv3": "conv3_1x1.conv",
    "bn3": "conv3_1x1.bn",
    "downsample.0": "shortcut.conv.conv",
    "downsample.1": "shortcut.conv.bn",
}
_RESNET = Tower(
    marks=("attnpool.c_proj.weight",),
    names={
        **{f"conv{number}": f"stem.conv{number}.conv" for number in (1, 2, 3)},
        **{f"bn{number}": f"stem.conv{number}.bn" for number in (1, 2, 3)},
        **{
            f"layer{stage + 1}.#.{theirs}": f"stages.{stage}.#.{timms}"
            for stage in range(4)
            for theirs, timms in _RESIDUAL.items()
        },
    },
    dropped=("attnpool.",),
)

_HF_CLIP = Tower(
    marks=("pre_layrnorm.weight",),  # their spelling
    names=table(
        {
            "embeddings.class_embedding": "cls_token",
            "embeddings.patch_embedding": "patch_embed.proj",
            "embeddings.position_embedding.weight": "pos_embed",
            "pre_layrnorm": "norm_pre",
            "post_layernorm": "norm",
        },
        {
            "layer_norm1": "norm1",
            "self_attn.q_proj": "attn.q",
            "self_attn.k_proj": "attn.k",
            "self_attn.v_proj": "attn.v",
            "self_attn.out_proj": "attn.proj",
            "layer_norm2": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        },
        blocks=("encoder.layers",),
    ),
    dropped=("embeddings.position_ids", "visual_projection."),
)
_HF_SIGLIP = dataclasses.replace(
    _HF_CLIP,
    marks=("embeddings.patch_embedding.bias",),
    dropped=("embeddings.position_ids", "head."),
)

_TRUNK = re.compile(r"(?:.*?\.)?trunk\.")
_TRUNK_MARKS = (  # a first layer of each kind of model that open_clip takes from timm
    "trunk.patch_embed.proj.weight",  # ViT, EVA, Swin
    "trunk.patch_embed.backbone.0.conv.weight",  # ViT behind a convolutional stem
    "trunk.patch_embed.backbone.stem.conv1.weight",  # ViTamin
    "trunk.stem.0.weight",  # ConvNeXt
    "trunk.stem.0.conv_kxk.0.conv.weight",  # FastViT
)
_TRUNK_HEADS = ("head.weight", "head.bias", "head.fc.", "attn_pool.")  # head.norm is no head


def _convert_trunk(tensors: Tensors) -> Tensors:
    prefix = only_prefix({match.group() for name in tensors if (match := _TRUNK.match(name))})
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(_TRUNK_HEADS)
    }


_TOWERS = {  # CoCa before OpenAI, whose mark it has too
    "open_clip CoCa": _COCA,
    "OpenAI CLIP or open_clip, ViT": _OPENAI,
    "OpenAI CLIP or open_clip, ResNet": _RESNET,
    "Hugging Face CLIP": _HF_CLIP,
    "Hugging Face SigLIP": _HF_SIGLIP,
}
CLIP_LAYOUTS: tuple[Layout, ...] = (
    *(Layout("open_clip around a timm model", mark, _convert_trunk) for mark in _TRUNK_MARKS),
    *layouts(_TOWERS),
)
