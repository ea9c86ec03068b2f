"""Loading, saving and settling adapters."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from einops import rearrange

from cosettle_adapter import CoSettleAdapter, FrameSelection, Projection
from cosettle_adapter.backbones import BackboneRow, VisionTransformerBackbone
from cosettle_adapter.closed_form import AffineMap, settle_clip
from cosettle_adapter.errors import ProjectionFormatError, WeightsUnavailableError
from cosettle_adapter.evaluation.variants import feature_variants
from cosettle_adapter.extraction import extract, read_features

from helpers import broken_off, projection_for, write_video

CLOSE = {"atol": 2e-4, "rtol": 1e-3}


def clip(count: int = 6, *, seed: int = 0) -> torch.Tensor:
    """A photograph of noise that slides."""
    generator = torch.Generator().manual_seed(seed)
    photo = torch.randint(0, 256, (3, 48, 160), dtype=torch.uint8, generator=generator)
    return torch.stack([photo[..., 7 * t : 7 * t + 80] for t in range(count)])


def test_raw_takes_what_from_pretrained_takes_and_reads_any_layer(
    tiny_backbone: VisionTransformerBackbone,
    tiny_registered: BackboneRow,
    tiny_file: Path,
    tmp_path: Path,
) -> None:
    raw = CoSettleAdapter.raw(
        tiny_registered.name,
        backbone_weights=tiny_file,
        cache_dir=tmp_path,
        local_files_only=True,
        dtype=torch.bfloat16,
        stride=8,
    )
    assert (raw.dtype, raw.backbone.stride) == (torch.bfloat16, 8)
    images = CoSettleAdapter.raw(tiny_backbone).preprocess(clip(1))
    for layer, normed in ((-1, True), (11, True), (4, False)):
        raw = CoSettleAdapter.raw(tiny_backbone, layer=layer)
        expected = tiny_backbone.patch_tokens(images, layer=layer, norm=normed)
        assert torch.equal(raw(clip(1)), expected)
    adapter = CoSettleAdapter(tiny_backbone, projection_for(tiny_backbone))
    raw = adapter.without_projection()
    assert torch.equal(raw(clip(1)), adapter(clip(1), return_backbone=True)[0])
    with pytest.raises(WeightsUnavailableError):
        CoSettleAdapter.raw("dinov2-vitb14", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        ("published", "no projection is published for dinov2-v"),
        ("best", "or a folder .*, got 'best'"),
    ],
)
def test_projections_that_are_nothing(projection: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoSettleAdapter.from_pretrained("dinov2-vitb14", projection=projection)


@pytest.mark.parametrize(
    ("kind", "found"),
    [("identity", "affine"), ("affine", "affine"), ("linear", "linear"), ("mlp2", "mlp2")],
)
def test_a_settled_adapter_returns_its_clip_settled_and_can_be_saved(
    tiny_backbone: VisionTransformerBackbone, kind: str, found: str, tmp_path: Path
) -> None:
    adapter = CoSettleAdapter(tiny_backbone, projection_for(tiny_backbone, kind=kind))
    before = adapter(clip())
    settled = adapter.settle(clip(), batch_size=4)
    assert next(settled.projection.parameters()).dtype == torch.float32
    torch.testing.assert_close(settled(clip()), settle_clip(before), **CLOSE)
    assert torch.equal(adapter(clip()), before)
    assert (settled.unsettled, adapter.unsettled) == (adapter, adapter)
    assert settled.backbone is adapter.backbone
    assert settled.config.kind == found
    assert settled.config.settled == (found != "affine"), "two affine maps become one"
    assert not any(name.startswith("_unsettled") for name in settled.state_dict())
    again = settled.settle(clip(seed=2))  # from the stored projection, not on top
    assert again.unsettled is adapter
    assert torch.equal(again(clip()), adapter.settle(clip(seed=2))(clip()))

    settled.save_pretrained(tmp_path / "settled")
    loaded = CoSettleAdapter(tiny_backbone, Projection.load(tmp_path / "settled"))
    assert torch.equal(loaded(clip()), settled(clip()))
    fit = loaded.config.fit
    assert fit["method"].startswith("settled on one clip")
    assert (fit["frames"], fit["ridge"], fit["clip"]) == (6, 1.0, "Tensor")
    assert fit["base"] == adapter.config.fit
    assert loaded.unsettled is loaded


@pytest.mark.parametrize("kind", ["affine", "linear", "identity"])
def test_a_projection_followed_by_two_maps_is_followed_by_both(
    tiny_backbone: VisionTransformerBackbone, kind: str
) -> None:
    tokens, projection = torch.randn(2, 192, 3, 4), projection_for(tiny_backbone, kind=kind)
    maps = [AffineMap(torch.randn(192, 192).double() / 14, torch.randn(192)) for _ in range(2)]
    found = projection.followed_by(maps[0], {}).followed_by(maps[1], {"method": "second"})
    patches = rearrange(projection(tokens), "b c h w -> b h w c")
    expected = rearrange(maps[1](maps[0](patches)), "b h w c -> b c h w")
    torch.testing.assert_close(found(tokens), expected, **CLOSE)
    assert (found.config.fit["method"], found.config.figures) == ("second", {})
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_a_file_is_settled_on_even_if_it_breaks_off(
    tiny_adapter: CoSettleAdapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = write_video(tmp_path / "clip.mkv", frames=40, height=48, width=64, noisy=True)
    settled = tiny_adapter.settle(whole, size=(32, 48), select=FrameSelection(every=10))
    assert (settled.config.fit["clip"], settled.config.fit["frames"]) == ("clip.mkv", 4)
    cut = broken_off(whole)
    settled = tiny_adapter.settle(cut, size=(32, 48))
    assert 0 < settled.config.fit["frames"] < 40
    assert re.search(r"cut\.mkv lost \d+ frames \(it ends before what its header", caplog.text)


def test_any_backbone_settles_without_a_projection(
    tiny_backbone: VisionTransformerBackbone,
    tiny_registered: BackboneRow,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    asked = {}

    def load(name: str, **options: object) -> VisionTransformerBackbone:
        asked.update(options, name=name)
        return tiny_backbone

    monkeypatch.setattr("cosettle_adapter.hub.load_backbone", load)
    adapter = CoSettleAdapter.from_pretrained(
        tiny_registered.name, projection="settle", stride=8, revision="abc"
    )
    assert (asked["name"], asked["stride"]) == (tiny_registered.name, 8)
    assert asked["options"].revision == "abc"  # type: ignore[attr-defined]
    assert adapter.settles
    assert "settled on each clip" in adapter.config.fit["method"]
    raw = CoSettleAdapter.raw(tiny_backbone)
    torch.testing.assert_close(adapter(clip()), settle_clip(raw(clip())), **CLOSE)

    with pytest.raises(ProjectionFormatError, match="it settles each clip separately"):
        adapter.save_pretrained(tmp_path / "nothing")
    with pytest.raises(ProjectionFormatError, match=r"adapter\.settle"):
        adapter.push_to_hub("someone/something")
    found = adapter.settle(clip())
    assert not found.settles
    torch.testing.assert_close(found(clip()), adapter(clip()), **CLOSE)
    found.save_pretrained(tmp_path / "found")
    assert Projection.load(tmp_path / "found").config.kind == "affine"


def test_projections_follow_their_backbone_to_its_device(tiny_adapter: CoSettleAdapter) -> None:
    moved = copy.deepcopy(tiny_adapter.backbone).to("meta")  # which cannot be mixed with the CPU
    other = copy.deepcopy(tiny_adapter.projection)
    adapter = CoSettleAdapter(moved, tiny_adapter.projection)
    tokens, features = adapter(clip(1), return_backbone=True, dense="input", upsampler="guided")
    assert features.is_meta
    for variant in feature_variants(adapter, baselines={"other": other}):
        assert variant.of_frames(tokens).is_meta, variant.name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_streams_settles_and_extracts_on_a_device(
    device: str, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    film = write_video(tmp_path / "clip.mp4", frames=6, height=48, width=64, noisy=True)
    found: list[torch.Tensor] = []
    for adapter in (tiny_adapter, copy.deepcopy(tiny_adapter).to(device)):
        chunks = list(adapter.stream(film, batch_size=4, temporal_fusion="symmetric"))
        assert {chunk.features.device.type for chunk in chunks} == {adapter.device.type}
        output = tmp_path / f"{len(found)}.safetensors"
        extract(adapter, film, output)
        found += [
            torch.cat([chunk.features.cpu() for chunk in chunks]),
            adapter.settle(film)(clip()).cpu(),
            read_features(output).features,
        ]
    for expected, moved in zip(found[:3], found[3:], strict=True):
        assert float(torch.cosine_similarity(moved, expected, dim=1).min()) > 0.999
