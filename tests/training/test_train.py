from __future__ import annotations

import dataclasses
import errno
import json
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
from safetensors.torch import load_file
from training_fakes import QUICK, SMALL_VIT, FakeData, distance, small_backbone

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.io import exclusive
from cosettle_adapter.training.checkpoint import latest, read_metrics, read_run
from cosettle_adapter.training.errors import (
    CheckpointError,
    DiskFullError,
    NonFiniteLossError,
    TrainingError,
    TrainingInterrupted,
)
from cosettle_adapter.training.processes import make_accelerator
from cosettle_adapter.training.settings import TrainSettings
from cosettle_adapter.training.train import StepReport, Trained, train

Callback = Callable[[StepReport], None]

TESTS = Path(__file__).parents[1]
ONE_EPOCH = dataclasses.replace(QUICK, epochs=1)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return small_backbone()


def fit(
    backbone: Backbone,
    output: Path,
    settings: TrainSettings = QUICK,
    data: FakeData | None = None,
    **options: object,
) -> Trained:
    accelerator = make_accelerator("cpu")
    return train(backbone, data or FakeData(), output, settings, accelerator=accelerator, **options)  # type: ignore[arg-type]


def stop_at(step: int, kind: signal.Signals = signal.SIGINT) -> Callback:
    def callback(report: StepReport) -> None:
        if report.step == step:
            signal.raise_signal(kind)

    return callback


@pytest.fixture(scope="module")
def whole(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    """A run of 24 steps that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "out"
    began = {"command": ["train", "--data", "/home/me/clips"]}
    return fit(backbone, output, began=began), output


def test_a_run_leaves_a_folder_that_loads_and_says_how_it_came_about(
    whole: tuple[Trained, Path], backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, output = whole
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md", "checkpoints", "config.json", "metrics.jsonl", "projection.safetensors",
    ]  # fmt: skip
    monkeypatch.setattr("cosettle_adapter.hub.load_backbone", lambda name, **_: backbone)
    adapter = CoSettleAdapter.from_pretrained(output)
    assert adapter(torch.zeros(2, 3, 64, 64)).shape == (2, 32, 4, 4)
    assert distance(adapter.projection, trained.projection) == 0
    assert not any(parameter.requires_grad for parameter in trained.projection.parameters())
    record = json.loads((output / "config.json").read_text())["fit"]
    assert (record["method"], record["clips"], record["steps"]) == ("train", 24, 24)
    assert (record["samples_per_step"], record["settings"]["seed"]) == (4, 3)
    assert not {"workers", "batch_size", "log_every"} & record["settings"].keys()
    assert record["versions"].keys() == {"torch", "timm", "accelerate"}
    assert record["command"] == "cosettle-adapter train --data clips", "no paths of a machine"
    assert record["last_epoch"].keys() == {"loss", "cycle", "kl", "accuracy"}
    assert "cosettle-adapter train --data clips" in (output / "README.md").read_text()
    fresh = small_backbone(SMALL_VIT).state_dict()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, fresh[name]), "the backbone is not touched"


def test_metrics_tell_of_every_step(whole: tuple[Trained, Path]) -> None:
    lines = read_metrics(whole[1])
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert [line["epoch"] for line in lines] == [1 + step // 6 for step in range(24)]
    assert lines[0].keys() >= {"loss", "cycle", "kl", "accuracy", "lr", "grad_norm"}
    assert all(line["clips_per_second"] > 0 for line in lines)
    first, last = (sum(line["loss"] for line in part) for part in (lines[:6], lines[-6:]))
    assert last < first, "it learns"
    for line in lines:
        assert line["loss"] == pytest.approx(line["cycle"] + 3 * line["kl"], rel=1e-5)


def test_twenty_four_steps_are_ten_and_fourteen(
    whole: tuple[Trained, Path], backbone: Backbone, tmp_path: Path
) -> None:
    began = {"command": ["train", "--epochs", "4"]}
    with pytest.raises(TrainingInterrupted, match=r"after step 10 of 24, .*--resume"):
        fit(backbone, tmp_path, on_step=stop_at(10), began=began)
    assert not (tmp_path / "projection.safetensors").exists()
    torch.rand(7)  # what else happened meanwhile does not matter
    steps: list[int] = []
    trained = fit(backbone, tmp_path, resume=True, on_step=lambda report: steps.append(report.step))
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
    fit(backbone, tmp_path, resume=True)  # nothing is left to do but to write
    assert (tmp_path / "README.md").exists()


def test_a_termination_signal_saves_too(backbone: Backbone, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted):
        fit(backbone, tmp_path, on_step=stop_at(2, signal.SIGTERM))
    assert read_run(tmp_path).step == 2
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert fit(backbone, tmp_path, ONE_EPOCH, overwrite=True, on_step=stop_at(6)).steps == 6


def test_a_second_interruption_stops_at_once(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cosettle_adapter.training.errors._IMPATIENT_AFTER", 0.0)

    def twice(report: StepReport) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(backbone, tmp_path, on_step=twice)
    assert not isinstance(caught.value, TrainingInterrupted)
    assert read_run(tmp_path).step == 0


@pytest.mark.parametrize("pea", ["batch", "sample"])
def test_accumulated_batches_are_one_large_batch(
    pea: str, backbone: Backbone, tmp_path: Path
) -> None:
    settings = dataclasses.replace(ONE_EPOCH, pea=pea)  # type: ignore[arg-type]
    cut = dataclasses.replace(settings, batch_size=1, accumulation=4)
    one, other = (
        fit(backbone, tmp_path / str(each.batch_size), each).projection for each in (settings, cut)
    )
    assert 0 < distance(one, other) < 1e-6


def test_another_run_is_neither_resumed_nor_overwritten(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        fit(backbone, tmp_path, on_step=stop_at(1))
    other = dataclasses.replace(QUICK, epochs=5, base_lr=0.1, batch_size=3)
    with pytest.raises(CheckpointError) as caught:
        fit(backbone, tmp_path, other, FakeData(seed=1), resume=True)
    for part in (
        "settings.epochs was 4, is 5", "settings.base_lr was 0.05, is 0.1",
        "samples_per_step was 4, is 3", "data was '24 fakes",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert "seed was" not in str(caught.value)
    with pytest.raises(TrainingError, match=r"already holds a checkpoint: continue with --resume"):
        fit(backbone, tmp_path)
    with pytest.raises(TrainingError, match="give one"):
        fit(backbone, tmp_path, resume=True, overwrite=True)
    assert fit(backbone, tmp_path, ONE_EPOCH, overwrite=True).steps == 6
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(TrainingError, match=r"projection.safetensors: begin again with --overwr"):
        fit(backbone, tmp_path)
    with pytest.raises(CheckpointError, match="no run to resume"):
        fit(backbone, tmp_path / "nowhere", resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="is a file; the output is a folder"):
        fit(backbone, tmp_path / "file")


@pytest.mark.parametrize("damage", ["optimizer.bin", "model.safetensors", "run.json"])
def test_a_damaged_checkpoint_is_refused(damage: str, backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        fit(backbone, tmp_path, on_step=stop_at(1))
    file = latest(tmp_path) / damage  # type: ignore[operator]
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint of this version"):
        fit(backbone, tmp_path, resume=True)


def test_a_batch_that_is_not_finite_is_named_and_changes_nothing(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(QUICK, save_every=1)
    with pytest.raises(
        NonFiniteLossError, match=r"the loss of step \d+ \(epoch 1\) is not finite \(nan\)"
    ) as caught:
        fit(backbone, tmp_path, settings, FakeData(broken=(7,)))
    assert "because of 1 of the 4 samples in a batch (clip07.mp4)" in str(caught.value)
    weights = load_file(latest(tmp_path) / "model.safetensors")  # type: ignore[operator]
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert f"step {read_run(tmp_path).step + 1} " in str(caught.value)
    with pytest.raises(NonFiniteLossError, match=r"of 4 of the 4 samples .*lower --base-lr"):
        fit(backbone, tmp_path / "all", data=FakeData(broken=tuple(range(24))))
    infinite = torch.tensor(float("inf"))
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda parameters, most: infinite)
    with pytest.raises(NonFiniteLossError, match=r"gradient of step 1 \(epoch 1\) .*clip\d\d.mp4"):
        fit(backbone, tmp_path / "gradient")
    assert read_run(tmp_path / "gradient").step == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_cannot_be_had_end_the_run_in_a_sentence(
    workers: int, backbone: Backbone, tmp_path: Path
) -> None:
    settings = dataclasses.replace(ONE_EPOCH, workers=workers)
    with pytest.raises(FrameError, match=r"^clip\d\d.mp4 cannot be read$"):
        fit(backbone, tmp_path, settings, FakeData(missing=tuple(range(24))))
    # a run that did no step is in nobody's way
    started: list[int] = []
    trained = fit(backbone, tmp_path, settings, FakeData(seed=1), on_start=started.append)
    assert (trained.steps, started) == (6, [24])
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 7))


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
        fit(backbone, tmp_path, dataclasses.replace(ONE_EPOCH, save_every=1))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]

    def also_full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", also_full)
    with pytest.raises(DiskFullError, match=r"no space .*--resume"):
        fit(backbone, tmp_path, ONE_EPOCH, resume=True)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "metrics.jsonl"}
    assert fit(backbone, tmp_path, ONE_EPOCH, resume=True).steps == 6
    for error in (RuntimeError("shapes do not match"), PermissionError("not yours")):
        monkeypatch.setattr(torch, "save", mock.Mock(side_effect=error))
        with pytest.raises(type(error), match=str(error)):
            fit(backbone, tmp_path / "other")


def test_two_runs_do_not_share_a_folder(backbone: Backbone, tmp_path: Path) -> None:
    refusals: list[str] = []

    def meanwhile(report: StepReport) -> None:
        if report.step == 2:
            for how in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(TrainingError, match="another run is writing into") as caught:
                    fit(backbone, tmp_path, QUICK, **how)  # type: ignore[arg-type]
                refusals.append(str(caught.value))

    fit(backbone, tmp_path, dataclasses.replace(ONE_EPOCH, save_every=1), on_step=meanwhile)
    assert len(refusals) == 2
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 7))
    with exclusive(tmp_path, refusal=TrainingError("still held")):
        pass


def test_skipped_videos_are_counted_over_a_resume(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        fit(backbone, tmp_path, data=FakeData(skips=(2, 5)), on_step=stop_at(6))
    trained = fit(backbone, tmp_path, data=FakeData(), resume=True)
    assert trained.skipped == {"gone02.mp4": "not a video", "gone05.mp4": "not a video"}
    record = trained.projection.config.fit
    assert (record["skipped"], record["skipped_clips"]) == (2, ["gone02.mp4", "gone05.mp4"])


def test_a_small_corpus_makes_small_batches(
    backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = dataclasses.replace(QUICK, epochs=2, batch_size=128)
    assert fit(backbone, tmp_path, settings, FakeData(5)).steps == 2
    assert "batches of 5 in place of 128: an epoch has 5 samples" in caplog.text
    data = FakeData()
    with pytest.raises(GeometryError, match="the nearest that does is 48 or 64"):
        fit(backbone, tmp_path / "out", dataclasses.replace(QUICK, size=60), data)
    assert not data.seen
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"frames": 3},
        {"head": "mlp2", "activation": "gelu"},
        {"head": "affine", "layers": (0, 1)},
        {"init": "identity", "pea": "off"},
        {"precision": "bfloat16"},
    ],
)
def test_other_settings_train(
    changes: dict[str, object], backbone: Backbone, tmp_path: Path
) -> None:
    settings = dataclasses.replace(QUICK, epochs=3, **changes)  # type: ignore[arg-type]
    trained = fit(backbone, tmp_path, settings, FakeData(frames=settings.frames))
    assert {t.dtype for t in trained.projection.state_dict().values()} == {torch.float32}
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert sum(losses[-6:]) < sum(losses[:6])


def test_an_old_checkpoint_makes_another_due(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cosettle_adapter.training.train._SAVE_SECONDS", -1.0)
    steps: list[int] = []
    on_step = lambda report: steps.append(read_run(tmp_path).step)  # noqa: E731
    fit(backbone, tmp_path, ONE_EPOCH, on_step=on_step)
    assert steps == [0, 1, 2, 3, 4, 5]


def test_metrics_go_to_tensorboard_where_it_is_installed(
    backbone: Backbone, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(backbone, tmp_path, ONE_EPOCH, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert "epoch" not in events.Tags()["scalars"]


# Other processes ------------------------------------------------------------------------------

SCRIPT = """
import dataclasses, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from cosettle_adapter.training.processes import make_accelerator
from cosettle_adapter.training.train import train
from training_fakes import QUICK, FakeData, small_backbone

output, replace, saves = Path(sys.argv[1]), Path.replace, 0

def slowly(path, target):
    global saves
    if target.name.startswith("step_"):
        saves += 1
        if saves == 8 and sys.argv[2] == "kill":  # all is there, under its temporary name
            (path / "optimizer.bin").write_bytes(b"half")
            print("writing", flush=True)
            time.sleep(60)
    return replace(path, target)

Path.replace = slowly
more = {"save_every": 1}
if sys.argv[2] == "interrupt":
    more = {"batch_size": 2, "accumulation": 2, "workers": 2, "epochs": 2000}
train(
    small_backbone(), FakeData(), output, dataclasses.replace(QUICK, **more),
    accelerator=make_accelerator("cpu"), on_step=lambda report: print(report.step, flush=True),
)
"""


def start(folder: Path, how: str) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def test_a_kill_in_the_middle_of_a_write_loses_one_step(
    whole: tuple[Trained, Path], backbone: Backbone, tmp_path: Path
) -> None:
    with start(tmp_path, "kill") as process:
        assert process.stdout is not None
        while process.stdout.readline() != b"writing\n":
            assert process.poll() is None
        process.kill()
    assert (tmp_path / "checkpoints" / ".step_00000007").is_dir()
    assert read_run(tmp_path).step == 6
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    trained = fit(backbone, tmp_path, dataclasses.replace(QUICK, save_every=1), resume=True)
    assert distance(trained.projection, whole[0].projection) == 0
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 25))


def test_ctrl_c_in_a_terminal_lets_the_workers_finish_the_step(tmp_path: Path) -> None:
    """A terminal sends SIGINT to the workers as well."""
    process = start(tmp_path, "interrupt")
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert b"TrainingInterrupted: stopped after step" in errors
    assert b"DataLoader worker" not in errors
    assert read_run(tmp_path).step == [1, *map(int, printed.split())][-1]
