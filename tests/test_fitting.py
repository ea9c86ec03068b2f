from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file

from cosettle_adapter import CoSettleAdapter, fitting, starter
from cosettle_adapter.backbones import REGISTRY, BackboneRow, VisionTransformerBackbone, lookup
from cosettle_adapter.closed_form import StatisticsError
from cosettle_adapter.errors import GeometryError
from cosettle_adapter.fitting import fit_starter, read_layers
from cosettle_adapter.projection import RECIPE
from cosettle_adapter.starter import known_correspondences, starter_clips, starter_photographs
from cosettle_adapter.video.synthetic import render_clip

from helpers import small_corpus, tiny_state

NARROW = {"embed_dim": 48, "num_heads": 2, "depth": 3}


@pytest.fixture(autouse=True)
def corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    small_corpus(monkeypatch.setattr)


def narrow(name: str, width: int, **options: object) -> BackboneRow:
    row = REGISTRY[name]
    options = {**row.options, **options}
    return dataclasses.replace(
        row, width=width, depth=options.get("depth", row.depth), options=options
    )


ROWS = (
    narrow("dinov3-vits16", 48, **NARROW),
    narrow("clip-vitb16", 48, **NARROW),
    narrow("dinov2-vitg14", 48, **NARROW),
    narrow("dinov3-convnext-base", 32, dims=(8, 16, 32, 64), depths=(1, 1, 1, 1)),
    lookup("timm:test_vit.r160_in1k"),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_kind_of_name_works_with_a_file_and_no_hub(
    row: BackboneRow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY, row.name, row)
    save_file(tiny_state(row), tmp_path / "backbone.safetensors")
    adapter = CoSettleAdapter.from_pretrained(
        row.name,
        projection="fit" if row.release else None,
        backbone_weights=tmp_path / "backbone.safetensors",
        cache_dir=tmp_path,
        local_files_only=True,
    )
    features = adapter(torch.rand(2, 3, 4 * row.patch, 5 * row.patch))
    assert features.shape == (2, adapter.width, 4, 5)
    assert bool(torch.isfinite(features).all())
    assert (adapter.config.recipe, adapter.config.licence) == (RECIPE, row.licence)


@pytest.mark.parametrize(
    ("matched", "layers"),
    [
        ([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.71, 0.7, 0.65, 0.6, 0.4, 0.2], (5, 7, 9)),
        ([0.6] * 20 + [0.8] + [0.6] * 19, (13, 20, 27)),
        ([0.1, 0.5, 0.6, 0.7, 0.2], (2, 3)),
        ([0.1, 0.1, 0.1, 0.1, 0.7], (4,)),
        ([0.0, 0.0, 0.0], (1, 2)),
    ],
)
def test_the_best_matching_layer_is_read_with_neighbours_that_match_nearly_as_well(
    matched: list[float], layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deep:
        depth = len(matched)

    clips = list(starter_clips((64, 64)))
    monkeypatch.setattr(fitting, "_encoded", lambda frames, backbone, wanted: list(wanted))
    monkeypatch.setattr(fitting, "_match_rate", lambda layer, clip: matched[layer])
    assert read_layers(Deep(), clips) == layers  # type: ignore[arg-type]


def test_patches_are_matched_where_the_motion_takes_them() -> None:
    photo = starter_photographs()["chelsea"]
    clip = render_clip(photo, frames=2, size=(96, 128), motion="pan", amount=0.3, seed=2)
    pixels = rearrange(clip.frames.float(), "t c (h y) (w x) -> t (c y x) h w", y=8, x=8)
    assert fitting._match_rate(pixels, clip) > 0.45
    assert fitting._match_rate(torch.randn(2, 8, 12, 16), clip) < 0.3
    here, there = known_correspondences(clip, 0, (6, 8))
    assert torch.equal(here, torch.arange(48))
    assert torch.equal(there, here)
    here, there = known_correspondences(clip, 1, (6, 8))
    shift = clip.homographies[1, :2, 2] / 16
    column = (here % 8 + 0.5 + shift[0]).floor().long()
    row = (here // 8 + 0.5 + shift[1]).floor().long()
    assert 0 < len(here) < 48
    assert torch.equal(there, row * 8 + column)


def test_it_is_what_it_says_on_the_corpus(tiny_backbone: VisionTransformerBackbone) -> None:
    state, seen = torch.get_rng_state(), []
    projection = fit_starter(tiny_backbone, on_clip=lambda found: seen.append(found.clips))
    assert torch.equal(torch.get_rng_state(), state), "random numbers are left alone"
    assert seen == [1, 2, 3, 4]
    assert not any(parameter.requires_grad for parameter in projection.parameters())
    layers = projection.config.layers
    raw = [CoSettleAdapter.raw(tiny_backbone, layer=layer, norm=False) for layer in layers]
    tokens = []
    for adapter in raw:
        maps = [adapter(clip.frames) for clip in starter_clips((64, 64))]
        read = rearrange(torch.cat(maps).double(), "t c h w -> (t h w) c")
        read = read - read.mean(0)
        tokens.append(read / read.square().mean().sqrt())
    expected = torch.cat(tokens, dim=1)
    _, values, axes = torch.linalg.svd(expected, full_matrices=False)
    expected = expected @ axes[:192].T
    expected = expected / (values[:192].square().sum() / 192 / len(expected)).sqrt()

    assert (projection.config.averaging, projection.config.fit["frames"]) == (0.2, 8)
    projection.config = dataclasses.replace(projection.config, averaging=0.0)
    adapter = CoSettleAdapter(tiny_backbone, projection)
    maps = [adapter(clip.frames) for clip in starter_clips((64, 64))]
    found = rearrange(torch.cat(maps).double(), "t c h w -> (t h w) c")
    torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=1e-2, rtol=1e-3)


def test_what_cannot_be_fitted_says_so(tiny_backbone: VisionTransformerBackbone) -> None:
    with pytest.raises(ValueError, match=r"float32 at stride 16 .* got torch.bfloat16"):
        fit_starter(copy.deepcopy(tiny_backbone).to(torch.bfloat16))
    for value in (1.5, torch.nan):
        broken = copy.deepcopy(tiny_backbone)
        broken._maps = lambda images, reads, positions, value=value: {  # type: ignore[method-assign]
            read: torch.full((len(images), 192, 4, 4), value) for read in reads
        }
        with pytest.raises(StatisticsError, match=r"fitted for tiny-vit16: its features are equal"):
            fit_starter(broken)


def test_a_backbone_of_one_size_is_fitted_at_it(
    tiny_backbone: VisionTransformerBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = tiny_backbone._maps

    def only(images: torch.Tensor, *rest: object) -> object:
        if images.shape[-2:] != (224, 224):
            raise GeometryError("made for 224 x 224")
        return maps(images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tiny_backbone, "_maps", only)
    monkeypatch.setattr(starter, "CLIPS", 1)
    assert fit_starter(tiny_backbone).config.fit["size"] == [224, 224]
