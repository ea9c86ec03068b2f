from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pytest

from cosettle_adapter.evaluation.gains import best_layers, gain, paired_interval
from cosettle_adapter.evaluation.run import Evaluation
from cosettle_adapter.evaluation.tasks import ClipScores

RAW, FIVE, SEVEN, MINE = "raw last block", "centred layer 5", "centred layer 7", "adapted"
TABLE = {
    "one/a": {RAW: 0.5, FIVE: 0.9, SEVEN: 0.6, MINE: 0.7},
    "one/b": {RAW: 0.4, FIVE: 0.8, SEVEN: 0.7, MINE: 0.6},
    "two/a": {RAW: 0.3, FIVE: 0.1, SEVEN: 0.2, MINE: 0.6},
}


def results(table: Mapping[str, Mapping[str, float]], **settings: object) -> Evaluation:
    clips = {
        clip: {kind: ClipScores({"J&F": value}) for kind, value in row.items()}
        for clip, row in table.items()
    }
    total: dict[str, dict[str, float]] = {kind: {} for row in table.values() for kind in row}
    known = {"layers": [7, 11], **settings}
    return Evaluation("davis", ("J&F",), known, {}, {}, clips, total, {})


def test_a_gain_is_the_mean_of_paired_differences_and_names_its_worst_clip() -> None:
    found = gain(results(TABLE), MINE, RAW)
    assert found.mean == pytest.approx((0.2 + 0.2 + 0.3) / 3)
    assert found.low <= found.mean <= found.high
    found = gain(results(TABLE), MINE, dict(zip(TABLE, (FIVE, SEVEN, SEVEN), strict=True)))
    assert (found.clip, found.worst) == ("one/a", pytest.approx(-0.2))
    assert found.mean == pytest.approx((-0.2 - 0.1 + 0.4) / 3)


def test_the_interval_is_that_of_the_bootstrap() -> None:
    differences = np.random.default_rng(1).normal(1.0, 2.0, 25)
    low, high = paired_interval(differences.tolist())
    assert (low, high) == paired_interval(differences.tolist()), "drawn with a fixed seed"
    draws = np.random.default_rng(2).choice(differences, (20_000, 25)).mean(1)
    assert (low, high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.05)
    assert paired_interval([0.5]) == pytest.approx((0.5, 0.5))


def test_the_layer_to_compare_with_is_chosen_on_the_other_parts() -> None:
    crossed = best_layers(results(TABLE, parts=["one", "two"]))
    assert crossed == {"one/a": SEVEN, "one/b": SEVEN, "two/a": FIVE}
    assert set(best_layers(results(TABLE)).values()) == {FIVE}
    only = {clip: row for clip, row in TABLE.items() if clip.startswith("one")}
    assert set(best_layers(results(only, parts=["one", "two"])).values()) == {FIVE}


def test_centred_counts_where_it_is_a_single_layer() -> None:
    table = {"a": {RAW: 0.5, "centred": 0.9, FIVE: 0.6}}
    assert best_layers(results(table)) == {"a": FIVE}
    assert best_layers(results(table, layers=[7])) == {"a": "centred"}


def test_clips_that_lack_a_figure_do_not_count() -> None:
    table = {**TABLE, "one/c": {RAW: math.nan, MINE: 0.1}, "one/d": {MINE: 0.1}}
    result = results(table)
    assert gain(result, MINE, RAW) == gain(results(TABLE), MINE, RAW)
    nothing = gain(result, MINE, "settled")
    assert math.isnan(nothing.mean)
    assert math.isnan(nothing.low)
    assert nothing.clip == ""
    assert best_layers(dataclasses.replace(result, total={RAW: {}})) == {}
