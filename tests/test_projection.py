from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cosettle_adapter import Projection, ProjectionConfig
from cosettle_adapter.errors import ProjectionFormatError
from cosettle_adapter.projection import CONFIG_FILE, WEIGHTS_FILE

CONFIG = ProjectionConfig(
    backbone="dino-vitb16",
    fingerprint="sha256:0",
    layers=(11,),
    norm=True,
    in_width=24,
    out_width=24,
)


def replace(**changes: object) -> ProjectionConfig:
    return dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "matrices"), [("linear", 1), ("mlp2", 2), ("mlp3", 3)])
def test_tanh_follows_a_linear_map_and_stands_between_several(kind: str, matrices: int) -> None:
    projection = Projection(replace(kind=kind))
    assert len(projection.linears) == matrices
    tokens = torch.randn(2, 5, 24)
    expected = tokens
    for index, linear in enumerate(projection.linears):
        expected = torch.tanh(expected) if index else expected
        expected = expected @ linear.weight.T + linear.bias
    expected = torch.tanh(expected) if kind == "linear" else expected
    expected = expected - expected.mean(-1, keepdim=True)
    expected = expected / (expected.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(projection.project(tokens), expected)


def test_affine_has_neither_activation_nor_norm_and_begins_as_the_identity() -> None:
    features = 100 * torch.randn(1, 24, 2, 3)
    affine = Projection(replace(kind="affine"))
    torch.testing.assert_close(affine(features), features)
    with torch.no_grad():
        affine.linears[0].weight.mul_(3)
        affine.linears[0].bias.add_(1)
    torch.testing.assert_close(affine(features), 3 * features + 1)
    identity = Projection(replace(kind="identity"))
    assert not list(identity.parameters())
    assert torch.equal(identity(features), features)


@pytest.mark.parametrize("kind", ["linear", "mlp2", "mlp3", "affine", "identity"])
def test_save_and_load_are_bit_equal(kind: str, tmp_path: Path) -> None:
    config = replace(
        kind=kind, layers=(3, 7), fit={"method": "ridge"}, figures={"summary": "x"}, licence="MIT"
    )
    projection = Projection(config)
    projection.save(tmp_path)
    loaded = Projection.load(tmp_path)
    assert loaded.config == config
    assert loaded.state_dict().keys() == projection.state_dict().keys()
    for name, tensor in projection.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_a_map_is_projected_patch_by_patch() -> None:
    projection, features = Projection(replace(out_width=8)), torch.randn(2, 24, 3, 5)
    projected = projection(features)
    assert projected.shape == (2, 8, 3, 5)
    assert projected.is_contiguous()
    torch.testing.assert_close(projected[-1, :, -1, 0], projection.project(features[-1, :, -1, 0]))
    with pytest.raises(ValueError, match=r"expected features \(B, 24, h, w\), got \(1, 23, 2, 2\)"):
        Projection(CONFIG)(torch.zeros(1, 23, 2, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "mlp9"}, "unknown projection kind 'mlp9'; expected one of linear, mlp2"),
        ({"activation": "swish"}, "unknown activation 'swish'; expected one of tanh"),
        ({"in_width": 0}, r"in_width and out_width must be positive integers, got \(0, 24\)"),
        ({"layers": ()}, "layers must be a list of at least one layer number"),
        ({"layers": 7}, r"config\.json: layers must be a list .*, got 7"),
        ({"kind": "identity", "out_width": 3}, "an identity has equal widths"),
        ({"averaging": 1.0}, r"averaging must be in \[0, 1\), got 1.0"),
        ({"format_version": 9}, "format_version 9, but this version"),
        ({"backbone": None}, r"missing fields \['backbone'\]"),
        ({"colour": 1}, r"unknown fields \['colour'\]"),
        ("{}", "format_version None"),
        ("{", r"config\.json"),
        ("[]", r"config\.json"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(
    tmp_path: Path, changes: dict[str, object] | str, message: str
) -> None:
    Projection(CONFIG).save(tmp_path)
    text = changes
    if isinstance(changes, dict):
        values = json.loads((tmp_path / CONFIG_FILE).read_text()) | changes
        if changes == {"backbone": None}:
            del values["backbone"]
        text = json.dumps(values)
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ProjectionFormatError, match=message):
        Projection.load(tmp_path)


def test_the_first_format_is_read_as_well() -> None:
    values = json.loads(replace(recipe=3, averaging=0.3).to_json())
    assert ProjectionConfig.from_json(json.dumps(values)) == replace(recipe=3, averaging=0.3)
    del values["recipe"], values["averaging"]
    assert ProjectionConfig.from_json(json.dumps({**values, "format_version": 1})) == CONFIG


def test_the_weights_must_be_those_of_the_config(tmp_path: Path) -> None:
    Projection(CONFIG).save(tmp_path)
    good = load_file(tmp_path / WEIGHTS_FILE)
    misshapen = {"extra": torch.zeros(1), "linears.0.weight": torch.zeros(24, 3)}
    for changes, message in (
        (misshapen, '(?s)config.json.*Unexpected.*"extra".*mismatch for linears.0.weight'),
        ({"norm.bias": good["norm.bias"].half()}, r"norm\.bias is torch\.float16"),
        ({"linears.0.bias": good["linears.0.bias"] / 0}, r"linears\.0\.bias .*not finite"),
    ):
        save_file({**good, **changes}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(ProjectionFormatError, match=message):
            Projection.load(tmp_path)


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_files_that_are_truncated_or_missing_are_named(tmp_path: Path, missing: str) -> None:
    Projection(CONFIG).save(tmp_path)
    weights = tmp_path / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ProjectionFormatError, match=r"projection\.safetensors is truncated"):
        Projection.load(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ProjectionFormatError, match=f"it has no {missing}"):
        Projection.load(tmp_path)
