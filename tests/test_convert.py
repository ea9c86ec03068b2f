from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from official import ENCODERS, features, random_state, save_checkpoint
from safetensors.torch import save_file

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import REGISTRY, BackboneRow, load_backbone, registry
from cosettle_adapter.backbones.weights import fingerprint
from cosettle_adapter.cli import main
from cosettle_adapter.convert import convert_checkpoint
from cosettle_adapter.errors import CorruptWeightsError

WIDTH, DEPTH = 96, 2
LINEAR = "adapter.adapter.adapter_linear"
NORM = "adapter.adapter.adapter_layer_norm1"


def small(row: BackboneRow, monkeypatch: pytest.MonkeyPatch) -> BackboneRow:
    """Register the same row with fewer channels and layers; what tells it apart stays."""
    options = {**row.options, "embed_dim": WIDTH, "depth": DEPTH}
    row = dataclasses.replace(row, options=options, width=WIDTH, depth=DEPTH, hub=None)
    monkeypatch.setitem(registry.REGISTRY, row.name, row)
    return row


@pytest.fixture
def mae(monkeypatch: pytest.MonkeyPatch) -> BackboneRow:
    return small(REGISTRY["mae-vitb16"], monkeypatch)


def mae_state() -> dict[str, torch.Tensor]:
    return random_state(ENCODERS["mae-vitb16"], width=WIDTH, depth=DEPTH)


def check_parity(row: BackboneRow, folder: Path) -> None:
    encoder = ENCODERS[row.name]
    state = random_state(encoder, width=row.width, depth=row.depth)
    file = save_checkpoint(folder / "checkpoint-4.pth", state)
    output = folder / "converted"
    command = ["convert", str(file), "--backbone", row.name, "-o", str(output), "--offline"]
    assert main(command) == 0
    adapter = CoSettleAdapter.from_pretrained(output)
    # the same file serves as the backbone's weights
    assert load_backbone(row.name, weights=file).fingerprint == adapter.config.fingerprint
    for height, width, tolerance in ((224, 224, 1e-5), (240, 400, 1e-4)):
        generator = torch.Generator().manual_seed(height)
        frames = torch.randint(
            0, 256, (1, 3, height, width), dtype=torch.uint8, generator=generator
        )
        expected = features(state, frames, encoder, row.depth)
        found = adapter(frames)
        assert found.shape == expected.shape == (1, row.width, height // 16, width // 16)
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error < tolerance, (row.name, height)


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ENCODERS)
def test_each_of_the_eight_equals_an_independent_implementation(
    name: str, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = REGISTRY[name]
    assert row.release
    if full:
        monkeypatch.setitem(registry.REGISTRY, name, dataclasses.replace(row, hub=None))
    else:
        small(row, monkeypatch)
    check_parity(REGISTRY[name], tmp_path)


def test_positions_of_another_interpolation_would_be_noticed(
    mae: BackboneRow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerance of the parity test separates the ways of resizing positions."""
    row = dataclasses.replace(mae, interpolation="size")
    monkeypatch.setitem(registry.REGISTRY, row.name, row)
    with pytest.raises(AssertionError, match="240"):
        check_parity(row, tmp_path)


def test_a_config_tells_where_it_came_from(mae: BackboneRow, tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path / "checkpoint-4.pth", mae_state(), base_model="mae")
    conversion = convert_checkpoint(file, mae)
    assert conversion.verdict.startswith("not compared")
    config = conversion.projection.config
    assert (config.kind, config.activation, config.layers) == ("linear", "tanh", (DEPTH - 1,))
    assert (config.norm, config.licence) == (True, "CC-BY-NC-4.0")
    assert (config.fit["epoch"], config.fit["source"]) == (4, "checkpoint-4.pth")
    assert config.fit["settings"] == {"blr": 1e-4, "base_model": "mae"}, "no paths of a machine"
    assert re.fullmatch(r"[0-9a-f]{64}", config.fit["source_sha256"])
    assert config.fingerprint == fingerprint(conversion.backbone)
    json.dumps(config.fit)


def test_deeper_heads_are_recognised(mae: BackboneRow, tmp_path: Path) -> None:
    state, count = mae_state(), 3
    weight, bias = (state.pop(f"{LINEAR}.{part}") for part in ("weight", "bias"))
    tokens = expected = torch.randn(5, WIDTH)
    for index in range(1, count + 1):
        state |= {f"{LINEAR}{index}.weight": weight * index, f"{LINEAR}{index}.bias": bias}
        expected = torch.tanh(expected) if index > 1 else expected
        expected = expected @ (weight * index).T + bias
    norm = [state[f"{NORM}.{part}"] for part in ("weight", "bias")]
    expected = torch.nn.functional.layer_norm(expected, (WIDTH,), *norm)
    projection = convert_checkpoint(save_checkpoint(tmp_path / "c.pth", state), mae).projection
    assert projection.config.kind == f"mlp{count}"
    torch.testing.assert_close(projection.project(tokens), expected, rtol=1e-4, atol=1e-4)


def test_precision_prefixes_and_containers_do_not_matter(mae: BackboneRow, tmp_path: Path) -> None:
    state = {f"module.{name}": tensor.half() for name, tensor in mae_state().items()}
    torch.save(state, tmp_path / "flat.pth")
    save_file(state, tmp_path / "flat.safetensors")
    save_checkpoint(tmp_path / "wrapped.pth", state)
    for name in ("flat.pth", "flat.safetensors", "wrapped.pth"):
        conversion = convert_checkpoint(tmp_path / name, mae)
        assert {t.dtype for t in conversion.backbone.values()} == {torch.float32}
        weight = conversion.projection.state_dict()["linears.0.weight"]
        assert torch.equal(weight, state[f"module.{LINEAR}.weight"].float())


WRONG: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "a backbone alone": (
        {f"{part}.{leaf}": None for part in (LINEAR, NORM) for leaf in ("weight", "bias")},
        "holds no projection.*backbone_weights",
    ),
    "half a head": ({f"{NORM}.bias": None}, "Missing.*norm.bias"),
    "not finite": (
        {f"{LINEAR}.bias": torch.full((WIDTH,), torch.nan)},
        "linears.0.bias: values that are not finite",
    ),
    "a second adapter": (
        {"adapter.adapter2.adapter_linear.weight": torch.ones(2)},
        "a projection for mae-vitb16: Unexpected.*adapter2.adapter_linear.weight",
    ),
    "another model": ({"register_tokens": torch.ones(1, 4, WIDTH)}, "Unexpected .*reg_token"),
    "another model, by its settings": ({}, "on 'dino', expected 'mae'"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_checkpoint_is_one_line_and_writes_nothing(
    fault: str, mae: BackboneRow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = WRONG[fault]
    state = {name: t for name, t in (mae_state() | changes).items() if t is not None}
    trained_on = "dino" if "settings" in fault else "mae"
    file = save_checkpoint(tmp_path / "checkpoint-4.pth", state, base_model=trained_on)
    with pytest.raises(CorruptWeightsError, match=message) as caught:
        convert_checkpoint(file, mae)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    output = tmp_path / "out"
    assert main(["convert", str(file), "--backbone", mae.name, "-o", str(output), "--offline"]) == 1
    assert "error:" in capsys.readouterr().err
    assert not output.exists()
