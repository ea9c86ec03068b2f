from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pytest

from cosettle_adapter.evaluation import ClipScores, Evaluation
from cosettle_adapter.evaluation.run import ClipResult
from cosettle_adapter.evaluation.tables import (
    best_layers,
    comparison,
    gain,
    paired_interval,
    result_notes,
    result_tables,
)

RAW, FIVE, SEVEN, MINE = "raw last layer", "centred layer 5", "centred layer 7", "adapted"
TABLE = {
    "one/a": {RAW: 0.5, FIVE: 0.9, SEVEN: 0.6, MINE: 0.7},
    "one/b": {RAW: 0.4, FIVE: 0.8, SEVEN: 0.7, MINE: 0.6},
    "two/a": {RAW: 0.3, FIVE: 0.1, SEVEN: 0.2, MINE: 0.6},
}
PARTS = ["one", "two"]


def results(table: Mapping[str, Mapping[str, float]], **settings: object) -> Evaluation:
    clips = {
        clip: ClipResult("", (48, 80), {n: ClipScores({"J&F": v}) for n, v in row.items()})
        for clip, row in table.items()
    }
    figures = {"J&F": 0.5, "drift@1": 0.25, "drift@4": math.nan, "drift@8": math.nan}
    total = {name: figures for row in table.values() for name in row}
    known = {"layers": [7, 11], "drift": "true motion", **settings}
    return Evaluation("davis", ("J&F",), known, clips, total)


def test_a_gain_is_the_mean_of_paired_differences_and_names_its_worst_clip() -> None:
    found = gain(results(TABLE), MINE, dict.fromkeys(TABLE, RAW))
    assert found.mean == pytest.approx((0.2 + 0.2 + 0.3) / 3)
    assert found.low <= found.mean <= found.high
    table = {**TABLE, "one/c": {RAW: math.nan, MINE: 0.1}, "one/d": {MINE: 0.1}}
    lacking = results(table)
    assert gain(lacking, MINE, dict.fromkeys(table, RAW)) == found, "those do not count"
    nothing = gain(lacking, MINE, dict.fromkeys(table, "settled"))
    assert (str(nothing), nothing.clip) == ("-", "")
    found = gain(results(TABLE), MINE, dict(zip(TABLE, (FIVE, SEVEN, SEVEN), strict=True)))
    assert (found.clip, found.worst) == ("one/a", pytest.approx(-0.2))
    assert found.mean == pytest.approx((-0.2 - 0.1 + 0.4) / 3)


def test_the_interval_is_that_of_the_bootstrap() -> None:
    differences = np.random.default_rng(1).normal(1.0, 2.0, 25)
    low, high = paired_interval(differences.tolist())
    assert (low, high) == paired_interval(differences.tolist()), "drawn with a fixed seed"
    draws = np.random.default_rng(2).choice(differences, (20_000, 25)).mean(1)
    assert (low, high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.05)


def test_the_layer_to_compare_with_is_chosen_on_the_other_parts() -> None:
    crossed = best_layers(results(TABLE, parts=PARTS))
    assert crossed == {"one/a": SEVEN, "one/b": SEVEN, "two/a": FIVE}
    assert set(best_layers(results(TABLE)).values()) == {FIVE}
    only = {clip: row for clip, row in TABLE.items() if clip.startswith("one")}
    assert set(best_layers(results(only, parts=PARTS)).values()) == {FIVE}
    table = {"a": {RAW: 0.5, "centred": 0.9, FIVE: 0.6}}
    assert best_layers(results(table)) == {"a": FIVE}
    assert best_layers(results(table, layers=[7])) == {"a": "centred"}, "it is a single layer"
    assert best_layers(dataclasses.replace(results(table), total={RAW: {}})) == {}


def test_the_tables_show_gains_with_their_worst_clip() -> None:
    variants, clips = result_tables(results(TABLE, parts=PARTS))
    assert variants.title == "davis: 3 clips, in percent"
    mine = next(row for row in variants.rows if row[1] == MINE)
    assert mine[2:] == [
        "50.0", "+23.3 [20.0, 30.0]", "+20.0", "+16.7 [-10.0, 50.0]", "-10.0", "25.0/-/-"
    ]  # fmt: skip
    assert clips.rows[0] == ["one/a", "50.0", "90.0", "60.0", "70.0"]
    assert clips.rows[clips.rule or 0][0] == "all: J&F"
    notes = list(result_notes(results(TABLE, parts=PARTS)))
    assert any("centred layer 7 for one, centred layer 5 for two" in note for note in notes)
    assert any(note.startswith("adapted: worst clip over raw last: one/a") for note in notes)
    assert "frames encoded at 48 x 80" in notes


def test_the_demos_table_marks_the_best_of_each_column() -> None:
    figures = {"raw": {"drift@1": 0.2, "matches@1": 0.5}, "mine": {"drift@1": 0.1}}
    table = comparison("clip", figures, emphasis="mine")
    assert list(table.columns) == ["features", "drift, next frame"]
    assert (table.best[0], table.best[1], table.emphasis) == ([], [1], 1)
    assert "Right matches" not in table.note
