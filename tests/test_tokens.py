"""Class, register and patch tokens and attention, against timm's own passes."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from einops import rearrange
from export_fakes import ROWS
from torch import nn

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import BackboneRow, VisionTransformerBackbone, build_backbone
from cosettle_adapter.closed_form import settle_clip

from helpers import noise, projection_for, tiny_state

VIT, ROTARY = ROWS["vit"], ROWS["rotary"]  # a class token; also four registers
REGISTERS = dataclasses.replace(
    VIT, architecture="vit_small_patch16_224", options={**VIT.options, "reg_tokens": 3}
)
PLAIN = dataclasses.replace(
    VIT, options={**VIT.options, "class_token": False, "global_pool": "", "reg_tokens": 0}
)
KINDS = {"class": VIT, "registers": REGISTERS, "rotary": ROTARY, "plain": PLAIN}


def adapter_of(row: BackboneRow, **changes: object) -> CoSettleAdapter:
    backbone = build_backbone(row, tiny_state(row), fingerprint="sha256:0")
    projection = projection_for(backbone, layers=(0,), out_width=8, **changes)  # type: ignore[arg-type]
    return CoSettleAdapter(backbone, projection)


def timm_model(row: BackboneRow) -> nn.Module:
    options = {"num_classes": 0, "global_pool": "", **row.options, "dynamic_img_size": True}
    model = timm.create_model(row.architecture, **options)
    model.load_state_dict(tiny_state(row))
    return model.eval()


@pytest.mark.parametrize("name", KINDS)
def test_tokens_are_those_of_timm(name: str) -> None:
    row = KINDS[name]
    adapter, side = adapter_of(row), row.image_size
    clip = noise(3, 3, side, side).sigmoid()
    tokens = adapter.tokens(clip, batch_size=2)
    expected = timm_model(row).forward_features(adapter.preprocess(clip))  # type: ignore[operator]
    registers = {"class": 0, "registers": 3, "rotary": 4, "plain": 0}[name]
    special = registers + (name != "plain")
    parts = expected.split([special, expected.shape[1] - special], dim=1)
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(rearrange(tokens.patch, "t c h w -> t (h w) c"), parts[1], **close)
    if name == "plain":
        assert tokens.cls is None
    else:
        torch.testing.assert_close(tokens.cls, parts[0][:, 0], **close)
    if registers:
        torch.testing.assert_close(tokens.registers, parts[0][:, 1:], **close)
    else:
        assert tokens.registers is None
    assert torch.equal(tokens.adapted, adapter(clip, batch_size=2))
    assert (tokens.attention, tokens.geometry) == (None, adapter.geometry(side, side))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("layer", [0, -1])
def test_attention_is_the_softmax_of_queries_and_keys(name: str, layer: int) -> None:
    adapter = adapter_of(KINDS[name])
    vit = adapter.backbone.vit
    attend, seen = vit.blocks[layer].attn, []
    queries = attend.q_norm.register_forward_hook(lambda _m, _i, output: seen.append(output))
    keys = attend.k_norm.register_forward_hook(lambda _m, _i, output: seen.append(output))
    tokens = adapter.tokens(torch.rand(2, 3, 48, 64), attention=layer, layer=0)
    queries.remove(), keys.remove()
    query, key = seen
    prefix, fused = vit.num_prefix_tokens, attend.fused_attn
    if name == "rotary":
        query, key = (rotated(adapter.backbone, values, prefix) for values in (query, key))
    expected = (query @ key.mT * attend.head_dim**-0.5).softmax(-1)
    assert tokens.attention is not None
    assert tokens.attention.shape == (2, attend.num_heads, prefix + 12, prefix + 12)
    torch.testing.assert_close(tokens.attention, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokens.attention.sum(-1), torch.ones(expected.shape[:-1]))
    assert fused, "fused again"
    assert not attend.attn_drop._forward_hooks
    plain = adapter.tokens(torch.rand(1, 3, 48, 64), layer=0)
    assert plain.patch.shape == (1, adapter.backbone.width, 3, 4)


def rotated(backbone: VisionTransformerBackbone, values: torch.Tensor, prefix: int) -> torch.Tensor:
    """Rotate patches' halves of channels by hand."""
    sine, cosine = backbone.positions((3, 4)).rotary.chunk(2, dim=-1)  # type: ignore[union-attr]
    first, second = values[:, :, prefix:].chunk(2, dim=-1)
    turned = values[:, :, prefix:] * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([values[:, :, :prefix], turned], dim=2)


def test_one_pass_serves_all_and_another_layer_is_not_normed() -> None:
    adapter, passes = adapter_of(REGISTERS), []
    adapter.backbone.vit.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    clip = torch.rand(2, 3, 48, 64)
    tokens = adapter.tokens(clip, layer=0, attention=1)
    assert len(passes) == 1
    images = adapter.preprocess(clip)
    assert torch.equal(tokens.patch, adapter.backbone.patch_tokens(images, layer=0, norm=False))
    vit = adapter.backbone.vit
    ((_, prefix),) = vit.forward_intermediates(
        images, indices=[0], return_prefix_tokens=True, intermediates_only=True
    )
    torch.testing.assert_close(tokens.cls, prefix[:, 0])
    torch.testing.assert_close(tokens.registers, prefix[:, 1:])


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_images_clips_and_precision(leading: tuple[int, ...]) -> None:
    adapter = adapter_of(REGISTERS)
    adapter.settles = True
    clip = noise(*leading, 3, 48, 64).sigmoid()
    tokens = adapter.tokens(clip, size=32, attention=1, batch_size=4)
    assert tokens.cls is not None
    assert tokens.registers is not None
    assert tokens.attention is not None
    assert tokens.cls.shape == (*leading, 32)
    assert tokens.registers.shape == (*leading, 3, 32)
    assert tokens.patch.shape == (*leading, 32, 2, 3)
    assert tokens.attention.shape == (*leading, 2, 10, 10)
    torch.testing.assert_close(tokens.adapted, adapter(clip, size=32, batch_size=4))
    if leading:
        adapter.settles = False
        unsettled = adapter(clip[1], size=32)
        torch.testing.assert_close(tokens.adapted[1], settle_clip(unsettled), atol=1e-5, rtol=1e-4)
    adapter.backbone.to(torch.bfloat16)
    rough = adapter.tokens(clip, size=32, attention=1)
    for name in ("cls", "registers", "patch", "adapted", "attention"):
        assert getattr(rough, name).dtype == torch.bfloat16
    torch.testing.assert_close(rough.cls.float(), tokens.cls, atol=0.1, rtol=0.1)  # type: ignore[union-attr]
    sums = rough.attention.float().sum(-1)  # type: ignore[union-attr]
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=0.02, rtol=0)


def test_feature_maps_have_patches_alone() -> None:
    row = ROWS["convnext"]
    backbone = build_backbone(row, tiny_state(row), fingerprint="sha256:0")
    adapter = CoSettleAdapter.raw(backbone)
    tokens = adapter.tokens(torch.rand(2, 3, 64, 64))
    assert (tokens.cls, tokens.registers) == (None, None)
    assert torch.equal(tokens.patch, tokens.adapted)
    with pytest.raises(ValueError, match=r"small-convnext returns feature maps: .* nor attention"):
        adapter.tokens(torch.rand(2, 3, 64, 64), attention=0)
    with pytest.raises(ValueError, match=r"layers 0 to 1 .*, got layer 2"):
        adapter_of(VIT).tokens(torch.rand(3, 48, 64), attention=2)
