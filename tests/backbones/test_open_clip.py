from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor

from cosettle_adapter.backbones import BackboneRow, build_backbone, lookup
from cosettle_adapter.backbones.backbone import Backbone
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.backbones.open_clip import open_clip_row as resolve
from cosettle_adapter.backbones.rows import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPENAI_MEAN,
    OPENAI_STD,
)
from cosettle_adapter.errors import UnknownModelError

WIDTH = 64
SMALL_TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
Changes = Callable[..., None]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Changes:
    """Make every architecture of open_clip a small one of the same kind."""

    def shrink(**changes: object) -> None:
        def config_of(name: str) -> dict[str, Any]:
            config: dict[str, Any] = original(name)
            vision = config["vision_cfg"]
            if "timm_model_name" not in vision:
                patch = vision["patch_size"]
                vision |= {"layers": 2, "width": WIDTH, "head_width": 16, "image_size": 4 * patch}
            vision |= changes
            for text in ("text_cfg", "multimodal_cfg"):
                if text in config:
                    config[text] |= SMALL_TEXT
            return config

        original = open_clip.get_model_config
        for module in (open_clip, open_clip.factory):
            monkeypatch.setattr(module, "get_model_config", config_of)

    return shrink


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> Changes:
    """Make every model timm creates a small one of the same kind."""
    original = timm.create_model

    def shrink(**sizes: object) -> None:
        monkeypatch.setattr(
            timm, "create_model", lambda name, **options: original(name, **{**sizes, **options})
        )

    return shrink


def random_model(architecture: str, *, quick_gelu: bool = False) -> Any:
    """open_clip's own whole model, text tower and all, no parameter as it was initialised."""
    model = open_clip.create_model(
        architecture, force_quick_gelu=quick_gelu, load_weights=False
    ).eval()
    for parameter in model.parameters():
        parameter.data = parameter + 0.05 * torch.randn_like(parameter)
    return model


def backbone_of(model: Any, row: BackboneRow) -> Backbone:
    tensors = to_timm(model.state_dict(), row)
    return build_backbone(row, tensors, fingerprint="")


def their_tokens(tower: Any, images: Tensor, *, norm: bool) -> list[Tensor]:
    with torch.no_grad():
        tokens: list[Tensor] = tower.forward_intermediates(
            images, normalize_intermediates=norm, intermediates_only=True
        )["image_intermediates"]
    return tokens


def check(row: BackboneRow, name: str, *, quick_gelu: bool = False) -> None:
    """A row's tokens against open_clip's own, and at a size that open_clip does not take."""
    assert (row.name, row.kind) == (f"open_clip:{name}", "vit")
    assert (row.width, row.depth) == (WIDTH, 2)
    model = random_model(name.partition("/")[0], quick_gelu=quick_gelu)
    backbone = backbone_of(model, row)
    images = torch.randn(1, 3, row.image_size, row.image_size)
    for norm in (False, True):
        expected = their_tokens(model.visual, images, norm=norm and row.final_norm)
        found = backbone.intermediate_tokens(images, (0, 1), norm=norm and row.final_norm)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.patch_tokens(images), found[1])
    other_size = torch.randn(1, 3, 2 * row.patch, 7 * row.patch)
    assert backbone.patch_tokens(other_size).shape == (1, WIDTH, 2, 7)
    with pytest.raises((AssertionError, RuntimeError)):
        their_tokens(model.visual, other_size, norm=True)


@pytest.mark.parametrize(
    ("name", "quick_gelu", "final_norm"),
    [
        ("ViT-B-16/openai", True, True),
        ("ViT-B-16/datacomp_xl_s13b_b90k", False, True),
        ("ViT-B-16-quickgelu/metaclip_400m", True, True),
        ("ViT-H-14-378/dfn5b", True, True),
        ("ViT-H-14-CLIPA/datacomp1b", False, False),
        ("coca_ViT-B-32/laion2b_s13b_b90k", False, False),
        ("ViT-M-16-alt", False, True),
    ],
)
def test_own_towers(small: Changes, name: str, quick_gelu: bool, final_norm: bool) -> None:
    small()
    row = resolve(name)
    assert (row.image_size, row.final_norm) == (4 * row.patch, final_norm)
    assert ("QuickGELU" in row.note) == quick_gelu
    check(row, name, quick_gelu=quick_gelu)


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("ViT-B-16-SigLIP2/webli", "absolute"),
        ("EVA02-B-16/merged2b_s8b_b131k", "absolute+rotary"),
        ("EVA01-g-14/laion400m_s11b_b41k", "absolute"),
        ("PE-Core-B-16/meta", "absolute+rotary"),
        ("MobileCLIP2-L-14/dfndr2b", "absolute"),
    ],
)
def test_timms_vits(small: Changes, small_timm: Changes, name: str, positions: str) -> None:
    small()
    small_timm(depth=2, embed_dim=WIDTH, num_heads=4)
    row = resolve(name)
    assert row.positions == positions
    check(row, name)


def test_timms_feature_maps(small: Changes, small_timm: Changes) -> None:
    small()
    small_timm(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64))
    finer = resolve("convnext_base_w/laion2b_s13b_b82k@8")
    assert (finer.name.partition("@")[2], finer.patch, finer.width) == ("8", 8, 16)
    row = resolve("convnext_base_w/laion2b_s13b_b82k")
    assert (row.kind, row.architecture, row.patch) == ("features", "convnext_base", 16)
    assert (row.width, row.depth, row.final_norm) == (32, 4, False)
    model = random_model("convnext_base_w")
    images = torch.randn(1, 3, 96, 64)
    tokens = backbone_of(model, row).patch_tokens(images)
    expected = their_tokens(model.visual, images, norm=False)[2]
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_openais_resnets() -> None:
    for name, architecture in (("RN101", "resnet101"), ("RN50x64", "resnet50x64")):
        assert resolve(f"{name}/openai").architecture == f"{architecture}_clip_gap"
    row = resolve("RN50/openai")
    assert (row.kind, row.architecture, row.patch) == ("features", "resnet50_clip_gap", 16)
    assert (row.width, row.depth) == (1024, 5)
    tower = open_clip.modified_resnet.ModifiedResNet([3, 4, 6, 3], 16, 8, image_size=32, width=64)
    for name, tensor in tower.eval().state_dict().items():
        if name.endswith("bn3.weight"):  # zero, so that blocks would do nothing
            tensor.fill_(0.5)
    model = torch.nn.ModuleDict({"visual": tower})
    images = torch.randn(1, 3, 64, 96)
    tokens = backbone_of(model, row).patch_tokens(images)
    expected = their_tokens(tower, images, norm=False)[3]
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-16/openai", (OPENAI_MEAN, OPENAI_STD, "MIT", "CLIP")),
        ("ViT-B-16-SigLIP2/webli", (HALF, HALF, "Apache-2.0", "SigLIP")),
        ("ViT-L-14-CLIPA/datacomp1b", (IMAGENET_MEAN, IMAGENET_STD, "unstated", "CLIP")),
        ("ViT-B-16/metaclip_400m", (OPENAI_MEAN, OPENAI_STD, "CC-BY-NC-4.0", "CLIP")),
        ("coca_ViT-L-14/laion2b_s13b_b90k", (OPENAI_MEAN, OPENAI_STD, "MIT", "CoCa")),
    ],
)
def test_a_row_carries_what_its_tag_says(name: str, expected: tuple[object, ...]) -> None:
    row = lookup(f"open_clip:{name}")
    assert (row.mean, row.std, row.licence, row.family) == expected


def test_where_weights_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    row = resolve("ViT-B-16/OPENAI")
    assert row.name == "open_clip:ViT-B-16/openai", "spelled as open_clip lists it"
    assert (row.patch, row.width, row.depth, row.image_size) == (16, 768, 12, 224)
    assert row.hub is not None
    assert row.hub.repo == "timm/vit_base_patch16_clip_224.openai"
    assert row.hub.filenames == ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    vitamin = resolve("ViTamin-S/datacomp1b").hub
    assert vitamin is not None
    assert (vitamin.repo, vitamin.filenames) == ("jienengchen/ViTamin-S", ("pytorch_model.bin",))
    nowhere = resolve("ViT-L-14-worldwide-quickgelu")
    assert (nowhere.name, nowhere.hub) == ("open_clip:ViT-L-14-worldwide-quickgelu", None)
    assert nowhere.note.startswith("QuickGELU; ")
    assert "pass backbone_weights=PATH" in nowhere.note
    elsewhere = {"url": "https://x.org/ViT-B-16.pt"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: elsewhere)
    row = resolve("ViT-B-16/openai")
    assert row.hub is None
    assert "download https://x.org/ViT-B-16.pt and pass backbone_weights=PATH" in row.note
    assert (row.mean, row.std) == (OPENAI_MEAN, OPENAI_STD)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_bass_w/laion2b", r"no architecture 'convnext_bass_w'.*convnext_bas"),
        ("ViT-M-16/openai", r"Its tags: none; write open_clip:ViT-M-16, with backbone_weights"),
        ("ViT-L-14-336/openia", r"no tag 'openia'\. Did you mean 'openai'"),
        ("ViT-B-32", r"needs a tag\. Its tags: ([^,]+, ){9,}\.\.\.; write .*ViT-B-32/openai"),
        ("convnext_base_w/laion2b_s13b_b82k@7", "no stage with 7 pixels"),
        ("ViT-B-16/openai@8", r"all layers of ViT-B-16 have one resolution; omit @8"),
    ],
)
def test_what_open_clip_does_not_have_is_said(name: str, message: str) -> None:
    with pytest.raises(UnknownModelError, match=message):
        resolve(name)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scaled_cosine_attn": True}, "scaled_cosine_attn=True"),
        ({"attentional_pool": "parallel"}, "attentional_pool='parallel'"),
        ({"image_size": [224, 448]}, r"image_size=\[224, 448\]"),
        ({"layers": [1, 1, 1, 1]}, r"layers=\[1, 1, 1, 1\]"),
    ],
)
def test_towers_timm_cannot_express(small: Changes, changes: dict[str, Any], named: str) -> None:
    small(**changes)
    with pytest.raises(UnknownModelError, match=rf"ViT-B-16/openai is not supported: .*{named}"):
        resolve("ViT-B-16/openai")
