"""Settings, and the head that they ask for."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from training_fakes import distance, small_backbone

from cosettle_adapter import Projection
from cosettle_adapter.errors import ProjectionFormatError
from cosettle_adapter.projection import ProjectionConfig
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.head import make_optimizer, new_head
from cosettle_adapter.training.settings import TrainSettings, learning_rate

WIDTH = 32


@given(st.integers(1, 50), st.integers(2, 20), st.integers(0, 2), st.floats(0, 2e-4), st.data())
def test_the_rate_is_the_papers_at_every_step(
    per_epoch: int, epochs: int, warmup: int, lowest: float, data: st.DataObject
) -> None:
    """The official code words it in fractions of an epoch."""
    warmup = min(warmup, epochs - 1)
    step = data.draw(st.integers(0, per_epoch * epochs - 1))
    epoch = step / per_epoch
    cosine = math.cos(math.pi * (epoch - warmup) / (epochs - warmup))
    expected = 0.5 * ((2e-4 + lowest) + (2e-4 - lowest) * cosine)
    expected = 2e-4 * epoch / warmup if epoch < warmup else expected
    steps = {"steps": per_epoch * epochs, "warmup": warmup * per_epoch}
    found = learning_rate(step, **steps, highest=2e-4, lowest=lowest)
    assert found == pytest.approx(expected, abs=1e-15)


def test_warm_up_and_highest_rate_of_short_runs() -> None:
    warmups = {epochs: TrainSettings(epochs=epochs).warmup for epochs in (5, 20, 2, 1)}
    assert warmups == pytest.approx({5: 1.0, 20: 1.0, 2: 0.4, 1: 0.2})
    assert TrainSettings(warmup_epochs=0).warmup == 0
    rates = {"steps": 4, "warmup": 4, "highest": 1.0, "lowest": 0.1}
    assert [learning_rate(step, **rates) for step in range(5)] == [0, 0.25, 0.5, 0.75, 0.1]  # type: ignore[arg-type]
    paper = TrainSettings()
    assert paper.highest_lr(512, 5 * 240_000 // 512) == pytest.approx(2e-4, rel=1e-3)
    assert paper.highest_lr(128, 10_000) == pytest.approx(5e-5)
    assert paper.highest_lr(32, 1000) == pytest.approx(2344 * 2e-4 / 1000)
    assert paper.highest_lr(32, 75) == 1e-3
    assert TrainSettings(base_lr=1e-4).highest_lr(128, 75) == pytest.approx(5e-5)
    with pytest.raises(TrainingError, match="highest learning rate of this run, 5e-05, got 6e-05"):
        TrainSettings(base_lr=1e-4, min_lr=6e-5).highest_lr(128, 75)


def test_only_matrices_decay() -> None:
    head = Projection(config(head="mlp3"))
    optimizer = make_optimizer(head, TrainSettings(weight_decay=0.2, betas=(0.8, 0.9)))
    matrices, vectors = optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.2, 0.0)
    assert [tensor.ndim for tensor in matrices["params"]] == [2, 2, 2]
    assert [tensor.ndim for tensor in vectors["params"]] == [1] * 5, "biases, and LayerNorm's two"
    assert matrices["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"frames": 1}, "frames must be at least 2"),
        ({"base_lr": 0.0}, "base_lr must be a positive rate"),
        ({"betas": (0.9, 1.0)}, r"two numbers in \[0, 1\)"),
        ({"warmup_epochs": 9.0}, "from 0 to the 5 epochs"),
        ({"min_lr": -1e-5}, "min_lr must be at least 0"),
        ({"clip_gap": 1.0}, "clip_gap must be below 1, got 1.0"),
        ({"reg_loss": "l2"}, "unknown reg_loss 'l2'; expected one of kl, mse"),
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
    several, last = config(layers=(0, -1)), config()
    assert (several.layers, several.norm) == ((0, 1), False)
    assert (several.in_width, several.out_width) == (64, 64)
    assert (last.layers, last.norm, last.in_width) == ((1,), True, 32)
    assert config(norm=False).norm is False


# Heads ----------------------------------------------------------------------------------------


def config(**changes: object) -> ProjectionConfig:
    return TrainSettings(**changes).head_config(small_backbone())  # type: ignore[arg-type]


def test_a_random_start_is_the_seeds_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (new_head(config(), init="random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert distance(first, again) == 0 < distance(first, other)
    weight = first.linears[0].weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.1)  # type: ignore[operator]
    assert all(parameter.requires_grad for parameter in first.parameters())


@pytest.mark.parametrize("kind", ["linear", "mlp2", "mlp3", "affine"])
def test_an_affine_map_starts_a_head_of_another_kind(kind: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(500, WIDTH, generator=generator) * 3 + 5
    weight = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0] / 3
    bias = -(weight @ tokens.mean(0))
    closed_form = Projection(dataclasses.replace(config(), kind="affine"))
    closed_form.load_state_dict({"linears.0.weight": weight, "linears.0.bias": bias})
    closed_form.save(tmp_path)
    starts = {"identity": (tokens - 5) / 3, str(tmp_path): tokens @ weight.T + bias}
    for init, projected in starts.items():
        given = projected if init == "identity" else tokens
        found = new_head(config(head=kind), init=init, seed=0).project(given)
        if kind == "affine":
            torch.testing.assert_close(found, projected)
        else:
            expected = F.layer_norm(projected, (WIDTH,))
            assert float(F.cosine_similarity(found, expected).detach().min()) > 0.998


def test_a_trained_head_starts_one_of_its_kind(tmp_path: Path) -> None:
    trained = new_head(config(head="mlp2"), init="random", seed=5)
    trained.save(tmp_path)
    head = new_head(config(head="mlp2"), init=str(tmp_path), seed=0)
    assert distance(head, trained) == 0
    assert all(parameter.requires_grad for parameter in head.parameters())


def test_starts_that_do_not_fit_are_told(tmp_path: Path) -> None:
    with pytest.raises(ProjectionFormatError, match="is not a projection"):
        new_head(config(), init=str(tmp_path), seed=0)
    new_head(config(head="mlp2", layers=(0,)), init="random", seed=0).save(tmp_path)
    with pytest.raises(TrainingError) as caught:
        new_head(config(), init=str(tmp_path), seed=0)
    for part in ("layers was (0,), is (1,)", "norm was False, is True", "kind was 'mlp2'"):
        assert part in str(caught.value)
    assert "fingerprint" not in str(caught.value)
    with pytest.raises(TrainingError, match="projection folder, got 'nowhere'"):
        new_head(config(), init="nowhere", seed=0)
    with pytest.raises(TrainingError, match="relu cannot start from identity"):
        new_head(config(activation="relu"), init="identity", seed=0)
