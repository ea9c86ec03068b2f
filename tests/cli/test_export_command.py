from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from training_fakes import SMALL_VIT

from cosettle_adapter.backbones import registry
from cosettle_adapter.cli import main

from helpers import tiny_state, write_video


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the weights of a small registered encoder."""
    monkeypatch.setitem(registry.REGISTRY, SMALL_VIT.name, SMALL_VIT)
    monkeypatch.chdir(tmp_path)
    save_file(tiny_state(SMALL_VIT), tmp_path / "weights.safetensors")
    return tmp_path


def export(*arguments: str) -> int:
    start = ["export", SMALL_VIT.name, "--backbone-weights", "weights.safetensors"]
    return main([*start, "--layer", "0", *arguments])


def test_an_onnx_file_is_described(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    write_video(workplace / "clip.mp4", frames=5, height=72, width=96)
    assert export("--size", "64", "96", "-o", "model.onnx", "--check-on", "clip.mp4") == 0
    said = capsys.readouterr().out
    assert "input   frames uint8 (batch, 3, 64, 96)" in said
    assert "output  features float32 (batch, 32, 4, 6)" in said
    assert "of PyTorch on 3 frame(s)" in said
    assert (workplace / "model.onnx").is_file()


def test_a_program_is_written_by_its_suffix(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = ["--no-preprocessing", "--no-check", "--static-batch", "2", "--stride", "8"]
    assert export("--size", "64", "64", "-o", "new/model.pt2", *choices) == 0
    said = capsys.readouterr().out
    assert "input   images float32 (2, 3, 64, 64)  RGB, (x - [0.485" in said
    assert "parity  not checked" in said
    loaded = torch.export.load(workplace / "new" / "model.pt2").module()
    assert loaded(torch.zeros(2, 3, 64, 64)).shape == (2, 32, 7, 7)


def test_a_file_that_is_there_is_kept_unless_told_otherwise(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "model.pt2").write_bytes(b"an earlier one")
    arguments = ["--size", "64", "64", "-o", "model.pt2", "--no-check"]
    assert export(*arguments) == 1
    assert "model.pt2 exists already; give --overwrite" in capsys.readouterr().err
    assert (workplace / "model.pt2").read_bytes() == b"an earlier one"
    assert export(*arguments, "--overwrite") == 0
    assert (workplace / "model.pt2").stat().st_size > 1000


def test_a_missing_extra_is_told_before_a_model_is_loaded(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    (workplace / "weights.safetensors").unlink()
    assert export("--size", "64", "64", "-o", "model.onnx") == 1
    assert "pip install 'cosettle-adapter[export]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--size", "65", "64", "-o", "model.pt2"], "the nearest size that does is 64 x 64"),
        (["--size", "64", "64", "-o", "model.trt"], "got model.trt, expected an output file"),
        (["--size", "64", "64", "-o", "."], "with the suffix .onnx or .pt2"),
        (
            ["--size", "64", "64", "-o", "model.pt2", "--check-on", "a.mp4", "--no-check"],
            "contradict each other",
        ),
        (["--size", "64", "64", "-o", "model.pt2", "--check-on", "a.mp4"], "a.mp4"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    arguments: list[str], told: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(*arguments) == 1
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said
    assert not list(workplace.glob("model.*"))
