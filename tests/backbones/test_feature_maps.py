from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from cosettle_adapter.backbones import BackboneRow, Positions, build_backbone, load_backbone
from cosettle_adapter.backbones.architectures import meta_model
from cosettle_adapter.backbones.feature_maps import FeatureMapBackbone, on_grid
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.errors import GeometryError

_WINDOWS = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
_SMALL: dict[str, dict[str, Any]] = {  # timm architecture: options that make it smaller
    "resnet18": {},
    "convnextv2_atto": {"depths": (1, 1, 2, 1)},
    "swin_tiny_patch4_window7_224": _WINDOWS,
    "swinv2_tiny_window8_256": _WINDOWS,
    "hiera_tiny_224": {"embed_dim": 32, "stages": (1, 1, 2, 1)},
    "hiera_small_abswin_256": {"embed_dim": 32, "stages": (1, 1, 2, 1)},
    "vit_tiny_r_s16_p8_224": {"depth": 2},
    "beit_base_patch16_224": {"embed_dim": 48, "depth": 2, "num_heads": 2},
    "samvit_base_patch16_224": {
        "embed_dim": 48, "depth": 2, "num_heads": 2, "global_attn_indexes": (1,), "neck_chans": 16
    },
    "test_maxvit": {},
    "davit_tiny": {
        "embed_dims": (16, 32, 64, 128), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)
    },
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "dla46x_c": {},
    "levit_128s": {},
    "mvitv2_tiny": {},
}  # fmt: skip
_ODD_SIZES: dict[str, dict[str, Any]] = {  # what timm needs to be told to take them
    "swin_tiny_patch4_window7_224": {"strict_img_size": False},
    "swinv2_tiny_window8_256": {"strict_img_size": False},
    **{name: {} for name in ("resnet18", "convnextv2_atto", "davit_tiny", "pvt_v2_b0")},
}
_PATCH = {"vit_tiny_r_s16_p8_224": 32}
_AWKWARD = ("levit_128s", "mvitv2_tiny")  # they have tests of their own
FAMILIES = [name for name in _SMALL if name not in _AWKWARD]
_RECENT = ("beit_base_patch16_224", "dla46x_c", "mvitv2_tiny", "test_maxvit")
_TIMM = tuple(int(part) for part in timm.__version__.split(".")[:3])


def row_of(architecture: str, **changes: Any) -> BackboneRow:
    values: dict[str, Any] = {
        "name": f"small-{architecture}",
        "family": "random",
        "architecture": architecture,
        "patch": _PATCH.get(architecture, 16),
        "width": 0,
        "depth": 0,
        "image_size": 224,
        "options": _SMALL[architecture],
        "kind": "features",
        "final_norm": False,
        "licence": "Apache-2.0",
    }
    return BackboneRow(**{**values, **changes})


def randomise(model: nn.Module) -> nn.Module:
    """Give every tensor an effect: scales of zero and one would hide what is left out."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and (tensor.ndim == 1 or not tensor.abs().sum()):
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


@functools.cache
def published(architecture: str) -> nn.Module:
    """timm's model, classifier and all, as timm would publish it."""
    if architecture in _RECENT and _TIMM < (1, 0, 31):
        pytest.skip(f"timm {timm.__version__} is too early for all of {architecture}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(timm.create_model(architecture, **_SMALL[architecture]))


@functools.cache
def kept(architecture: str) -> dict[str, Tensor]:
    """What of the published tensors a backbone is built from."""
    tensors = published(architecture).state_dict()
    return to_timm(tensors, row_of(architecture))


def build(architecture: str, **options: Any) -> FeatureMapBackbone:
    tensors = kept(architecture)
    row = row_of(architecture, **options.pop("changes", {}))
    backbone = build_backbone(row, tensors, fingerprint="sha256:0", **options)
    assert isinstance(backbone, FeatureMapBackbone)
    return backbone


built = functools.cache(build)  # where a test does not change it


def images_for(backbone: FeatureMapBackbone, rows: int, columns: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    side = backbone.patch
    return torch.randn(batch, 3, rows * side, columns * side, generator=generator)


def own_images(architecture: str) -> Tensor:
    height, width = published(architecture).pretrained_cfg["input_size"][-2:]
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))


def timm_maps(architecture: str, images: Tensor, **options: Any) -> list[Tensor]:
    """Maps of timm's own ``features_only`` model with the same tensors, ``(B, C, h', w')``."""
    channels = built(architecture).widths
    model = timm.create_model(
        architecture,
        features_only=True,
        out_indices=tuple(range(len(channels))),
        **_SMALL[architecture],
        **options,
    )
    stored = {_plain(name): value for name, value in published(architecture).state_dict().items()}
    model.load_state_dict({name: stored[_plain(name)] for name in model.state_dict()})
    with torch.no_grad():
        maps = model.eval()(images)
    return [
        cells if cells.shape[1] == wide else rearrange(cells, "b h w c -> b c h w")
        for cells, wide in zip(maps, channels, strict=True)
    ]


def _plain(name: str) -> str:
    """A tensor's name without what ``features_only`` does to it."""
    return name.removeprefix("model.").replace("_", ".")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_grids_stage_equals_timms_also_at_odd_sizes_that_timm_takes(architecture: str) -> None:
    backbone = built(architecture)
    for images in (own_images(architecture), images_for(backbone, 13, 17)):
        options = {} if images.shape[-1] != 17 * backbone.patch else _ODD_SIZES.get(architecture)
        if options is not None:
            tokens = backbone.patch_tokens(images)
            grid = backbone.grid(*images.shape[-2:])
            assert tokens.shape == (len(images), backbone.width, *grid)
            expected = timm_maps(architecture, images, **options)[backbone.default_layer]
            torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_any_multiple_of_a_cell_gives_all_layers_on_one_grid_also_in_bfloat16(
    architecture: str,
) -> None:
    backbone = copy.deepcopy(built(architecture))
    images = images_for(backbone, 9, 13)
    every = range(backbone.depth)
    maps = backbone.intermediate_tokens(images, every)
    torch.testing.assert_close(maps[backbone.default_layer], backbone.patch_tokens(images))
    rough = backbone.to(torch.bfloat16).intermediate_tokens(images, every)
    for layer, near, far in zip(every, maps, rough, strict=True):
        assert near.shape == far.shape == (1, backbone.widths[layer], 9, 13)
        assert torch.isfinite(near).all()
        assert near.std() > 0
        assert far.dtype == torch.bfloat16
        assert float(torch.cosine_similarity(far.float(), near, dim=1).mean()) > 0.99
    assert backbone.to(torch.float32).patch_tokens(images).dtype == torch.float32


@pytest.mark.parametrize("architecture", ["hiera_tiny_224", "hiera_small_abswin_256"])
def test_hiera_equals_one_made_for_the_size(architecture: str) -> None:
    backbone = built(architecture)
    images = images_for(backbone, 13, 17)
    size = (224, 288)  # whole mask units of 32 pixels
    native = timm.create_model(architecture, img_size=size, **_SMALL[architecture]).eval()
    tensors = dict(published(architecture).state_dict())
    if architecture == "hiera_tiny_224":
        tensors["pos_embed"] = resample_abs_pos_embed(
            tensors["pos_embed"], [56, 72], [56, 56], num_prefix_tokens=0
        )
    native.load_state_dict(tensors)
    padded = F.pad(images, (0, 16, 0, 16), mode="replicate")
    with torch.no_grad():
        (expected,) = native.forward_intermediates(
            padded, indices=[backbone.default_layer], intermediates_only=True
        )
    torch.testing.assert_close(
        backbone.patch_tokens(images), expected[..., :13, :17], atol=1e-5, rtol=1e-4
    )


def test_maps_of_another_pitch_span_the_image() -> None:
    # Inception's convolutions without padding make 13 x 15 cells "of 16 pixels" of such an image.
    cells = torch.randn(1, 8, 13, 15)
    tokens = on_grid(cells, (240, 272), 16, (15, 17), 16)
    assert tokens.shape[-2:] == (15, 17)
    torch.testing.assert_close(tokens[..., 0, 0], cells[..., 0, 0])
    torch.testing.assert_close(tokens[..., -1, -1], cells[..., -1, -1])
    torch.testing.assert_close(tokens[..., 7, 8], cells[..., 6, 7])


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    pixels=st.sampled_from([2, 4, 8, 16, 32, 64]),
    rounding=st.sampled_from([math.floor, math.ceil]),
    extra=st.integers(0, 2),
)
def test_a_map_of_where_its_cells_are_stays_one(
    rows: int, columns: int, pixels: int, rounding: Any, extra: int
) -> None:
    """Cells that hold the pixel at their centre still do on the grid, away from the far edges."""
    patch, padding = 16, 32 * extra
    size = (rows * patch + padding, columns * patch + padding)
    height, width = (max(1, rounding(side / pixels)) for side in size)
    centres = [(torch.arange(count) + 0.5) * pixels for count in (height, width)]
    cells = torch.stack(torch.meshgrid(*centres, indexing="ij"))[None]
    tokens = on_grid(cells, size, pixels, (rows, columns), patch)
    assert tokens.shape == (1, 2, rows, columns)
    for axis, count in ((0, rows), (1, columns)):
        expected = (torch.arange(count) + 0.5) * patch
        expected = expected.clamp(centres[axis][0], centres[axis][-1])
        got = tokens[0, axis].amax(1 - axis)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("architecture", "stages"),
    [
        ("resnet18", ["conv1", "layer1", "layer2", "layer3", "layer4"]),
        ("hiera_tiny_224", ["blocks.0", "blocks.1", "blocks.3", "blocks.4"]),
    ],
)
def test_stages_after_the_deepest_asked_for_do_not_run(
    architecture: str, stages: list[str]
) -> None:
    backbone, calls = build(architecture), []
    for stage in stages:
        module = backbone.model.get_submodule(stage)
        module.register_forward_pre_hook(lambda *_, stage=stage: calls.append(stage))
    for layer in range(len(stages)):
        calls.clear()
        backbone.intermediate_tokens(own_images(architecture)[:1], (layer, 0))
        assert calls == stages[: layer + 1]


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("levit_128s", ".*Error"), ("mvitv2_tiny", "its positions are for one size")],
)
def test_a_size_that_a_model_cannot_take(architecture: str, reason: str) -> None:
    backbone = built(architecture)
    assert backbone.patch_tokens(torch.zeros(1, 3, 224, 224)).shape[-2:] == (14, 14)
    message = rf"{architecture} does not accept images of 208 x 272 pixels \({reason}.*224\)"
    with pytest.raises(GeometryError, match=message):
        backbone.patch_tokens(torch.zeros(1, 3, 208, 272))
    backbone = build("resnet18")
    backbone.model.layer2 = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):  # at its own size, the size is not to blame
        backbone.patch_tokens(torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("timm:test_convnext.r160_in1k", {"head.norm.weight", "head.fc.weight"}),
        ("timm:test_efficientnet.r160_in1k@8", {"conv_head.weight", "bn2.running_var"}),
        # blocks.0.norm1 of four stages, not of four encoders
        ("timm:pvt_v2_b0.in1k", {"head.weight"}),
    ],
)
def test_a_file_that_timm_saved_classifier_and_all(
    name: str, heads: set[str], tmp_path: Path
) -> None:
    model = randomise(timm.create_model(name.removeprefix("timm:").partition(".")[0]))
    tensors, file = model.state_dict(), tmp_path / "model.safetensors"
    assert heads <= tensors.keys()
    save_file({f"module.{n}": t for n, t in tensors.items() if n not in heads}, file)
    headless = load_backbone(name, weights=file)
    save_file(tensors, file)
    backbone = load_backbone(name, weights=file)
    assert backbone.fingerprint == headless.fingerprint
    assert not heads & {stored.removeprefix("model.") for stored in backbone.state_dict()}
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model.forward_intermediates(
            images, indices=[backbone.default_layer], intermediates_only=True
        )[0]
    torch.testing.assert_close(backbone.patch_tokens(images), expected)


@pytest.mark.parametrize("architecture", ["hiera_tiny_224", "beit_base_patch16_224"])
def test_copies_for_other_sizes_share_the_weights_and_do_not_leak(architecture: str) -> None:
    backbone = copy.deepcopy(built(architecture))
    images = own_images(architecture)
    before = backbone.patch_tokens(images)
    for side in range(1, 8):
        backbone.patch_tokens(images_for(backbone, side, side + 1))
    assert 1 < len(backbone._resized) <= 4
    assert torch.equal(backbone.patch_tokens(images), before)
    copied = list(backbone._resized.values())[-1]
    own = dict(backbone.model.named_parameters())
    apart = {name for name, tensor in copied.named_parameters() if tensor is not own[name]}
    assert all("pos" in name for name in apart)


@pytest.mark.parametrize("architecture", ["resnet18", "hiera_tiny_224"])
def test_input_gradients_on_request_also_after_inference(architecture: str) -> None:
    backbone = build(architecture, requires_input_grad=True)
    images = images_for(backbone, 3, 5)
    with torch.inference_mode():
        backbone.patch_tokens(images)
    images.requires_grad_()
    backbone.patch_tokens(images).square().sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().amax(dim=(0, 1)) > 0).float().mean() > 0.9
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_what_feature_maps_do_not_have_is_said() -> None:
    backbone = built("hiera_tiny_224")
    images = images_for(backbone, 2, 2)
    assert backbone.positions((2, 2)) == Positions()
    tokens = backbone.patch_tokens(images, norm=False, positions=Positions())
    assert torch.equal(tokens, backbone.patch_tokens(images))
    with pytest.raises(ValueError, match=r"absolute positions of shape None"):
        backbone.patch_tokens(images, positions=Positions(torch.zeros(1, 4, 384)))
    with pytest.raises(ValueError, match="returns feature maps, which have no final norm"):
        backbone.patch_tokens(images, norm=True)
    with pytest.raises(ValueError, match=r"0 to 3 .* got layer 4"):
        backbone.patch_tokens(images, layer=4)
    for stride in (8, 32):
        with pytest.raises(
            GeometryError, match=f"stride, got stride {stride}.*@<pixels per patch>"
        ):
            build("resnet18", stride=stride)
    with pytest.raises(GeometryError, match="no stage of 14 pixels; it has 2, 4, 8"):
        build("resnet18", changes={"patch": 14})


def test_a_swin_file_of_timms_early_years() -> None:
    row = row_of("swin_tiny_patch4_window7_224")
    tensors = published(row.architecture).state_dict()
    early = {}
    for name, tensor in tensors.items():
        for stage in (1, 2, 3):  # downsampling stood at the end of the stage before
            name = name.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")
        early[name.replace("head.fc.", "head.")] = tensor
    early["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    picked = to_timm(early, row)
    assert picked.keys() == meta_model(row).state_dict().keys()
    assert all(tensor is tensors[name] for name, tensor in picked.items())
