from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_fakes import QUICK, small_backbone

from cosettle_adapter import Projection
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.head import make_optimizer
from cosettle_adapter.training.settings import (
    ObjectiveSettings,
    TrainSettings,
    learning_rate_factor,
)


@given(st.integers(1, 50), st.integers(2, 20), st.integers(0, 2), st.data())
def test_the_rate_is_the_papers_at_every_step(
    per_epoch: int, epochs: int, warmup: int, data: st.DataObject
) -> None:
    """The official code words it in fractions of an epoch."""
    warmup = min(warmup, epochs - 1)
    step = data.draw(st.integers(0, per_epoch * epochs - 1))
    epoch = step / per_epoch
    expected = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
    expected = epoch / warmup if epoch < warmup else expected
    factor = learning_rate_factor(step, steps=per_epoch * epochs, warmup=warmup * per_epoch)
    assert factor == pytest.approx(expected, abs=1e-12)


def test_warm_up_is_an_epoch_or_a_fifth_of_a_short_run() -> None:
    warmups = {epochs: TrainSettings(epochs=epochs).warmup for epochs in (5, 20, 2, 1)}
    assert warmups == pytest.approx({5: 1.0, 20: 1.0, 2: 0.4, 1: 0.2})
    assert TrainSettings(warmup_epochs=0).warmup == 0
    rising = [learning_rate_factor(step, steps=4, warmup=4) for step in range(5)]
    assert rising == [0, 0.25, 0.5, 0.75, 0]


def test_the_highest_rate_grows_with_the_samples_of_a_step_and_on_short_runs() -> None:
    paper = TrainSettings()
    assert paper.highest_lr(512, 5 * 240_000 // 512) == pytest.approx(2e-4, rel=1e-3)
    assert paper.highest_lr(128, 10_000) == pytest.approx(5e-5)
    assert paper.highest_lr(32, 1000) == pytest.approx(2344 * 2e-4 / 1000)
    assert paper.highest_lr(32, 75) == 1e-3
    assert TrainSettings(base_lr=1e-4).highest_lr(128, 75) == pytest.approx(5e-5)


def test_only_matrices_decay() -> None:
    head = Projection(TrainSettings(head="mlp3").head_config(small_backbone()))
    optimizer = make_optimizer(head, TrainSettings(weight_decay=0.2, betas=(0.8, 0.9)))
    matrices, vectors = optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.2, 0.0)
    assert [tensor.ndim for tensor in matrices["params"]] == [2, 2, 2]
    assert [tensor.ndim for tensor in vectors["params"]] == [1] * 5, "biases, and LayerNorm's two"
    assert matrices["betas"] == (0.8, 0.9)
    assert isinstance(optimizer, torch.optim.AdamW)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"frames": 1}, "frames must be at least 2"),
        ({"base_lr": 0.0}, "base_lr must be a positive rate"),
        ({"betas": (0.9, 1.0)}, r"two numbers in \[0, 1\)"),
        ({"warmup_epochs": 9.0}, "from 0 to the 5 epochs"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"head": "mlp4"}, "unknown head 'mlp4'; expected one of linear"),
        ({"layers": ()}, "at least one layer"),
        ({"temperatures": (0.1, -0.1)}, r"one or more positive numbers, got \(0.1, -0.1\)"),
        ({"pea_ratio": math.nan}, "pea_ratio must be at least 0, got nan"),
        ({"pea": "each"}, "unknown pea 'each'; expected one of batch, sample, off"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainSettings(**changes)  # type: ignore[arg-type]


def test_several_layers_are_read_side_by_side() -> None:
    backbone = small_backbone()
    config = TrainSettings(layers=(0, -1)).head_config(backbone)
    assert (config.layers, config.norm) == ((0, 1), False)
    assert (config.in_width, config.out_width) == (64, 64)
    last = TrainSettings().head_config(backbone)
    assert (last.layers, last.norm, last.in_width) == ((1,), True, 32)
    assert TrainSettings(norm=False).head_config(backbone).norm is False


def test_what_is_recorded_is_plain_and_says_nothing_of_the_machine() -> None:
    paper = ObjectiveSettings()
    assert (paper.temperatures, paper.separability_weight) == ((0.03,), 3.0)
    assert (paper.pea_ratio, paper.pool) == (10.0, 2)
    record = QUICK.record()
    assert (record["temperatures"], record["warmup_epochs"]) == ([0.03], 0.8)
    assert not {"workers", "batch_size", "layers"} & record.keys()
    assert None not in record.values()
    assert QUICK.decisive().keys() > record.keys() - {"warmup_epochs"}
