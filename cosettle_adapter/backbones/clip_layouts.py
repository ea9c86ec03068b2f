"""Image towers as OpenAI, open_clip and Hugging Face name them, renamed to timm's names.

Every tower here is one of timm's models under other names, and a table says which: ``#`` stands
for the number of a block. A tensor no table knows keeps the name it has in the file, so that the
strict check of :func:`cosettle_adapter.backbones.build_backbone` lists it; only what is known to
lie behind the patch tokens (projections, pooling) or beside the tower (text) is dropped. Tensors
cannot tell QuickGELU from GELU, nor one epsilon from another: the row says that.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import torch
from einops import rearrange

from cosettle_adapter.backbones.layout import Layout, Tensors
from cosettle_adapter.errors import CorruptWeightsError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _table(
    outside: Mapping[str, str], inside: Mapping[str, str], blocks: tuple[str, ...]
) -> dict[str, str]:
    return {
        **outside,
        **{
            f"{block}.#.{theirs}": f"blocks.#.{timms}"
            for block in blocks
            for theirs, timms in inside.items()
        },
    }


@dataclasses.dataclass(frozen=True)
class _Tower:
    """How one family of models names its image tower.

    Attributes:
        marks: names only this tower has, any of them; what stands before one stands before all.
        names: tensors or modules, their first number written ``#``, to timm's names.
        dropped: beginnings of names inside the tower that patch tokens do not pass through.
        finish: what renaming does not settle, done in place on timm's names.
    """

    marks: tuple[str, ...]
    names: Mapping[str, str]
    dropped: tuple[str, ...]
    finish: Callable[[Tensors], None] = lambda _: None


def _convert(tensors: Tensors, tower: _Tower) -> Tensors:
    prefix = _only_prefix(
        {
            name.removesuffix(mark)
            for name in tensors
            for mark in tower.marks
            if name == mark or name.endswith("." + mark)
        }
    )
    converted: Tensors = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(prefix)
        if name.startswith(prefix) and not inner.startswith(tower.dropped):
            converted[_renamed(inner, tower.names) or name] = tensor
    _join(converted, "attn.qkv", ("attn.q", "attn.k", "attn.v"))
    _join(converted, "mlp.fc1", ("mlp.gate", "mlp.up"))
    _give_shape(converted, "cls_token", 1, "c -> 1 1 c")
    _give_shape(converted, "pos_embed", 2, "n c -> 1 n c")
    tower.finish(converted)
    return converted


def _only_prefix(found: set[str]) -> str:
    if len(found) != 1:
        listed = ", ".join(repr(prefix) for prefix in sorted(found))
        raise CorruptWeightsError(
            f"expected one image tower, found {len(found)}{f' ({listed})' if found else ''}; save "
            "the one that is meant alone"
        )
    return found.pop()


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    """Look a tensor up by its own name or by its module's; ``None`` when neither is known."""
    number = _NUMBER.search(name)
    general = name if number is None else f"{name[: number.start()]}#{name[number.end() :]}"
    module, _, leaf = general.rpartition(".")
    new = names.get(general) or (f"{names[module]}.{leaf}" if module in names else None)
    return new if new is None or number is None else new.replace("#", number.group())


def _join(tensors: Tensors, whole: str, parts: tuple[str, ...]) -> None:
    """Concatenate the outputs of linear layers that timm computes in one."""
    for name in list(tensors):
        block, found, leaf = name.rpartition(f".{parts[0]}.")
        names = [f"{block}.{part}.{leaf}" for part in parts]
        if found and all(part in tensors for part in names):
            tensors[f"{block}.{whole}.{leaf}"] = torch.cat([tensors.pop(part) for part in names])


def _give_shape(tensors: Tensors, name: str, ndim: int, pattern: str) -> None:
    if name in tensors and tensors[name].ndim == ndim:
        tensors[name] = rearrange(tensors[name], pattern)


def _add_bias(tensors: Tensors) -> None:
    """Without a norm before the blocks, timm's patches have a bias; in CLIPA they have none."""
    kernel = tensors.get("patch_embed.proj.weight")
    if kernel is not None and "norm_pre.weight" not in tensors:
        tensors.setdefault("patch_embed.proj.bias", kernel.new_zeros(len(kernel)))


def _fold_class_position(tensors: Tensors) -> None:
    """With registers, timm keeps positions for patches only, and its own conversion does this."""
    if tensors.keys() >= {"reg_token", "cls_token", "pos_embed"}:
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]


_OPENAI = _Tower(
    marks=("ln_post.weight",),
    names=_table(
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
    dropped=("proj",),
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
_RESNET = _Tower(
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

_HF_CLIP = _Tower(
    marks=("pre_layrnorm.weight",),  # their spelling
    names=_table(
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

_HF_VIT = _Tower(
    marks=("encoder.layer.0.layernorm_before.weight", "layers.0.layernorm_before.weight"),
    names=_table(
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
    _HF_VIT, marks=("encoder.layer.0.layer_scale1.lambda1",), finish=_fold_class_position
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
    prefix = _only_prefix({match.group() for name in tensors if (match := _TRUNK.match(name))})
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
    "Hugging Face DINOv2": _HF_DINOV2,
    "Hugging Face ViT or MAE": _HF_VIT,
}
CLIP_LAYOUTS: tuple[Layout, ...] = (
    *(Layout("open_clip around a timm model", mark, _convert_trunk) for mark in _TRUNK_MARKS),
    *(
        Layout(name, mark, functools.partial(_convert, tower=tower))
        for name, tower in _TOWERS.items()
        for mark in tower.marks
    ),
)
