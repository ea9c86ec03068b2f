from __future__ import annotations

import pytest
import timm
import torch

from cosettle_adapter.backbones import REGISTRY, lookup
from cosettle_adapter.errors import UnknownModelError


@pytest.mark.parametrize("name", REGISTRY)
def test_a_row_describes_its_architecture(name: str) -> None:
    row = REGISTRY[name]
    with torch.device("meta"):
        vit = timm.create_model(row.architecture, num_classes=0)
    assert vit.embed_dim == row.width
    assert len(vit.blocks) == row.depth
    assert vit.patch_embed.patch_size == (row.patch, row.patch)
    assert vit.patch_embed.grid_size == (row.image_size // row.patch,) * 2
    assert hasattr(vit.norm, "weight"), "the final norm must be a real one"


@pytest.mark.parametrize("name", REGISTRY)
def test_a_row_has_a_source_and_a_licence(name: str) -> None:
    row = REGISTRY[name]
    assert row.name == name
    assert row.hub or row.wheel
    assert row.licence in {"Apache-2.0", "MIT", "CC-BY-NC-4.0"}
    if "NC" in row.licence:
        assert "non-commercial" in row.note


def test_the_promised_backbones_are_there() -> None:
    promised = {f"dinov2-vit{size}14{reg}" for size in "sblg" for reg in ("", "-reg")}
    promised |= {"dino-vits16", "dino-vits8", "dino-vitb16", "dino-vitb8"}
    promised |= {"mae-vitb16", "mae-vitl16", "mae-vith14", "clip-vitb16", "dinov2-vits14-pypi"}
    assert promised <= REGISTRY.keys()


def test_clip_uses_quickgelu() -> None:
    with torch.device("meta"):
        vit = timm.create_model(REGISTRY["clip-vitb16"].architecture, num_classes=0)
    activation = vit.blocks[0].mlp.act
    values = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(activation(values), values * torch.sigmoid(1.702 * values))
    assert vit.norm.eps == 1e-5


def test_an_unknown_name_gets_close_ones() -> None:
    with pytest.raises(UnknownModelError, match="Did you mean 'dinov2-vitb14'"):
        lookup("dinov2-vitb-14")
