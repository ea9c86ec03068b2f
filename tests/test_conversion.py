from __future__ import annotations

import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from official import ENCODERS, features, random_state, save_checkpoint
from safetensors.torch import load_file, save_file

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import REGISTRY, BackboneRow, load_backbone, registry
from cosettle_adapter.backbones.weights import LoadedWeights, fingerprint
from cosettle_adapter.cli import main
from cosettle_adapter.conversion import compare, convert_checkpoint
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError

WIDTH, DEPTH = 96, 3


def small(row: BackboneRow, width: int = WIDTH, depth: int = DEPTH) -> BackboneRow:
    """The same row with fewer channels and blocks; everything that tells it apart stays."""
    options = {**row.options, "embed_dim": width, "depth": depth}
    return dataclasses.replace(row, options=options, width=width, depth=depth, hub=None)


@pytest.fixture
def mae(monkeypatch: pytest.MonkeyPatch) -> BackboneRow:
    row = small(REGISTRY["mae-vitb16"])
    monkeypatch.setitem(registry.REGISTRY, row.name, row)
    return row


def mae_state(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**random_state(ENCODERS["mae-vitb16"], width=WIDTH, depth=DEPTH), **changes}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def check_parity(row: BackboneRow, width: int, depth: int, folder: Path) -> None:
    encoder = ENCODERS[row.name]
    state = random_state(encoder, width=width, depth=depth)
    file = save_checkpoint(folder / "checkpoint-4.pth", state)
    output = folder / "converted"
    command = ["convert", str(file), "--backbone", row.name, "-o", str(output), "--offline"]
    assert main(command) == 0
    adapter = CoSettleAdapter.from_pretrained(output)
    for height, width_pixels, tolerance in ((224, 224, 1e-5), (480, 880, 1e-4)):
        generator = torch.Generator().manual_seed(height)
        frames = torch.randint(
            0, 256, (1, 3, height, width_pixels), dtype=torch.uint8, generator=generator
        )
        expected = features(state, frames, encoder, depth)
        found = adapter(frames)
        assert found.shape == expected.shape == (1, width, height // 16, width_pixels // 16)
        assert relative(found, expected) < tolerance, (row.name, height)


@pytest.mark.parametrize("name", ENCODERS)
def test_each_of_the_eight_equals_an_independent_implementation(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = small(REGISTRY[name])
    monkeypatch.setitem(registry.REGISTRY, name, row)
    check_parity(row, WIDTH, DEPTH, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_each_of_the_eight_at_full_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = dataclasses.replace(REGISTRY[name], hub=None)
    monkeypatch.setitem(registry.REGISTRY, name, row)
    check_parity(row, 768, 12, tmp_path)


def test_the_eight_are_the_rows_with_a_release() -> None:
    assert {name for name, row in REGISTRY.items() if row.release} == set(ENCODERS)


def test_positions_of_another_interpolation_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerance of the parity test separates the ways of resizing positions."""
    row = dataclasses.replace(small(REGISTRY["mae-vitb16"]), interpolation="size")
    monkeypatch.setitem(registry.REGISTRY, row.name, row)
    with pytest.raises(AssertionError, match="480"):
        check_parity(row, WIDTH, DEPTH, tmp_path)


def test_a_config_tells_where_it_came_from(mae: BackboneRow, tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path / "checkpoint-4.pth", mae_state())
    conversion = convert_checkpoint(file, mae)
    config = conversion.projection.config
    assert (config.kind, config.activation, config.layers) == ("linear", "tanh", (DEPTH - 1,))
    assert config.norm is True
    assert config.licence == "CC-BY-NC-4.0"
    assert config.fit["epoch"] == 4
    assert config.fit["settings"] == {"blr": 1e-4}, "paths of somebody's machine stay out"
    assert re.fullmatch(r"[0-9a-f]{64}", config.fit["source_sha256"])
    assert config.fingerprint == fingerprint(conversion.backbone)
    json.dumps(config.fit)


@pytest.mark.parametrize("kind", ["mlp2", "mlp3"])
def test_deeper_heads_are_recognised(kind: str, mae: BackboneRow, tmp_path: Path) -> None:
    state = mae_state()
    weight, bias = (
        state.pop(f"adapter.adapter.adapter_linear.{part}") for part in ("weight", "bias")
    )
    for index in range(int(kind[-1])):
        state[f"adapter.adapter.adapter_linear{index + 1}.weight"] = weight * (index + 1)
        state[f"adapter.adapter.adapter_linear{index + 1}.bias"] = bias
    projection = convert_checkpoint(save_checkpoint(tmp_path / "c.pth", state), mae).projection
    assert projection.config.kind == kind
    tokens = torch.randn(5, WIDTH)
    expected = tokens
    for index in range(int(kind[-1])):
        expected = torch.tanh(expected) if index else expected
        expected = expected @ (weight * (index + 1)).T + bias
    norm = [state[f"adapter.adapter.adapter_layer_norm1.{part}"] for part in ("weight", "bias")]
    expected = torch.nn.functional.layer_norm(expected, (WIDTH,), *norm)
    torch.testing.assert_close(projection.project(tokens), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_and_distributed_prefixes_are_undone(
    mae: BackboneRow, tmp_path: Path
) -> None:
    state = {f"module.{name}": tensor.half() for name, tensor in mae_state().items()}
    conversion = convert_checkpoint(save_checkpoint(tmp_path / "c.pth", state), mae)
    assert {t.dtype for t in conversion.backbone.values()} == {torch.float32}
    weight = conversion.projection.state_dict()["linears.0.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["module.adapter.adapter.adapter_linear.weight"].float())


def test_a_flat_state_dict_and_safetensors_are_read_as_well(
    mae: BackboneRow, tmp_path: Path
) -> None:
    state = mae_state()
    torch.save(state, tmp_path / "flat.pth")
    save_file(state, tmp_path / "flat.safetensors")
    wrapped = convert_checkpoint(save_checkpoint(tmp_path / "c.pth", state), mae)
    for file in ("flat.pth", "flat.safetensors"):
        flat = convert_checkpoint(tmp_path / file, mae)
        assert flat.projection.config.fingerprint == wrapped.projection.config.fingerprint


def test_the_same_backbone_is_recognised_and_not_stored_twice(
    mae: BackboneRow, tmp_path: Path
) -> None:
    conversion = convert_checkpoint(save_checkpoint(tmp_path / "c.pth", mae_state()), mae)
    public = LoadedWeights(
        dict(conversion.backbone),
        conversion.projection.config.fingerprint,
        "a public tag",
        "c0ffee",
    )
    same = conversion.compared_with(public)
    assert same.comparison is not None
    assert same.comparison.same
    assert "the same model as a public tag" in same.verdict
    assert same.projection.config.backbone_revision == "c0ffee"
    conversion.save(tmp_path / "out")
    assert (tmp_path / "out" / "backbone.safetensors").is_file()
    same.save(tmp_path / "out")
    assert not (tmp_path / "out" / "backbone.safetensors").exists()


def test_another_backbone_is_told_tensor_by_tensor(mae: BackboneRow, tmp_path: Path) -> None:
    conversion = convert_checkpoint(save_checkpoint(tmp_path / "c.pth", mae_state()), mae)
    changed = {name: tensor.clone() for name, tensor in conversion.backbone.items()}
    changed["blocks.1.mlp.fc1.bias"][3] += 0.25
    different = conversion.compared_with(LoadedWeights(changed, "sha256:0", "a public tag"))
    assert different.comparison is not None
    assert different.comparison.different == ("blocks.1.mlp.fc1.bias",)
    assert different.comparison.largest == pytest.approx(0.25, rel=1e-5)
    assert "1 of " in different.verdict
    assert different.projection.config.backbone_revision is None
    assert conversion.projection.config.fit["backbone"] == "not compared", "the first is unchanged"
    different.save(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "backbone.safetensors")
    assert fingerprint(stored) == conversion.projection.config.fingerprint


def test_a_tensor_that_only_one_side_has_is_a_difference() -> None:
    reference = LoadedWeights({"a": torch.ones(2), "b": torch.ones(2)}, "", "public")
    comparison = compare({"a": torch.ones(2), "c": torch.ones(2)}, reference)
    assert comparison.different == ("b", "c")
    assert comparison.largest == float("inf")


WRONG = {
    "a backbone alone": (
        lambda state: {name: t for name, t in state.items() if "adapter" not in name},
        "holds no projection.*backbone_weights",
    ),
    "half a head": (
        lambda state: {name: t for name, t in state.items() if "layer_norm1.bias" not in name},
        "missing .*adapter_layer_norm1.bias",
    ),
    "a head of another width": (
        lambda state: {**state, "adapter.adapter.adapter_linear.weight": torch.ones(4, 4)},
        r"adapter_linear.weight is \(4, 4\), expected \(96, 96\)",
    ),
    "a head that is not finite": (
        lambda state: {
            **state,
            "adapter.adapter.adapter_linear.bias": torch.full((WIDTH,), float("nan")),
        },
        "adapter_linear.bias is not finite",
    ),
    "another model": (
        lambda state: {
            **{name: t for name, t in state.items() if "blocks.2" not in name},
            "extra.weight": torch.ones(1),
        },
        r"12 missing \(blocks.2.norm1.weight, .* and 4 more\); 1 unexpected \(extra.weight\)",
    ),
    "swapped shapes": (
        lambda state: {**state, "blocks.0.mlp.fc1.weight": state["blocks.0.mlp.fc2.weight"]},
        r"blocks.0.mlp.fc1.weight is \(96, 384\), expected \(384, 96\)",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_checkpoint_is_one_line_and_writes_nothing(
    fault: str, mae: BackboneRow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = WRONG[fault]
    file = save_checkpoint(tmp_path / "checkpoint-4.pth", change(mae_state()))
    with pytest.raises(CorruptWeightsError, match=message) as caught:
        convert_checkpoint(file, mae)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    output = tmp_path / "out"
    assert main(["convert", str(file), "--backbone", mae.name, "-o", str(output), "--offline"]) == 1
    assert "error:" in capsys.readouterr().err
    assert not output.exists()


def test_another_models_checkpoint_is_refused(mae: BackboneRow, tmp_path: Path) -> None:
    state = random_state(ENCODERS["dinov2-vitb16-in1k"], width=WIDTH, depth=DEPTH)
    file = save_checkpoint(tmp_path / "c.pth", state)
    with pytest.raises(CorruptWeightsError, match=r"unexpected .*(reg_token|ls1.gamma)"):
        convert_checkpoint(file, mae)


def test_a_truncated_file_is_one_line(mae: BackboneRow, tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path / "c.pth", mae_state())
    content = file.read_bytes()
    for kept in (10, len(content) // 2, len(content) - 100):
        file.write_bytes(content[:kept])
        with pytest.raises(CorruptWeightsError, match="truncated or not a PyTorch") as caught:
            convert_checkpoint(file, mae)
        assert "\n" not in str(caught.value)


class Payload:
    """A pickle that creates a file when somebody unpickles it carelessly."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("protocol", ["zip", "legacy", "plain pickle"])
def test_code_in_a_pickle_is_never_run(protocol: str, mae: BackboneRow, tmp_path: Path) -> None:
    target = tmp_path / "created-by-the-payload"
    file = tmp_path / "checkpoint-4.pth"
    content = {"model": mae_state(), "args": Payload(target)}
    if protocol == "plain pickle":
        file.write_bytes(pickle.dumps(Payload(target)))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(
        CorruptWeightsError, match=r"not run and is not used|cannot be read|not a Py"
    ):
        convert_checkpoint(file, mae)
    assert not target.exists()
    torch.load(file, weights_only=False) if protocol == "zip" else None
    assert target.exists() is (protocol == "zip"), "the payload itself works"


def test_a_missing_file_is_told(mae: BackboneRow, tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailableError, match="does not exist"):
        convert_checkpoint(tmp_path / "nowhere.pth", mae)


def test_a_checkpoint_says_itself_which_backbone_it_was_trained_on(
    mae: BackboneRow, tmp_path: Path
) -> None:
    """Names alone do not tell one plain ViT-B/16 from another."""
    file = save_checkpoint(tmp_path / "c.pth", mae_state(), base_model="dino")
    with pytest.raises(CorruptWeightsError, match="was trained on 'dino', not on 'mae'"):
        convert_checkpoint(file, mae)
    convert_checkpoint(save_checkpoint(file, mae_state(), base_model="mae"), mae)


@pytest.mark.parametrize("name", ["adapter.extra.weight", "adapter.adapter2.adapter_linear.weight"])
def test_what_else_an_adapter_holds_is_not_swallowed(
    name: str, mae: BackboneRow, tmp_path: Path
) -> None:
    file = save_checkpoint(tmp_path / "c.pth", mae_state(**{name: torch.ones(2)}))
    with pytest.raises(CorruptWeightsError, match=f"unexpected {name}"):
        convert_checkpoint(file, mae)


def test_a_backbone_that_is_not_finite_is_refused(mae: BackboneRow, tmp_path: Path) -> None:
    state = mae_state()
    state["blocks.1.norm1.bias"][0] = float("nan")
    with pytest.raises(CorruptWeightsError, match=r"blocks.1.norm1.bias hold values"):
        convert_checkpoint(save_checkpoint(tmp_path / "c.pth", state), mae)


def test_a_converted_folder_survives_saving(mae: BackboneRow, tmp_path: Path) -> None:
    convert_checkpoint(save_checkpoint(tmp_path / "c.pth", mae_state()), mae).save(tmp_path / "a")
    adapter = CoSettleAdapter.from_pretrained(tmp_path / "a")
    adapter.save_pretrained(tmp_path / "b")
    frames = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    again = CoSettleAdapter.from_pretrained(tmp_path / "b")
    assert torch.equal(again(frames), adapter(frames))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_released_checkpoint_serves_as_backbone_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = small(REGISTRY[name])
    monkeypatch.setitem(registry.REGISTRY, name, row)
    state = random_state(ENCODERS[name], width=WIDTH, depth=DEPTH)
    file = save_checkpoint(tmp_path / "c.pth", state)
    converted = convert_checkpoint(file, row)
    assert load_backbone(name, weights=file).fingerprint == fingerprint(converted.backbone)
