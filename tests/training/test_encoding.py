from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from einops import rearrange
from torch import Tensor, nn
from training_fakes import QUICK, FakeData, small_backbone

from cosettle_adapter.backbones import (
    BackboneRow,
    VisionTransformerBackbone,
    build_backbone,
    lookup,
)
from cosettle_adapter.backbones.feature_maps import FeatureMapBackbone
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.errors import GeometryError
from cosettle_adapter.training.checkpoint import read_metrics
from cosettle_adapter.training.data import generator_of
from cosettle_adapter.training.encoding import (
    PerturbedPositions,
    compile_encoder,
    draw_offsets,
    encode,
    perturb_positions,
    perturbed_positions,
    rotary_angles,
)
from cosettle_adapter.training.processes import make_accelerator
from cosettle_adapter.training.settings import TrainSettings
from cosettle_adapter.training.train import train

from helpers import TINY, tiny_state

OFFSETS = torch.tensor([[0.0, 0.999], [0.37, 0.61], [0.5, 0.0]], dtype=torch.float64)


def cubic(distance: float) -> float:
    """Keys' cubic with a = -0.75, which torch calls bicubic."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    if d < 2:
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return 0.0


def reference_pea(
    cells: Tensor, first: tuple[int, int], ratio: float
) -> Tensor:  # (h, w, C) float64, cell by cell
    h, w, _ = cells.shape
    zoomed = int((1 + ratio) * h), int((1 + ratio) * w)
    perturbed = torch.zeros_like(cells)
    for i in range(h):
        for j in range(w):
            y = (first[0] + i + 0.5) * h / zoomed[0] - 0.5
            x = (first[1] + j + 0.5) * w / zoomed[1] - 0.5
            for row in range(math.floor(y) - 1, math.floor(y) + 3):
                for column in range(math.floor(x) - 1, math.floor(x) + 3):
                    weight = cubic(y - row) * cubic(x - column)
                    inside = min(max(row, 0), h - 1), min(max(column, 0), w - 1)
                    perturbed[i, j] += weight * cells[inside]
    return perturbed


@pytest.mark.parametrize(
    ("grid", "ratio", "prefix"), [((14, 14), 10.0, 1), ((5, 8), 3.0, 0), ((6, 4), 0.5, 5)]
)
def test_pea_equals_its_definition(grid: tuple[int, int], ratio: float, prefix: int) -> None:
    h, w = grid
    positions = torch.randn(1, prefix + h * w, 3, dtype=torch.float64)
    perturbed = perturb_positions(positions, OFFSETS, grid=grid, prefix=prefix, ratio=ratio)
    single = perturb_positions(positions.float(), OFFSETS, grid=grid, prefix=prefix, ratio=ratio)
    assert (perturbed.dtype, single.dtype) == (torch.float64, torch.float32)
    for offset, variant, rounded in zip(OFFSETS, perturbed, single, strict=True):
        places = int((1 + ratio) * h) - h + 1, int((1 + ratio) * w) - w + 1
        first = int(offset[0] * places[0]), int(offset[1] * places[1])
        cells = rearrange(positions[0, prefix:], "(h w) c -> h w c", h=h)
        expected = rearrange(reference_pea(cells, first, ratio), "h w c -> (h w) c")
        torch.testing.assert_close(variant[prefix:], expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(rounded[prefix:].double(), expected, atol=1e-5, rtol=0)
        assert torch.equal(variant[:prefix], positions[0, :prefix])


# Rotary positions -----------------------------------------------------------------------------

KINDS = {
    "absolute": TINY,
    "registers": dataclasses.replace(
        TINY, architecture="vit_small_patch14_reg4_dinov2", patch=14, width=384, image_size=518
    ),
    "none": dataclasses.replace(TINY, positions="none", options={"pos_embed": "none"}),
    "rotary": lookup("timm:vit_small_patch16_dinov3.lvd1689m"),
    "absolute+rotary": lookup("timm:eva02_tiny_patch14_224.mim_in22k"),
    "absolute+rotary, columns first": lookup("timm:vit_pe_spatial_tiny_patch16_512.fb"),
    "rotary, each block its own": lookup("timm:vit_small_patch16_rope_mixed_224.naver_in1k"),
}
ROTARY = [kind for kind in KINDS if "rotary" in kind]


@functools.cache
def small(kind: str) -> VisionTransformerBackbone:
    """Two random blocks of a kind of transformer, with strong positions."""
    row = KINDS[kind]
    row = dataclasses.replace(row, depth=2, options={**row.options, "depth": 2})
    state = tiny_state(row)
    for name, tensor in state.items():
        if name == "rope.freqs":
            tensor.mul_(10)
        elif name == "pos_embed":
            tensor.mul_(20)
    backbone = build_backbone(row, state, fingerprint="sha256:0")
    assert isinstance(backbone, VisionTransformerBackbone)
    return backbone


def images_for(backbone: Any, h: int, w: int, *, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, h * backbone.patch, w * backbone.patch, generator=generator)


def places(first: int, side: int, ratio: float) -> Tensor:
    """Where the cells of a crop lie in the grid in use, in cells."""
    zoom = int((1 + ratio) * side) / side
    return torch.tensor([(first + k + 0.5) / zoom - 0.5 for k in range(side)], dtype=torch.float64)


def test_rotary_pea_of_dinov3_equals_its_definition() -> None:
    """Coordinates from -1 to 1 over the image; angles 2 pi coordinate / period, rows first."""
    h, w, ratio = 6, 9, 10.0
    backbone = small("rotary")
    periods = 100.0 ** (torch.arange(16, dtype=torch.float64) / 16)
    found = perturbed_positions(backbone, (h, w), OFFSETS, ratio=ratio).rotary
    assert found is not None
    for offset, variant in zip(OFFSETS, found, strict=True):
        y = places(int(offset[0] * (66 - h + 1)), h, ratio)
        x = places(int(offset[1] * (99 - w + 1)), w, ratio)
        for cell in range(h * w):
            coordinates = [2 * (y[cell // w] + 0.5) / h - 1, 2 * (x[cell % w] + 0.5) / w - 1]
            half = torch.cat([2 * math.pi * coordinate / periods for coordinate in coordinates])
            angles = torch.cat([half, half])
            expected = torch.cat([angles.sin(), angles.cos()])
            torch.testing.assert_close(variant[cell].double(), expected, atol=1e-6, rtol=0)


def test_rotary_pea_of_mixed_frequencies_equals_its_definition() -> None:
    """Angles x f_x + y f_y in cells, with frequencies of each block and head."""
    h, w, ratio = 5, 4, 10.0
    backbone = small("rotary, each block its own")
    frequencies = backbone.vit.rope.freqs.double()  # (2, depth, heads, D / 2), columns first
    found = perturbed_positions(backbone, (h, w), OFFSETS, ratio=ratio).rotary
    assert found is not None
    assert found.shape == (3, 2, 6, h * w, 128)
    for offset, variant in zip(OFFSETS, found, strict=True):
        y = places(int(offset[0] * (55 - h + 1)), h, ratio)
        x = places(int(offset[1] * (44 - w + 1)), w, ratio)
        for cell in range(h * w):
            half = x[cell % w] * frequencies[0] + y[cell // w] * frequencies[1]
            angles = half.repeat_interleave(2, dim=-1)
            expected = torch.cat([angles.sin(), angles.cos()], dim=-1)
            torch.testing.assert_close(variant[:, :, cell].double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_pea_without_zoom_is_timms_own(kind: str) -> None:
    for grid in ((16, 16), (3, 5), (1, 4), (1, 1)):
        own = small(kind).positions(grid).rotary
        same = perturbed_positions(small(kind), grid, OFFSETS, ratio=0.0).rotary
        assert own is not None
        assert same is not None
        for variant in same:
            torch.testing.assert_close(variant, own, atol=1e-5, rtol=0)


def test_an_embedding_that_is_not_known_is_refused() -> None:
    class Other(nn.Module):
        def get_embed(self, shape: list[int]) -> Tensor:
            angles = torch.arange(math.prod(shape), dtype=torch.float32)[:, None]
            return torch.cat([angles.sin(), angles.cos()], dim=1)

    with pytest.raises(ValueError, match="rotary positions of Other cannot be perturbed"):
        rotary_angles(Other(), (3, 3))


# Backbones without positions to replace -------------------------------------------------------

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "convnext_atto": {"depths": (1, 1, 2, 1)},
    "resnet18": {},
}


def feature_maps(architecture: str, *, pointwise: bool = False) -> FeatureMapBackbone:
    """A random backbone; ``pointwise`` cells see nothing but their own pixels."""
    options = ARCHITECTURES[architecture]
    row = BackboneRow(
        name=f"small-{architecture}", family="random", architecture=architecture, patch=16,
        width=0, depth=0, image_size=224, licence="Apache-2.0", options=options, kind="features",
        final_norm=False,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = timm.create_model(architecture, **options)
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.1)
            elif pointwise and "conv_dw" in name:
                centre = tensor[..., 3, 3].clone()
                tensor.zero_()[..., 3, 3] = centre
    tensors = to_timm(model.state_dict(), row)
    backbone = build_backbone(row, tensors, fingerprint="sha256:0")
    assert isinstance(backbone, FeatureMapBackbone)
    return backbone


def test_a_moved_picture_has_its_cells_in_their_places() -> None:
    """A network that is the same everywhere does not notice that the picture was moved."""
    backbone = feature_maps("convnext_atto", pointwise=True)
    images = images_for(backbone, 5, 7, batch=3)
    own = backbone.patch_tokens(images)
    moved = perturbed_positions(backbone, (5, 7), OFFSETS)
    assert moved.shift is not None
    assert moved.shift.tolist() == [[0, 6], [1, 3], [2, 0]]
    torch.testing.assert_close(
        backbone.patch_tokens(images, positions=moved), own, atol=1e-5, rtol=1e-5
    )


def test_on_blank_pictures_only_the_place_moves() -> None:
    """Zero padding alone tells cells where they are; after moving, it tells them another place."""
    backbone = feature_maps("resnet18")
    images = torch.ones(1, 3, 8 * 16, 8 * 16)
    own = backbone.patch_tokens(images)
    assert float(own[0, :, 0, 0].sub(own[0, :, 4, 4]).abs().mean()) > 0.01
    moved = backbone.patch_tokens(
        images, positions=PerturbedPositions(shift=torch.tensor([[3, 5]]))
    )
    torch.testing.assert_close(moved, own.roll((-3, -5), dims=(2, 3)))


def test_overlapping_patches_cannot_be_moved() -> None:
    backbone = build_backbone(TINY, tiny_state(), fingerprint="sha256:0", stride=8)
    own = backbone.positions((3, 3))
    moved = PerturbedPositions(own.absolute, shift=torch.tensor([[1, 1]]))
    with pytest.raises(GeometryError, match=r"cannot be shifted .* overlap \(patch 16, stride 8\)"):
        backbone.patch_tokens(torch.zeros(1, 3, 32, 32), positions=moved)


# Views ----------------------------------------------------------------------------------------

SEEDS = torch.tensor([5, 6, 7])


def test_one_place_a_step_or_a_sample_is_a_function_of_it() -> None:
    def draw(seed: int, step: int, samples: Tensor = SEEDS) -> Tensor:
        settings = TrainSettings(pea="batch", seed=seed)
        return draw_offsets(settings, step=step, sample_seeds=samples)

    assert (draw(0, 3).shape, draw(0, 3).dtype) == ((1, 2), torch.float64)
    assert torch.equal(draw(0, 3), draw(0, 3, samples=SEEDS[:1]))
    assert not torch.equal(draw(0, 3), draw(0, 4))
    assert not torch.equal(draw(0, 3), draw(1, 3))
    drawn = draw_offsets(TrainSettings(), step=3, sample_seeds=SEEDS)
    alone = draw_offsets(TrainSettings(seed=9), step=8, sample_seeds=SEEDS[1:2])
    assert torch.equal(alone[0], drawn[1])
    many = draw_offsets(TrainSettings(), step=0, sample_seeds=torch.arange(2000))
    assert 0 <= float(many.min()) <= float(many.max()) < 1
    counts = torch.histc(many, bins=4, min=0, max=1)
    assert float((counts / 1000 - 1).abs().max()) < 0.12
    assert abs(float(torch.corrcoef(many.T)[0, 1])) < 0.08


@pytest.mark.parametrize("kind", [*KINDS, "feature maps"])
@pytest.mark.parametrize(("pea", "length"), [("batch", 2), ("sample", 3)])
def test_views_are_what_encoding_one_by_one_gives(kind: str, pea: str, length: int) -> None:
    backbone: Any = feature_maps("resnet18") if kind == "feature maps" else small(kind)
    settings = TrainSettings(pea=pea, frames=length, layers=(0, 1))  # type: ignore[arg-type]
    h, w, patch = 3, 5, backbone.patch
    frames = torch.rand(2, length, 3, h * patch, w * patch, generator=generator_of(0))
    offsets = draw_offsets(settings, step=1, sample_seeds=SEEDS[:2])
    views = encode(backbone, settings, frames, SEEDS[:2], step=1)
    assert views.shape == (2, 2 * length - 1, h * w, sum(backbone.widths[:2]))
    row, moved = backbone.row, 0.0
    mean, std = (torch.tensor(each)[:, None, None] for each in (row.mean, row.std))

    def alone(image: Tensor, positions: Any = None) -> Tensor:
        images = (image[None] - mean) / std
        maps = backbone.intermediate_tokens(images, (0, 1), norm=False, positions=positions)
        return rearrange(torch.cat(maps, dim=1), "1 c h w -> (h w) c")

    for clip in range(2):
        offset = offsets[clip if pea == "sample" else 0]
        positions = perturbed_positions(backbone, (h, w), offset[None])
        for frame in range(length):
            own = alone(frames[clip, frame])
            torch.testing.assert_close(views[clip, frame], own, atol=1e-4, rtol=1e-4)
            if frame < length - 1:
                other = alone(frames[clip, frame], positions)
                found = views[clip, length + frame]
                torch.testing.assert_close(found, other, atol=1e-4, rtol=1e-4)
                moved += float((own - other).abs().mean())
    assert (moved == 0) is (kind == "none")
    off = dataclasses.replace(settings, pea="off")
    plain = encode(backbone, off, frames, SEEDS[:2], step=1)
    torch.testing.assert_close(plain, views[:, :length], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("norm", "layers", "normed"),
    [(None, None, (False, True)), (False, None, (False, False)), (True, None, (True, True)),
     (None, (0,), (False, False))],
)  # fmt: skip
def test_ijepa_is_normed_as_the_official_code_does_unless_told(
    norm: bool | None, layers: tuple[int, ...] | None, normed: tuple[bool, bool]
) -> None:
    """``models/ijepa/deit.py`` applies the norm to the perturbed view of frame 1 alone."""
    small = {"embed_dim": 48, "depth": 2}
    row = lookup("ijepa-vitb16")
    row = dataclasses.replace(row, options={**row.options, **small}, width=48, depth=2)
    state = tiny_state(row)
    backbone = build_backbone(row, state, fingerprint="sha256:0")
    settings = TrainSettings(norm=norm, layers=layers)
    frames = torch.rand(1, 2, 3, 224, 224, generator=generator_of(0))
    views = encode(backbone, settings, frames, SEEDS[:1], step=0)

    model: Any = timm.create_model(
        row.architecture, class_token=False, global_pool="", num_classes=0, **small
    )
    model.load_state_dict(state)
    offset = draw_offsets(settings, step=0, sample_seeds=SEEDS[:1])[0]
    first = int(offset[0] * 141), int(offset[1] * 141)
    own = rearrange(model.pos_embed.detach().double(), "1 (h w) c -> h w c", h=14)
    perturbed = rearrange(reference_pea(own, first, 10.0), "h w c -> 1 (h w) c").float()

    def read(frame: int, positions: Tensor, use_norm: bool) -> Tensor:
        mean, std = (torch.tensor(each)[:, None, None] for each in (row.mean, row.std))
        tokens = model.patch_embed((frames[0, frame : frame + 1] - mean) / std) + positions
        for block in model.blocks[: 2 if layers is None else 1]:
            tokens = block(tokens)
        return model.norm(tokens) if use_norm else tokens

    plain, other = normed
    given = ((0, model.pos_embed, plain), (1, model.pos_embed, plain), (0, perturbed, other))
    with torch.no_grad():
        expected = torch.cat([read(*each) for each in given])
    torch.testing.assert_close(views[0], expected, atol=2e-5, rtol=1e-5)


def test_a_compiled_encoder_gives_the_same_tokens() -> None:
    backbone, plain = small_backbone(), small_backbone()
    compile_encoder(backbone, backend="eager")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(backbone.patch_tokens(images), plain.patch_tokens(images))
    compiled = [module for module in backbone.modules() if module._compiled_call_impl is not None]
    assert len(compiled) == backbone.depth
    before = [module._compiled_call_impl for module in compiled]
    compile_encoder(backbone, backend="eager")
    assert [module._compiled_call_impl for module in compiled] == before, "once"


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """Accelerate keeps the device of a process; other tests took the CPU."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_trains_in_bfloat16(on_gpu: None, compiled: bool, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, precision="bfloat16", compile=compiled)
    backbone = small_backbone()
    trained = train(backbone, FakeData(), tmp_path, settings, accelerator=make_accelerator("cuda"))  # type: ignore[arg-type]
    assert backbone.device.type == "cuda"
    assert {t.dtype for t in trained.projection.state_dict().values()} == {torch.float32}
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert sum(losses[-6:]) < sum(losses[:6])
    assert trained.projection.config.fit["device"] == "cuda"
