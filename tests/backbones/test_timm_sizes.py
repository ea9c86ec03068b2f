from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from cosettle_adapter.backbones.cnn import FeatureMapBackbone
from cosettle_adapter.backbones.row import BackboneRow
from cosettle_adapter.backbones.timm_features import takes
from cosettle_adapter.backbones.timm_sizes import family, fit_copy


def row_of(architecture: str) -> BackboneRow:
    return BackboneRow(
        name=architecture,
        family="random",
        architecture=architecture,
        patch=16,
        width=0,
        depth=0,
        licence="Apache-2.0",
        image_size=224,
        kind="features",
    )


def outline(architecture: str) -> nn.Module:
    """A model as the wrapper has it created."""
    options = FeatureMapBackbone.create_options(row_of(architecture))
    with torch.device("meta"):
        model: nn.Module = timm.create_model(architecture, **options)
    return model


@pytest.mark.parametrize(
    "architecture",
    [
        "deit_tiny_distilled_patch16_224",
        "eva02_tiny_patch14_224",
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "vit_tiny_r_s16_p8_224",
        "vit_tiny_patch16_224",
    ],
)
def test_an_option_makes_timm_take_any_size(architecture: str) -> None:
    size = (224, 336)
    with torch.device("meta"):
        plain = timm.create_model(architecture)
    assert not takes(plain, size)
    assert takes(outline(architecture), size)


@pytest.mark.parametrize("architecture", ["hiera_tiny_224", "hiera_small_abswin_256"])
def test_a_copy_takes_a_size_that_the_model_does_not(architecture: str) -> None:
    model = timm.create_model(architecture)
    fitted = fit_copy(model, (160, 288), row_of(architecture))
    assert takes(fitted, (160, 288))
    assert not takes(model, (160, 288))
    assert fitted.pos_embed.shape == (1, 40 * 72, 96)
    assert fitted.blocks[0].attn.qkv.weight is model.blocks[0].attn.qkv.weight


def test_models_that_take_any_size_are_not_copied() -> None:
    model = outline("resnet18")
    assert fit_copy(model, (160, 288), row_of("resnet18")) is model


def test_options_are_a_familys() -> None:
    row = row_of("swin_tiny_patch4_window7_224")
    assert dict(FeatureMapBackbone.create_options(row)) == {"strict_img_size": False}
    assert family("convnext_base").options == {}
