from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_fakes import small_backbone, train_on_cpu

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.training.train import Trained


@pytest.fixture(scope="session", autouse=True)
def little_garbage() -> Iterator[None]:
    """Accelerate collects garbage after every run, among all that the modules hold."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return small_backbone()


@pytest.fixture(scope="module")
def whole(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    """A run of 24 steps that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "out"
    began = {"command": ["train", "--data", "/home/me/clips"]}
    return train_on_cpu(backbone, output, began=began), output
