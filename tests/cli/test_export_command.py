from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_fakes import SMALL_VIT

from helpers import write_video

pytestmark = pytest.mark.usefixtures("small_encoder")
Run = Callable[..., str]
START = ("export", SMALL_VIT.name, "--backbone-weights", "weights.safetensors", "--layer", "0")
START = (*START, "--size", "64")


def test_a_program_is_described_and_compared_on_a_video(run: Run) -> None:
    write_video(Path("clip.mp4"), frames=5, height=72, width=96)
    said = run(*START, "96", "-o", "new/model.pt2", "--check-on", "clip.mp4")
    assert "input   frames uint8 (batch, 3, 64, 96)" in said
    assert "output  features float32 (batch, 32, 4, 6)" in said
    assert "of PyTorch on 3 frame(s)" in said
    assert Path("new/model.pt2").is_file()


def test_a_program_replaces_an_earlier_one_only_if_told(run: Run) -> None:
    path = Path("model.pt2")
    path.write_bytes(b"an earlier one")
    choices = ["--no-preprocessing", "--no-check", "--static-batch", "2", "--stride", "8"]
    said = run(*START, "64", "-o", path, *choices, status=1)
    assert "model.pt2 exists already; give --overwrite" in said
    assert path.read_bytes() == b"an earlier one"
    said = run(*START, "64", "-o", path, *choices, "--overwrite")
    assert "input   images float32 (2, 3, 64, 64)  RGB, (x - [0.485" in said
    assert "parity  not checked" in said
    loaded = torch.export.load(path).module()
    assert loaded(torch.zeros(2, 3, 64, 64)).shape == (2, 32, 7, 7)


def test_a_missing_extra_is_told_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    Path("weights.safetensors").unlink()
    said = run(*START, "64", "-o", "model.onnx", status=1)
    assert "pip install 'cosettle-adapter[export]'" in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("65 -o model.pt2", "the nearest size that does is 64 x 64"),
        ("64 -o model.trt", "got model.trt, expected an output file"),
        ("64 -o model.pt2 --check-on a.mp4 --no-check", "contradict each other"),
        ("64 -o model.pt2 --check-on a.mp4", "a.mp4"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments: str, told: str, run: Run) -> None:
    assert told in run(*START, *arguments.split(), status=1)
    assert not list(Path().glob("model.*"))
