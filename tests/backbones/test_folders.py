"""Folders as transformers saves them, against transformers' own models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from test_layouts import VIT, file_of

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import REGISTRY, load_backbone, lookup
from cosettle_adapter.errors import CorruptWeightsError, UnknownModelError, WeightsUnavailableError
from cosettle_adapter.hub import is_published

from helpers import small_corpus

SIZE = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
DINOV2 = {**SIZE, "mlp_ratio": 3, "layerscale_value": 0.7}
GATED = {"use_swiglu_ffn": True, "qkv_bias": False}
DINOV3 = {**SIZE, "layerscale_value": 0.5, "rope_theta": 50.0}
MAE = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
NAFLEX = {**SIZE, "num_patches": 16}
TEXT = {**SIZE, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # a class of transformers; its config
    "CLIP tower": ("CLIPVisionModel", SIZE),
    "CLIP": ("CLIPModel", {"vision_config": {**SIZE, "hidden_act": "gelu"}, "text_config": TEXT}),
    "SigLIP": ("SiglipModel", {"vision_config": SIZE, "text_config": TEXT}),
    "SigLIP 2": ("Siglip2Model", {"vision_config": NAFLEX, "text_config": TEXT}),
    "DINOv2": ("Dinov2Model", DINOV2),
    "DINOv2, gated": ("Dinov2Model", {**DINOV2, **GATED}),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", DINOV2),
    "DINOv3": ("DINOv3ViTModel", {**DINOV3, "num_register_tokens": 3}),
    "DINOv3, gated": ("DINOv3ViTModel", {**DINOV3, "use_gated_mlp": True, "hidden_act": "silu"}),
    "DINOv3, no biases": ("DINOv3ViTModel", {**DINOV3, "query_bias": False, "value_bias": False}),
    "ViT": ("ViTForImageClassification", {**SIZE, "hidden_act": "relu"}),
    "ViT-MAE": ("ViTMAEForPreTraining", {**SIZE, **MAE, "mask_ratio": 0.0}),
    "I-JEPA": ("IJepaModel", SIZE),
}  # fmt: skip
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}


def put(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def saved(case: str, folder: Path) -> Any:
    """A random model of transformers, written to a folder; its encoder."""
    transformers = pytest.importorskip("transformers")
    name, settings = CASES[case]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    put(folder / "preprocessor_config.json", HALF)
    return getattr(model, "vision_model", getattr(model, "vit", model))


def last_hidden_state(encoder: Any, images: torch.Tensor, h: int, w: int) -> torch.Tensor:
    options: dict[str, Any] = {"interpolate_pos_encoding": True}
    kind = type(encoder).__name__
    if kind.startswith("Siglip2"):
        images = rearrange(images, "b c (h y) (w x) -> b (h w) (y x c)", h=h, w=w)
        mask, shapes = torch.ones(len(images), h * w), torch.tensor([[h, w]] * len(images))
        options = {"pixel_attention_mask": mask.int(), "spatial_shapes": shapes}
    elif kind.lower().startswith("dino"):
        options = {}
    elif kind.startswith("ViTMAE"):
        options["noise"] = torch.arange(h * w).expand(len(images), -1).float()  # keeps the order
    with torch.no_grad():
        tokens = encoder(images, **options).last_hidden_state[:, -h * w :]
    return rearrange(tokens, "b (h w) c -> b c h w", h=h)


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    encoder = saved(case, tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert (backbone.row.mean, backbone.row.std) == ((0.5,) * 3, (0.25,) * 3)
    for h, w in ((4, 4), (5, 3)):
        images = torch.randn(2, 3, h * 8, w * 8)
        expected = last_hidden_state(encoder, images, h, w)
        torch.testing.assert_close(backbone.patch_tokens(images), expected, atol=1e-5, rtol=1e-5)
    if "CLIP" in case:
        normed = encoder.post_layernorm(expected.movedim(1, -1)).movedim(-1, 1)
        found = backbone.patch_tokens(images, norm=True)
        torch.testing.assert_close(found, normed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_fields_that_a_config_omits_have_transformers_defaults(case: str, tmp_path: Path) -> None:
    saved(case, tmp_path)
    transformers = pytest.importorskip("transformers")
    whole, file = lookup(str(tmp_path)), tmp_path / "config.json"
    content = json.loads(file.read_text())
    tower = content.get("vision_config", content)
    kind = transformers.AutoConfig.for_model(tower["model_type"]).to_dict()
    removed = [key for key in tower if key != "model_type" and kind.get(key) == tower[key]]
    for key in removed:
        del tower[key]
    put(file, content)
    short = lookup(str(tmp_path))
    assert removed
    assert repr(short) == repr(whole)


# Without transformers: a folder that holds the ViT of ``official`` under transformers' names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {
        "model_type": "vit", "hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 384,
        "layer_norm_eps": 1e-6,
    }  # fmt: skip
    put(tmp_path / "config.json", config)
    put(tmp_path / "preprocessor_config.json", HALF)
    torch.save(file_of("Hugging Face ViT"), tmp_path / "pytorch_model.bin")
    return tmp_path


def test_weights_come_in_one_file_or_in_shards(folder: Path) -> None:
    whole = load_backbone(str(folder))
    tensors = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    places = {name: f"shard-{number % 3}.bin" for number, name in enumerate(tensors)}
    for shard in set(places.values()):
        part = {name: tensors[name] for name, place in places.items() if place == shard}
        torch.save(part, folder / shard)
    index = folder / "pytorch_model.bin.index.json"
    put(index, {"weight_map": places})
    assert load_backbone(str(folder)).fingerprint == whole.fingerprint
    for content, message in (
        ({"weight_map": {**places, "lost": "shard-0.bin"}}, r"tensors that no shard has.*lost"),
        ({"weight_map": 3}, "is not an index of weights"),
        ([], "is not an index of weights"),
    ):
        put(index, content)
        with pytest.raises(CorruptWeightsError, match=rf"{index.name}.*{message}"):
            load_backbone(str(folder))
    put(index, {"weight_map": {**places, "secret": "../../../etc/passwd"}})
    with pytest.raises(WeightsUnavailableError, match=rf"{folder.name}/passwd does not exist"):
        load_backbone(str(folder))
    index.unlink()
    with pytest.raises(WeightsUnavailableError, match=r"no weights; expected model\.safetensors"):
        load_backbone(str(folder))


def test_an_adapter_is_loaded_by_folder_and_comes_back(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_corpus(monkeypatch.setattr)
    cache, saved_to = (tmp_path_factory.mktemp(name) for name in ("cache", "saved"))
    adapter = CoSettleAdapter.from_pretrained(folder, cache_dir=cache)
    frames = torch.randint(0, 256, (2, 3, 64, 80), dtype=torch.uint8)
    features = adapter(frames)
    assert features.shape[-2:] == (4, 5)
    assert not is_published(folder)
    adapter.save_pretrained(saved_to)
    again = CoSettleAdapter.from_pretrained(folder, projection=saved_to)
    assert torch.equal(again(frames), features)
    assert adapter.config.backbone == f"transformers:{folder.name}", "no path of this machine"
    with pytest.raises(UnknownModelError, match=r"give its path as the model, and .*projection="):
        CoSettleAdapter.from_pretrained(saved_to)
    raw = CoSettleAdapter.raw(folder)
    assert raw.config.norm
    assert raw.backbone.row.folder == folder.resolve()
    # a Path is a folder, even if a model has the same name
    monkeypatch.chdir(folder.parent)
    folder = folder.rename("mae-vitb16")
    settling = CoSettleAdapter.from_pretrained(Path("mae-vitb16"), projection="settle")
    assert torch.equal(settling.backbone.vit.pos_embed, raw.backbone.vit.pos_embed)
    assert lookup("mae-vitb16").folder is None
    assert not is_published(Path("mae-vitb16"))
    # with a projection the folder is one of save_pretrained
    shutil.copy(saved_to / "projection.safetensors", folder)
    with pytest.raises(UnknownModelError, match="unknown backbone"):
        lookup(folder)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "bert"}, UnknownModelError, "model_type 'bert', expected one of clip, "),
        ({"hidden_act": "mish"}, UnknownModelError, r"timm has no model with hidden_act='mish'"),
        ({"patch_size": [16, 8]}, UnknownModelError, r"no model with patch_size=\[16, 8\]"),
        ({"num_channels": 4}, UnknownModelError, r"no model with num_channels=4"),
        ({"hidden_size": 48}, CorruptWeightsError, "these are not the weights of"),
    ],
)  # fmt: skip
def test_what_a_config_cannot_say(
    changes: dict[str, object], error: type[Exception], message: str, folder: Path
) -> None:
    content = json.loads((folder / "config.json").read_text())
    put(folder / "config.json", {**content, **changes})
    with pytest.raises(error, match=message):
        load_backbone(str(folder))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"preprocessor": {"do_normalize": False}}, ((0.0,) * 3, (1.0,) * 3)),
        ({"processor": {"image_processor": HALF}}, ((0.5,) * 3, (0.25,) * 3)),
        ({}, r"has no preprocessor_config\.json.*pass this folder as backbone_weights"),
        ({"preprocessor": {"image_mean": [0, 0, 0]}}, "has no image_mean and image_std"),
        ({"preprocessor": 3}, r"preprocessor_config\.json is not a JSON object"),
    ],
)
def test_normalisation_is_the_preprocessors(
    files: dict[str, object], expected: Any, folder: Path
) -> None:
    (folder / "preprocessor_config.json").unlink()
    for name, content in files.items():
        put(folder / f"{name}_config.json", content)
    if isinstance(expected, tuple):
        row = lookup(str(folder))
        assert (row.mean, row.std) == expected
        return
    with pytest.raises((WeightsUnavailableError, CorruptWeightsError), match=expected):
        lookup(str(folder))


def test_an_unknown_type_is_reported_before_a_missing_preprocessor(tmp_path: Path) -> None:
    put(tmp_path / "config.json", {"model_type": "bert"})
    with pytest.raises(UnknownModelError, match="has the model_type 'bert', expected one of clip"):
        lookup(str(tmp_path))


def test_a_named_model_takes_a_folder_unless_its_activation_differs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = VIT.row
    monkeypatch.setitem(REGISTRY, row.name, row)
    (folder / "preprocessor_config.json").unlink()
    backbone = load_backbone(row.name, weights=folder)
    assert (backbone.row, backbone.origin) == (row, str(folder))
    content = json.loads((folder / "config.json").read_text())
    put(folder / "config.json", {**content, "hidden_act": "quick_gelu"})
    with pytest.raises(CorruptWeightsError, match=r"config\.json has another activation than tiny"):
        load_backbone(row.name, weights=folder)
