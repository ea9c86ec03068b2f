from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from cosettle_adapter import CoSettleAdapter, Projection, list_models
from cosettle_adapter.backbones import BackboneRow, VisionTransformerBackbone
from cosettle_adapter.errors import (
    BackboneMismatchError,
    FrameError,
    GeometryError,
    ProjectionFormatError,
    UnknownModelError,
    WeightsUnavailableError,
)

from helpers import REAL, projection_for, tiny_state


def frames(count: int = 3, height: int = 48, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3)])
def test_leading_dimensions_are_kept(
    tiny_adapter: CoSettleAdapter, leading: tuple[int, ...]
) -> None:
    clip = torch.zeros(*leading, 3, 48, 64)
    assert tiny_adapter(clip).shape == (*leading, 192, 3, 4)
    raw, features = tiny_adapter(clip, return_backbone=True)
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
def test_chunking_does_not_change_the_result(
    tiny_backbone: VisionTransformerBackbone, count: int, batch_size: int
) -> None:
    adapter = CoSettleAdapter(tiny_backbone, projection_for(tiny_backbone))
    clip = frames(count)
    whole = adapter(clip, batch_size=count)
    torch.testing.assert_close(adapter(clip, batch_size=batch_size), whole, atol=1e-5, rtol=0)


def test_the_same_frames_give_the_same_bits(tiny_adapter: CoSettleAdapter) -> None:
    assert torch.equal(tiny_adapter(frames()), tiny_adapter(frames()))


def test_features_are_the_projection_of_what_the_row_normalises(
    tiny_adapter: CoSettleAdapter,
) -> None:
    clip = frames()
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    images = (clip.float() / 255 - mean) / std
    torch.testing.assert_close(tiny_adapter.preprocess(clip), images)
    tokens = tiny_adapter.backbone.patch_tokens(images, layer=7, norm=False)
    raw, features = tiny_adapter(clip, return_backbone=True)
    torch.testing.assert_close(raw, tokens)
    torch.testing.assert_close(features, tiny_adapter.projection(tokens))


def test_unit_length_on_request(tiny_adapter: CoSettleAdapter) -> None:
    lengths = tiny_adapter(frames(), normalize=True).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_several_blocks_are_concatenated(tiny_backbone: VisionTransformerBackbone) -> None:
    projection = projection_for(tiny_backbone, layers=(2, 5), in_width=384, out_width=32)
    adapter = CoSettleAdapter(tiny_backbone, projection)
    raw, features = adapter(frames(1), return_backbone=True)
    assert raw.shape == (1, 384, 3, 4)
    assert features.shape == (1, 32, 3, 4)


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({}, (3, 4)),
        ({"size": 64}, (4, 5)),
        ({"size": (32, 80)}, (2, 5)),
        ({"fit": "pad"}, (4, 5)),
    ],
)
def test_sizes(
    tiny_adapter: CoSettleAdapter, options: dict[str, object], grid: tuple[int, int]
) -> None:
    clip = frames(1, 50, 65)
    geometry = tiny_adapter.geometry(50, 65, **options)  # type: ignore[arg-type]
    assert geometry.grid == grid
    assert tiny_adapter(clip, **options).shape[-2:] == grid
    centres = geometry.cell_centers()
    torch.testing.assert_close(
        geometry.pixels_to_cells(centres)[1, 2], torch.tensor([1.0, 2.0]).double()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(
    tiny_backbone: VisionTransformerBackbone,
    dtype: torch.dtype,
    tmp_path: Path,
    tiny_registered: BackboneRow,
) -> None:
    save_file(tiny_state(), tmp_path / "backbone.safetensors")
    projection_for(tiny_backbone).save(tmp_path / "p")
    half = CoSettleAdapter.from_pretrained(
        tmp_path / "p", backbone_weights=tmp_path / "backbone.safetensors", dtype=dtype
    )
    features = half(frames())
    assert features.dtype == half.dtype == dtype
    assert next(half.projection.parameters()).dtype == torch.float32
    full = CoSettleAdapter(tiny_backbone, projection_for(tiny_backbone))(frames())
    cosine = torch.cosine_similarity(features.float(), full, dim=1)
    assert float(cosine.min()) > 0.98


def test_nothing_is_learned_by_accident(tiny_adapter: CoSettleAdapter) -> None:
    tiny_adapter.train()
    assert not tiny_adapter(frames()).requires_grad
    tiny_adapter.projection.requires_grad_(True)
    tiny_adapter(frames()).sum().backward()
    trained = {name for name, value in tiny_adapter.named_parameters() if value.grad is not None}
    assert trained == {
        f"projection.{name}" for name, _ in tiny_adapter.projection.named_parameters()
    }


def test_input_gradients_reach_the_frames(
    tiny_backbone: VisionTransformerBackbone, tiny_registered: BackboneRow, tmp_path: Path
) -> None:
    save_file(tiny_state(), tmp_path / "backbone.safetensors")
    projection_for(tiny_backbone).save(tmp_path / "p")
    adapter = CoSettleAdapter.from_pretrained(
        tmp_path / "p",
        backbone_weights=tmp_path / "backbone.safetensors",
        requires_input_grad=True,
    )
    clip = (frames().float() / 255).requires_grad_()
    adapter(clip).square().sum().backward()
    assert clip.grad is not None
    assert float(clip.grad.abs().sum()) > 0


def test_streaming_equals_one_call(tiny_adapter: CoSettleAdapter) -> None:
    clip = frames(7)
    whole = tiny_adapter(clip)
    chunks = list(tiny_adapter.stream(clip, batch_size=3, return_backbone=True, fps=10))
    assert [len(chunk.features) for chunk in chunks] == [3, 3, 1]
    assert [chunk.start for chunk in chunks] == [0, 3, 6]
    streamed = torch.cat([chunk.features for chunk in chunks])
    torch.testing.assert_close(streamed, whole, atol=1e-5, rtol=0)
    times = torch.cat([chunk.timestamps for chunk in chunks])
    torch.testing.assert_close(times, torch.arange(7).double() / 10)
    assert chunks[0].geometry == tiny_adapter.geometry(48, 64)
    assert chunks[0].backbone is not None
    assert next(tiny_adapter.stream(clip)).backbone is None


def test_bad_stream_arguments_fail_at_the_call(tiny_adapter: CoSettleAdapter) -> None:
    with pytest.raises(FrameError, match=r"every must be at least 1 .*, got 0"):
        tiny_adapter.stream(frames(), every=0)
    with pytest.raises(FrameError, match=r"nowhere\.mp4 does not exist"):
        tiny_adapter.stream("nowhere.mp4")


@pytest.mark.parametrize(
    ("clip", "error"),
    [
        (torch.zeros(0, 3, 48, 48), FrameError),
        (torch.zeros(2, 4, 48, 48), FrameError),
        (torch.full((2, 3, 48, 48), 200.0), FrameError),
        (torch.full((2, 3, 48, 48), torch.nan), FrameError),
        (torch.full((2, 3, 48, 48), -1.0), FrameError),
        (torch.zeros(2, 3, 48, 48, dtype=torch.long), FrameError),
        (torch.zeros(2, 3, 8, 48), GeometryError),
    ],
)
def test_frames_that_cannot_be_used(
    tiny_adapter: CoSettleAdapter, clip: torch.Tensor, error: type[Exception]
) -> None:
    with pytest.raises(error):
        tiny_adapter(clip)


def test_a_batch_of_nothing(tiny_adapter: CoSettleAdapter) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        tiny_adapter(frames(), batch_size=0)


def test_a_projection_of_another_backbone_is_refused(
    tiny_backbone: VisionTransformerBackbone,
) -> None:
    projection = projection_for(tiny_backbone, fingerprint="sha256:" + "a" * 64)
    with pytest.raises(BackboneMismatchError, match="fingerprint aaaaaaaaaaaa, but the backbone"):
        CoSettleAdapter(tiny_backbone, projection)
    adapter = CoSettleAdapter(tiny_backbone, projection, allow_mismatched_backbone=True)
    assert adapter(frames(1)).shape == (1, 192, 3, 4)


def test_a_projection_of_another_width_is_refused(tiny_backbone: VisionTransformerBackbone) -> None:
    with pytest.raises(ProjectionFormatError, match=r"reads 96 channels, but 1 block\(s\)"):
        CoSettleAdapter(tiny_backbone, projection_for(tiny_backbone, in_width=96))


def test_raw_reads_any_block(tiny_backbone: VisionTransformerBackbone) -> None:
    images = CoSettleAdapter.raw(tiny_backbone).preprocess(frames(1))
    for layer, normed in ((-1, True), (11, True), (4, False)):
        raw = CoSettleAdapter.raw(tiny_backbone, layer=layer)
        expected = tiny_backbone.patch_tokens(images, layer=layer, norm=normed)
        assert torch.equal(raw(frames(1)), expected)


def test_save_and_load_are_bit_equal_and_small(
    real_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    real_adapter.save_pretrained(tmp_path / "out")
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 2_000_000
    loaded = CoSettleAdapter.from_pretrained(tmp_path / "out", local_files_only=True)
    assert loaded.config == real_adapter.config
    clip = frames(1, 56, 70)
    assert torch.equal(loaded(clip), real_adapter(clip))


def test_the_real_adapter_as_the_readme_shows_it(real_adapter: CoSettleAdapter) -> None:
    raw, features = real_adapter(frames(2, 140, 210), return_backbone=True)
    assert (raw.shape, features.shape) == ((2, 1152, 10, 15), (2, 384, 10, 15))
    assert real_adapter.config.figures["summary"]


def test_an_alias_means_the_alias_even_beside_a_folder_of_that_name(
    real_adapter: CoSettleAdapter,
    tiny_backbone: VisionTransformerBackbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    projection_for(tiny_backbone).save(tmp_path / REAL)
    monkeypatch.chdir(tmp_path)
    assert CoSettleAdapter.from_pretrained(REAL).config == real_adapter.config
    with pytest.raises(UnknownModelError, match="unknown backbone 'tiny-vit16'"):
        CoSettleAdapter.from_pretrained(f"./{REAL}")


def test_what_was_not_published_is_not_had_by_asking_for_it() -> None:
    with pytest.raises(UnknownModelError, match="no projection has been published for dinov2-v"):
        CoSettleAdapter.from_pretrained("dinov2-vitb14", projection="published")


def test_raw_takes_what_from_pretrained_takes(tiny_registered: BackboneRow, tmp_path: Path) -> None:
    save_file(tiny_state(), tmp_path / "backbone.safetensors")
    raw = CoSettleAdapter.raw(
        tiny_registered.name,
        backbone_weights=tmp_path / "backbone.safetensors",
        cache_dir=tmp_path,
        local_files_only=True,
        dtype=torch.bfloat16,
    )
    assert raw.dtype == torch.bfloat16
    with pytest.raises(WeightsUnavailableError):
        CoSettleAdapter.raw("dinov2-vitb14", cache_dir=tmp_path, local_files_only=True)


def test_names_that_are_nothing() -> None:
    with pytest.raises(UnknownModelError, match="Did you mean 'dinov2-vits14-pypi'"):
        CoSettleAdapter.from_pretrained("dinov2-vits14-pipy")
    with pytest.raises(ProjectionFormatError, match="is not a folder"):
        CoSettleAdapter.from_pretrained("./nowhere")
    with pytest.raises(WeightsUnavailableError, match=r"no config\.json from the Hub repository"):
        CoSettleAdapter.from_pretrained("owner/nothing", local_files_only=True)


def test_a_hub_repository_loads_from_the_cache_without_network(
    tiny_backbone: VisionTransformerBackbone, tiny_registered: BackboneRow, tmp_path: Path
) -> None:
    repository = tmp_path / "cache" / "models--owner--mine"
    projection_for(tiny_backbone).save(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    save_file(tiny_state(), tmp_path / "backbone.safetensors")
    adapter = CoSettleAdapter.from_pretrained(
        "owner/mine",
        cache_dir=tmp_path / "cache",
        local_files_only=True,
        backbone_weights=tmp_path / "backbone.safetensors",
    )
    assert adapter(frames(1)).shape == (1, 192, 3, 4)


def test_list_models_shows_every_row_with_published_ones_first() -> None:
    models = list_models()
    names = [model.name for model in models]
    assert {"dinov2-vitb14", "mae-vitl16", "clip-vitb16", REAL} <= set(names)
    assert names[0] == REAL
    assert models[0].projection == "in the package"
    order = ["in the package", "by the authors", "fitted, in your cache", "fitted on first use"]
    ranks = [order.index(model.projection) for model in models]
    assert ranks == sorted(ranks)
    assert ranks.count(1) == 8, "the paper's eight"
    assert json.dumps([dataclasses.asdict(model) for model in models])


def test_the_projection_that_ships_is_small_and_names_its_licence() -> None:
    from cosettle_adapter.published import bundled_folder

    folder = bundled_folder(REAL)
    assert folder is not None
    projection = Projection.load(folder)
    assert projection.config.licence
    assert projection.config.fit["clips"] > 0
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_the_cpu(real_adapter: CoSettleAdapter, dtype: torch.dtype) -> None:
    cuda = CoSettleAdapter.from_pretrained(REAL, device="cuda", dtype=dtype)
    clip = frames(2, 140, 210)
    features = cuda(clip)
    assert features.is_cuda
    cosine = torch.cosine_similarity(features.float().cpu(), real_adapter(clip), dim=1)
    assert float(cosine.min()) > (0.9999 if dtype == torch.float32 else 0.97)
