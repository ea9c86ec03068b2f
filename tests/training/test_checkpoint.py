from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from training_fakes import ONE_EPOCH, QUICK, FakeData, distance, train_on_cpu

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.io import exclusive
from cosettle_adapter.training.checkpoint import latest, read_metrics, read_run
from cosettle_adapter.training.errors import (
    CheckpointError,
    DiskFullError,
    TrainingError,
    TrainingInterrupted,
)
from cosettle_adapter.training.train import StepReport, Trained

Callback = Callable[[StepReport], None]

TESTS = Path(__file__).parents[1]


def stop_at(step: int, kind: signal.Signals = signal.SIGINT) -> Callback:
    def callback(report: StepReport) -> None:
        if report.step == step:
            signal.raise_signal(kind)

    return callback


def test_twenty_four_steps_are_ten_and_fourteen(
    whole: tuple[Trained, Path], backbone: Backbone, tmp_path: Path
) -> None:
    began = {"command": ["train", "--epochs", "4"]}
    with pytest.raises(TrainingInterrupted, match=r"after step 10 of 24, .*--resume"):
        train_on_cpu(backbone, tmp_path, on_step=stop_at(10), began=began)
    assert not (tmp_path / "projection.safetensors").exists()
    torch.rand(7)  # what else happened meanwhile does not matter
    steps: list[int] = []
    trained = train_on_cpu(
        backbone, tmp_path, resume=True, on_step=lambda report: steps.append(report.step)
    )
    assert steps == list(range(11, 25))
    assert trained.projection.config.fit["command"] == "cosettle-adapter train --epochs 4"
    assert distance(trained.projection, whole[0].projection) == 0
    first, second = (
        torch.load(latest(folder) / "optimizer.bin", weights_only=True)["state"]  # type: ignore[operator]
        for folder in (tmp_path, whole[1])
    )
    for number, state in first.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, second[number][name]), name
    losses = [[line["loss"] for line in read_metrics(folder)] for folder in (tmp_path, whole[1])]
    assert losses[0] == losses[1]
    (tmp_path / "README.md").unlink()
    train_on_cpu(backbone, tmp_path, resume=True)  # nothing is left to do but to write
    assert (tmp_path / "README.md").exists()


def test_another_run_is_neither_resumed_nor_overwritten(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        train_on_cpu(backbone, tmp_path, on_step=stop_at(1))
    other = dataclasses.replace(QUICK, epochs=5, base_lr=0.1, batch_size=3)
    with pytest.raises(CheckpointError) as caught:
        train_on_cpu(backbone, tmp_path, other, FakeData(seed=1), resume=True)
    for part in (
        "settings.epochs was 4, is 5", "settings.base_lr was 0.05, is 0.1",
        "samples_per_step was 4, is 3", "data was '24 fakes",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert "seed was" not in str(caught.value)
    with pytest.raises(TrainingError, match=r"already holds a checkpoint: continue with --resume"):
        train_on_cpu(backbone, tmp_path)
    with pytest.raises(TrainingError, match="give only one"):
        train_on_cpu(backbone, tmp_path, resume=True, overwrite=True)
    assert train_on_cpu(backbone, tmp_path, ONE_EPOCH, overwrite=True).steps == 6
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(TrainingError, match=r"projection.safetensors: start again with --overwr"):
        train_on_cpu(backbone, tmp_path)
    with pytest.raises(CheckpointError, match="no run to resume"):
        train_on_cpu(backbone, tmp_path / "nowhere", resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="is a file; the output must be a folder"):
        train_on_cpu(backbone, tmp_path / "file")


def test_a_damaged_checkpoint_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        train_on_cpu(backbone, tmp_path, on_step=stop_at(1))
    for damage in ("optimizer.bin", "model.safetensors", "run.json"):
        file = latest(tmp_path) / damage  # type: ignore[operator]
        good = file.read_bytes()
        file.write_bytes(good[:50])
        with pytest.raises(CheckpointError, match="is damaged or not a checkpoint of this version"):
            train_on_cpu(backbone, tmp_path, resume=True)
        file.write_bytes(good)


def test_a_full_disk_keeps_what_was_saved(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(state: object, path: Path) -> None:
        if latest(tmp_path) and read_run(tmp_path).step == 3:
            Path(path).write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DiskFullError, match=r"no space .*--resume"):
        train_on_cpu(backbone, tmp_path, dataclasses.replace(ONE_EPOCH, save_every=1))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]

    def also_full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", also_full)
    with pytest.raises(DiskFullError, match=r"no space .*--resume"):
        train_on_cpu(backbone, tmp_path, ONE_EPOCH, resume=True)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "metrics.jsonl"}
    assert train_on_cpu(backbone, tmp_path, ONE_EPOCH, resume=True).steps == 6
    for error in (RuntimeError("shapes do not match"), PermissionError("not yours")):
        monkeypatch.setattr(torch, "save", mock.Mock(side_effect=error))
        with pytest.raises(type(error), match=str(error)):
            train_on_cpu(backbone, tmp_path / "other")


def test_two_runs_do_not_share_a_folder(backbone: Backbone, tmp_path: Path) -> None:
    def meanwhile(report: StepReport) -> None:
        if report.step == 2:
            for how in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(TrainingError, match="another run is writing into"):
                    train_on_cpu(backbone, tmp_path, QUICK, **how)  # type: ignore[arg-type]

    settings = dataclasses.replace(ONE_EPOCH, save_every=1)
    train_on_cpu(backbone, tmp_path, settings, on_step=meanwhile)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 7))
    with exclusive(tmp_path, refusal=TrainingError("still held")):
        pass


def test_skipped_videos_are_counted_over_a_resume(backbone: Backbone, tmp_path: Path) -> None:
    first, rest = FakeData(skips=(2, 5)), FakeData()
    with pytest.raises(TrainingInterrupted):
        train_on_cpu(backbone, tmp_path, data=first, on_step=stop_at(6))
    trained = train_on_cpu(backbone, tmp_path, data=rest, resume=True)
    assert trained.skipped == {"gone02.mp4": "not a video", "gone05.mp4": "not a video"}
    record = trained.projection.config.fit
    assert (record["skipped"], record["skipped_clips"]) == (2, ["gone02.mp4", "gone05.mp4"])


def test_an_old_checkpoint_makes_another_due(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cosettle_adapter.training.train._SAVE_SECONDS", -1.0)
    steps: list[int] = []
    on_step = lambda report: steps.append(read_run(tmp_path).step)  # noqa: E731
    train_on_cpu(backbone, tmp_path, ONE_EPOCH, on_step=on_step)
    assert steps == [0, 1, 2, 3, 4, 5]


# Other processes ------------------------------------------------------------------------------

SCRIPT = """
import dataclasses, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from training_fakes import QUICK, small_backbone, train_on_cpu

replace = Path.replace

def slowly(path, target):
    if target.name == "step_00000007":  # all is there, under its temporary name
        (path / "optimizer.bin").write_bytes(b"half")
        print("writing", flush=True)
        time.sleep(60)
    return replace(path, target)

Path.replace = slowly
train_on_cpu(small_backbone(), Path(sys.argv[1]), dataclasses.replace(QUICK, save_every=1))
"""


def test_a_kill_in_the_middle_of_a_write_loses_one_step(
    whole: tuple[Trained, Path], backbone: Backbone, tmp_path: Path
) -> None:
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    assert (tmp_path / "checkpoints" / ".step_00000007").is_dir()
    assert read_run(tmp_path).step == 6
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    settings = dataclasses.replace(QUICK, save_every=1)
    trained = train_on_cpu(backbone, tmp_path, settings, resume=True)
    assert distance(trained.projection, whole[0].projection) == 0
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 25))


def test_ctrl_c_in_a_terminal_lets_the_workers_finish_the_step(
    backbone: Backbone, tmp_path: Path
) -> None:
    """A terminal sends SIGINT to the workers as well."""

    def press(report: StepReport) -> None:
        for worker in multiprocessing.active_children() if report.step == 1 else ():
            assert worker.pid is not None
            assert os.getpgid(worker.pid) != os.getpgid(0)
            os.kill(worker.pid, signal.SIGINT)
        if report.step == 8:  # more than the workers had prepared
            signal.raise_signal(signal.SIGINT)

    settings = dataclasses.replace(QUICK, batch_size=2, accumulation=2, workers=2, epochs=20)
    with pytest.raises(TrainingInterrupted, match="stopped after step 8 of 120"):
        train_on_cpu(backbone, tmp_path, settings, on_step=press)
    assert read_run(tmp_path).step == 8


def test_signals_save_and_a_second_one_stops_at_once(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted):
        train_on_cpu(backbone, tmp_path, on_step=stop_at(2, signal.SIGTERM))
    assert read_run(tmp_path).step == 2
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    last = train_on_cpu(backbone, tmp_path, ONE_EPOCH, overwrite=True, on_step=stop_at(6))
    assert last.steps == 6, "nothing was left to stop"
    monkeypatch.setattr("cosettle_adapter.training.errors._REPEAT_SECONDS", 0.0)

    def twice(report: StepReport) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        train_on_cpu(backbone, tmp_path / "again", on_step=twice)
    assert not isinstance(caught.value, TrainingInterrupted)
    assert read_run(tmp_path / "again").step == 0
