"""How other people's checkpoints name the same tensors, and the way back to timm's names.

Names are regular expressions. Nothing is dropped but what is known to lie behind the patch tokens
(projections, pooling) or beside the encoder (text towers, decoders), and nothing is resized unless
the row says so: timm's own filters for transformers do both silently, so they are used for feature
maps only.
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

# Every encoder has one kernel that makes patches; what stands before its name stands before all.
_KERNEL = re.compile(
    r"((?:.*\.)?)(patch_embed\.proj|conv1|embeddings\.patch_embeddings?(\.projection)?)\.weight"
)
_DISTRIBUTED = re.compile(r"^(module\.)+")  # DistributedDataParallel's prefix
_ENCODERS = (  # what stands before the encoder that is meant where there are several
    "momentum_encoder.",  # MoCo v3; base_encoder stands beside it
    "visual_encoder.",  # BLIP; visual_encoder_m and a text encoder stand beside it
    "teacher.backbone.",  # DINO, iBOT
    "backbone.",  # DINOv2, T-CoRe
    "encoder.",  # I-JEPA
    "",
)
_NAMES = {  # applied in order
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
    # Meta: DINOv2, which packs gate and value as timm does, and DINOv3
    r"^(register|storage)_tokens$": "reg_token",
    r"\.mlp\.w12\.": ".mlp.fc1.",
    r"\.mlp\.w1\.": ".mlp.gate.",
    r"\.mlp\.w2\.": ".mlp.up.",
    r"\.mlp\.w3\.": ".mlp.fc2.",
}
_BESIDE = re.compile(  # what stands beside an encoder, or behind its patch tokens
    r"embeddings\.(position_ids|mask_token)|mask_token|masked_embed|decoder[._]|adapter\.|head\.|"
    r"proj$|visual_projection\.|attn_pool\.|pooler\.|classifier\.|local_cls_norm\.|"
    r"rope_embed(dings)?\.|.*\.bias_mask"
)
_LINEAR = re.compile(r"(.*)\.(attn\.qkv|attn\.q|mlp\.up)\.(weight|bias)")


def to_timm(tensors: Mapping[str, Tensor], row: BackboneRow) -> Tensors:
    """Give a state dict of any known layout timm's names and the shapes of the row's architecture.

    Whatever is left over, missing or misshapen shows up when the backbone is built.
    """
    if row.kind == "features":
        return _of_feature_maps(tensors, row)
    expected = meta_model(row).state_dict().keys()
    given = _select_encoder(tensors)
    beside = {name for name in given if _BESIDE.match(name)}
    if "attn_pool.query" in beside:  # CoCa normalises what pooling makes of the patch tokens
        beside |= {"ln_post.weight", "ln_post.bias"}
    found: Tensors = {}
    for name, tensor in given.items():
        if name in beside:
            continue
        if name not in expected:
            for pattern, new in _NAMES.items():
                name = re.sub(pattern, new, name)
        found[name] = tensor
    for name in list(found):
        if match := _LINEAR.fullmatch(name):
            _join_linears(found, expected, *match.groups())
        elif name.endswith(".gamma") and name not in expected:  # Eva's name of a layer scale
            found[re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", name)] = found.pop(name)
    bias, kernel = "patch_embed.proj.bias", found.get("patch_embed.proj.weight")
    if "class_embedding" in given and bias in expected and kernel is not None:
        found.setdefault(bias, kernel.new_zeros(len(kernel)))  # CLIPA has none
    if "norm.weight" not in found:  # timm's name for a norm behind mean pooling
        found = {re.sub(r"^fc_norm\.", "norm.", name): tensor for name, tensor in found.items()}
    for name in found.keys() & {"cls_token", "pos_embed"}:
        while found[name].ndim < 3:
            found[name] = rearrange(found[name], "... -> 1 ...")
    _fit_positions(found, row)
    return found


def _of_feature_maps(tensors: Mapping[str, Tensor], row: BackboneRow) -> Tensors:
    """Pick the tensors that feature maps come from, without heads and final norms.

    Names of authors and of earlier timm versions are known to timm's ``checkpoint_filter_fn``.
    """
    whole, own = meta_model(row, whole=True), meta_model(row).state_dict().keys()
    first = next(iter(own))
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(first)]
    found = _below(min(prefixes, key=len, default=""), tensors)
    if not own <= found.keys():
        family = importlib.import_module(type(whole).__module__)
        with contextlib.suppress(*TIMM_ERRORS):  # not in a layout that timm knows either
            found = getattr(family, "checkpoint_filter_fn", lambda given, _: given)(found, whole)
    heads = whole.state_dict().keys() - own
    return {name: tensor for name, tensor in found.items() if name not in heads}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Keep what is below a prefix, without it."""
    kept = (name for name in tensors if name.startswith(prefix))
    return {name.removeprefix(prefix): tensors[name] for name in kept}


def _select_encoder(tensors: Mapping[str, Tensor]) -> Tensors:
    """Keep the encoder's tensors, without what stands before their names."""
    found = {match[1] for name in tensors if (match := _KERNEL.fullmatch(name))}
    known = [
        prefix
        for encoder in _ENCODERS
        for prefix in found
        if _DISTRIBUTED.sub("", prefix) == encoder
    ]
    if not known and len(found) > 1:
        raise CorruptWeightsError(
            f"holds several encoders ({', '.join(sorted(found))}), and which is meant cannot be "
            "told; save one of them alone"
        )
    return _below(known[0] if known else next(iter(found), ""), tensors)


def _join_linears(
    tensors: Tensors, expected: Collection[str], block: str, layer: str, leaf: str
) -> None:
    """Bring a block's query or gate into the form that the architecture computes it in."""

    def take(*parts: str) -> list[Tensor]:
        names = [f"{block}.{part}.{leaf}" for part in parts]
        return [tensors.pop(name) for name in names] if tensors.keys() >= set(names) else []

    def keep(query: Tensor, value: Tensor) -> None:
        # Without key bias, timm keeps the others apart, or leaves them out where all are zero.
        if bool(query.any()) or bool(value.any()):
            tensors[f"{block}.attn.q_bias"], tensors[f"{block}.attn.v_bias"] = query, value

    if layer == "attn.qkv":
        if f"{block}.attn.qkv.{leaf}" not in expected and f"{block}.attn.qkv.weight" in expected:
            query, _, value = take("attn.qkv")[0].chunk(3)
            keep(query, value)
    elif layer == "attn.q":
        if parts := take("attn.q", "attn.k", "attn.v"):
            tensors[f"{block}.attn.qkv.{leaf}"] = torch.cat(parts)
        elif leaf == "bias" and (parts := take("attn.q", "attn.v")):
            keep(*parts)
    elif parts := take("mlp.gate", "mlp.up"):
        if f"{block}.mlp.fc1_g.{leaf}" in expected:
            tensors[f"{block}.mlp.fc1_g.{leaf}"], tensors[f"{block}.mlp.fc1_x.{leaf}"] = parts
        else:
            tensors[f"{block}.mlp.fc1.{leaf}"] = torch.cat(parts)
    else:
        (tensors[f"{block}.mlp.fc1.{leaf}"],) = take("mlp.up")


def _fit_positions(tensors: Tensors, row: BackboneRow) -> None:
    """Bring a file's positions into the shape that timm stores.

    Where there are registers, timm keeps positions for patches only: the class token's own is
    added to the token. A square grid is resized to the row's if its authors do so at loading.
    """
    positions = tensors.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return
    prefix = int("cls_token" in tensors)
    side = math.isqrt(positions.shape[1] - prefix)
    if prefix + side * side != positions.shape[1]:
        return
    if prefix and "reg_token" in tensors:
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
