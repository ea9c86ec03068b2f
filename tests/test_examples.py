"""Every example runs as its own first lines say, on less: ``Try: python examples/<name>.py``.

Each in an empty folder; what it prints has to bear out what it is there to show. Examples that need
data of yours are tested beside what they call.
"""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from golden_inputs import tiny_weights

from cosettle_adapter.backbones import VisionTransformerBackbone

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
NEED_DATA = {"dino_tracker_features", "evaluate_davis"}
NEEDS = {"onnx_runtime": ("onnxruntime", "onnxscript")}
SMALLER = {
    "onnx_runtime": "--model tiny --size 64 96 --frames 4",
    "pca_film": "--frames 3 --size 112",
    "propagate_mask": "--frames 5",
    "propagate_mask_texture": "--frames 3 --texture --size 448",
    "timm_style_features": "--frames 6",
    "track_points": "--frames 6",
    "training_loop": "--frames 9 --steps 60",
}
NUMBER = r"(\d+\.\d+)"


@pytest.fixture
def printed(
    real_backbone: VisionTransformerBackbone,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What the example that a test is named after prints."""
    del real_backbone  # only to fetch or skip
    name = request.node.name.removeprefix("test_")
    for module in ("av", "skimage", *NEEDS.get(name, ())):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    if name == "onnx_runtime":
        shutil.copytree(Path(__file__).with_name("golden") / "format1", "tiny")
        tiny_weights(tmp_path).rename("tiny/backbone.safetensors")
    example = str(EXAMPLES[name.removesuffix("_texture")])
    monkeypatch.setattr(sys, "argv", [example, *SMALLER.get(name, "").split()])
    runpy.run_path(example, run_name="__main__")
    return capsys.readouterr().out


def numbers(pattern: str, text: str) -> tuple[float, ...]:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in:\n{text}"
    return tuple(map(float, found.groups()))


def test_training_loop(printed: str) -> None:
    seen, late = numbers(rf"adapted +{NUMBER} +{NUMBER}", printed)
    assert seen > 80
    assert late > 40


def test_timm_style_features(printed: str) -> None:
    errors = [float(error) for error in re.findall(rf"{NUMBER} px", printed)]
    assert len(errors) == 4
    last_block, adapted = errors[-2:]  # an early block of its own may track as well
    assert adapted < last_block


def test_transformers_style(printed: str) -> None:
    raw, adapted = numbers(rf"  {NUMBER} %\n  {NUMBER} %", printed)
    assert min(raw, adapted) > 30, "of 352 tokens; which finds more depends on the clip"
    assert "last_hidden_state (2, 352, 384)" in printed


def test_propagate_mask(printed: str, tmp_path: Path) -> None:
    (overlap,) = numbers(rf"true masks: {NUMBER} %", printed)
    assert overlap > 50
    assert (tmp_path / "masks.mp4").stat().st_size > 10_000


def test_propagate_mask_texture(printed: str) -> None:
    (own,) = numbers(rf"own label: {NUMBER} %", printed)
    assert "8 label(s) through 3 frames" in printed
    assert own > 40, "of eight stripes"


def test_track_points(printed: str, tmp_path: Path) -> None:
    raw, adapted = (float(error) for error in re.findall(rf"{NUMBER} px", printed))
    assert adapted < raw
    assert (tmp_path / "tracks.mp4").stat().st_size > 10_000


def test_pca_film(printed: str, tmp_path: Path) -> None:
    assert "3 frames: pca.mp4" in printed
    assert (tmp_path / "pca.mp4").stat().st_size > 10_000


def test_onnx_runtime(printed: str, tmp_path: Path) -> None:
    (difference,) = numbers(r"largest difference of [\d,]+ numbers: (\S+)", printed)
    assert difference < 1e-4
    assert re.search(r"on the object in \d of 4", printed), printed
    assert (tmp_path / "adapted.onnx").is_file()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = EXAMPLES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) < (300 if name in NEED_DATA else 120)
    said = ast.get_docstring(ast.parse(text)) or ""
    assert f"python examples/{name}.py" in said
    tested = f"test_{name}" in globals()
    assert (f"Try: python examples/{name}.py\n" in said) is tested
    assert tested is (name not in NEED_DATA)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
    assert left.value.code == 0
    assert "usage:" in capsys.readouterr().out.lower()
