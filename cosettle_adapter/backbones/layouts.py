"""Renaming the tensors of other projects' checkpoints to timm's names.

Only tensors that are known to follow the patch tokens (projections, pooling) or to lie outside the
encoder (text towers, decoders) are dropped, and positions are resized only if the row says so.
timm's own filters for transformers do both silently, so they are used for feature maps only.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Collection, Mapping

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.backbones.architectures import TIMM_ERRORS, meta_model
from cosettle_adapter.backbones.rows import BackboneRow
from cosettle_adapter.backbones.vit import resize_positions
from cosettle_adapter.errors import CorruptWeightsError

Tensors = dict[str, Tensor]

# Every encoder has one patch embedding; the prefix of its name is that of all its tensors.
_PATCH_EMBEDDING = re.compile(
    r"((?:.*\.)?)(patch_embed\.proj|conv1|embeddings\.patch_embeddings?(\.projection)?)\.weight"
)
_DISTRIBUTED = re.compile(r"^(module\.)+")  # DistributedDataParallel's prefix
_ENCODERS = (  # prefixes of the encoder to use, in order of preference
    "momentum_encoder.",  # MoCo v3, which also has base_encoder
    "visual_encoder.",  # BLIP, which also has visual_encoder_m and a text encoder
    "teacher.backbone.",  # DINO, iBOT
    "backbone.",  # DINOv2, T-CoRe
    "encoder.",  # I-JEPA
    "",
)
_NAMES = {  # regular expressions, applied in order
    # OpenAI and open_clip
    r"^conv1\.": "patch_embed.proj.",
    r"^class_embedding$": "cls_token",
    r"^positional_embedding$": "pos_embed",
    r"^ln_pre\.": "norm_pre.",
    r"^ln_post\.": "norm.",
    r"^transformer\.resblocks\.": "blocks.",
    r"\.ln_(\d)\.": r".norm\1.",
    r"\.ls_(\d)\.": r".ls\1.",
    r"\.attn\.in_proj_": ".attn.qkv.",
    r"\.attn\.out_proj\.": ".attn.proj.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    # Hugging Face: CLIP, SigLIP, ViT, MAE, DINOv2 and DINOv3, in files and in memory
    r"^embeddings\.(class_embedding|cls_token)$": "cls_token",
    r"^embeddings\.register_tokens$": "reg_token",
    r"^embeddings\.position_embedding(s|\.weight)$": "pos_embed",
    r"^embeddings\.patch_embeddings?\.(projection\.)?": "patch_embed.proj.",
    r"^pre_layrnorm\.": "norm_pre.",  # their spelling
    r"^(post_)?layernorm\.": "norm.",
    r"^(model\.|encoder\.)?layers?\.": "blocks.",
    r"\.(layer_norm1|layernorm_before)\.": ".norm1.",
    r"\.(layer_norm2|layernorm_after)\.": ".norm2.",
    r"\.(self_attn|attention)\.([qkv])_proj\.": r".attn.\2.",
    r"\.attention\.attention\.([qkv])(uery|ey|alue)\.": r".attn.\1.",
    r"\.(self_attn\.out_proj|attention\.o_proj|attention\.output\.dense)\.": ".attn.proj.",
    r"\.(intermediate\.dense|mlp\.weights_in)\.": ".mlp.fc1.",
    r"\.(output\.dense|mlp\.weights_out|mlp\.down_proj)\.": ".mlp.fc2.",
    r"\.mlp\.(gate|up)_proj\.": r".mlp.\1.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
    # Meta: DINOv2, which stores blocks in chunks and packs gate and value as timm does, and DINOv3
    r"^blocks\.\d+\.(\d+\.)": r"blocks.\1",
    r"^(register|storage)_tokens$": "reg_token",
    r"\.mlp\.w12\.": ".mlp.fc1.",
    r"\.mlp\.w1\.": ".mlp.gate.",
    r"\.mlp\.w2\.": ".mlp.up.",
    r"\.mlp\.w3\.": ".mlp.fc2.",
}
_UNUSED = re.compile(  # outside the encoder or after its patch tokens
    r"embeddings\.(position_ids|mask_token)|mask_token|masked_embed|decoder[._]|adapter\.|"
    r"(projection_)?head\.|proj$|visual_projection\.|attn_pool\.|pooler\.|classifier\.|local_cls_norm\.|"
    r"rope_embed(dings)?\.|.*\.bias_mask"
)
_NORM = re.compile(r"^(fc_)?norm\.")
_LINEAR = re.compile(r"(.*)\.(attn\.qkv|attn\.q|mlp\.up)\.(weight|bias)")


def to_timm(tensors: Mapping[str, Tensor], row: BackboneRow) -> Tensors:
    """Convert a state dict of any known layout to the names and shapes of the row's timm model."""
    if row.kind == "features":
        return _feature_map_tensors(tensors, row)
    expected = meta_model(row).state_dict().keys()
    source = _select_encoder(tensors)
    unused = {name for name in source if _UNUSED.match(name)}
    renamed: Tensors = {}
    for name, tensor in source.items():
        if name in unused or not tensor.numel():  # a DINOv3 without registers
            continue
        if name not in expected:
            for pattern, new in _NAMES.items():
                name = re.sub(pattern, new, name)
        renamed[name] = tensor
    for name in list(renamed):
        if match := _LINEAR.fullmatch(name):
            _convert_linear(renamed, expected, *match.groups())
        elif name.endswith(".gamma") and name not in expected:  # Eva's name of a layer scale
            renamed[re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", name)] = renamed.pop(name)
    bias, kernel = "patch_embed.proj.bias", renamed.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 2:  # SigLIP 2 applies it to flattened patches
        kernel = rearrange(kernel, "c (h w rgb) -> c rgb h w", h=row.patch, w=row.patch)
        renamed["patch_embed.proj.weight"] = kernel
    if "class_embedding" in source and bias in expected and kernel is not None:
        renamed.setdefault(bias, kernel.new_zeros(len(kernel)))  # CLIPA has no bias
    if "norm.weight" not in expected:  # a norm in the file is for pooled tokens
        renamed = {name: value for name, value in renamed.items() if not _NORM.match(name)}
    elif "norm.weight" not in renamed:  # timm calls a norm after mean pooling fc_norm
        renamed = {_NORM.sub("norm.", name): value for name, value in renamed.items()}
    for name in renamed.keys() & {"cls_token", "pos_embed"}:
        while renamed[name].ndim < 3:
            renamed[name] = rearrange(renamed[name], "... -> 1 ...")
    _fit_positions(renamed, row)
    return renamed


def _feature_map_tensors(tensors: Mapping[str, Tensor], row: BackboneRow) -> Tensors:
    """Select the tensors that feature maps need, renamed by timm's ``checkpoint_filter_fn``."""
    whole, expected = meta_model(row, whole=True), meta_model(row).state_dict().keys()
    first = next(iter(expected))
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(first)]
    selected = _strip_prefix(min(prefixes, key=len, default=""), tensors)
    if not expected <= selected.keys():
        module = importlib.import_module(type(whole).__module__)
        convert = getattr(module, "checkpoint_filter_fn", lambda state, _: state)
        with contextlib.suppress(*TIMM_ERRORS):  # a layout that timm does not know
            selected = convert(selected, whole)
    heads = whole.state_dict().keys() - expected
    return {name: tensor for name, tensor in selected.items() if name not in heads}


def _strip_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Select the tensors whose names have a prefix, and remove it."""
    names = (name for name in tensors if name.startswith(prefix))
    return {name.removeprefix(prefix): tensors[name] for name in names}


def _select_encoder(tensors: Mapping[str, Tensor]) -> Tensors:
    """Select the tensors of the encoder, without the prefix of their names."""
    prefixes = {match[1] for name in tensors if (match := _PATCH_EMBEDDING.fullmatch(name))}
    known = [
        prefix
        for encoder in _ENCODERS
        for prefix in prefixes
        if _DISTRIBUTED.sub("", prefix) == encoder
    ]
    if not known and len(prefixes) > 1:
        raise CorruptWeightsError(
            f"holds several encoders ({', '.join(sorted(prefixes))}), expected one; save the "
            "encoder to use in a file of its own"
        )
    return _strip_prefix(known[0] if known else next(iter(prefixes), ""), tensors)


def _convert_linear(
    tensors: Tensors, expected: Collection[str], block: str, layer: str, leaf: str
) -> None:
    """Join or split the linear maps of queries or gates as the architecture stores them."""

    def pop(*parts: str) -> list[Tensor]:
        names = [f"{block}.{part}.{leaf}" for part in parts]
        return [tensors.pop(name) for name in names] if tensors.keys() >= set(names) else []

    def store_biases(query: Tensor, value: Tensor) -> None:
        # Without key bias, timm stores the other two separately, or none if both are zero.
        if f"{block}.attn.q_bias" in expected or bool(query.any()) or bool(value.any()):
            tensors[f"{block}.attn.q_bias"], tensors[f"{block}.attn.v_bias"] = query, value

    if layer == "attn.qkv":
        if f"{block}.attn.qkv.{leaf}" not in expected and f"{block}.attn.qkv.weight" in expected:
            query, _, value = pop("attn.qkv")[0].chunk(3)
            store_biases(query, value)
    elif layer == "attn.q":
        if parts := pop("attn.q", "attn.k", "attn.v"):
            tensors[f"{block}.attn.qkv.{leaf}"] = torch.cat(parts)
        elif leaf == "bias" and (parts := pop("attn.q", "attn.v")):
            store_biases(*parts)
    elif parts := pop("mlp.gate", "mlp.up"):
        if f"{block}.mlp.fc1_g.{leaf}" in expected:
            tensors[f"{block}.mlp.fc1_g.{leaf}"], tensors[f"{block}.mlp.fc1_x.{leaf}"] = parts
        else:
            tensors[f"{block}.mlp.fc1.{leaf}"] = torch.cat(parts)
    else:
        (tensors[f"{block}.mlp.fc1.{leaf}"],) = pop("mlp.up")


def _fit_positions(tensors: Tensors, row: BackboneRow) -> None:
    """Convert a file's positions to timm's shape, resized if the row's authors do so on loading."""
    positions = tensors.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return
    prefix = int("cls_token" in tensors)
    side = math.isqrt(positions.shape[1] - prefix)
    if prefix + side * side != positions.shape[1]:
        return
    if prefix and "reg_token" in tensors:  # with registers, timm stores positions of patches only
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        tensors["pos_embed"] = positions[:, 1:]
    elif row.load_interpolation is not None:
        with torch.no_grad():
            tensors["pos_embed"] = resize_positions(
                positions,
                (row.image_size // row.patch,) * 2,
                source_grid=(side, side),
                prefix=prefix,
                interpolation=row.load_interpolation,
            )
