"""Commands run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from training_fakes import SMALL_VIT

from cosettle_adapter.backbones import registry
from cosettle_adapter.cli import main

from helpers import tiny_state


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command, check its status, and return what it printed, which is no traceback."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*words: object, status: int = 0) -> str:
        found = main([str(word) for word in words])
        printed = "".join(capsys.readouterr())
        assert found == status, printed
        assert "-v" in words or "Traceback" not in printed
        return printed

    return run


@pytest.fixture
def small_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder with the weights of a small registered encoder."""
    monkeypatch.setitem(registry.REGISTRY, SMALL_VIT.name, SMALL_VIT)
    monkeypatch.chdir(tmp_path)
    save_file(tiny_state(SMALL_VIT), tmp_path / "weights.safetensors")
    return tmp_path
