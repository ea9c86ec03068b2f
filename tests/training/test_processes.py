from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_fakes import (
    ONE_EPOCH,
    QUICK,
    SMALL_CLIP,
    SMALL_VIT,
    distance,
    small_backbone,
    train_on_cpu,
)

from cosettle_adapter import Projection
from cosettle_adapter.backbones import BackboneRow
from cosettle_adapter.training.checkpoint import latest, read_metrics, read_run
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.processes import make_accelerator
from cosettle_adapter.training.settings import TrainSettings

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote: see ``training_processes``."""
    folder = tmp_path_factory.mktemp("together")
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(TESTS / "training_processes.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def notes(folder: Path, name: str) -> list[str]:
    return [(folder / f"{name}-{rank}.txt").read_text() for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "row", "settings"), [("vit", SMALL_VIT, QUICK), ("clip", SMALL_CLIP, ONE_EPOCH)]
)
def test_two_processes_are_one_with_twice_the_batch(
    name: str, row: BackboneRow, settings: TrainSettings, together: Path, tmp_path: Path
) -> None:
    assert notes(together, "processes") == ["2", "2"]
    alone = train_on_cpu(small_backbone(row), tmp_path, settings)
    found = Projection.load(together / name)
    assert distance(found, alone.projection) < 1e-5
    assert distance(found, Projection(found.config)) > 0.01, "it has been trained"
    losses = [line["loss"] for line in read_metrics(together / name)]
    assert losses == pytest.approx([line["loss"] for line in read_metrics(tmp_path)], rel=1e-4)
    assert (found.config.fit["processes"], found.config.fit["samples_per_step"]) == (2, 4)


def test_one_that_is_told_to_stop_stops_both_after_a_step(together: Path) -> None:
    said = notes(together, "stopped")
    assert said[0] == said[1]
    saved = read_run(together / "stopped")
    assert f"after step {saved.step} of 24" in said[0]
    assert 5 <= saved.step <= 6
    assert notes(together, "steps") == [str(saved.step), "0"], "the first process alone reports"
    states = latest(together / "stopped").glob("random_states_*")  # type: ignore[union-attr]
    assert len(list(states)) == 2
    # one process goes on where two were stopped
    trained = train_on_cpu(small_backbone(), together / "stopped", resume=True)
    assert distance(trained.projection, Projection.load(together / "vit")) < 1e-5


def test_a_failure_of_one_is_told_by_both(together: Path) -> None:
    said = notes(together, "nan")
    assert said[0] == said[1]
    assert "because of 1 of the 2 samples in a batch (clip07.mp4)" in said[0]
    assert notes(together, "missing") == ["clip07.mp4 cannot be read"] * 2


def test_devices_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="--device xpu is not available; use --device"):
        make_accelerator("xpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="would put all 2 processes on one device"):
        make_accelerator("cuda:1")
    with pytest.raises(TrainingError, match="but Accelerate connects only 1 on cpu"):
        make_accelerator("cpu")
