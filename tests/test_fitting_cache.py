from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cosettle_adapter import CoSettleAdapter, fitting, fitting_cache, list_models
from cosettle_adapter.backbones import BackboneRow, VisionTransformerBackbone
from cosettle_adapter.errors import WeightsUnavailableError
from cosettle_adapter.projection import CONFIG_FILE, WEIGHTS_FILE

from helpers import TINY, projection_for, small_corpus

SCRIPT = Path(__file__).with_name("fitting_process.py")


@pytest.fixture(autouse=True)
def corpus(monkeypatch: pytest.MonkeyPatch, tiny_registered: BackboneRow) -> None:
    small_corpus(monkeypatch.setattr)


@pytest.fixture
def weights(tiny_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_file, tmp_path))


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backbones that were fitted."""
    seen: list[str] = []
    fit = fitting.fit_starter

    def counted(backbone: VisionTransformerBackbone, **how: object) -> object:
        seen.append(f"{backbone.dtype} {backbone.stride}")
        return fit(backbone, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(fitting, "fit_starter", counted)
    return seen


def load(weights: Path, **how: object) -> CoSettleAdapter:
    how = {"backbone_weights": weights, "cache_dir": weights.parent / "cache", **how}
    return CoSettleAdapter.from_pretrained(TINY.name, **how)  # type: ignore[arg-type]


def stored(cache: Path) -> Path:
    (folder,) = [
        path for path in (cache / "cosettle-adapter/projections").iterdir() if path.is_dir()
    ]
    return folder


def run(cache: Path, weights: Path, *action: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(cache), str(weights), *action]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_is_fitted_once_in_its_native_form_and_then_loaded(
    weights: Path, fits: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = load(weights, dtype=torch.bfloat16, stride=8)
    assert first.dtype == torch.bfloat16
    assert first.backbone.stride == 8
    (said,) = caplog.messages
    folder = stored(weights.parent / "cache")
    assert "fitting a projection for tiny-vit16 on the package's photographs" in said
    assert str(folder) in said
    assert folder.name == f"tiny-vit16-{first.backbone.fingerprint[7:19]}-recipe1"
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    second = load(weights)
    assert fits == ["torch.float32 16"]
    assert second.config == first.config
    for name, tensor in first.projection.state_dict().items():
        assert torch.equal(second.projection.state_dict()[name], tensor)
    (folder / WEIGHTS_FILE).write_bytes(b"nothing")  # damaged, so it is fitted again
    load(weights)
    assert len(fits) == 2
    assert "cannot read the projection in" in caplog.text


@pytest.mark.parametrize("processes", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_killed_fit_is_resumed_by_one_of_several_processes_and_needs_no_extra(
    weights: Path, tmp_path: Path, processes: int
) -> None:
    cache = tmp_path / "killed"
    assert run(cache, weights, "stop", "3").returncode < 0
    assert [path.name for path in stored(cache).iterdir()] == ["statistics.safetensors"]
    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(lambda _: run(cache, weights, "block"), range(processes)))
    assert not any(each.returncode for each in found), "".join(each.stderr for each in found)
    assert sum(int(each.stdout) for each in found) == 1, "one fitted, the others loaded"
    folder = stored(cache)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    resumed = load_file(folder / WEIGHTS_FILE)
    for name, tensor in load(weights).projection.state_dict().items():
        assert torch.equal(resumed[name], tensor)


@pytest.mark.parametrize(("code", "at"), [(errno.EROFS, "mkdir"), (errno.ENOSPC, "write_bytes")])
def test_a_cache_that_cannot_be_written_is_done_without(
    weights: Path,
    fits: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    at: str,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fitting_cache, "_SAVE_EVERY", -1.0)
    monkeypatch.setattr(Path, at, refuse)
    adapter = load(weights)
    assert adapter(torch.zeros(1, 3, 32, 32)).shape == (1, 192, 2, 2)
    (warned,) = [message for message in caplog.messages if "again by the" in message]
    assert os.strerror(code) in warned
    assert not [path for path in weights.parent.rglob("*") if path.name.startswith(".")]


def test_a_recipe_is_pinned(weights: Path, tmp_path: Path, fits: list[str]) -> None:
    with pytest.raises(WeightsUnavailableError, match=r'projection="fit"'):
        CoSettleAdapter.from_pretrained("clip-vitb16", cache_dir=tmp_path, local_files_only=True)
    assert not fits, "a published one that cannot be reached is never another one"
    fitted = load(weights, recipe=1)
    assert fitted.config.recipe == 1
    with pytest.raises(ValueError, match="unknown recipe 7; expected 1 or None"):
        load(weights, recipe=7)
    projection_for(fitted.backbone).save(tmp_path / "own")
    assert load(weights, projection=tmp_path / "own").config.layers == (7,)
    with pytest.raises(ValueError, match="has recipe None in its config, expected 1"):
        load(weights, projection=str(tmp_path / "own"), recipe=1)


def test_the_list_tells_what_is_in_the_cache(
    weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))

    def status() -> str:
        return {model.name: model.projection for model in list_models()}[TINY.name]

    assert status() == "fitted on first use"
    load(weights, cache_dir=None)
    assert status() == "fitted, in your cache"
