from __future__ import annotations

import math

import pytest
import torch
from cosettle_adapter.training.schedule import (
    learning_rate,
    learning_rate_factor,
    make_optimizer,
    parameter_groups,
)
from hypothesis import given
from hypothesis import strategies as st
from training_fakes import QUICK, small_backbone

from cosettle_adapter import Projection
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.settings import TrainSettings


def paper(step: int, per_epoch: int, epochs: int, warmup: int) -> float:
    """The schedule as the paper's code words it: in fractions of an epoch."""
    epoch = step / per_epoch
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


@given(st.integers(1, 50), st.integers(2, 20), st.integers(0, 2), st.data())
def test_the_rate_is_the_papers_at_every_step(
    per_epoch: int, epochs: int, warmup: int, data: st.DataObject
) -> None:
    warmup = min(warmup, epochs - 1)
    step = data.draw(st.integers(0, per_epoch * epochs - 1))
    factor = learning_rate_factor(step, steps=per_epoch * epochs, warmup=warmup * per_epoch)
    assert factor == pytest.approx(paper(step, per_epoch, epochs, warmup), abs=1e-12)
    assert 0 <= factor <= 1


def test_a_run_that_is_all_warm_up_only_rises() -> None:
    factors = [learning_rate_factor(step, steps=4, warmup=4) for step in range(5)]
    assert factors == [0, 0.25, 0.5, 0.75, 0]


@pytest.mark.parametrize(("epochs", "warmup"), [(5, 1.0), (20, 1.0), (2, 0.4), (1, 0.2)])
def test_warm_up_is_an_epoch_or_a_fifth_of_a_short_run(epochs: int, warmup: float) -> None:
    assert TrainSettings(epochs=epochs).warmup == pytest.approx(warmup)
    assert TrainSettings(epochs=epochs, warmup_epochs=0).warmup == 0


def test_the_rate_grows_with_the_samples_of_a_step() -> None:
    paper = learning_rate(TrainSettings(), 512, steps=5 * 240_000 // 512)
    assert paper == pytest.approx(2e-4, rel=1e-3), "the paper's 4 x 128"
    assert learning_rate(TrainSettings(), 128, steps=10_000) == pytest.approx(5e-5)
    assert learning_rate(TrainSettings(), 512, steps=100_000) == pytest.approx(2e-4)


def test_a_short_run_gets_a_rate_that_moves_it_as_far_up_to_a_limit() -> None:
    assert learning_rate(TrainSettings(), 32, steps=1000) == pytest.approx(2344 * 2e-4 / 1000)
    assert learning_rate(TrainSettings(), 32, steps=75) == 1e-3
    assert learning_rate(TrainSettings(base_lr=1e-4), 128, steps=75) == pytest.approx(5e-5)


def test_only_matrices_decay() -> None:
    head = Projection(TrainSettings(head="mlp3").head_config(small_backbone()))
    matrices, vectors = parameter_groups(head.parameters(), 0.05)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0.0)
    assert isinstance(matrices["params"], list)
    assert isinstance(vectors["params"], list)
    assert len(matrices["params"]) == 3
    assert {tensor.ndim for tensor in matrices["params"]} == {2}
    assert {tensor.ndim for tensor in vectors["params"]} == {1}
    assert len(vectors["params"]) == 5, "three biases, and LayerNorm's scale and shift"


def test_the_optimiser_is_what_the_settings_say() -> None:
    head = torch.nn.Linear(4, 4)
    settings = TrainSettings(epochs=3, base_lr=0.1, betas=(0.8, 0.9), warmup_epochs=1)
    optimizer, scheduler = make_optimizer(head, settings, samples=512, steps_per_epoch=2)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    cosine = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == pytest.approx([0, 0.1, *(0.2 * value for value in cosine)])
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"frames": 1}, "frames must be at least 2"),
        ({"base_lr": 0.0}, "expected a positive rate"),
        ({"betas": (0.9, 1.0)}, r"two numbers in \[0, 1\)"),
        ({"warmup_epochs": 9.0}, "from 0 to the 5 epochs"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"head": "mlp4"}, "unknown head 'mlp4'; expected one of linear"),
        ({"precision": "int8"}, "expected one of float32, bfloat16, float16"),
        ({"layers": ()}, "at least one block"),
    ],
)
def test_settings_that_make_no_sense_are_told(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainSettings(**changes)  # type: ignore[arg-type]


def test_several_blocks_are_read_side_by_side() -> None:
    backbone = small_backbone()
    config = TrainSettings(layers=(0, -1)).head_config(backbone)
    assert (config.layers, config.norm) == ((0, 1), False)
    assert (config.in_width, config.out_width) == (64, 64)
    last = TrainSettings().head_config(backbone)
    assert (last.layers, last.norm, last.in_width) == ((1,), True, 32)
    assert TrainSettings(norm=False).head_config(backbone).norm is False


def test_what_is_recorded_is_plain_and_says_nothing_of_the_machine() -> None:
    record = QUICK.record()
    assert record["temperatures"] == [0.03]
    assert record["warmup_epochs"] == 0.8
    assert not {"workers", "batch_size", "objective", "layers"} & record.keys()
    assert None not in record.values()
