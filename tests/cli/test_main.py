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


def test_extract_writes_features(
    real_backbone: VisionTransformerBackbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = write_video(tmp_path / "clip.mp4", frames=6, height=60, width=80)
    out = tmp_path / "clip.safetensors"
    command = ["extract", str(clip), "-o", str(out), "--every", "2", "--size", "56x84"]
    assert main([*command, "--storage", "float16"]) == 0
    assert "(3, 384, 4, 6)" in capsys.readouterr().out.replace("\n", " ")
    assert tuple(read_features(out).features.shape) == (3, 384, 4, 6)
    assert main([*command, "--layer", "3", "--stride", "7", "--overwrite"]) == 0
    read = read_features(out)
    assert tuple(read.features.shape) == (3, 384, 7, 11)
    assert read.metadata["layers"] == [3]


def test_a_truncated_source_is_told_and_fails(
    real_backbone: VisionTransformerBackbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_video(tmp_path / "w.mkv", frames=60, height=28, width=42, noisy=True)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    out = tmp_path / "cut.safetensors"
    assert main(["extract", str(cut), "-o", str(out), "--layer", "0"]) == 1
    assert "the source ended early" in capsys.readouterr().out
    assert 0 < len(read_features(out).features) < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "nowhere.mp4", "-o", "x.safetensors"], "nowhere.mp4 does not exist"),
        (["extract", "x.mp4", "-o", "x", "--model", "dinov2-vitb41"], "Did you mean"),
        (
            ["extract", "x.mp4", "-o", "x", "--model", "dinov3-vitb16", "--offline"],
            "no weights for dinov3",
        ),
        (["download", "clip-vitb61"], "unknown backbone 'clip-vitb61'"),
        (["fit", "--backbone", REAL, "--data", "nowhere", "-o", "x"], "nowhere is not a folder"),
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


@pytest.mark.parametrize(
    ("text", "expected"), [("476", 476), ("476x882", (476, 882)), ("28X42", (28, 42))]
)
def test_sizes_parse(text: str, expected: object) -> None:
    assert parse_size(None, [Token(value=text)]) == expected


@pytest.mark.parametrize("text", ["", "big", "1x2x3", "-5", "0"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected 476 or 476x882"):
        parse_size(None, [Token(value=text)])


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, cosettle_adapter; heavy = {'torch', 'timm', 'numpy', 'av', 'rich', 'onnx', "
        "'open_clip', 'matplotlib', 'scipy', 'skimage', 'PIL'} & set(sys.modules); print(heavy)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "set()"


def test_the_adapter_loads_no_extra() -> None:
    code = (
        "import sys; from cosettle_adapter import CoSettleAdapter, Projection, load_backbone; "
        "print({'av', 'rich', 'onnx', 'open_clip', 'matplotlib', 'scipy', 'skimage'} "
        "& set(sys.modules))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "set()"
