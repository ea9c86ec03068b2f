from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cosettle_adapter.evaluation.probe import choose_probe, fit_probe, nearest_votes


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blobs(classes: int = 3, each: int = 12, *, apart: float = 4.0) -> tuple:
    labels = torch.arange(classes).repeat_interleave(each)
    centres = apart * noise(classes, 5, seed=9)
    return (centres[labels] + noise(len(labels), 5)), labels


def votes_by_hand(train: list, labels: list, query: list, k: int, temperature: float) -> dict:
    def cosine(a: list, b: list) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (math.hypot(*a) * math.hypot(*b))

    nearest = sorted(range(len(train)), key=lambda i: -cosine(train[i], query))[:k]
    votes: dict[int, float] = {}
    for i in nearest:
        weight = math.exp(cosine(train[i], query) / temperature)
        votes[labels[i]] = votes.get(labels[i], 0.0) + weight
    total = sum(votes.values())
    return {label: weight / total for label, weight in votes.items()}


@given(
    n=st.integers(1, 9), k=st.integers(1, 12), temperature=st.floats(0.05, 2),
    seed=st.integers(0, 99),
)  # fmt: skip
@hypothesis_settings(max_examples=40)
def test_votes_equal_their_definition(n: int, k: int, temperature: float, seed: int) -> None:
    train, queries = noise(n, 4, seed=seed), noise(3, 4, seed=seed + 100)
    labels = torch.arange(n) % 3
    votes = nearest_votes(train, labels, queries, ks=[k], classes=3, temperature=temperature)[k]
    for query, row in zip(queries.tolist(), votes.tolist(), strict=True):
        expected = votes_by_hand(train.tolist(), labels.tolist(), query, k, temperature)
        assert row == pytest.approx([expected.get(label, 0.0) for label in range(3)])


def test_of_equally_near_neighbours_the_earlier_counts() -> None:
    train = torch.ones(4, 3)
    votes = nearest_votes(train, torch.tensor([1, 0, 0, 0]), torch.ones(1, 3), ks=[1, 3], classes=2)
    assert votes[1].argmax() == 1
    assert votes[3].tolist() == [pytest.approx([2 / 3, 1 / 3])]


def test_a_small_temperature_trusts_the_nearest() -> None:
    train = torch.tensor([[1.0, 0.0], [1.0, 0.3], [1.0, 0.3]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    cold = nearest_votes(train, labels, query, ks=[3], classes=2, temperature=0.01)[3]
    warm = nearest_votes(train, labels, query, ks=[3], classes=2, temperature=1.0)[3]
    assert (cold.argmax(), warm.argmax()) == (0, 1)


def test_a_feature_of_zeros_is_near_to_none() -> None:
    votes = nearest_votes(noise(4, 3), torch.zeros(4).long(), torch.zeros(1, 3), ks=[2], classes=1)
    assert votes[2].tolist() == [[1.0]]


@pytest.mark.parametrize("options", [{"ks": []}, {"ks": [0]}, {"ks": [1], "temperature": 0.0}])
def test_options_of_votes_are_checked(options: dict) -> None:
    with pytest.raises(ValueError, match="expected at least one feature"):
        nearest_votes(noise(2, 3), torch.zeros(2).long(), noise(1, 3), classes=1, **options)


@pytest.mark.parametrize("penalty", [1e-3, 0.1, 10.0])
def test_a_probe_is_where_the_gradient_vanishes(penalty: float) -> None:
    features, labels = blobs(apart=0.7)
    probe = fit_probe(features, labels, penalty, classes=3)
    # written out: mean cross entropy + penalty / 2 |W|^2 on standardised features
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    error = torch.softmax(standard @ probe.weight.T + probe.bias, 1) - torch.eye(3)[labels]
    gradient = error.T @ standard / len(labels) + penalty * probe.weight
    assert float(gradient.abs().max()) < 1e-7
    assert float(error.mean(0).abs().max()) < 1e-7
    torch.testing.assert_close(probe.logits(features), standard @ probe.weight.T + probe.bias)


def test_a_probe_separates_what_can_be_separated() -> None:
    features, labels = blobs()
    assert bool(
        (fit_probe(features, labels, 1e-4, classes=3).logits(features).argmax(1) == labels).all()
    )
    strong = fit_probe(features, labels, 10.0, classes=3)
    weak = fit_probe(features, labels, 1e-4, classes=3)
    assert strong.weight.norm() < 0.1 * weak.weight.norm()


def test_a_probe_knows_neither_scale_nor_shift_nor_constant_channels() -> None:
    features, labels = blobs(apart=0.7)
    plain = fit_probe(features, labels, 0.1, classes=3).logits(features)
    moved = torch.cat([features * 1e3 - 7, torch.full((len(labels), 1), 0.1)], dim=1)
    torch.testing.assert_close(
        fit_probe(moved, labels, 0.1, classes=3).logits(moved), plain, atol=1e-5, rtol=1e-5
    )


def test_where_it_starts_does_not_matter() -> None:
    features, labels = blobs(apart=0.7)
    start = fit_probe(features, labels, 10.0, classes=3)
    warm = fit_probe(features, labels, 0.05, classes=3, start=start)
    cold = fit_probe(features, labels, 0.05, classes=3)
    torch.testing.assert_close(warm.weight, cold.weight, atol=1e-5, rtol=1e-4)
    assert float(start.weight.norm()) < float(cold.weight.norm())  # and start is left as it was


def test_the_penalty_is_chosen_on_what_was_held_out() -> None:
    # 40 channels of noise and few videos: a weak penalty remembers them
    labels = torch.arange(2).repeat(12)
    features = torch.cat(
        [0.8 * (labels[:, None] * 2.0 - 1) + noise(24, 1), noise(24, 40, seed=3)], 1
    )
    held = list(range(12))
    chosen = choose_probe(features, labels, held, classes=2)
    accuracies, losses = {}, {}
    rest = torch.arange(12, 24)
    for penalty in (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        logits = fit_probe(features[rest], labels[rest], penalty, classes=2).logits(features[held])
        accuracies[penalty] = float((logits.argmax(1) == labels[held]).double().mean())
        losses[penalty] = float(torch.nn.functional.cross_entropy(logits, labels[held]))
    best = max(accuracies, key=lambda p: (accuracies[p], -losses[p]))
    assert chosen.probe.penalty == best
    assert chosen.held_out_accuracy == accuracies[best]
    refitted = fit_probe(features, labels, best, classes=2)
    torch.testing.assert_close(chosen.probe.weight, refitted.weight)


def test_nothing_to_hold_out_means_the_default_penalty() -> None:
    chosen = choose_probe(noise(2, 3), torch.tensor([0, 1]), [], classes=2)
    assert (chosen.probe.penalty, chosen.held_out_accuracy) == (0.01, None)
    with pytest.raises(ValueError, match=r"penalty of 0\.0"):
        fit_probe(noise(2, 3), torch.tensor([0, 1]), 0.0, classes=2)


def test_probes_are_fitted_where_gradients_are_off() -> None:
    features, labels = blobs()
    with torch.no_grad():
        probe = fit_probe(features, labels, 0.1, classes=3)
    assert float(probe.weight.norm()) > 0.1
    assert not probe.weight.requires_grad
