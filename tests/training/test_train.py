from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_fakes import (
    ONE_EPOCH,
    QUICK,
    SMALL_VIT,
    FakeData,
    distance,
    small_backbone,
    train_on_cpu,
)

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.training.checkpoint import latest, read_metrics, read_run
from cosettle_adapter.training.errors import NonFiniteLossError
from cosettle_adapter.training.train import Trained


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
    assert record["last_epoch"].keys() == {"loss", "cycle", "separability", "accuracy"}
    assert "cosettle-adapter train --data clips" in (output / "README.md").read_text()
    fresh = small_backbone(SMALL_VIT).state_dict()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, fresh[name]), "the backbone is not touched"


def test_metrics_tell_of_every_step(whole: tuple[Trained, Path]) -> None:
    lines = read_metrics(whole[1])
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert [line["epoch"] for line in lines] == [1 + step // 6 for step in range(24)]
    assert lines[0].keys() >= {"loss", "cycle", "separability", "accuracy", "lr", "grad_norm"}
    assert all(line["clips_per_second"] > 0 for line in lines)
    first, last = (sum(line["loss"] for line in part) for part in (lines[:6], lines[-6:]))
    assert last < first, "it learns"
    for line in lines:
        assert line["loss"] == pytest.approx(line["cycle"] + 3 * line["separability"], rel=1e-5)


def test_the_rate_falls_to_the_lowest(backbone: Backbone, tmp_path: Path) -> None:
    rates = {"base_lr": 0.64, "min_lr": 0.004, "warmup_epochs": 0.5}  # 0.64 x 4 samples / 256
    train_on_cpu(backbone, tmp_path, dataclasses.replace(ONE_EPOCH, **rates))  # type: ignore[arg-type]
    found = [line["lr"] for line in read_metrics(tmp_path)]
    assert found == pytest.approx([0, 0.01 / 3, 0.02 / 3, 0.01, 0.0085, 0.0055])


@pytest.mark.parametrize("pea", ["batch", "sample"])
def test_accumulated_batches_are_one_large_batch(
    pea: str, backbone: Backbone, tmp_path: Path
) -> None:
    settings = dataclasses.replace(ONE_EPOCH, pea=pea)  # type: ignore[arg-type]
    cut = dataclasses.replace(settings, batch_size=1, accumulation=4)
    one, other = (
        train_on_cpu(backbone, tmp_path / str(each.batch_size), each).projection
        for each in (settings, cut)
    )
    assert 0 < distance(one, other) < 1e-6


def test_a_batch_that_is_not_finite_is_named_and_changes_nothing(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(QUICK, save_every=1)
    with pytest.raises(
        NonFiniteLossError, match=r"the loss of step \d+ \(epoch 1\) is not finite \(nan\)"
    ) as caught:
        train_on_cpu(backbone, tmp_path, settings, FakeData(broken=(7,)))
    assert "because of 1 of the 4 samples in a batch (clip07.mp4)" in str(caught.value)
    weights = load_file(latest(tmp_path) / "model.safetensors")  # type: ignore[operator]
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert f"step {read_run(tmp_path).step + 1} " in str(caught.value)
    with pytest.raises(NonFiniteLossError, match=r"of 4 of the 4 samples .*lower --base-lr"):
        train_on_cpu(backbone, tmp_path / "all", data=FakeData(broken=tuple(range(24))))
    infinite = torch.tensor(float("inf"))
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda parameters, most: infinite)
    with pytest.raises(NonFiniteLossError, match=r"gradient of step 1 \(epoch 1\) .*clip\d\d.mp4"):
        train_on_cpu(backbone, tmp_path / "gradient")
    assert read_run(tmp_path / "gradient").step == 0


def test_samples_that_cannot_be_had_end_the_run_in_a_sentence(
    backbone: Backbone, tmp_path: Path
) -> None:
    settings = dataclasses.replace(ONE_EPOCH, workers=1)
    with pytest.raises(FrameError, match=r"^clip\d\d.mp4 cannot be read$"):
        train_on_cpu(backbone, tmp_path, settings, FakeData(missing=tuple(range(24))))
    # a run that did no step is in nobody's way
    started: list[int] = []
    trained = train_on_cpu(backbone, tmp_path, settings, FakeData(seed=1), on_start=started.append)
    assert (trained.steps, started) == (6, [24])
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 7))


def test_a_small_corpus_makes_small_batches(
    backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = dataclasses.replace(QUICK, epochs=2, batch_size=128)
    assert train_on_cpu(backbone, tmp_path, settings, FakeData(5)).steps == 2
    assert "batch size lowered from 128 to 5, because an epoch has only 5 samples" in caplog.text
    data = FakeData()
    with pytest.raises(GeometryError, match="the nearest valid size is 48 or 64"):
        train_on_cpu(backbone, tmp_path / "out", dataclasses.replace(QUICK, size=60), data)
    assert not data.seen
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"frames": 3, "head": "mlp2", "activation": "gelu", "precision": "bfloat16"},
        {"head": "affine", "layers": (0, 1), "init": "identity", "pea": "off"},
    ],
)
def test_other_settings_train(
    changes: dict[str, object], backbone: Backbone, tmp_path: Path
) -> None:
    settings = dataclasses.replace(QUICK, epochs=3, **changes)  # type: ignore[arg-type]
    trained = train_on_cpu(backbone, tmp_path, settings, FakeData(frames=settings.frames))
    assert {t.dtype for t in trained.projection.state_dict().values()} == {torch.float32}
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert sum(losses[-6:]) < sum(losses[:6])


def test_metrics_go_to_tensorboard_where_it_is_installed(
    backbone: Backbone, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_on_cpu(backbone, tmp_path, ONE_EPOCH, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert "epoch" not in events.Tags()["scalars"]
