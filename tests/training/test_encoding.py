from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cosettle_adapter.training.distribution import make_accelerator
from cosettle_adapter.training.metrics import read_metrics
from einops import rearrange
from torch import Tensor
from training_fakes import QUICK, FakeData, small_backbone

from cosettle_adapter.backbones import Backbone, VisionTransformerBackbone, build_backbone, lookup
from cosettle_adapter.errors import GeometryError
from cosettle_adapter.training.encoding import Views, compile_encoder, draw_offsets, encode_views
from cosettle_adapter.training.positions import perturbed_positions
from cosettle_adapter.training.settings import ObjectiveSettings
from cosettle_adapter.training.train import train

from helpers import TINY, tiny_state

PAPER = ObjectiveSettings()
SEEDS = torch.tensor([5, 6, 7])


def frames_for(clips: int = 2, length: int = 2, side: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(clips, length, 3, side, side, generator=generator)


def test_one_place_a_step_is_a_function_of_the_step() -> None:
    batch = ObjectiveSettings(pea="batch")

    def draw(seed: int, step: int, samples: Tensor = SEEDS) -> Tensor:
        return draw_offsets(batch, seed=seed, step=step, sample_seeds=samples)

    assert draw(0, 3).shape == (1, 2)
    assert draw(0, 3).dtype == torch.float64
    assert torch.equal(draw(0, 3), draw(0, 3, samples=SEEDS[:1]))
    assert not torch.equal(draw(0, 3), draw(0, 4))
    assert not torch.equal(draw(0, 3), draw(1, 3))


def test_one_place_a_sample_is_a_function_of_the_sample() -> None:
    sample = ObjectiveSettings(pea="sample")
    drawn = draw_offsets(sample, seed=0, step=3, sample_seeds=SEEDS)
    assert drawn.shape == (3, 2)
    alone = draw_offsets(sample, seed=9, step=8, sample_seeds=SEEDS[1:2])
    assert torch.equal(alone[0], drawn[1])
    assert len(drawn.unique(dim=0)) == 3


def test_offsets_are_spread_evenly() -> None:
    sample = ObjectiveSettings(pea="sample")
    drawn = draw_offsets(sample, seed=0, step=0, sample_seeds=torch.arange(2000))
    assert 0 <= float(drawn.min()) <= float(drawn.max()) < 1
    counts = torch.histc(drawn, bins=4, min=0, max=1)
    assert float((counts / 1000 - 1).abs().max()) < 0.12
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 0.08


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
        ignored=(), width=0, depth=0,
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
    settings = ObjectiveSettings(pea=pea)  # type: ignore[arg-type]
    frames = frames_for(3, length)
    offsets = draw_offsets(settings, seed=0, step=1, sample_seeds=SEEDS)
    views = encode_views(
        backbone, frames, layers=(1,), norm=None, settings=settings, offsets=offsets
    )
    assert views.grid == (4, 4)
    assert views.forward.shape[:3] == (3, length, 16)
    assert views.backward.shape[:3] == (3, length - 1, 16)
    mean, std = (torch.tensor(each)[:, None, None] for each in (TINY.mean, TINY.std))
    if kind != "absolute":
        mean, std = (
            torch.tensor(each)[:, None, None] for each in (backbone.row.mean, backbone.row.std)
        )
    moved = 0.0
    for clip in range(3):
        offset = offsets[clip if pea == "sample" else 0]
        positions = perturbed_positions(backbone, (4, 4), offset[None])
        for frame in range(length):
            image = ((frames[clip, frame] - mean) / std)[None]
            own = rearrange(backbone.patch_tokens(image, layer=1), "1 c h w -> (h w) c")
            torch.testing.assert_close(views.forward[clip, frame], own, atol=1e-4, rtol=1e-4)
            if frame == length - 1:
                continue
            tokens = backbone.patch_tokens(image, layer=1, positions=positions)
            other = rearrange(tokens, "1 c h w -> (h w) c")
            torch.testing.assert_close(views.backward[clip, frame], other, atol=1e-4, rtol=1e-4)
            moved += float((own - other).abs().mean())
    assert moved > 0


def test_all_views_go_through_the_backbone_at_once() -> None:
    backbone = small("tiny")
    assert isinstance(backbone, VisionTransformerBackbone)
    batches: list[int] = []
    backbone.vit.blocks[0].register_forward_hook(lambda _, given, __: batches.append(len(given[0])))
    offsets = torch.rand(1, 2)
    encode_views(
        backbone, frames_for(2, 3), layers=(1,), norm=False, settings=PAPER, offsets=offsets
    )
    assert batches == [2 * 5]
    off = ObjectiveSettings(pea="off")
    views = encode_views(
        backbone, frames_for(2, 3), layers=(1,), norm=False, settings=off, offsets=None
    )
    assert batches == [2 * 5, 2 * 3]
    assert torch.equal(views.backward, views.forward[:, :-1])


def test_layers_are_joined_along_the_channels() -> None:
    backbone, offsets = small("tiny"), torch.rand(1, 2)

    def encode(*layers: int) -> Views:
        return encode_views(
            backbone, frames_for(), layers=layers, norm=False, settings=PAPER, offsets=offsets
        )

    both, first, last = encode(0, 1), encode(0), encode(1)
    assert torch.allclose(both.forward, torch.cat([first.forward, last.forward], -1), atol=1e-5)
    assert torch.allclose(both.backward, torch.cat([first.backward, last.backward], -1), atol=1e-5)


def test_frames_that_cannot_be_encoded() -> None:
    backbone = small("tiny")

    def encode(frames: Tensor, offsets: Tensor | None = None) -> Views:
        offsets = torch.rand(1, 2) if offsets is None else offsets
        return encode_views(
            backbone, frames, layers=(1,), norm=None, settings=PAPER, offsets=offsets
        )

    with pytest.raises(TypeError, match=r"expected frames floating point, .* got torch\.uint8"):
        encode(torch.zeros(1, 2, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(B, T, 3, H, W\) with T of 2 or more, got \(1, 1, 3"):
        encode(frames_for(1, 1))
    with pytest.raises(ValueError, match=r"offsets \(1, 2\) or \(3, 2\) for 3 clips, got \(2, 2\)"):
        encode(frames_for(3), torch.rand(2, 2))
    with pytest.raises(ValueError, match=r"for 3 clips, got None"):
        encode_views(backbone, frames_for(3), layers=(1,), norm=None, settings=PAPER, offsets=None)
    with pytest.raises(GeometryError, match="height 60 does not fit"):
        encode(frames_for(1, 2, 60))


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
    trained = train(backbone, FakeData(), tmp_path, settings, accelerator=make_accelerator("cuda"))
    assert backbone.device.type == "cuda"
    assert {t.dtype for t in trained.projection.state_dict().values()} == {torch.float32}
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert sum(losses[-6:]) < sum(losses[:6])
    assert trained.projection.config.fit["device"] == "cuda"


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu(on_gpu: None, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, epochs=1)
    torch.backends.cuda.matmul.allow_tf32 = False
    train(
        small_backbone(), FakeData(), tmp_path / "gpu", settings,
        accelerator=make_accelerator("cuda"),
    )  # fmt: skip
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    train(
        small_backbone(), FakeData(), tmp_path / "cpu", settings,
        accelerator=make_accelerator("cpu"),
    )  # fmt: skip
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("gpu", "cpu")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
