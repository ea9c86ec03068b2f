from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from cosettle_adapter.backbones.timm_features import (
    feature_info,
    feature_maps,
    own_size,
    own_tensors,
    prune,
    takes,
    unused_modules,
)
from cosettle_adapter.errors import UnknownModelError

_TINY_SWIN = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}


def outline(architecture: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(architecture, **options)
    return model


def tops(architecture: str) -> set[str]:
    """First parts of the names of the tensors that pruning takes out of a model."""
    model = outline(architecture)
    before = set(model.state_dict())
    prune(model)
    return {name.partition(".")[0] for name in before - set(model.state_dict())}


@pytest.mark.parametrize(
    ("architecture", "heads"),
    [
        ("resnet18", {"fc"}),
        ("test_convnext", {"head"}),
        ("efficientnet_b0", {"conv_head", "bn2", "classifier"}),
        ("swin_tiny_patch4_window7_224", {"norm", "head"}),
        ("hiera_tiny_224", {"head"}),
        ("vit_tiny_r_s16_p8_224", {"norm", "head"}),
        ("beit_base_patch16_224", {"fc_norm", "head"}),
        ("samvit_base_patch16", {"neck"}),
        ("deit_tiny_distilled_patch16_224", {"norm", "head", "head_dist"}),
        ("volo_d1_224", {"norm", "head", "aux_head", "post_network"}),
        ("xcit_nano_12_p8_224", {"norm", "head", "cls_attn_blocks"}),
        ("cait_xxs24_224", {"norm", "head", "blocks_token_only"}),
    ],
)
def test_heads_are_found_whatever_they_are_called(architecture: str, heads: set[str]) -> None:
    assert tops(architecture) == heads


def test_a_stem_that_is_read_but_never_called_is_used() -> None:
    # BEiT computes with qkv.weight and q_bias; it never calls qkv.
    model = outline("beit_base_patch16_224", embed_dim=48, depth=1, num_heads=2)
    prune(model)
    assert {"blocks.0.attn.qkv.weight", "blocks.0.attn.q_bias"} <= set(model.state_dict())


def test_pruning_does_not_change_the_maps() -> None:
    model = timm.create_model("crossvit_tiny_240").eval()  # walks over norms it does not apply
    if not hasattr(model, "forward_intermediates"):
        pytest.skip(f"timm {timm.__version__} returns no feature maps of CrossViT")
    images = torch.randn(1, 3, 240, 240)
    layers = range(len(feature_info(model)))
    with torch.no_grad():
        before = feature_maps(model, images, layers)
        prune(model)
        after = feature_maps(model, images, layers)
    assert "norm.0.weight" not in model.state_dict()
    assert all(torch.equal(first, second) for first, second in zip(before, after, strict=True))


def test_finding_out_leaves_the_model_as_it_was() -> None:
    model = timm.create_model("resnet18").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert unused_modules(model) == ["global_pool", "fc"]
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())


def test_own_tensors_of_a_pruned_model_are_its_own() -> None:
    whole = timm.create_model("test_convnext").state_dict()
    model = outline("test_convnext")
    prune(model)
    picked = own_tensors(model, whole)
    assert picked.keys() == model.state_dict().keys() < whole.keys()
    assert all(tensor is whole[name] for name, tensor in picked.items())
    assert own_tensors(model, picked).keys() == picked.keys()
    assert own_tensors(outline("test_convnext"), whole).keys() == picked.keys()


def test_what_is_nobodys_is_left_for_the_strict_check() -> None:
    model = outline("resnet18")
    given = {**model.state_dict(), "layer1.0.surprise": torch.zeros(1), "other": torch.zeros(1)}
    del given["bn1.weight"]
    picked = own_tensors(model, given)
    assert {"layer1.0.surprise", "other"} <= picked.keys()
    assert "bn1.weight" not in picked


def test_a_swin_file_of_timms_early_years() -> None:
    model = outline("swin_tiny_patch4_window7_224", **_TINY_SWIN)
    tensors: dict[str, Tensor] = timm.create_model(
        "swin_tiny_patch4_window7_224", **_TINY_SWIN
    ).state_dict()
    early = {}
    for name, tensor in tensors.items():
        for stage in (1, 2, 3):  # downsampling stood at the end of the stage before
            name = name.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")
        early[name.replace("head.fc.", "head.")] = tensor
    early["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    early["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    picked = own_tensors(model, early)
    prune(model)
    assert picked.keys() == model.state_dict().keys()
    assert all(tensor is tensors[name] for name, tensor in picked.items())


def test_a_convnext_file_of_its_authors() -> None:
    model = outline("convnext_atto", depths=(1, 1, 1, 1))
    tensors = timm.create_model("convnext_atto", depths=(1, 1, 1, 1)).state_dict()
    authors = {}
    for name, tensor in tensors.items():
        for stage in (1, 2, 3):
            name = name.replace(f"stages.{stage}.downsample", f"downsample_layers.{stage}")
        name = name.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".")
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        authors[name.replace("head.norm", "norm").replace("head.fc", "head")] = tensor
    picked = own_tensors(model, authors)
    prune(model)
    assert picked.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in picked.items())


def test_a_model_whose_maps_timm_cannot_compute() -> None:
    model = timm.create_model("resnet18")
    model.layer2 = nn.Linear(3, 3)
    with pytest.raises(UnknownModelError, match="cannot compute the feature maps of ResNet"):
        unused_modules(model)


def test_what_sizes_a_model_takes() -> None:
    assert takes(outline("levit_128s"), (224, 224))
    assert not takes(outline("levit_128s"), (208, 272))
    assert takes(timm.create_model("resnet18").to(torch.bfloat16), (208, 272))


def test_the_size_a_model_was_made_for() -> None:
    assert own_size(outline("samvit_base_patch16")) == (1024, 1024)
