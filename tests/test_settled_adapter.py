from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from einops import rearrange, reduce

from cosettle_adapter import CoSettleAdapter, Projection
from cosettle_adapter.analysis import SETTLED, compare_features, feature_kinds
from cosettle_adapter.backbones import BackboneRow, VisionTransformerBackbone
from cosettle_adapter.closed_form import AffineMap, settle_clip
from cosettle_adapter.errors import (
    ProjectionFormatError,
    UnknownModelError,
)
from cosettle_adapter.extraction import extract
from cosettle_adapter.feature_file import read_features

from helpers import projection_for, write_video

CLOSE = {"atol": 2e-4, "rtol": 1e-3}


def clip(count: int = 6, *, seed: int = 0) -> torch.Tensor:
    """A photograph of noise that slides."""
    generator = torch.Generator().manual_seed(seed)
    photo = torch.randint(0, 256, (3, 48, 160), dtype=torch.uint8, generator=generator)
    return torch.stack([photo[..., 7 * t : 7 * t + 80] for t in range(count)])


def with_kind(backbone: VisionTransformerBackbone, kind: str) -> CoSettleAdapter:
    return CoSettleAdapter(backbone, projection_for(backbone, kind=kind))


@pytest.fixture
def settling(tiny_backbone: VisionTransformerBackbone) -> CoSettleAdapter:
    return CoSettleAdapter._settling(tiny_backbone)


@pytest.mark.parametrize("kind", ["identity", "affine", "linear", "mlp2"])
def test_a_settled_adapter_returns_its_clip_settled(
    tiny_backbone: VisionTransformerBackbone, kind: str
) -> None:
    adapter = with_kind(tiny_backbone, kind)
    before = adapter(clip())
    settled = adapter.settle(clip(), batch_size=4)
    torch.testing.assert_close(settled(clip()), settle_clip(before), **CLOSE)
    assert torch.equal(adapter(clip()), before)
    assert settled.unsettled is adapter
    assert adapter.unsettled is adapter
    assert settled.backbone is adapter.backbone


@pytest.mark.parametrize(("kind", "found"), [("identity", "affine"), ("affine", "affine")])
def test_closed_forms_stay_a_single_affine_map(
    tiny_backbone: VisionTransformerBackbone, kind: str, found: str
) -> None:
    settled = with_kind(tiny_backbone, kind).settle(clip())
    assert (settled.config.kind, settled.config.settled) == (found, False)
    assert len(list(settled.projection.parameters())) == 2


@pytest.mark.parametrize("kind", ["affine", "linear", "mlp3"])
def test_a_settled_adapter_can_be_saved(
    tiny_backbone: VisionTransformerBackbone, kind: str, tmp_path: Path
) -> None:
    adapter = with_kind(tiny_backbone, kind)
    settled = adapter.settle(clip(), ridge=0.5)
    settled.save_pretrained(tmp_path / "settled")
    loaded = CoSettleAdapter(tiny_backbone, Projection.load(tmp_path / "settled"))
    assert torch.equal(loaded(clip()), settled(clip()))
    fit = loaded.config.fit
    assert fit["method"].startswith("settled on one clip")
    assert (fit["frames"], fit["ridge"], fit["clip"]) == (6, 0.5, "Tensor")
    assert fit["base"] == adapter.config.fit
    assert loaded.config.figures == {}
    assert loaded.unsettled is loaded


def test_settling_again_starts_from_the_stored_projection(tiny_adapter: CoSettleAdapter) -> None:
    once = tiny_adapter.settle(clip(seed=1))
    twice = once.settle(clip(seed=2))
    assert twice.unsettled is tiny_adapter
    direct = tiny_adapter.settle(clip(seed=2))
    assert torch.equal(twice(clip()), direct(clip()))


def test_a_projection_followed_by_two_maps_is_followed_by_both(
    tiny_backbone: VisionTransformerBackbone,
) -> None:
    tokens = torch.randn(2, 192, 3, 4)
    maps = [AffineMap(torch.randn(192, 192).double() / 14, torch.randn(192)) for _ in range(2)]
    for kind in ("affine", "linear", "identity"):
        projection = projection_for(tiny_backbone, kind=kind)
        found = projection.followed_by(maps[0], {}).followed_by(maps[1], {"method": "second"})
        cells = rearrange(projection(tokens), "b c h w -> b h w c")
        expected = rearrange(maps[1](maps[0](cells)), "b h w c -> b c h w")
        torch.testing.assert_close(found(tokens), expected, **CLOSE)
        assert found.config.fit["method"] == "second"
        assert not any(parameter.requires_grad for parameter in found.parameters())


def test_the_base_is_not_a_part_of_the_settled_one(tiny_adapter: CoSettleAdapter) -> None:
    settled = tiny_adapter.settle(clip())
    expected = set(tiny_adapter.state_dict()) | {
        "projection.settling.weight",
        "projection.settling.bias",
    }
    assert set(settled.state_dict()) == expected


def test_a_file_is_settled_on_by_its_name_and_even_if_it_breaks_off(
    tiny_adapter: CoSettleAdapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=8, height=64, width=96)
    settled = tiny_adapter.settle(path, size=(48, 64), every=2)
    assert (settled.config.fit["clip"], settled.config.fit["frames"]) == ("clip.mp4", 4)

    long = write_video(tmp_path / "long.mp4", frames=80, height=128, width=160, noisy=True)
    data = long.read_bytes()
    broken = tmp_path / "broken.mkv"
    remux(long, broken)
    broken.write_bytes(broken.read_bytes()[: len(data) // 2])
    settled = tiny_adapter.settle(broken, size=(32, 48))
    assert 0 < settled.config.fit["frames"] < 80
    assert "settled on the readable part of the clip" in caplog.text


def remux(source: Path, destination: Path) -> None:
    import av

    with av.open(str(source)) as there, av.open(str(destination), "w") as here:
        (stream,) = there.streams.video
        copy = here.add_stream_from_template(stream)
        for packet in there.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                here.mux(packet)


def test_a_stream_settles_by_the_frames_that_came(tiny_adapter: CoSettleAdapter) -> None:
    frames = clip(9)

    def streamed(source: torch.Tensor, **options: object) -> torch.Tensor:
        chunks = tiny_adapter.stream(source, settle=True, **options)  # type: ignore[arg-type]
        return torch.cat([chunk.features for chunk in chunks])

    found = streamed(frames, batch_size=4)
    torch.testing.assert_close(found, streamed(frames, batch_size=1), **CLOSE)
    torch.testing.assert_close(found[:5], streamed(frames[:5], batch_size=4), **CLOSE)
    plain = tiny_adapter(frames)
    centred = plain[:1] - reduce(plain[:1], "t c h w -> 1 c 1 1", "mean")
    torch.testing.assert_close(found[:1], centred, **CLOSE)
    units = streamed(frames, normalize=True).norm(dim=1)
    torch.testing.assert_close(units, torch.ones_like(units))
    forgetful = streamed(frames, forgetting=0.5)
    assert not torch.allclose(found, forgetful, atol=1e-3)
    with pytest.raises(ValueError, match=r"forgetting=0, expected"):
        tiny_adapter.stream(frames, settle=True, forgetting=0)


def test_any_backbone_settles_without_a_projection(
    tiny_backbone: VisionTransformerBackbone,
    tiny_registered: BackboneRow,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {}

    def load(name: str, **options: object) -> VisionTransformerBackbone:
        asked.update(options, name=name)
        return tiny_backbone

    monkeypatch.setattr("cosettle_adapter.adapter.load_backbone", load)
    adapter = CoSettleAdapter.from_pretrained(
        tiny_registered.name, projection="settle", stride=8, revision="abc"
    )
    assert (asked["name"], asked["stride"]) == (tiny_registered.name, 8)
    assert asked["options"].revision == "abc"  # type: ignore[attr-defined]
    assert adapter.settles
    assert "settled on each clip" in adapter.config.fit["method"]
    raw = CoSettleAdapter.raw(tiny_backbone)
    torch.testing.assert_close(adapter(clip()), settle_clip(raw(clip())), **CLOSE)


def test_unknown_names_do_not_settle() -> None:
    with pytest.raises(UnknownModelError, match="Did you mean 'dinov2-vits14'"):
        CoSettleAdapter.from_pretrained("dinov2-vits41", projection="settle")


def test_forward_settles_each_clip_of_a_batch_by_itself(settling: CoSettleAdapter) -> None:
    clips = torch.stack([clip(seed=1), clip(seed=2)])
    together = settling(clips, batch_size=5)
    apart = torch.stack([settling(each, batch_size=2) for each in clips])
    torch.testing.assert_close(together, apart, **CLOSE)
    assert settling(clips[0, 0]).shape == (192, 3, 5)
    raw, features = settling(clips, return_backbone=True, normalize=True)
    assert raw.shape == features.shape
    torch.testing.assert_close(features.norm(dim=2), torch.ones(2, 6, 3, 5))


def test_streams_of_a_settling_adapter_settle_unless_told_not_to(
    settling: CoSettleAdapter, tmp_path: Path
) -> None:
    raw = CoSettleAdapter.raw(settling.backbone)
    settled = torch.cat([chunk.features for chunk in settling.stream(clip())])
    plain = torch.cat([chunk.features for chunk in settling.stream(clip(), settle=False)])
    torch.testing.assert_close(plain, raw(clip()), **CLOSE)
    expected = torch.cat([chunk.features for chunk in raw.stream(clip(), settle=True)])
    torch.testing.assert_close(settled, expected, **CLOSE)
    extract(settling, clip(), tmp_path / "features.safetensors")
    stored = read_features(tmp_path / "features.safetensors").features
    torch.testing.assert_close(stored, settled, **CLOSE)


def test_what_settles_anew_cannot_be_stored_but_what_it_found_can(
    settling: CoSettleAdapter, tmp_path: Path
) -> None:
    with pytest.raises(ProjectionFormatError, match="it settles on every clip anew"):
        settling.save_pretrained(tmp_path / "nothing")
    with pytest.raises(ProjectionFormatError, match=r"adapter\.settle"):
        settling.push_to_hub("someone/something")
    found = settling.settle(clip())
    assert not found.settles
    torch.testing.assert_close(found(clip()), settling(clip()), **CLOSE)
    found.save_pretrained(tmp_path / "found")
    assert Projection.load(tmp_path / "found").config.kind == "affine"


def test_settled_features_are_a_kind_to_compare(
    tiny_adapter: CoSettleAdapter,
    tiny_backbone: VisionTransformerBackbone,
    settling: CoSettleAdapter,
) -> None:
    other = {"other": projection_for(tiny_backbone, seed=4)}
    names = [kind.name for kind in feature_kinds(tiny_adapter, beside=other, settle=True)]
    assert names[-4:] == ["adapted", "settled", "other", "other, settled"]
    assert SETTLED not in {kind.name for kind in feature_kinds(tiny_adapter)}
    found = compare_features(settling, clip())
    torch.testing.assert_close(found[SETTLED], settling(clip()), **CLOSE)


def test_low_precision_settles_in_float32(tiny_backbone: VisionTransformerBackbone) -> None:
    half = copy.deepcopy(tiny_backbone).to(torch.bfloat16)
    settled = with_kind(half, "identity").settle(clip())
    assert settled.projection.linears[0].weight.dtype == torch.float32
    found = settled(clip())
    assert found.dtype == torch.bfloat16
    expected = with_kind(tiny_backbone, "identity").settle(clip())(clip())
    cosine = torch.cosine_similarity(found.float(), expected, dim=1)
    assert float(cosine.min()) > 0.95
