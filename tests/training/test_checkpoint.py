from __future__ import annotations

import errno
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from training_fakes import small_backbone

from cosettle_adapter.training.checkpoint import (
    RunState,
    differences,
    latest,
    read_run,
    restore,
    room_for_run,
    save,
)
from cosettle_adapter.training.distribution import make_accelerator
from cosettle_adapter.training.errors import CheckpointError, DiskFullError
from cosettle_adapter.training.head import Head, make_optimizer, new_head
from cosettle_adapter.training.metrics import MetricsLog, read_metrics
from cosettle_adapter.training.settings import TrainSettings

STATE = RunState({"settings": {"epochs": 5}, "data": "abc"}, step=3, best={"step": 2})
BEST = {"weight": torch.arange(6.0).reshape(2, 3)}


@pytest.fixture
def accelerator() -> object:
    """With a head that made a step, and its optimiser."""
    accelerator = make_accelerator("cpu")
    head = Head(new_head(TrainSettings().head_config(small_backbone()), init="random", seed=0))
    optimizer = accelerator.prepare(make_optimizer(accelerator.prepare(head), TrainSettings()))
    head(torch.randn(2, 32)).sum().backward()
    optimizer.step()
    return accelerator


def test_it_comes_back_as_it_was(tmp_path: Path, accelerator: object) -> None:
    save(accelerator, tmp_path, STATE, BEST)  # type: ignore[arg-type]
    expected = torch.rand(3), random.random(), np.random.rand()
    (model,) = accelerator._models  # type: ignore[attr-defined]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state, best = restore(accelerator, tmp_path, STATE.config)  # type: ignore[arg-type]
    assert state == STATE
    assert best is not None
    assert torch.equal(best["weight"], BEST["weight"])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]
    with pytest.raises(CheckpointError, match=r"another run: data was 'abc', is 'x'. Resume it"):
        restore(accelerator, tmp_path, {**STATE.config, "data": "x"})  # type: ignore[arg-type]


def test_one_checkpoint_is_kept_and_it_is_whole(tmp_path: Path, accelerator: object) -> None:
    (tmp_path / "checkpoints" / ".step_00000009").mkdir(parents=True)  # of a killed process
    for step in (3, 3, 12):
        save(accelerator, tmp_path, RunState({}, step=step), None)  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000012"]
    assert read_run(tmp_path).step == 12


@pytest.mark.parametrize("damage", ["optimizer.bin", "model.safetensors", "run.json", "version"])
def test_a_damaged_checkpoint_is_refused(damage: str, tmp_path: Path, accelerator: object) -> None:
    save(accelerator, tmp_path, STATE, BEST)  # type: ignore[arg-type]
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    if damage == "version":
        (checkpoint / "run.json").write_text('{"format_version": 99, "config": {}}')
    else:
        file = checkpoint / damage
        file.write_bytes(file.read_bytes()[:50])
    message = "has format_version 99" if damage == "version" else "is damaged or not a checkpoint"
    with pytest.raises(CheckpointError, match=message):
        restore(accelerator, tmp_path, STATE.config)  # type: ignore[arg-type]


def test_no_checkpoint_and_one_of_version_0_1(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint, so there is no run to"):
        read_run(tmp_path)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(CheckpointError, match=r"its checkpoint\.pt is version 0\.1's"):
        read_run(tmp_path)


def test_other_errors_of_the_system_stay_what_they_are() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, raised in ((PermissionError("no"), PermissionError), (full, DiskFullError)):
        with pytest.raises(raised), room_for_run(Path("out")):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), room_for_run(Path("out")):
        raise RuntimeError("shapes do not match")


def test_differences_are_named_with_their_path() -> None:
    saved = {"settings": {"epochs": 5, "seed": 0}, "data": "a", "gone": 1}
    now = {"settings": {"epochs": 6, "seed": 0}, "data": "a"}
    assert differences(saved, now) == ["gone was 1, is None", "settings.epochs was 5, is 6"]
    assert differences(saved, saved) == []


def test_lines_after_the_resumed_step_are_written_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, step=0)
    for step in range(6):
        log.write(step, {"loss": step / 2, "kl": float("nan")})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    MetricsLog(tmp_path, step=3).write(4, {"loss": 9.0})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[-1] == {"step": 4, "loss": 9.0}
    assert lines[0]["kl"] is None, "JSON has no NaN"
    MetricsLog(tmp_path, step=0)
    assert read_metrics(tmp_path) == [], "step 0 is measured again"


def test_tensorboard_is_written_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_accelerator("cpu")
    log = MetricsLog(tmp_path, step=0, tensorboard=True)
    log.write(1, {"epoch": 1, "loss": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == [0.5]
    assert events.Tags()["scalars"] == ["loss"]
