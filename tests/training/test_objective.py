from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cosettle_adapter.backbones import Backbone, VisionTransformerBackbone, build_backbone, lookup
from cosettle_adapter.errors import GeometryError
from cosettle_adapter.training.encoding import Views, draw_offsets, encode_views
from cosettle_adapter.training.losses import (
    multi_frame_cycle_loss,
    objective,
    semantic_separability_loss,
)
from cosettle_adapter.training.settings import ObjectiveSettings

from helpers import TINY, projection_for, tiny_state

PAPER = ObjectiveSettings()
SEEDS = torch.tensor([5, 6, 7])


def frames_for(clips: int = 2, length: int = 2, side: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(clips, length, 3, side, side, generator=generator)


def views_for(
    clips: int = 3, length: int = 2, width: int = 8, dtype: torch.dtype = torch.float32
) -> Views:
    generator = torch.Generator().manual_seed(0)
    tokens = 5 * torch.randn(clips, 2 * length - 1, 16, width, generator=generator).to(dtype)
    return Views(tokens[:, :length], tokens[:, length:], (4, 4))


def test_the_papers_settings_are_the_defaults() -> None:
    assert (PAPER.temperatures, PAPER.separability_weight) == ((0.03,), 3.0)
    assert (PAPER.pea_ratio, PAPER.pool) == (10.0, 2)
    stored = json.loads(json.dumps(dataclasses.asdict(PAPER)))
    assert ObjectiveSettings(**stored) == PAPER


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperatures": ()}, r"one or more positive numbers, got \(\)"),
        ({"temperatures": (0.1, -0.1)}, r"got \(0.1, -0.1\)"),
        ({"separability_weight": -1}, "separability_weight must be 0 or more, got -1"),
        ({"pea_ratio": math.nan}, "pea_ratio must be 0 or more, got nan"),
        ({"pea": "each"}, "pea must be batch, sample or off, got 'each'"),
        ({"pool": 0}, "pool must be a whole number of cells, 1 or more, got 0"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveSettings(**changes)  # type: ignore[arg-type]


# Offsets --------------------------------------------------------------------------------------


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


# Views ----------------------------------------------------------------------------------------


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
        positions = backbone.perturbed_positions((4, 4), offset[None])
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


# The objective --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3])
def test_the_total_is_the_papers(length: int) -> None:
    views, head = views_for(length=length), nn.Linear(8, 8)
    found = objective(head, views, PAPER)
    forward, backward = (
        F.normalize(head(each), dim=-1) for each in (views.forward, views.backward)
    )
    cycle, accuracy = multi_frame_cycle_loss(forward, backward, (4, 4), 0.03)
    originals = F.normalize(torch.cat([views.forward, views.backward], dim=1), dim=-1)
    separability = semantic_separability_loss(originals, torch.cat([forward, backward], dim=1))
    torch.testing.assert_close(found.cycle, cycle)
    torch.testing.assert_close(found.separability, separability)
    torch.testing.assert_close(found.accuracy, accuracy)
    torch.testing.assert_close(found.total, cycle + 3 * separability)
    assert all(each.shape == () for each in vars(found).values())


def test_several_temperatures_are_averaged() -> None:
    views, head = views_for(), nn.Linear(8, 8)
    apart = [
        objective(head, views, ObjectiveSettings(temperatures=(temperature,)))
        for temperature in (0.03, 0.1, 0.5)
    ]
    both = objective(head, views, ObjectiveSettings(temperatures=(0.03, 0.1, 0.5)))
    torch.testing.assert_close(both.cycle, torch.stack([each.cycle for each in apart]).mean())
    torch.testing.assert_close(both.accuracy, torch.stack([each.accuracy for each in apart]).mean())
    torch.testing.assert_close(both.separability, apart[0].separability)


def test_the_head_is_called_once() -> None:
    calls: list[tuple[int, ...]] = []

    def head(tokens: Tensor) -> Tensor:
        calls.append(tuple(tokens.shape))
        return tokens

    losses = objective(head, views_for(3, 3), PAPER)
    assert calls == [(3, 5, 16, 8)]
    assert float(losses.separability) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("inference", [True, False])
def test_gradients_reach_only_the_head(inference: bool) -> None:
    backbone = small("tiny")
    head = projection_for(backbone)  # type: ignore[arg-type]
    head.requires_grad_(True)
    frames = frames_for().requires_grad_()
    with torch.inference_mode(inference):
        views = encode_views(
            backbone, frames, layers=(1,), norm=None, settings=PAPER, offsets=torch.rand(1, 2)
        )
    objective(head.project, views, PAPER).total.backward()
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0
    assert frames.grad is None
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_tokens_get_no_gradients() -> None:
    views, head = views_for(), nn.Linear(8, 8)
    leaf = dataclasses.replace(views, forward=views.forward.clone().requires_grad_())
    objective(head, leaf, PAPER).total.backward()
    assert leaf.forward.grad is None


def test_two_halves_average_to_the_whole() -> None:
    views, head = views_for(4), nn.Linear(8, 8)

    def gradient(*parts: Views) -> Tensor:
        head.zero_grad()
        for part in parts:
            (objective(head, part, PAPER).total / len(parts)).backward()
        assert head.weight.grad is not None
        return head.weight.grad.clone()

    halves = [
        dataclasses.replace(views, forward=views.forward[part], backward=views.backward[part])
        for part in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(gradient(*halves), gradient(views), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_and_autocast_give_float32_losses(dtype: torch.dtype) -> None:
    head, exact = nn.Linear(8, 8), views_for()
    halves = Views(exact.forward.to(dtype), exact.backward.to(dtype), exact.grid)
    expected = objective(
        head, Views(halves.forward.float(), halves.backward.float(), exact.grid), PAPER
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective(head, halves, PAPER)
    for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)


def test_a_head_that_changes_the_width() -> None:
    views, head = views_for(), nn.Linear(8, 4)
    with pytest.raises(ValueError, match="the head makes 4 of 8: keep the width, or set"):
        objective(head, views, PAPER)
    alone = objective(head, views, ObjectiveSettings(separability_weight=0))
    assert float(alone.separability) == 0
    assert torch.equal(alone.total, alone.cycle)
    watched = objective(nn.Linear(8, 8), views, ObjectiveSettings(separability_weight=0))
    assert float(watched.separability.detach()) > 0
    assert torch.equal(watched.total, watched.cycle)


def test_an_untrained_network_comes_back_by_chance() -> None:
    """1 in 49 places of a 14 x 14 grid, where the way home leads over another clip's frames."""
    backbone = small("tiny")
    head = projection_for(backbone)  # type: ignore[arg-type]
    settings = ObjectiveSettings(pea="sample")
    clips = 24
    offsets = draw_offsets(settings, seed=0, step=0, sample_seeds=torch.arange(clips))
    views = encode_views(
        backbone, frames_for(clips, 2, 224), layers=(1,), norm=None, settings=settings,
        offsets=offsets,
    )  # fmt: skip
    views = dataclasses.replace(views, backward=views.backward.roll(1, dims=0))
    with torch.no_grad():
        accuracy = float(objective(head.project, views, settings).accuracy)
    assert accuracy == pytest.approx(1 / 49, abs=4 * math.sqrt(1 / 49 / (clips * 49)))


class Looks(TorchDispatchMode):
    """Counts how often a value is brought to Python, for which it waits for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_objective_does_not_wait_for_the_device() -> None:
    views = views_for()
    with Looks() as looks:
        objective(nn.Linear(8, 8), views, PAPER)
    assert looks.count == 0
    with Looks() as looks, pytest.raises(ValueError, match="as unit vectors"):
        multi_frame_cycle_loss(views.forward, views.backward, views.grid)
    assert looks.count == 1
