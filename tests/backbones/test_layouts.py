from __future__ import annotations

import dataclasses

import pytest
import torch

from cosettle_adapter.backbones.architectures import check_tensors, meta_model
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.backbones.positions import resize_positions
from cosettle_adapter.backbones.registry import REGISTRY
from cosettle_adapter.errors import CorruptWeightsError

from helpers import TINY, tiny_state

SMALL = dataclasses.replace(TINY, depth=2, options={"depth": 2})
STATE = {name: t for name, t in tiny_state(SMALL).items() if name in meta_model(SMALL).state_dict()}


def prefixed(prefix: str, change: float = 0.0) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor + change for name, tensor in STATE.items()}


def is_state(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[n], STATE[n]) for n in STATE)


LAYOUTS = {
    "timm": prefixed(""),
    "distributed": prefixed("module."),
    "wrapped twice": prefixed("module.module."),
    "MAE with its decoder": {
        **prefixed(""),
        "mask_token": torch.ones(1, 1, 8),
        "decoder_embed.weight": torch.ones(8, 8),
        "decoder_blocks.0.norm1.weight": torch.ones(8),
        "decoder_pos_embed": torch.ones(1, 197, 8),
    },
    "MoCo v3": {
        **prefixed("module.base_encoder.", 1.0),
        **prefixed("module.momentum_encoder."),
        "module.momentum_encoder.head.0.weight": torch.ones(2, 2),
        "module.predictor.0.weight": torch.ones(2, 2),
    },
    "BLIP": {
        **prefixed("visual_encoder."),
        **prefixed("visual_encoder_m.", 1.0),
        "text_encoder.embeddings.word_embeddings.weight": torch.ones(3, 3),
        "itm_head.weight": torch.ones(2, 2),
        "image_queue": torch.ones(2, 2),
    },
    "I-JEPA": prefixed("module."),
    "DINO's teacher": {**prefixed("backbone."), "head.mlp.0.weight": torch.ones(2, 2)},
    "DINO, distributed": {
        **prefixed("module.backbone."),
        "module.head.mlp.0.weight": torch.ones(2, 2),
    },
    "DINOv2's teacher": {
        **prefixed("backbone."),
        "backbone.mask_token": torch.ones(1, 8),
        "dino_head.mlp.0.weight": torch.ones(2, 2),
        "ibot_head.last_layer.weight_g": torch.ones(2, 2),
    },
    "iBOT": {**prefixed(""), "masked_embed": torch.ones(1, 8), "head.weight": torch.ones(2, 2)},
    "with the authors' head": {
        **prefixed(""),
        "adapter.adapter.adapter_linear.weight": torch.ones(2, 2),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_timms(layout: str) -> None:
    assert is_state(to_timm(dict(LAYOUTS[layout]), SMALL))


def test_what_nobody_knows_is_left_to_be_noticed() -> None:
    tensors = {**prefixed("backbone."), "backbone.surprise.weight": torch.ones(1)}
    converted = to_timm(tensors, SMALL)
    assert "surprise.weight" in converted
    with pytest.raises(CorruptWeightsError, match=r"1 unexpected \(surprise.weight\)"):
        check_tensors(meta_model(SMALL), converted, SMALL)


def test_two_encoders_that_cannot_be_told_apart_are_an_error() -> None:
    with pytest.raises(CorruptWeightsError, match=r"several encoders \(left\., right\.\)"):
        to_timm({**prefixed("left."), **prefixed("right.")}, SMALL)


def test_a_norm_behind_mean_pooling_is_the_final_norm() -> None:
    tensors = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: tensor
        for name, tensor in prefixed("").items()
    }
    assert "fc_norm.weight" in tensors
    assert is_state(to_timm(tensors, SMALL))


def test_registers_and_the_class_position_take_timms_shape() -> None:
    row = REGISTRY["dinov2-vitb16-in1k"]
    tensors = {
        "cls_token": torch.randn(1, 1, 8),
        "pos_embed": torch.randn(1, 197, 8),
        "register_tokens": torch.randn(1, 4, 8),
        "mask_token": torch.zeros(1, 8),
    }
    converted = to_timm(dict(tensors), row)
    assert converted.keys() == {"cls_token", "pos_embed", "reg_token"}
    assert torch.equal(converted["cls_token"], tensors["cls_token"] + tensors["pos_embed"][:, :1])
    assert torch.equal(converted["pos_embed"], tensors["pos_embed"][:, 1:])
    again = to_timm(dict(converted), row)
    assert torch.equal(again["cls_token"], converted["cls_token"]), "folded once only"


def test_blip_positions_come_down_to_224_as_its_authors_do_it() -> None:
    row = REGISTRY["blip-vitb16"]
    stored = torch.randn(1, 24 * 24 + 1, 8)
    state = {"cls_token": torch.zeros(1, 1, 8), "pos_embed": stored}
    converted = to_timm(dict(state), row)
    expected = resize_positions(
        stored, (14, 14), source_grid=(24, 24), prefix=1, interpolation="size"
    )
    assert torch.equal(converted["pos_embed"], expected)
    assert converted["pos_embed"].shape == (1, 197, 8)


def test_other_rows_refuse_positions_of_another_grid() -> None:
    tensors = {**prefixed(""), "pos_embed": torch.zeros(1, 24 * 24 + 1, 192)}
    with pytest.raises(CorruptWeightsError, match=r"1 misshapen \(pos_embed is \(1, 577, 192\)"):
        check_tensors(meta_model(SMALL), to_timm(tensors, SMALL), SMALL)


@pytest.mark.parametrize("name", ["dinov2-vits14-reg", "dinov2-vitg14", "dinov2-vitg14-reg"])
def test_metas_own_files_of_dinov2(name: str) -> None:
    """Positions with the class token's, registers and SwiGLU under Meta's names."""
    row = REGISTRY[name]
    expected = meta_model(row).state_dict()
    cells = (row.image_size // row.patch) ** 2
    theirs = {
        key.replace("reg_token", "register_tokens")
        .replace("mlp.fc1", "mlp.w12" if "vitg" in name else "mlp.fc1")
        .replace("mlp.fc2", "mlp.w3" if "vitg" in name else "mlp.fc2"): tensor
        for key, tensor in expected.items()
    }
    theirs["pos_embed"] = torch.empty(1, cells + 1, row.width, device="meta")
    theirs["mask_token"] = torch.empty(1, row.width, device="meta")
    check_tensors(meta_model(row), to_timm(theirs, row), row)
