"""Frames to features: shapes, inputs, sizes, precision, gradients, errors, torch.compile."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from export_fakes import ROWS, small_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cosettle_adapter import CoSettleAdapter, Projection
from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.closed_form import settle_clip
from cosettle_adapter.errors import (
    BackboneMismatchError,
    FrameError,
    GeometryError,
    ProjectionFormatError,
)

from helpers import REAL, projection_for

COMPILED = ("vit", "rotary", "convnext")
SLOW = sorted(ROWS.keys() - set(COMPILED))


def frames(count: int = 3, height: int = 48, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_leading_dimensions_are_kept_and_sizes_as_geometry_says(
    tiny_adapter: CoSettleAdapter, leading: tuple[int, ...]
) -> None:
    for options in ({}, {"size": 64}, {"size": (32, 80)}, {"fit": "pad"}):
        grid = tiny_adapter.geometry(50, 65, **options).grid  # type: ignore[arg-type]
        odd = torch.zeros(*leading, 3, 50, 65)
        assert tiny_adapter(odd, **options).shape == (*leading, 192, *grid)
    raw, features = tiny_adapter(torch.zeros(*leading, 3, 48, 64), return_backbone=True)
    assert raw.shape == features.shape == (*leading, 192, 3, 4)


def test_bytes_floats_arrays_and_images_give_the_same(tiny_adapter: CoSettleAdapter) -> None:
    clip = frames()
    expected = tiny_adapter(clip)
    channels_last = clip.movedim(1, -1).contiguous().numpy()
    images = [Image.fromarray(frame) for frame in channels_last]
    for same in (clip.float() / 255, channels_last, channels_last.astype(np.float32) / 255, images):
        torch.testing.assert_close(tiny_adapter(same), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiny_adapter(images[1]), expected[1], atol=1e-5, rtol=1e-5)


@settings(max_examples=10)
@given(count=st.integers(1, 7), batch_size=st.integers(1, 9))
def test_batching_does_not_change_the_result(
    tiny_backbone: VisionTransformerBackbone, count: int, batch_size: int
) -> None:
    adapter = CoSettleAdapter(tiny_backbone, projection_for(tiny_backbone))
    clip = frames(count)
    whole = adapter(clip, batch_size=count)
    torch.testing.assert_close(adapter(clip, batch_size=batch_size), whole, atol=1e-5, rtol=0)
    assert torch.equal(adapter(clip, batch_size=count), whole)


def test_features_are_the_projection_of_the_layers_of_what_the_row_normalises(
    tiny_backbone: VisionTransformerBackbone,
) -> None:
    projection = projection_for(tiny_backbone, layers=(2, 5), in_width=384, out_width=32)
    adapter, clip = CoSettleAdapter(tiny_backbone, projection), frames()
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    images = (clip.float() / 255 - mean) / std
    torch.testing.assert_close(adapter.preprocess(clip), images)
    torch.testing.assert_close(adapter.preprocess(clip[0]), images[:1])
    layers = [tiny_backbone.patch_tokens(images, layer=layer, norm=False) for layer in (2, 5)]
    raw, features = adapter(clip, return_backbone=True)
    torch.testing.assert_close(raw, torch.cat(layers, dim=1))
    torch.testing.assert_close(features, projection(raw))
    lengths = adapter(clip, normalize=True).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_half_precision_keeps_the_projection_in_float32(
    tiny_backbone: VisionTransformerBackbone, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    half = copy.deepcopy(tiny_adapter).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    saved = Projection.load(tmp_path).state_dict()
    for name, tensor in tiny_adapter.projection.state_dict().items():
        assert torch.equal(saved[name], tensor), name
    assert torch.equal(
        half.preprocess(frames()), CoSettleAdapter.raw(tiny_backbone).preprocess(frames())
    )
    features = half(frames())
    assert features.dtype == half.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(features.float(), tiny_adapter(frames()), dim=1)
    assert float(cosine.min()) > 0.98


def test_only_the_projection_learns_and_only_when_asked(tiny_adapter: CoSettleAdapter) -> None:
    tiny_adapter.train()
    assert not tiny_adapter(frames()).requires_grad
    tiny_adapter.projection.requires_grad_(True)
    tiny_adapter(frames()).sum().backward()
    trained = {name for name, value in tiny_adapter.named_parameters() if value.grad is not None}
    assert trained == {
        f"projection.{name}" for name, _ in tiny_adapter.projection.named_parameters()
    }


def test_each_clip_of_a_batch_is_settled_by_itself(
    tiny_backbone: VisionTransformerBackbone,
) -> None:
    raw, settling = CoSettleAdapter.raw(tiny_backbone), CoSettleAdapter.raw(tiny_backbone)
    settling.settles = True
    clips = frames(10).reshape(2, 5, 3, 48, 64)
    expected = torch.stack([settle_clip(raw(clip)) for clip in clips])
    torch.testing.assert_close(settling(clips, batch_size=3), expected, atol=2e-4, rtol=1e-3)
    assert settling(clips[0, 0]).shape == (192, 3, 4)
    tokens, features = settling(clips, return_backbone=True, normalize=True)
    assert tokens.shape == features.shape
    torch.testing.assert_close(features.norm(dim=2), torch.ones(2, 5, 3, 4))


@pytest.mark.parametrize(
    ("clip", "error"),
    [
        (torch.zeros(0, 3, 48, 48), FrameError),
        (torch.zeros(2, 4, 48, 48), FrameError),
        (torch.full((2, 3, 48, 48), 200.0), FrameError),
        (torch.zeros(2, 3, 48, 48, dtype=torch.long), FrameError),
        (torch.zeros(2, 3, 8, 48), GeometryError),
    ],
)
def test_frames_that_cannot_be_used(
    tiny_adapter: CoSettleAdapter, clip: torch.Tensor, error: type[Exception]
) -> None:
    with pytest.raises(error):
        tiny_adapter(clip)
    with pytest.raises(ValueError, match=r"batch_size must be a whole number .*, got 0"):
        tiny_adapter(frames(), batch_size=0)


def test_a_projection_of_another_backbone_is_refused(
    tiny_backbone: VisionTransformerBackbone,
) -> None:
    projection = projection_for(tiny_backbone, fingerprint="sha256:" + "a" * 64)
    with pytest.raises(BackboneMismatchError, match="fingerprint aaaaaaaaaaaa, but the backbone"):
        CoSettleAdapter(tiny_backbone, projection)
    adapter = CoSettleAdapter(tiny_backbone, projection, allow_mismatched_backbone=True)
    assert adapter(frames(1)).shape == (1, 192, 3, 4)
    with pytest.raises(ProjectionFormatError, match=r"reads 96 channels, but 1 layer\(s\)"):
        CoSettleAdapter(tiny_backbone, projection_for(tiny_backbone, in_width=96))


def compiled(adapter: CoSettleAdapter, backend: str = "eager") -> CoSettleAdapter:
    torch._dynamo.reset()
    module: CoSettleAdapter = torch.compile(adapter, fullgraph=True, backend=backend)  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in COMPILED else pytest.mark.slow) for name in ROWS],
)
def test_forward_compiles_to_one_graph(name: str) -> None:
    adapter = small_adapter(name)
    fast = compiled(adapter, "aot_eager" if name == "vit" else "eager")
    for clip in (frames(3, 64, 80), frames(2, 64, 80)):
        torch.testing.assert_close(fast(clip), adapter(clip))


@pytest.mark.parametrize(
    ("options", "clip"),
    [
        ({"normalize": True, "size": 48, "return_backbone": True}, frames()[None] / 255),
        ({"fit": "pad", "batch_size": 2}, frames()[..., :-3]),
    ],
    ids=["a clip of floats, resized and normalised", "padded, in two batches"],
)
def test_every_option_compiles_to_one_graph(options: dict[str, object], clip: torch.Tensor) -> None:
    adapter = small_adapter("vit")
    torch.testing.assert_close(compiled(adapter)(clip, **options), adapter(clip, **options))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_the_cpu(real_adapter: CoSettleAdapter, dtype: torch.dtype) -> None:
    cuda = CoSettleAdapter.from_pretrained(REAL, device="cuda", dtype=dtype)
    clip = frames(2, 140, 210)
    features = cuda(clip)
    assert features.is_cuda
    cosine = torch.cosine_similarity(features.float().cpu(), real_adapter(clip), dim=1)
    assert float(cosine.min()) > (0.9999 if dtype == torch.float32 else 0.97)
