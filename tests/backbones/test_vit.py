from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F

from cosettle_adapter.backbones import (
    Positions,
    VisionTransformerBackbone,
    build_backbone,
    load_backbone,
    lookup,
)
from cosettle_adapter.backbones.rows import BackboneRow, PositionInterpolation
from cosettle_adapter.backbones.vit import _rescaled_in_graph, resize_positions
from cosettle_adapter.errors import CorruptWeightsError, GeometryError

from helpers import TINY, tiny_state


def build(row: BackboneRow = TINY, **options: object) -> VisionTransformerBackbone:
    return build_backbone(row, tiny_state(row), fingerprint="sha256:0", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def strided() -> dict[int, VisionTransformerBackbone]:
    return {stride: build(small("plain"), stride=stride) for stride in (4, 7, 8, 16)}


def test_layers_after_the_deepest_asked_for_do_not_run() -> None:
    backbone = build()
    ran: list[int] = []
    for index, block in enumerate(backbone.vit.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    images = torch.randn(1, 3, 64, 64)
    fourth, second = backbone.intermediate_tokens(images, (4, 2))
    assert ran == [0, 1, 2, 3, 4]
    torch.testing.assert_close(second, backbone.patch_tokens(images, layer=2))
    torch.testing.assert_close(fourth, backbone.patch_tokens(images, layer=-8))


@settings(max_examples=20)
@given(stride=st.sampled_from([4, 7, 8, 16]), rows=st.integers(0, 5), columns=st.integers(0, 5))
def test_overlapping_patches(
    strided: dict[int, VisionTransformerBackbone], stride: int, rows: int, columns: int
) -> None:
    height, width = 16 + rows * stride, 16 + columns * stride
    tokens = strided[stride].patch_tokens(torch.zeros(1, 3, height, width), layer=0)
    assert tokens.shape[-2:] == (rows + 1, columns + 1) == strided[stride].grid(height, width)


def test_positions_are_computed_once_a_grid_and_few_are_kept() -> None:
    backbone = build(small("plain"))
    assert backbone.positions((3, 4)) is backbone.positions((3, 4))
    for side in range(1, 40):
        backbone.positions((side, 1))
    assert len(backbone._positions) <= 16


def test_weights_of_another_model_are_listed() -> None:
    state = {**tiny_state(), "surprise": torch.zeros(1), "norm.bias": torch.zeros(3)}
    del state["norm.weight"]
    message = (
        r'Missing.*"norm.weight".*Unexpected.*"surprise".*mismatch for norm.bias.*\[3\].*\[192\]'
    )
    with pytest.raises(CorruptWeightsError, match=message):
        build_backbone(TINY, state, fingerprint="sha256:0")


PLAIN = {
    "plain": TINY,
    "registers without positions": dataclasses.replace(
        TINY, architecture="vit_small_patch14_reg4_dinov2", patch=14, width=384, image_size=518
    ),
    "norm before the blocks": dataclasses.replace(
        TINY, architecture="vit_base_patch16_clip_quickgelu_224", width=768
    ),
}
ROTARY = {
    "timm:vit_small_patch16_dinov3.lvd1689m": "rotary",
    "timm:eva02_tiny_patch14_224.mim_in22k": "absolute+rotary",
    "timm:vit_pe_spatial_tiny_patch16_512.fb": "absolute+rotary",
    "timm:vit_small_patch16_rope_mixed_224.naver_in1k": "rotary",
}


@functools.cache
def small(name: str) -> BackboneRow:
    row = PLAIN[name] if name in PLAIN else lookup(name)
    return dataclasses.replace(row, depth=2, options={**row.options, "depth": 2})


@pytest.mark.parametrize("name", [*PLAIN, *ROTARY])
def test_tokens_equal_timms(name: str) -> None:
    row = small(name)
    state = tiny_state(row)
    model: Any = timm.create_model(
        row.architecture, num_classes=0, dynamic_img_size=True, **{"global_pool": "", **row.options}
    ).eval()
    model.load_state_dict(state)
    backbone = build_backbone(row, state, fingerprint="sha256:0")
    stored = row.image_size // row.patch
    for (h, w), norm in itertools.product([(stored, stored), (5, 9)], (False, row.final_norm)):
        images = torch.randn(1, 3, h * row.patch, w * row.patch)
        with torch.no_grad():
            expected = model.forward_intermediates(
                images, indices=[0, 1], norm=norm, intermediates_only=True
            )
        tokens = backbone.intermediate_tokens(images, (0, 1), norm=norm)
        for found, wanted in zip(tokens, expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("tag", "norm"),
    [
        ("test_vit.r160_in1k", "norm"),
        ("test_vit2.r160_in1k", "fc_norm"),
        ("eva02_tiny_patch14_224.mim_in22k", "fc_norm"),
    ],
)
def test_a_norm_of_pooled_tokens_is_not_applied_to_tokens(
    tag: str, norm: str, tmp_path: Path
) -> None:
    model: Any = timm.create_model(tag.partition(".")[0], num_classes=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.mean() > 0.5))
    assert hasattr(getattr(model, norm), "weight")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    backbone = load_backbone(f"timm:{tag}", weights=tmp_path / "model.safetensors")
    side = backbone.row.image_size
    images = torch.randn(1, 3, side, side)
    found = backbone.patch_tokens(images)
    with torch.no_grad():
        whole = model.forward_features(images)[:, model.num_prefix_tokens :]
        (read,) = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)
    torch.testing.assert_close(found.flatten(2).mT, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, read, atol=1e-5, rtol=1e-5)
    if norm == "fc_norm":
        assert "no final norm" in backbone.row.note
        with pytest.raises(ValueError, match="has no final norm"):
            backbone.patch_tokens(images, norm=True)


@pytest.mark.parametrize("name", [*PLAIN, *ROTARY])
def test_half_precision_keeps_positions_in_float32(name: str) -> None:
    row, dtype = small(name), torch.float16 if name == "plain" else torch.bfloat16
    full = build(row)
    backbone = copy.deepcopy(full).to(dtype)
    images = torch.randn(1, 3, 4 * row.patch, 4 * row.patch)
    tokens = backbone.patch_tokens(images)
    assert tokens.dtype == dtype
    own, exact = backbone.positions((4, 4)), full.positions((4, 4))
    for kind in ("absolute", "rotary"):
        if (wanted := getattr(exact, kind)) is not None:
            assert wanted.dtype == torch.float32
            assert torch.equal(getattr(own, kind), wanted)
    cosine = torch.cosine_similarity(tokens.float(), full.patch_tokens(images), dim=1)
    assert float(cosine.min()) > 0.98


@pytest.mark.parametrize("name", ["plain", *ROTARY])
def test_frozen_means_frozen_but_for_input_gradients_on_request(name: str) -> None:
    row = small(name)
    backbone = build(row, requires_input_grad=True)
    assert torch.nn.Sequential(backbone).train().training
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    images = torch.randn(1, 3, 3 * row.patch, 2 * row.patch)
    with torch.inference_mode():  # whose tensors must not be cached as positions
        backbone.patch_tokens(images)
    images.requires_grad_()
    backbone.patch_tokens(images).square().sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0
    assert not build(row).patch_tokens(images).requires_grad


@pytest.mark.parametrize("name", ["plain", "timm:eva02_tiny_patch14_224.mim_in22k"])
def test_positions_can_be_replaced(name: str) -> None:
    row = small(name)
    backbone = build(row)
    images = torch.randn(2, 3, 2 * row.patch, 3 * row.patch)
    own, tokens = backbone.positions((2, 3)), backbone.patch_tokens(images)
    assert own.absolute is not None
    assert torch.equal(backbone.patch_tokens(images, positions=own), tokens)
    moved = own.absolute.roll(1, dims=1)
    found = backbone.patch_tokens(
        images, positions=dataclasses.replace(own, absolute=torch.cat([own.absolute, moved]))
    )
    torch.testing.assert_close(found[0], tokens[0])
    assert not torch.allclose(found[1], tokens[1])
    if own.rotary is not None:
        still = dataclasses.replace(own, rotary=own.rotary[:1].expand_as(own.rotary))
        assert not torch.allclose(backbone.patch_tokens(images, positions=still), tokens)
    else:
        with pytest.raises(ValueError, match=r"rotary positions of shape None .*, got \("):
            backbone.patch_tokens(images, positions=Positions(own.absolute, torch.zeros(4, 8)))
    with pytest.raises(ValueError, match=r"absolute positions of shape \(1, 7, 192\) .*, got None"):
        backbone.patch_tokens(images, positions=Positions(rotary=own.rotary))
    with pytest.raises(
        ValueError, match=r"positions of shape \(1, 7, 192\) for grid 2 x 3, or \(.*, got \("
    ):
        backbone.patch_tokens(
            images, positions=dataclasses.replace(own, absolute=own.absolute[:, 1:])
        )


def test_an_overlapping_patch_sees_its_own_pixels() -> None:
    backbone = build(small("plain"), stride=8)
    images = torch.randn(1, 3, 48, 40)
    row, column = 3, 1
    patch = images[..., row * 8 : row * 8 + 16, column * 8 : column * 8 + 16]
    weight, bias = backbone.vit.patch_embed.proj.weight, backbone.vit.patch_embed.proj.bias
    expected = torch.einsum("bchw,ochw->bo", patch, weight) + bias
    embedded = backbone.vit._pos_embed(backbone.vit.patch_embed(images))
    positions = backbone.positions((5, 4)).absolute
    assert positions is not None
    place = 1 + row * 4 + column
    torch.testing.assert_close(embedded[:, place], expected + positions[:, place])


def test_what_cannot_be_read_is_said(tiny_backbone: VisionTransformerBackbone) -> None:
    for size, fault in {
        (225, 224): "height 225 does not fit patch 16 at stride 16; .* is 224 or 240",
        (224, 8): "width 8 does not fit patch 16 at stride 16; .* is 16$",
    }.items():
        with pytest.raises(GeometryError, match=fault):
            tiny_backbone.patch_tokens(torch.zeros(1, 3, *size))
    for layer in (12, -13, "x"):
        with pytest.raises(ValueError, match=f"layers 0 to 11 .* got layer {layer!r}"):
            tiny_backbone.patch_tokens(torch.zeros(1, 3, 32, 32), layer=layer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\), got \(3, 32, 32\)"):
        tiny_backbone.patch_tokens(torch.zeros(3, 32, 32))
    for stride in (0, 17):
        with pytest.raises(GeometryError, match=f"between 1 and the patch size 16, got {stride}"):
            build(small("plain"), stride=stride)
    row = small("timm:vit_pe_spatial_tiny_patch16_512.fb")
    with pytest.raises(ValueError, match="has no final norm; omit norm=True"):
        build(row).patch_tokens(torch.zeros(1, 3, 32, 32), norm=True)


# Positions on other grids

MODES = get_args(PositionInterpolation)


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    mode=st.sampled_from(MODES),
    source=st.sampled_from([14, 16, 37]),
)
def test_every_grid_gets_exactly_its_positions(
    height: int, width: int, mode: PositionInterpolation, source: int
) -> None:
    positions = torch.randn(1, 1 + source * source, 2)
    how: Any = {"source_grid": (source, source), "prefix": 1, "interpolation": mode}
    resized = resize_positions(positions, (height, width), **how)
    assert resized.shape == (1, 1 + height * width, 2)
    assert torch.equal(resized[:, :1], positions[:, :1])
    assert bool(torch.isfinite(resized).all())
    assert torch.equal(resize_positions(positions, (source, source), **how), positions)


@pytest.mark.parametrize("source", [(37, 37), (14, 14), (7, 9)])
def test_graphs_of_any_size_rescale_as_torch_does(source: tuple[int, int]) -> None:
    patches = torch.randn(1, 3, *source).double()  # torch's own weights are off by 1e-5 in float32
    for grid in ((37, 37), (14, 14), (20, 35), (37, 35), (9, 7), (3, 60), (1, 1)):
        scale = tuple((a + 0.1) / b for a, b in zip(grid, source, strict=True))
        expected = F.interpolate(patches, scale_factor=scale, mode="bicubic")
        found = _rescaled_in_graph(patches, grid)
        expected = patches if grid == source else expected
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


def test_resizing_is_what_timm_and_the_official_dino_code_do() -> None:
    positions, grid = torch.randn(1, 1 + 14 * 14, 8).half(), (30, 55)
    how: Any = {"source_grid": (14, 14), "prefix": 1}
    found = {mode: resize_positions(positions, grid, interpolation=mode, **how) for mode in MODES}
    assert {resized.dtype for resized in found.values()} == {torch.float32}
    expected = resample_abs_pos_embed(positions.float(), new_size=[*grid], num_prefix_tokens=1)
    torch.testing.assert_close(found["size+antialias"], expected)
    square = rearrange(positions[:, 1:].float(), "1 (h w) c -> 1 c h w", h=14)
    for mode, resized in {
        "size": F.interpolate(square, grid, mode="bicubic"),
        "scale+0.1": F.interpolate(square, scale_factor=(30.1 / 14, 55.1 / 14), mode="bicubic"),
    }.items():
        patches = rearrange(resized, "1 c h w -> 1 (h w) c")
        torch.testing.assert_close(found[mode][:, 1:], patches)  # type: ignore[index]
