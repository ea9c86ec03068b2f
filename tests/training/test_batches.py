from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosettle_adapter.training.batches import Plan
from cosettle_adapter.training.errors import TrainingError


def plan(samples: int = 24, **changes: int) -> Plan:
    options = {"batch_size": 4, "processes": 1, "accumulation": 1, "epochs": 2, "seed": 0}
    return Plan(samples, **{**options, **changes})


def step_keys(of: Plan, step: int) -> list[tuple[int, int]]:
    """What all processes see in a step, in order of forward pass, then rank."""
    ranks = [of.keys(step, rank) for rank in range(of.processes)]
    return [key for parts in zip(*ranks, strict=True) for part in parts for key in part]


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_a_step_is_the_same_however_it_is_divided(
    samples: int, batch: int, processes: int, accumulation: int
) -> None:
    whole = batch * processes * accumulation
    if samples < whole:
        return
    divided = plan(samples, batch_size=batch, processes=processes, accumulation=accumulation)
    one = plan(samples, batch_size=whole)
    assert divided.steps == one.steps == 2 * (samples // whole)
    for step in range(one.steps):
        assert step_keys(divided, step) == one.keys(step, 0)[0]


def test_an_epoch_sees_no_sample_twice_and_drops_others_each_time() -> None:
    of = plan(10, epochs=3)
    epochs = [[step_keys(of, 2 * epoch + step) for step in range(2)] for epoch in range(3)]
    seen = [{index for step in epoch for _, index in step} for epoch in epochs]
    assert [len(indices) for indices in seen] == [8, 8, 8]
    assert [{epoch for step in steps for epoch, _ in step} for steps in epochs] == [{0}, {1}, {2}]
    assert len({frozenset(indices) for indices in seen}) > 1
    assert plan(10, seed=1).keys(0, 0) != plan(10, seed=0).keys(0, 0)
    # a change here would change every run that is resumed or repeated
    assert [index for _, index in plan(10).keys(0, 0)[0]] == KNOWN


KNOWN = [6, 3, 1, 9]


def test_batches_begin_at_any_step() -> None:
    of = plan(accumulation=2)
    whole = list(of.batches())
    assert list(of.batches(start=4)) == whole[8:]
    assert [batch for step in range(of.steps) for batch in of.keys(step, 0)] == whole


def test_few_samples_make_small_batches_and_too_few_are_refused() -> None:
    assert plan(7, batch_size=128, accumulation=2).batch_size == 3
    assert plan(7, batch_size=128).steps_per_epoch == 1
    with pytest.raises(TrainingError, match="3 samples are too few for 2 processes and 2 forward"):
        plan(3, processes=2, accumulation=2)
