from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosettle_adapter.backbones import (
    Positions,
    VisionTransformerBackbone,
    build_backbone,
    lookup,
)
from cosettle_adapter.backbones.registry import BackboneRow
from cosettle_adapter.errors import CorruptWeightsError, GeometryError

from helpers import TINY, tiny_state


def build(row: BackboneRow = TINY, **options: object) -> VisionTransformerBackbone:
    return build_backbone(row, tiny_state(row), fingerprint="sha256:0", **options)  # type: ignore[arg-type]


def timm_tokens(row: BackboneRow, images: Tensor, *, layer: int, norm: bool) -> Tensor:
    model = timm.create_model(row.architecture, num_classes=0, dynamic_img_size=True).eval()
    model.load_state_dict(tiny_state(row))
    with torch.no_grad():
        tokens: Tensor = model.forward_intermediates(
            images, indices=[layer], norm=norm, output_fmt="NCHW", intermediates_only=True
        )[0]
    return tokens


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (48, 32)])
@pytest.mark.parametrize(("layer", "norm"), [(11, True), (11, False), (3, False), (3, True)])
def test_tokens_equal_timms(size: tuple[int, int], layer: int, norm: bool) -> None:
    images = torch.randn(2, 3, *size)
    tokens = build().patch_tokens(images, layer=layer, norm=norm)
    assert tokens.shape == (2, 192, size[0] // 16, size[1] // 16)
    expected = timm_tokens(TINY, images, layer=layer, norm=norm)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_registers_and_unembedded_class_tokens_are_stripped() -> None:
    row = dataclasses.replace(
        TINY,
        architecture="vit_small_patch14_reg4_dinov2",
        patch=14,
        width=384,
        image_size=518,
    )
    images = torch.randn(1, 3, 70, 98)
    tokens = build(row).patch_tokens(images)
    assert tokens.shape == (1, 384, 5, 7)
    expected = timm_tokens(row, images, layer=11, norm=True)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_clips_pre_norm_is_applied() -> None:
    row = dataclasses.replace(TINY, architecture="vit_base_patch16_clip_quickgelu_224", width=768)
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(
        build(row).patch_tokens(images),
        timm_tokens(row, images, layer=11, norm=True),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("side", [546, 602])
def test_sides_that_trip_others_work(side: int) -> None:
    row = dataclasses.replace(
        TINY, architecture="vit_small_patch14_dinov2", patch=14, width=384, image_size=518,
        interpolation="scale+0.1",
    )  # fmt: skip
    tokens = build(row).patch_tokens(torch.zeros(1, 3, side, 28), layer=0)
    assert tokens.shape == (1, 384, side // 14, 2)


def test_976_works_at_patch_16() -> None:
    assert build().patch_tokens(torch.zeros(1, 3, 976, 16), layer=0).shape[-2:] == (61, 1)


def test_one_pass_gives_several_blocks_in_the_order_asked(
    tiny_backbone: VisionTransformerBackbone,
) -> None:
    images = torch.randn(1, 3, 64, 64)
    last, fourth = tiny_backbone.intermediate_tokens(images, (-1, 3))
    torch.testing.assert_close(last, tiny_backbone.patch_tokens(images))
    torch.testing.assert_close(fourth, tiny_backbone.patch_tokens(images, layer=3))


def test_blocks_after_the_deepest_asked_for_do_not_run() -> None:
    backbone = build()
    ran: list[int] = []
    for index, block in enumerate(backbone.vit.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    backbone.intermediate_tokens(torch.zeros(1, 3, 32, 32), (2, 4))
    assert ran == [0, 1, 2, 3, 4]


@settings(max_examples=20, deadline=None)
@given(
    stride=st.sampled_from([4, 7, 8, 16]),
    rows=st.integers(0, 5),
    columns=st.integers(0, 5),
)
def test_overlapping_patches(stride: int, rows: int, columns: int) -> None:
    backbone = build(stride=stride)
    height, width = 16 + rows * stride, 16 + columns * stride
    tokens = backbone.patch_tokens(torch.zeros(1, 3, height, width), layer=0)
    assert tokens.shape[-2:] == (rows + 1, columns + 1) == backbone.grid(height, width)


def test_an_overlapping_patch_sees_its_own_pixels() -> None:
    backbone = build(stride=8)
    images = torch.randn(1, 3, 48, 48)
    row, column = 3, 1
    patch = images[..., row * 8 : row * 8 + 16, column * 8 : column * 8 + 16]
    weight, bias = backbone.vit.patch_embed.proj.weight, backbone.vit.patch_embed.proj.bias
    expected = torch.einsum("bchw,ochw->bo", patch, weight) + bias
    embedded = backbone._embed(images, torch.zeros(1, 26, 192))
    torch.testing.assert_close(embedded[:, 1 + row * 5 + column], expected)


def test_positions_are_computed_once_a_grid() -> None:
    backbone = build()
    assert backbone.positions((3, 4)) is backbone.positions((3, 4))
    for side in range(1, 40):
        backbone.positions((side, 1))
    assert len(backbone._positions) <= 16


def test_positions_can_be_replaced() -> None:
    backbone = build()
    images = torch.randn(2, 3, 32, 32)
    own = backbone.positions((2, 2))
    torch.testing.assert_close(
        backbone.patch_tokens(images, positions=own), backbone.patch_tokens(images)
    )
    assert own.absolute is not None
    moved = Positions(own.absolute.roll(1, dims=1))
    tokens = backbone.patch_tokens(images, positions=moved)
    assert not torch.allclose(tokens, backbone.patch_tokens(images))
    each = Positions(torch.cat([own.absolute, own.absolute.roll(1, dims=1)]))
    torch.testing.assert_close(
        backbone.patch_tokens(images, positions=each)[0], backbone.patch_tokens(images)[0]
    )
    torch.testing.assert_close(backbone.patch_tokens(images, positions=each)[1], tokens[1])
    with pytest.raises(
        ValueError, match=r"expected absolute positions \(1 or B, 5, 192\) for grid 2 x 2, got"
    ):
        backbone.patch_tokens(images, positions=Positions(own.absolute[:, 1:]))
    with pytest.raises(ValueError, match="no absolute positions were given"):
        backbone.patch_tokens(images, positions=Positions())
    with pytest.raises(ValueError, match="rotary positions were given, but this backbone has none"):
        backbone.patch_tokens(images, positions=Positions(own.absolute, torch.zeros(4, 8)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_positions_in_float32(dtype: torch.dtype) -> None:
    backbone = build().to(dtype)
    images = torch.randn(1, 3, 64, 64)
    tokens = backbone.patch_tokens(images)
    assert tokens.dtype == dtype
    absolute = backbone.positions((4, 4)).absolute
    assert absolute is not None
    assert absolute.dtype == torch.float32
    cosine = torch.cosine_similarity(tokens.float(), build().patch_tokens(images), dim=1)
    assert float(cosine.min()) > 0.99


def test_frozen_means_frozen() -> None:
    backbone = build()
    wrapped = torch.nn.Sequential(backbone).train()
    assert wrapped.training
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert not backbone.patch_tokens(images).requires_grad


def test_input_gradients_on_request() -> None:
    backbone = build(requires_input_grad=True)
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    backbone.patch_tokens(images).square().sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((225, 224), "height 225 does not fit patch 16 at stride 16; .* is 224 or 240"),
        ((224, 8), "width 8 does not fit patch 16 at stride 16; .* is 16$"),
    ],
)
def test_sides_that_do_not_fit_name_those_that_do(size: tuple[int, int], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        build().patch_tokens(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("layer", [12, -13])
def test_a_block_that_is_not_there(layer: int) -> None:
    with pytest.raises(ValueError, match=f"blocks 0 to 11 .* got layer {layer}"):
        build().patch_tokens(torch.zeros(1, 3, 32, 32), layer=layer)


def test_images_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\), got \(3, 32, 32\)"):
        build().patch_tokens(torch.zeros(3, 32, 32))


@pytest.mark.parametrize("stride", [0, 17])
def test_a_stride_that_skips_pixels(stride: int) -> None:
    with pytest.raises(GeometryError, match=f"between 1 and the patch size 16, got {stride}"):
        build(stride=stride)


def test_weights_of_another_model_are_listed() -> None:
    state = tiny_state()
    state["surprise"] = torch.zeros(1)
    state["norm.bias"] = torch.zeros(3)
    del state["norm.weight"]
    with pytest.raises(CorruptWeightsError) as caught:
        build_backbone(TINY, state, fingerprint="sha256:0")
    for fault in (
        "1 missing (norm.weight)",
        "1 unexpected (surprise)",
        "1 misshapen (norm.bias is (3,), expected (192,))",
    ):
        assert fault in str(caught.value)


ROTARY = {
    "timm:vit_small_patch16_dinov3.lvd1689m": "rotary",
    "timm:eva02_tiny_patch14_224.mim_in22k": "absolute+rotary",
    "timm:vit_pe_spatial_tiny_patch16_512.fb": "absolute+rotary",
    "timm:vit_small_patch16_rope_mixed_224.naver_in1k": "rotary",
}


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("cells", [(5, 9), "stored"])
def test_rotary_transformers_equal_timm(name: str, cells: tuple[int, int] | str) -> None:
    row = dataclasses.replace(lookup(name), depth=2)
    row = dataclasses.replace(row, options={"depth": 2})
    assert row.positions == ROTARY[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = timm.create_model(
            row.architecture, num_classes=0, global_pool="", depth=2, dynamic_img_size=True
        ).eval()
        state = {
            key: torch.randn_like(tensor) * 0.1 + ("norm" in key)
            for key, tensor in model.state_dict().items()
        }
    model.load_state_dict(state)
    backbone = build_backbone(row, state, fingerprint="sha256:0")
    h, w = (row.image_size // row.patch,) * 2 if isinstance(cells, str) else cells
    images = torch.randn(2, 3, h * row.patch, w * row.patch)
    with torch.no_grad():
        expected = model.forward_intermediates(
            images, indices=[0, 1], norm=row.final_norm, intermediates_only=True
        )
    tokens = backbone.intermediate_tokens(images, (0, 1), norm=row.final_norm)
    for found, wanted in zip(tokens, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    rotary = backbone.positions((h, w)).rotary
    assert rotary is not None
    assert rotary.dtype == torch.float32
    assert rotary.shape[-2] == h * w
    half = build_backbone(row, state, fingerprint="sha256:0").to(torch.bfloat16)
    assert half.patch_tokens(images).dtype == torch.bfloat16
    again = half.positions((h, w)).rotary
    assert again is not None
    torch.testing.assert_close(again, rotary, atol=1e-6, rtol=1e-6)


def test_rotary_positions_can_be_replaced() -> None:
    row = dataclasses.replace(
        lookup("timm:vit_small_patch16_dinov3.lvd1689m"), depth=2, options={"depth": 2}
    )
    backbone = build_backbone(row, tiny_state(row), fingerprint="sha256:0")
    images = torch.randn(1, 3, 48, 64)
    own = backbone.positions((3, 4))
    torch.testing.assert_close(
        backbone.patch_tokens(images, positions=own), backbone.patch_tokens(images)
    )
    assert own.rotary is not None
    still = Positions(rotary=own.rotary[:1].expand_as(own.rotary))
    assert not torch.allclose(
        backbone.patch_tokens(images, positions=still), backbone.patch_tokens(images)
    )
    with pytest.raises(ValueError, match=r"expected rotary positions \(12, 128\) for grid 3 x 4"):
        backbone.patch_tokens(images, positions=Positions(rotary=own.rotary[:5]))


def test_building_leaves_the_random_state_alone() -> None:
    row = dataclasses.replace(
        lookup("timm:vit_small_patch16_dinov3.lvd1689m"), depth=1, options={"depth": 1}
    )
    state = tiny_state(row)
    before = torch.random.get_rng_state()
    build_backbone(row, state, fingerprint="sha256:0")
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_real_backbone_equals_timm(real_backbone: VisionTransformerBackbone) -> None:
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0).eval()
    model.load_state_dict(real_backbone.vit.state_dict())
    images = torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        expected = model.forward_intermediates(
            images, indices=[11], norm=True, output_fmt="NCHW", intermediates_only=True
        )[0]
    torch.testing.assert_close(real_backbone.patch_tokens(images), expected, atol=1e-5, rtol=1e-5)
