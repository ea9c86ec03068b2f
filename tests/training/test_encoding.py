from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor
from training_fakes import QUICK, FakeData, small_backbone

from cosettle_adapter.backbones import Backbone, build_backbone, lookup
from cosettle_adapter.training.checkpoint import read_metrics
from cosettle_adapter.training.encoding import (
    compile_encoder,
    draw_offsets,
    encode,
    perturbed_positions,
)
from cosettle_adapter.training.processes import make_accelerator
from cosettle_adapter.training.settings import TrainSettings
from cosettle_adapter.training.train import train

from helpers import TINY, tiny_state

SEEDS = torch.tensor([5, 6, 7])


def test_one_place_a_step_is_a_function_of_the_step() -> None:
    def draw(seed: int, step: int, samples: Tensor = SEEDS) -> Tensor:
        settings = TrainSettings(pea="batch", seed=seed)
        return draw_offsets(settings, step=step, sample_seeds=samples)

    assert (draw(0, 3).shape, draw(0, 3).dtype) == ((1, 2), torch.float64)
    assert torch.equal(draw(0, 3), draw(0, 3, samples=SEEDS[:1]))
    assert not torch.equal(draw(0, 3), draw(0, 4))
    assert not torch.equal(draw(0, 3), draw(1, 3))


def test_one_place_a_sample_is_a_function_of_the_sample() -> None:
    drawn = draw_offsets(TrainSettings(), step=3, sample_seeds=SEEDS)
    alone = draw_offsets(TrainSettings(seed=9), step=8, sample_seeds=SEEDS[1:2])
    assert torch.equal(alone[0], drawn[1])
    assert len(drawn.unique(dim=0)) == 3
    many = draw_offsets(TrainSettings(), step=0, sample_seeds=torch.arange(2000))
    assert 0 <= float(many.min()) <= float(many.max()) < 1
    counts = torch.histc(many, bins=4, min=0, max=1)
    assert float((counts / 1000 - 1).abs().max()) < 0.12
    assert abs(float(torch.corrcoef(many.T)[0, 1])) < 0.08


def small(name: str) -> Backbone:
    row = TINY if name == "tiny" else lookup(name)
    row = dataclasses.replace(row, depth=2, options={**row.options, "depth": 2})
    return build_backbone(row, tiny_state(row), fingerprint="sha256:0")


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "absolute": lambda: small("tiny"),
    "rotary": lambda: small("timm:vit_small_patch16_dinov3.lvd1689m"),
    "each block its own": lambda: small("timm:vit_small_patch16_rope_mixed_224.naver_in1k"),
    "feature maps": lambda: _feature_maps(),
}


def _feature_maps() -> Backbone:
    row = dataclasses.replace(
        TINY, architecture="resnet18", kind="features", positions="none", final_norm=False,
        width=0, depth=0,
    )  # fmt: skip
    state = {
        name: tensor.abs() if "running_var" in name else tensor
        for name, tensor in tiny_state(row).items()
    }
    return build_backbone(row, state, fingerprint="sha256:0")


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("pea", ["batch", "sample"])
@pytest.mark.parametrize("length", [2, 3])
def test_views_are_what_encoding_one_by_one_gives(kind: str, pea: str, length: int) -> None:
    backbone = BACKBONES[kind]()
    settings = TrainSettings(pea=pea, frames=length, layers=(0, 1))  # type: ignore[arg-type]
    frames = torch.rand(3, length, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    offsets = draw_offsets(settings, step=1, sample_seeds=SEEDS)
    views = encode(backbone, settings, frames, SEEDS, step=1)
    assert views.shape == (3, 2 * length - 1, 16, sum(backbone.widths[:2]))
    mean, std = (
        torch.tensor(each)[:, None, None] for each in (backbone.row.mean, backbone.row.std)
    )
    moved = 0.0

    def alone(image: Tensor, positions: object) -> Tensor:
        maps = backbone.intermediate_tokens(
            image[None],
            (0, 1),
            norm=False,
            positions=positions,  # type: ignore[arg-type]
        )
        return rearrange(torch.cat(maps, dim=1), "1 c h w -> (h w) c")

    for clip in range(3):
        offset = offsets[clip if pea == "sample" else 0]
        positions = perturbed_positions(backbone, (4, 4), offset[None])
        for frame in range(length):
            image = (frames[clip, frame] - mean) / std
            own = alone(image, None)
            torch.testing.assert_close(views[clip, frame], own, atol=1e-4, rtol=1e-4)
            if frame < length - 1:
                other = alone(image, positions)
                found = views[clip, length + frame]
                torch.testing.assert_close(found, other, atol=1e-4, rtol=1e-4)
                moved += float((own - other).abs().mean())
    assert moved > 0
    off = dataclasses.replace(settings, pea="off")
    plain = encode(backbone, off, frames, SEEDS, step=1)
    torch.testing.assert_close(plain, views[:, :length], atol=1e-4, rtol=1e-4)


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
