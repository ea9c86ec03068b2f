from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_fakes import FakeData

from cosettle_adapter.errors import FrameError
from cosettle_adapter.training.batches import Plan, StepBatches, _Fetched, load_batches
from cosettle_adapter.training.cached_views import CachedBatch
from cosettle_adapter.training.encoding import Views
from cosettle_adapter.training.errors import TrainingError


def plan(samples: int = 24, **changes: int) -> Plan:
    options = {"batch_size": 4, "processes": 1, "accumulation": 1, "epochs": 2, "seed": 0}
    return Plan.of(samples, **{**options, **changes})


def step_keys(of: Plan, step: int) -> list[tuple[int, int]]:
    """What all processes see in a step, in order of forward pass, then rank."""
    ranks = [of.keys(step, rank) for rank in range(of.processes)]
    return [key for parts in zip(*ranks, strict=True) for part in parts for key in part]


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_a_step_is_the_same_however_it_is_cut(
    samples: int, batch: int, processes: int, accumulation: int
) -> None:
    whole = batch * processes * accumulation
    if samples < whole:
        return
    cut = plan(samples, batch_size=batch, processes=processes, accumulation=accumulation)
    one = plan(samples, batch_size=whole)
    assert cut.steps == one.steps == 2 * (samples // whole)
    for step in range(one.steps):
        assert step_keys(cut, step) == one.keys(step, 0)[0]


def test_an_epoch_sees_no_sample_twice_and_drops_others_each_time() -> None:
    of = plan(10, batch_size=4, epochs=3)
    epochs = [[step_keys(of, 2 * epoch + step) for step in range(2)] for epoch in range(3)]
    seen = [{index for step in epoch for _, index in step} for epoch in epochs]
    assert [len(indices) for indices in seen] == [8, 8, 8]
    assert [{epoch for step in steps for epoch, _ in step} for steps in epochs] == [{0}, {1}, {2}]
    assert len({frozenset(indices) for indices in seen}) > 1
    assert plan(10, seed=1).keys(0, 0) != plan(10, seed=0).keys(0, 0)


def test_batches_begin_at_any_step() -> None:
    of = plan(accumulation=2)
    whole = list(StepBatches(of))
    later = StepBatches(of, start=4)
    assert list(later) == whole[8:]
    assert len(later) == len(whole) - 8
    assert [batch for step in range(of.steps) for batch in of.keys(step, 0)] == whole


def test_few_samples_make_small_batches_and_too_few_are_told() -> None:
    assert plan(7, batch_size=128, accumulation=2).batch_size == 3
    assert plan(7, batch_size=128).steps_per_epoch == 1
    with pytest.raises(TrainingError, match="3 samples are too few for 2 processes and 2 forward"):
        plan(3, processes=2, accumulation=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers: int) -> None:
    batches = load_batches(
        FakeData(8), StepBatches(plan(8, epochs=1)), workers=workers, pin_memory=False
    )
    found = [batch.seeds.tolist() for batch in batches]
    assert found == [[index for _, index in keys] for keys in StepBatches(plan(8, epochs=1))]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_the_same_sentence_from_a_worker(workers: int) -> None:
    batches = load_batches(
        FakeData(8, missing=(5,)), StepBatches(plan(8)), workers=workers, pin_memory=False
    )
    with pytest.raises(FrameError, match=r"^clip05.mp4 cannot be read$"):
        list(batches)


def test_all_tensors_of_a_batch_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[int, ...]] = []

    def pin(tensor: torch.Tensor, *_: object) -> torch.Tensor:
        pinned.append(tuple(tensor.shape))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    views = Views(torch.zeros(2, 2, 4, 8), torch.zeros(2, 1, 4, 8), (2, 2))
    batch = _Fetched(CachedBatch(views, torch.zeros(2, dtype=torch.int64), (("a", "b"),)))
    copied = batch.pin_memory().batch
    assert pinned == [(2, 2, 4, 8), (2, 1, 4, 8), (2,)]
    assert (copied.views.grid, copied.skipped) == ((2, 2), (("a", "b"),))
