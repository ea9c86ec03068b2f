from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from export_fakes import ROWS
from PIL import Image

from cosettle_adapter import CoSettleAdapter, hub
from cosettle_adapter.backbones import REGISTRY, load_backbone
from cosettle_adapter.backbones.weights import LoadedWeights, fingerprint
from cosettle_adapter.cli import main
from cosettle_adapter.extraction import read_features
from cosettle_adapter.hub import list_models

from helpers import REAL, projection_for, tiny_state, write_video

QUICK = {
    "train": ["--epochs", "1", "--size", "56", "--batch-size", "2", "--pairs-per-clip", "2"],
    "fit": ["--rendered", "1", "--pairs", "1", "--size", "56"],
    "evaluate": ["--size", "140x196"],
}
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the clip and the clips/ that the README speaks of."""
    write_video(tmp_path / "clip.mp4", frames=10, height=300, width=420)
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / "clips" / name, frames=12, height=84, width=84, noisy=True)
    write_masks(tmp_path / "my-clips" / "square", frames=4, height=140, width=196)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small random encoder and projection under the name that the README uses."""
    row = dataclasses.replace(ROWS["dinov2"], name=REAL)
    state = tiny_state(row)
    loaded = LoadedWeights(state, fingerprint(state), "random")
    monkeypatch.setitem(REGISTRY, REAL, row)
    monkeypatch.setattr("cosettle_adapter.backbones.load_weights", lambda *_, **__: loaded)
    projection = projection_for(load_backbone(REAL), layers=(1,), averaging=0.2, recipe=1)
    projection.save(tmp_path / "projections" / REAL)
    monkeypatch.setattr(hub, "_BUNDLED", tmp_path / "projections")


def write_masks(folder: Path, *, frames: int, height: int, width: int) -> None:
    """A moving square as ``frames/`` and ``masks/``."""
    for kind in ("frames", "masks"):
        (folder / kind).mkdir(parents=True)
    for t in range(frames):
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[40:100, 30 + 14 * t : 90 + 14 * t] = 1
        Image.fromarray(mask).save(folder / "masks" / f"{t:03d}.png")
        Image.fromarray(60 + 150 * mask).convert("RGB").save(folder / "frames" / f"{t:03d}.png")


@pytest.mark.usefixtures("real_backbone", "workplace")
def test_the_snippet_prints_the_shapes_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = blocks("python")
    exec(compile(snippet, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[:1] == re.findall(r"print\(.*\)  # (torch\.Size.*)", snippet)
    assert [line.split("]")[0] for line in printed[1:]] == [
        "torch.Size([8, 384, 20, 28",
        "torch.Size([2, 384, 20, 28",
    ]


@pytest.mark.usefixtures("small_model")
def test_the_commands_work(workplace: Path) -> None:
    commands = [
        shlex.split(line)[1:]
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("cosettle-adapter ")
    ]
    names = ["list", "extract", "extract", "evaluate", "fit", "train", "export"]
    assert [command[0] for command in commands] == names
    for command in commands:
        assert main([*command, *QUICK.get(command[0], [])]) == 0
    features = read_features("clip.safetensors").features
    assert tuple(features.shape) == (10, 48, 20, 28)
    assert len(list((workplace / "features").glob("*.zarr"))) == len(list(Path("clips").iterdir()))
    assert (workplace / "adapter.onnx").is_file()
    assert (workplace / "my-projection" / "config.json").is_file()
    assert CoSettleAdapter.from_pretrained("trained").config.fit["method"] == "train"
    results = json.loads((workplace / "results.json").read_text())
    assert results["total"]["adapted"]["J mean"] > 0.5


def test_ci_runs_the_test_command_of_the_readme() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "grep -m1 'pytest$' README.md" in ci
    command = next(line for line in README.splitlines() if line.endswith("pytest"))
    assert '".[dev]"' in command


def test_it_is_complete() -> None:
    for page in (ROOT / "README.md", *(ROOT / "weights_cards").glob("*.md")):
        assert "@@" not in page.read_text(encoding="utf-8"), page  # a figure to fill in
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target
    for model in list_models():
        assert not model.has_projection or model.name in README
