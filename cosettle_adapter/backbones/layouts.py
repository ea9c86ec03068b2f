"""How other people's checkpoints name the same tensors, and the way back to timm's names.

A layout is a table of regular expressions. Nothing is dropped but what is known to lie behind the
patch tokens (projections, pooling) or beside the encoder (text towers, decoders), and nothing is
resized unless the row says so: timm's own filters for transformers do both silently, so they are
used for feature maps only.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.backbones.architectures import meta_model
from cosettle_adapter.backbones.rows import BackboneRow
from cosettle_adapter.backbones.timm_features import own_tensors
from cosettle_adapter.backbones.vit import resize_positions
from cosettle_adapter.errors import CorruptWeightsError

Tensors = dict[str, Tensor]
Names = Mapping[str, str | Callable[[re.Match[str]], str]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way of naming an image encoder's tensors.

    Attributes:
        name: what people call it.
        mark: a name that only this layout has.
        names: regular expressions to timm's names, all applied, in order.
        dropped: beginnings of names that patch tokens do not pass through.
        below: a module that all names are below.
    """

    name: str
    mark: str
    names: Names
    dropped: tuple[str, ...]
    below: str = ""

    def prefixes(self, tensors: Iterable[str]) -> set[str]:
        """What stands before the names of each encoder in a file; none: another layout."""
        mark = re.compile(rf"((?:.*\.)?{self.below}){self.mark}")
        return {match[1] for name in tensors if (match := mark.fullmatch(name))}


_OPENAI: Names = {
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
}
_RESNET: Names = {
    r"^(conv|bn)(\d)\.": lambda m: f"stem.conv{m[2]}.{m[1]}.",
    r"^layer(\d)\.": lambda m: f"stages.{int(m[1]) - 1}.",
    r"(\.\d+)\.(conv|bn)([13])\.": r"\1.conv\3_1x1.\2.",
    r"(\.\d+)\.(conv|bn)2\.": r"\1.conv2_kxk.\2.",
    r"\.downsample\.0\.": ".shortcut.conv.conv.",
    r"\.downsample\.1\.": ".shortcut.conv.bn.",
}
_HUGGING_FACE: Names = {  # CLIP, SigLIP, ViT, MAE, DINOv2 and DINOv3, in files and in memory
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
}
_META: Names = {
    r"^storage_tokens$": "reg_token",
    r"\.mlp\.w1\.": ".mlp.gate.",
    r"\.mlp\.w2\.": ".mlp.up.",
    r"\.mlp\.w3\.": ".mlp.fc2.",
}
_BESIDE = (
    "embeddings.position_ids", "embeddings.mask_token", "visual_projection.", "pooler.",
    "classifier.", "decoder.", "rope_embeddings.", "head.",
)  # fmt: skip
_TRUNK_HEADS = ("head.weight", "head.bias", "head.fc.", "attn_pool.")  # head.norm is no head

LAYOUTS = (  # the first whose mark is found is meant: CoCa has OpenAI's too
    Layout(
        "open_clip around a timm model", r"(patch_embed|stem)\..*", {}, _TRUNK_HEADS, r"trunk\."
    ),
    Layout(  # CoCa's last norm is for what the pooling makes of the patch tokens
        "open_clip CoCa", r"attn_pool\.query", _OPENAI, ("proj", "attn_pool.", "ln_post.")
    ),
    # a released checkpoint has the authors' head in the tower
    Layout("OpenAI CLIP or open_clip, ViT", r"ln_post\.weight", _OPENAI, ("proj", "adapter.")),
    Layout(
        "OpenAI CLIP or open_clip, ResNet", r"attnpool\.c_proj\.weight", _RESNET, ("attnpool.",)
    ),
    Layout(
        "Meta DINOv3", "storage_tokens", _META, ("mask_token", "rope_embed.", "local_cls_norm.")
    ),
    Layout("Hugging Face CLIP", r"pre_layrnorm\.weight", _HUGGING_FACE, _BESIDE),
    Layout("Hugging Face SigLIP", r"embeddings\.patch_embedding\.bias", _HUGGING_FACE, _BESIDE),
    Layout("Hugging Face DINOv3", r"embeddings\.patch_embeddings\.weight", _HUGGING_FACE, _BESIDE),
    Layout(
        "Hugging Face ViT, MAE or DINOv2",
        r"embeddings\.patch_embeddings\.projection\.weight",
        _HUGGING_FACE,
        _BESIDE,
    ),
)

# A ViT that kept timm's names inside a larger model, by what stands before them; the first wins.
_ENCODERS = (
    "momentum_encoder.",  # MoCo v3; base_encoder stands beside it
    "visual_encoder.",  # BLIP; visual_encoder_m and a text encoder stand beside it
    "teacher.backbone.",  # DINO, iBOT
    "backbone.",  # DINOv2, T-CoRe
    "encoder.",  # I-JEPA
    "",
)
_FIRST_BLOCK = re.compile(r"((?:.*\.)?)blocks\.0\.norm1\.weight")
_DISTRIBUTED = re.compile(r"^(module\.)+")  # DistributedDataParallel's prefix
# Tensors that training codes store beside the encoder.
_TRAINING = ("decoder_", "mask_token", "masked_embed", "adapter.")
_AUTHORS: Names = {  # of DINOv2, which packs gate and value of its giant's SwiGLU as timm does
    r"^register_tokens$": "reg_token",
    r"\.mlp\.w12\.": ".mlp.fc1.",
    r"\.mlp\.w3\.": ".mlp.fc2.",
}


def to_timm(tensors: Mapping[str, Tensor], row: BackboneRow) -> Tensors:
    """Give a state dict of any known layout the names and shapes of the row's architecture.

    Nothing is dropped but what is known not to be the encoder, so whatever is left over, missing
    or misshapen shows up when the backbone is built, under the name it has in the file.

    Args:
        tensors: a file's state dict.
        row: the backbone it should be.

    Returns:
        timm's names to tensors, dtype unchanged.

    Raises:
        CorruptWeightsError: two encoders in one file and no way to tell which is meant.
    """
    layout = next((known for known in LAYOUTS if known.prefixes(tensors)), None)
    found = dict(tensors) if layout is None else _convert(tensors, layout, row)
    if row.kind == "features":
        return own_tensors(
            meta_model(row), {_DISTRIBUTED.sub("", name): t for name, t in found.items()}
        )
    if layout is None:
        found = _select_encoder(found)
    others = (*_TRAINING, *row.ignored)
    found = {
        _renamed(name, _AUTHORS if layout is None else {}): tensor
        for name, tensor in found.items()
        if not name.startswith(others)
    }
    if "norm.weight" not in found and "fc_norm.weight" in found:
        # timm's name for a norm behind mean pooling
        found = {re.sub(r"^fc_norm\.", "norm.", name): tensor for name, tensor in found.items()}
    _fold_class_position(found)
    _bring_positions_to_size(found, row)
    return found


def _convert(tensors: Mapping[str, Tensor], layout: Layout, row: BackboneRow) -> Tensors:
    """Select the encoder's tensors and give them the names and shapes of the architecture."""
    prefixes = layout.prefixes(tensors)
    if len(prefixes) > 1:
        raise CorruptWeightsError(
            f"expected one image tower, found {len(prefixes)} "
            f"({', '.join(map(repr, sorted(prefixes)))}); save the one that is meant alone"
        )
    prefix = prefixes.pop()
    own = {
        _renamed(inner, layout.names): name
        for name in tensors
        if name.startswith(prefix)
        and not (inner := name.removeprefix(prefix)).startswith(layout.dropped)
    }
    converted = {new: tensors[name] for new, name in own.items()}
    expected = meta_model(row).state_dict().keys()
    kernel = converted.get("patch_embed.proj.weight")
    if layout.names is _OPENAI and "norm_pre.weight" not in converted and kernel is not None:
        # Without a norm before the blocks, timm's patches have a bias; in CLIPA they have none.
        converted.setdefault("patch_embed.proj.bias", kernel.new_zeros(len(kernel)))
    for name, ndim, pattern in (("cls_token", 1, "c -> 1 1 c"), ("pos_embed", 2, "n c -> 1 n c")):
        if name in converted and converted[name].ndim == ndim:
            converted[name] = rearrange(converted[name], pattern)
    for name in list(converted):
        if match := _LINEAR.fullmatch(name):
            _join_linears(converted, expected, *match.groups())
        elif name.endswith(".gamma") and name not in expected:  # Eva's name of a layer scale
            converted[re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", name)] = converted.pop(name)
    if row.kind == "features":  # what is not expected is a head, and found out from the model
        return converted
    return {
        name if name in expected else own.get(name, name): tensor
        for name, tensor in converted.items()
    }


def _renamed(name: str, names: Names) -> str:
    for pattern, new in names.items():
        name = re.sub(pattern, new, name)
    return name


_LINEAR = re.compile(r"(.*)\.(attn\.qkv|attn\.q|mlp\.up)\.(weight|bias|bias_mask)")


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

    if leaf == "bias_mask":
        take("attn.qkv")  # says again which bias is zero
    elif layer == "attn.qkv":
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


def _select_encoder(tensors: Tensors) -> Tensors:
    """Keep the encoder's tensors, without what stands before their names."""
    found = {match[1] for name in tensors if (match := _FIRST_BLOCK.fullmatch(name))}
    if not found:
        return tensors
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
    prefix = known[0] if known else found.pop()
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _fold_class_position(tensors: Tensors) -> None:
    """Where there are registers, timm keeps positions for patches only.

    The class token's own position, which the authors' files have before the square of the
    patches', is added to the token, as timm's conversion does it.
    """
    if not tensors.keys() >= {"reg_token", "cls_token", "pos_embed"}:
        return
    positions = tensors["pos_embed"]
    if positions.ndim == 3 and math.isqrt(positions.shape[1] - 1) ** 2 == positions.shape[1] - 1:
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        tensors["pos_embed"] = positions[:, 1:]


def _bring_positions_to_size(tensors: Tensors, row: BackboneRow) -> None:
    """Resize a file's square grid of positions to the row's, as its authors do at loading."""
    positions = tensors.get("pos_embed")
    if positions is None or row.load_interpolation is None or positions.ndim != 3:
        return
    prefix = int("cls_token" in tensors)
    side = math.isqrt(positions.shape[1] - prefix)
    if prefix + side * side == positions.shape[1]:
        with torch.no_grad():
            tensors["pos_embed"] = resize_positions(
                positions,
                (row.image_size // row.patch,) * 2,
                source_grid=(side, side),
                prefix=prefix,
                interpolation=row.load_interpolation,
            )
