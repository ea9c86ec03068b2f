"""How other people's checkpoints name the same tensors, and the way back to timm's names."""

from __future__ import annotations

import functools

import torch

from cosettle_adapter.backbones.architectures import meta_model
from cosettle_adapter.backbones.clip_layouts import CLIP_LAYOUTS
from cosettle_adapter.backbones.layout import Tensors
from cosettle_adapter.backbones.positions import resize_positions
from cosettle_adapter.backbones.renaming import fold_class_position
from cosettle_adapter.backbones.row import BackboneRow
from cosettle_adapter.backbones.timm_features import own_tensors
from cosettle_adapter.backbones.vit_layouts import VIT_LAYOUTS
from cosettle_adapter.errors import CorruptWeightsError

LAYOUTS = (*CLIP_LAYOUTS, *VIT_LAYOUTS)

# A ViT that kept timm's names inside a larger model, by what stands before them; the first wins.
_ENCODERS = (
    "momentum_encoder.",  # MoCo v3; base_encoder stands beside it
    "visual_encoder.",  # BLIP; visual_encoder_m and a text encoder stand beside it
    "teacher.backbone.",  # DINO, iBOT
    "backbone.",  # DINOv2, T-CoRe
    "encoder.",  # I-JEPA
    "",
)
_WRAPPER = "module."  # DistributedDataParallel's prefix
_FIRST_BLOCK = "blocks.0.norm1.weight"
# Tensors that ride along in the checkpoints of training codes and are not the encoder.
_RIDERS = ("decoder_", "mask_token", "masked_embed", "adapter.")


def to_timm(tensors: Tensors, row: BackboneRow) -> Tensors:
    """Give a state dict of any known layout the names and shapes of the row's architecture.

    Nothing is dropped but what is known not to be the encoder, so whatever is left over, missing
    or misshapen shows up when the backbone is built.

    Args:
        tensors: a file's state dict.
        row: the backbone it should be.

    Returns:
        timm's names to tensors, dtype unchanged.

    Raises:
        CorruptWeightsError: two encoders in one file and no way to tell which is meant, or none.
    """
    layout = next((known for known in LAYOUTS if _has_mark(tensors, known.mark)), None)
    if layout is not None:
        tensors = layout.convert(tensors)
    if row.kind == "features":
        tensors = {_bare(name): tensor for name, tensor in tensors.items()}
        return own_tensors(meta_model(row), tensors)
    if layout is None:
        tensors = _select_encoder(tensors)
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith((*_RIDERS, *row.ignored))
    }
    _rename(tensors, "register_tokens", "reg_token")
    tensors = _unpacked_names(tensors)
    if "norm.weight" not in tensors:  # timm's name for a norm behind mean pooling
        _rename(tensors, "fc_norm.weight", "norm.weight")
        _rename(tensors, "fc_norm.bias", "norm.bias")
    fold_class_position(tensors)
    if row.load_interpolation is not None:
        _bring_positions_to_size(tensors, row)
    return tensors


def _has_mark(tensors: Tensors, mark: str) -> bool:
    return any(name == mark or name.endswith("." + mark) for name in tensors)


def _select_encoder(tensors: Tensors) -> Tensors:
    """Keep the encoder's tensors, without what stands before their names."""
    found = {
        name.removesuffix(_FIRST_BLOCK)
        for name in tensors
        if name == _FIRST_BLOCK or name.endswith("." + _FIRST_BLOCK)
    }
    if not found:
        return tensors
    known = [prefix for encoder in _ENCODERS for prefix in found if _bare(prefix) == encoder]
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


def _bare(name: str) -> str:
    while name.startswith(_WRAPPER):
        name = name.removeprefix(_WRAPPER)
    return name


def _unpacked_names(tensors: Tensors) -> Tensors:
    """Meta's DINOv2 packs gate and value of its giant's SwiGLU as ``w12``, timm as ``fc1``."""
    packed = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}
    if not any(".mlp.w12." in name for name in tensors):
        return tensors
    return {
        functools.reduce(lambda text, old: text.replace(old, packed[old]), packed, name): tensor
        for name, tensor in tensors.items()
    }


def _rename(tensors: Tensors, old: str, new: str) -> None:
    if old in tensors and new not in tensors:
        tensors[new] = tensors.pop(old)


def _bring_positions_to_size(tensors: Tensors, row: BackboneRow) -> None:
    """Resize a file's square grid of positions to the row's, as its authors do at loading."""
    positions = tensors.get("pos_embed")
    if positions is None or row.load_interpolation is None or positions.ndim != 3:
        return
    prefix = int("cls_token" in tensors)
    side = int((positions.shape[1] - prefix) ** 0.5)
    if prefix + side * side != positions.shape[1]:
        return
    grid = (row.image_size // row.patch,) * 2
    with torch.no_grad():
        tensors["pos_embed"] = resize_positions(
            positions,
            grid,
            source_grid=(side, side),
            prefix=prefix,
            interpolation=row.load_interpolation,
        )
