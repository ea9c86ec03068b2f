from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
import torch

from cosettle_adapter.training import checkpoint as module
from cosettle_adapter.training.checkpoint import (
    Checkpoint,
    differences,
    random_state,
    remove_unfinished,
    restore_random_state,
)
from cosettle_adapter.training.errors import CheckpointError, DiskFullError
from cosettle_adapter.training.metrics import MetricsLog, read_metrics


def checkpoint(step: int = 3) -> Checkpoint:
    return Checkpoint(
        step=step,
        steps=10,
        projection={"weight": torch.arange(6.0).reshape(2, 3)},
        optimizer={"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"b": (0.9, 1)}]},
        scheduler={"last_epoch": 3},
        rng=[random_state()],
        config={"settings": {"epochs": 5}, "data": "abc"},
    )


def test_it_comes_back_as_it_was_and_anybody_can_read_it(tmp_path: Path) -> None:
    checkpoint().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert {"projection", "optimizer", "scheduler", "scaler", "step", "rng", "config"} <= set(state)
    assert state["scaler"] is None
    back = Checkpoint.load(tmp_path)
    assert torch.equal(back.projection["weight"], checkpoint().projection["weight"])
    assert (back.step, back.config, back.optimizer["param_groups"]) == (
        3, {"settings": {"epochs": 5}, "data": "abc"}, [{"b": (0.9, 1)}],
    )  # fmt: skip


def test_a_view_takes_no_more_room_than_it_shows(tmp_path: Path) -> None:
    large = torch.zeros(1_000_000)
    saved = checkpoint()
    saved.projection["weight"] = large[:4]
    saved.save(tmp_path)
    assert (tmp_path / "checkpoint.pt").stat().st_size < 100_000


def test_generators_go_on_where_they_were() -> None:
    state = random_state()
    expected = torch.rand(3), random.random()
    restore_random_state(state)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_a_damaged_checkpoint_is_told(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    if damage == "cut":
        checkpoint().save(tmp_path)
        file.write_bytes(file.read_bytes()[:700])
    elif damage == "text":
        file.write_text("not a checkpoint")
    else:
        torch.save({"format_version": 99}, file)
    expected = "has format_version 99" if damage == "other" else "is truncated or not a checkpoint"
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint.load(tmp_path)


def test_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.pt, so there is no run to"):
        Checkpoint.load(tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(3).save(tmp_path)

    def no_space(path: Path, data: object) -> int:
        with path.open("wb") as file:
            file.write(bytes(10))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(DiskFullError, match=rf"no space left .*--resume {tmp_path}"):
        checkpoint(4).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert Checkpoint.load(tmp_path).step == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_is_really_full_says_so() -> None:
    with (
        pytest.raises(DiskFullError, match="no space left to write into"),
        module.disk_full_in_a_sentence(Path("out")),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_other_errors_of_the_system_stay_what_they_are() -> None:
    with (
        pytest.raises(PermissionError),
        module.disk_full_in_a_sentence(Path("out")),
    ):
        raise PermissionError(errno.EACCES, "no")


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    checkpoint().save(tmp_path)
    (tmp_path / ".checkpoint.abc123.part.pt").write_bytes(b"half")
    (tmp_path / ".mine.pt").write_bytes(b"")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.pt", "checkpoint.pt"]


def test_differences_are_named_with_their_path() -> None:
    saved = {"settings": {"epochs": 5, "seed": 0}, "data": "a", "gone": 1}
    now = {"settings": {"epochs": 6, "seed": 0}, "data": "a"}
    assert differences(saved, now) == ["gone was 1, is None", "settings.epochs was 5, is 6"]
    assert differences(saved, saved) == []


def test_lines_after_the_resumed_step_are_written_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, step=0)
    for step in range(1, 6):
        log.write(step, {"loss": step / 2, "kl": float("nan")})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    resumed = MetricsLog(tmp_path, step=3)
    resumed.write(4, {"loss": 9.0})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1] == {"step": 4, "loss": 9.0}
    assert lines[0]["kl"] is None, "JSON has no NaN"


def test_a_run_resumed_at_its_beginning_is_measured_anew(tmp_path: Path) -> None:
    for _ in range(2):
        log = MetricsLog(tmp_path, step=0)
        log.write(0, {"raw/overlap": 0.5})
        log.close()
    assert read_metrics(tmp_path) == [{"step": 0, "raw/overlap": 0.5}]
    MetricsLog(tmp_path, step=1).close()
    assert len(read_metrics(tmp_path)) == 1, "not measured again"


def test_a_new_run_begins_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    MetricsLog(tmp_path, step=0)
    assert read_metrics(tmp_path) == []


def test_tensorboard_is_written_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, step=0, tensorboard=True)
    log.write(1, {"epoch": 1, "loss": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == [0.5]
    assert events.Tags()["scalars"] == ["loss"]
