from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cyclopts import Token

from cosettle_adapter import __version__
from cosettle_adapter.backbones import REGISTRY, VisionTransformerBackbone
from cosettle_adapter.cli import COMMANDS, main
from cosettle_adapter.cli.common import parse_size
from cosettle_adapter.extraction import read_features

from helpers import REAL, write_video


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert __version__ in printed
    assert all(command in printed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "Usage: cosettle-adapter " + command in printed
    assert "``" not in printed


def test_the_help_of_a_command_is_its_whole_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert "An interrupted run continues with --resume DIR" in capsys.readouterr().out


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--jsn"]) == 2
    assert "Did you mean --json?" in capsys.readouterr().err


def test_list_shows_a_table_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["list"]) == 0
    table = capsys.readouterr().out
    assert REAL in table
    assert "CC-BY-NC-4.0" in table
    assert "dinov3-vitb16" not in table, "none is published"
    assert main(["list", "--backbones"]) == 0
    table = capsys.readouterr().out
    for name, row in REGISTRY.items():
        line = next(line for line in table.splitlines() if f" {name} " in line)
        assert row.family in line
        assert row.positions in line
        assert row.licence.removeprefix("LicenseRef-") in line
        assert "by the authors" in line or row.release is None
    assert "timm:<tag>" in table
    assert main(["list", "--json"]) == 0
    models = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert models["dinov2-vitl14"]["width"] == 1024
    assert models["dinov2-vitl14"]["projection"] == "fitted on first use"


def test_download_tells_where_the_weights_came_from(
    real_backbone: VisionTransformerBackbone,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["download", REAL, "--offline"]) == 0
    printed = capsys.readouterr().out
    assert real_backbone.fingerprint in printed
    assert "licence MIT" in printed


def test_a_truncated_source_is_told_and_fails(
    real_backbone: VisionTransformerBackbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_video(tmp_path / "w.mkv", frames=60, height=28, width=42, noisy=True)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    out = tmp_path / "cut.safetensors"
    assert main(["extract", str(cut), "-o", str(out), "--layer", "0"]) == 2
    assert "frames of its source were lost to damage" in capsys.readouterr().out
    assert 0 < len(read_features(out).features) < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "nowhere.mp4", "-o", "x.safetensors"], "nowhere.mp4 does not exist"),
        (["extract", __file__, "-o", "x", "--model", "dinov2-vitb41"], "Did you mean"),
        (
            ["extract", __file__, "-o", "x", "--model", "dinov3-vitb16", "--offline"],
            "no weights for dinov3",
        ),
        (["download", "clip-vitb61"], "unknown backbone 'clip-vitb61'"),
        (["fit", "--backbone", REAL, "--data", "nowhere", "-o", "x"], "nowhere does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_status(
    real_backbone: VisionTransformerBackbone,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cosettle_adapter.hub.list_models", interrupt)
    assert main(["list"]) == 130


def test_sizes_are_a_shorter_side_or_both() -> None:
    for text, size in {"476": 476, "476x882": (476, 882), "28X42": (28, 42)}.items():
        assert parse_size(None, [Token(value=text)]) == size
    for text in ("", "big", "1x2x3", "-5", "0"):
        with pytest.raises(ValueError, match="expected 476 or 476x882"):
            parse_size(None, [Token(value=text)])


@pytest.mark.parametrize(
    ("imported", "heavy"),
    [
        ("import cosettle_adapter", "torch timm numpy PIL"),
        ("from cosettle_adapter import CoSettleAdapter, Projection, load_backbone", ""),
    ],
)
def test_importing_loads_nothing_heavy_and_no_extra(imported: str, heavy: str) -> None:
    extras = f"av rich onnx open_clip matplotlib scipy skimage {heavy}"
    code = f"import sys; {imported}; print({set(extras.split())} & set(sys.modules))"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "set()"
