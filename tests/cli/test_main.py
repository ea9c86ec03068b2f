from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cyclopts import Token

from cosettle_adapter import __version__
from cosettle_adapter.backbones import REGISTRY, VisionTransformerBackbone
from cosettle_adapter.cli import COMMANDS
from cosettle_adapter.cli.common import parse_size
from cosettle_adapter.extraction import read_features

from helpers import REAL, broken_off, write_video

Run = Callable[..., str]


def test_help_lists_the_commands_and_each_explains_itself(run: Run) -> None:
    assert __version__ in run("--version")
    assert all(command in run("--help") for command in COMMANDS)
    for command in COMMANDS:
        printed = run(command, "--help")
        assert "Usage: cosettle-adapter " + command in printed
        assert "``" not in printed
    assert "An interrupted run continues with --resume DIR" in run("train", "--help")


def test_list_shows_a_table_and_json(run: Run) -> None:
    table = run("list")
    assert REAL in table
    assert "CC-BY-NC-4.0" in table
    assert "dinov3-vitb16" not in table, "none is published"
    table = run("list", "--backbones")
    for name, row in REGISTRY.items():
        line = next(line for line in table.splitlines() if f" {name} " in line)
        for cell in (row.family, row.positions, row.licence.removeprefix("LicenseRef-")):
            assert cell in line
        assert "by the authors" in line or row.release is None
    models = {model["name"]: model for model in json.loads(run("list", "--json"))}
    assert models["dinov2-vitl14"]["width"] == 1024
    assert models["dinov2-vitl14"]["projection"] == "fitted on first use"


def test_download_tells_where_the_weights_came_from(
    real_backbone: VisionTransformerBackbone, run: Run
) -> None:
    printed = run("download", REAL, "--offline")
    assert real_backbone.fingerprint in printed
    assert "licence MIT" in printed


def test_a_truncated_source_is_told_and_fails(
    real_backbone: VisionTransformerBackbone, tmp_path: Path, run: Run
) -> None:
    whole = write_video(tmp_path / "w.mkv", frames=60, height=28, width=42, noisy=True)
    cut, out = broken_off(whole), tmp_path / "cut.safetensors"
    printed = run("extract", cut, "-o", out, "--layer", 0, status=2)
    assert "frames of its source were lost to damage: " in printed
    assert 0 < len(read_features(out).features) < 60


def test_a_mistake_is_one_sentence_and_a_status(
    real_backbone: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    for command, message in (
        ("extract nowhere.mp4 -o x.safetensors", "nowhere.mp4 does not exist"),
        ("extract clip.py -o x --model dinov2-vitb41", "Did you mean"),
        ("extract clip.py -o x --model dinov3-vitb16 --offline", "no weights for dinov3"),
        ("download clip-vitb61", "unknown backbone 'clip-vitb61'"),
        (f"fit --backbone {REAL} --data nowhere -o x", "nowhere does not exist"),
    ):
        assert message in run(*command.replace("clip.py", __file__).split(), status=1)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_answered(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cosettle_adapter.hub.list_models", interrupt)
    assert "no partial file was left behind" in run("list", status=130)


def test_sizes_are_a_shorter_side_or_both() -> None:
    for text, size in {"476": 476, "476x882": (476, 882), "28X42": (28, 42)}.items():
        assert parse_size(None, [Token(value=text)]) == size
    for text in ("", "big", "1x2x3", "-5", "0"):
        with pytest.raises(ValueError, match="expected 476 or 476x882"):
            parse_size(None, [Token(value=text)])


def test_importing_loads_nothing_heavy_and_no_extra() -> None:
    code = """
        import sys, cosettle_adapter
        print({"torch", "timm", "numpy", "PIL"} & set(sys.modules))
        from cosettle_adapter import CoSettleAdapter, Projection, load_backbone
        extras = {"av", "rich", "onnx", "open_clip", "matplotlib", "scipy", "skimage"}
        print(extras & set(sys.modules))
    """
    command = [sys.executable, "-c", "\n".join(map(str.strip, code.splitlines()))]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["set()", "set()"]
