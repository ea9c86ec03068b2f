from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
from official import quick_gelu
from torch.nn import functional as F

from cosettle_adapter.backbones import REGISTRY, BackboneRow, lookup
from cosettle_adapter.backbones.architectures import empty_model, meta_model
from cosettle_adapter.backbones.registry import feature_info
from cosettle_adapter.backbones.rows import OPENAI_MEAN
from cosettle_adapter.errors import UnknownModelError

_MODELS: dict[tuple[str, str], Any] = {}


def model_of(row: BackboneRow) -> Any:
    """The row's model without memory; several rows have the same."""
    key = (row.architecture, repr(row.options))
    if key not in _MODELS:
        _MODELS[key] = meta_model(row)
    return _MODELS[key]


@pytest.mark.parametrize("name", REGISTRY)
def test_a_row_describes_its_architecture_and_what_timm_publishes(name: str) -> None:
    row = REGISTRY[name]
    model = model_of(row)
    if row.kind == "vit":
        assert (model.embed_dim, len(model.blocks)) == (row.width, row.depth)
        assert model.patch_embed.patch_size == (row.patch, row.patch)
        assert model.patch_embed.grid_size == (row.image_size // row.patch,) * 2
        assert hasattr(model.norm, "weight") or not row.final_norm, "it must be a real norm"
        has = {"absolute": model.pos_embed, "rotary": getattr(model, "rope", None)}
        assert row.positions == "+".join(kind for kind in has if has[kind] is not None)
    else:
        stages = feature_info(model)
        assert len(stages) == row.depth
        assert (row.width, row.patch) in stages
        assert (row.final_norm, row.positions) == (False, "none")
    assert row.name == name
    assert row.hub or row.wheel or row.release or "backbone_weights" in row.note
    licences = {"Apache-2.0", "MIT", "BSD-3-Clause", "BSD-3-Clause-Clear", "CC-BY-NC-4.0"}
    assert row.licence in licences or row.licence.startswith("LicenseRef-")
    assert "NC" not in row.licence or "non-commercial" in row.note
    if row.hub is None:
        return
    owner, _, tag = row.hub.repo.partition("/")
    if owner != "timm":
        assert row.hub.filenames[0].endswith(".pth")
        return
    published = tag.replace("clip_", "clip_quickgelu_") if "openai" in tag else tag
    config = timm.get_pretrained_cfg(published)
    assert published.partition(".")[0] == row.architecture
    assert (config.hf_hub_id, config.input_size[-1]) == (row.hub.repo, row.image_size)
    assert (config.mean, config.std) == (row.mean, row.std) or name == "clip-vitb16"
    stated = (config.license or "").replace("dinov3-license", "LicenseRef-DINOv3").lower()
    assert stated == row.licence.lower() or row.family == "CLIP"


@pytest.mark.parametrize(
    ("name", "activation", "note"),
    [
        ("clip-vitb16", quick_gelu, "QuickGELU; ImageNet mean"),
        ("timm:vit_base_patch16_clip_224.openai", quick_gelu, "QuickGELU"),
        ("timm:vit_base_patch16_clip_224.laion2b", F.gelu, ""),
        ("siglip2-vitb16", functools.partial(F.gelu, approximate="tanh"), ""),
    ],
)
def test_an_encoder_has_the_activation_it_was_trained_with(
    name: str, activation: Any, note: str
) -> None:
    row = lookup(name)
    model: Any = meta_model(row)
    values = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(model.blocks[0].mlp.act(values), activation(values))
    assert row.note.startswith(note)
    assert model.norm.eps == (1e-5 if "clip" in name else 1e-6)


@pytest.mark.parametrize("name", ["dinov2-vits14", "dinov3-vits16", "resnet50", "swin-base"])
def test_a_model_whose_weights_come_from_a_file_is_not_initialised(name: str) -> None:
    before = torch.random.get_rng_state()
    with torch.profiler.profile() as profile:
        empty_model(REGISTRY[name])
    assert torch.equal(before, torch.random.get_rng_state())
    ran = {event.key for event in profile.key_averages()}
    assert "aten::empty" in ran
    assert not ran & {"aten::uniform_", "aten::normal_"}


# timm:<tag>


@pytest.mark.parametrize(
    ("tag", "kind", "patch", "width", "depth", "positions"),
    [
        ("resnet50.a1_in1k@8", "features", 8, 512, 5, "none"),
        ("convnextv2_base.fcmae@32", "features", 32, 1024, 4, "none"),
        ("hiera_base_224.mae", "features", 16, 384, 4, "none"),
        ("vit_tiny_r_s16_p8_224.augreg_in21k", "features", 32, 192, 12, "none"),
        ("levit_128s.fb_dist_in1k@64", "features", 64, 384, 3, "none"),
        ("vit_small_patch16_224.dino", "vit", 16, 384, 12, "absolute"),
        ("vit_small_patch16_224.dino@16", "features", 16, 384, 12, "none"),
        ("vit_small_patch16_dinov3.lvd1689m", "vit", 16, 384, 12, "rotary"),
        ("eva02_tiny_patch14_224.mim_in22k", "vit", 14, 192, 12, "absolute+rotary"),
    ],
)
def test_a_tag_is_a_row(
    tag: str, kind: str, patch: int, width: int, depth: int, positions: str
) -> None:
    row = lookup(f"timm:{tag}")
    assert row.name == f"timm:{tag}"
    assert (row.kind, row.patch, row.width, row.depth) == (kind, patch, width, depth)
    assert row.positions == positions
    assert row.hub is not None
    assert row.hub.repo == f"timm/{tag.partition('@')[0]}"
    assert row.architecture == tag.partition(".")[0]


@pytest.mark.parametrize("given", ["resnet50@8", "vit_small_patch16_224"])
def test_the_default_tag_is_filled_in(given: str) -> None:
    architecture, at, pixels = given.partition("@")
    tag = timm.get_pretrained_cfg(architecture).tag
    row = lookup(f"timm:{given}")
    assert tag
    assert row.name == f"timm:{architecture}.{tag}{at}{pixels}"
    assert lookup(row.name) == row  # a saved projection names its backbone so


def test_licence_mean_and_source_are_timms() -> None:
    assert lookup("timm:convnext_base.dinov3_lvd1689m").licence == "LicenseRef-DINOv3"
    assert lookup("timm:hiera_base_224.mae").licence == "CC-BY-NC-4.0"
    assert lookup("timm:vit_base_patch16_clip_224.openai").mean == OPENAI_MEAN
    row = lookup("timm:botnet50ts_256")
    assert (row.name, row.hub) == ("timm:botnet50ts_256", None)
    assert "backbone_weights=PATH" in row.note
    assert lookup(row.name) == row


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("resnt50", r"timm [\d.]+ has no model 'resnt50'\. Did you mean 'resnet50'"),
        # an old name that timm still maps, but has no configuration of
        ("vit_base_patch16_224_dino", r"no model .* Did you mean 'vit_base_patch16_224\.dino'"),
        ("dinov2-vitb-14", "Did you mean 'dinov2-vitb14'"),
        ("resnet50.a9_in1k", r"no weights 'resnet50\.a9_in1k'\. Did you mean 'resnet50\.\w+_in1k'"),
        ("botnet50ts_256.in1k", r"no weights .*\. It has no weights of botnet50ts_256"),
        ("resnet50@7", r"timm:resnet50\.\w+@7 has no stage with 7 pixels .* has 2, 4, 8, 16, 32$"),
        ("resnet50@", r"no stage with no number of pixels per patch; it has 2, 4"),
        ("vit_small_patch16_224.dino@8", r"no stage with 8 pixels per patch; it has 16$"),
    ],
)
def test_what_timm_does_not_have_is_named_with_what_comes_near(tag: str, message: str) -> None:
    with pytest.raises(UnknownModelError, match=message):
        lookup(tag if tag.startswith("dino") else f"timm:{tag}")
