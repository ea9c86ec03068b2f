from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

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


def test_linear_is_linear_tanh_layernorm() -> None:
    projection = Projection(CONFIG)
    tokens = torch.randn(2, 5, 24)
    weight, bias = projection.linears[0].weight, projection.linears[0].bias
    hidden = torch.tanh(tokens @ weight.T + bias)
    centred = hidden - hidden.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(projection.project(tokens), expected)
    paper = Projection(replace(in_width=768, out_width=768))
    assert sum(parameter.numel() for parameter in paper.parameters()) == 592_128


@pytest.mark.parametrize(("kind", "matrices"), [("mlp2", 2), ("mlp3", 3)])
def test_mlps_put_the_activation_between_matrices(kind: str, matrices: int) -> None:
    projection = Projection(replace(kind=kind))
    assert len(projection.linears) == matrices
    tokens = torch.randn(3, 24)
    expected = tokens
    for index, linear in enumerate(projection.linears):
        expected = F.linear(expected, linear.weight, linear.bias)
        if index < matrices - 1:
            expected = torch.tanh(expected)
    torch.testing.assert_close(projection.project(tokens), F.layer_norm(expected, (24,)))


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
        ({"kind": "identity", "out_width": 3}, "an identity has equal widths"),
        ({"averaging": 1.0}, r"averaging must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ProjectionFormatError, match=message):
        replace(**changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.update(format_version=9), "format_version 9, but this version"),
        (lambda config: config.pop("backbone"), r"missing fields \['backbone'\]"),
        (lambda config: config.update(colour=1), r"unknown fields \['colour'\]"),
        (lambda config: config.update(layers=7), r"config\.json: layers must be a list .*, got 7"),
        (lambda config: config.clear(), "format_version None"),
    ],
)
def test_a_config_file_that_was_edited_is_refused(tmp_path: Path, edit, message: str) -> None:  # type: ignore[no-untyped-def]
    Projection(CONFIG).save(tmp_path)
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    edit(values)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(ProjectionFormatError, match=message):
        Projection.load(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / CONFIG_FILE).write_text(text)
        with pytest.raises(ProjectionFormatError, match=r"config\.json"):
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


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(OSError, match="No space left"):
        Projection(CONFIG).save(tmp_path)
    assert not list(tmp_path.iterdir())
