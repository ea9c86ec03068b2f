from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import moving_squares, write_davis
from einops import rearrange
from PIL import Image

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import (
    ClipScores,
    Evaluation,
    Propagation,
    davis_clips,
    davis_protocol,
    evaluate,
    evaluate_sequence,
)
from cosettle_adapter.evaluation.drift import mutual_correspondences, temporal_drift
from cosettle_adapter.evaluation.run import ClipResult, plain
from cosettle_adapter.evaluation.tables import (
    best_layers,
    comparison,
    gain,
    paired_interval,
    result_notes,
    result_tables,
)
from cosettle_adapter.evaluation.variants import compare_features, feature_variants
from cosettle_adapter.projection import Projection

SIZE = (48, 80)
RAW, SAME, CENTRED, ADAPTED = "raw last layer", "raw same layer", "centred", "adapted"


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    _, masks = moving_squares()
    return write_davis(tmp_path / "davis", {"one": masks, "two": masks[:, ::-1], "three": masks})


def run(
    davis: Path, adapter: CoSettleAdapter, variants: dict[str, Any] | None = None, **options: Any
) -> Evaluation:
    names, context = options.pop("clips", None), options.pop("context", 2)
    protocol = davis_protocol(davis, clips=names, propagation=Propagation(context=context))
    chosen = feature_variants(adapter, **(variants or {}))
    return evaluate(protocol, adapter, chosen, **{"size": SIZE, **options})


def mark(output: Path) -> None:
    """Change a stored figure: a sign that it is not computed again."""
    stored = json.loads(output.read_text())
    stored["clips"]["one"]["scores"][RAW]["values"]["J&F"] = 0.123
    output.write_text(json.dumps(stored))


def is_marked(result: Evaluation) -> bool:
    return result.clips["one"].scores[RAW].values["J&F"] == 0.123


def test_every_variant_of_features_is_scored(davis: Path, tiny_adapter: CoSettleAdapter) -> None:
    result = run(davis, tiny_adapter)
    assert list(result.clips) == ["one", "two", "three"]
    assert list(result.total) == [RAW, SAME, CENTRED, ADAPTED]
    assert not result.failed
    clip = davis_clips(davis)[0]
    frames = torch.stack([torch.from_numpy(clip.read_frame(t)) for t in range(len(clip))])
    variants = feature_variants(tiny_adapter, baseline_layers=[8])
    features = compare_features(
        tiny_adapter, rearrange(frames, "t h w c -> t c h w"), size=SIZE, variants=variants
    )
    # drift is measured by the matches of a layer that nothing compared reads
    assert result.settings["drift"] == "matches of centred layer 8"
    matches = mutual_correspondences(features["centred layer 8"], 4)
    for variant in result.total:
        scores = evaluate_sequence(features[variant], clip.read_annotations(), context=2)
        values = result.clips["one"].scores[variant].values
        assert values["J&F"] == pytest.approx(scores.j_and_f), variant
        expected = temporal_drift(features[variant], matches)
        assert values["drift@4"] == pytest.approx(expected, rel=1e-4)
        assert "drift@8" not in values, "five frames have no pair eight apart"
        over_clips = [clip.scores[variant].values["drift@1"] for clip in result.clips.values()]
        assert result.total[variant]["drift@1"] == pytest.approx(sum(over_clips) / 3)
    near = run(davis, tiny_adapter, size=(50, 85), clips=["one"])
    assert near.clips["one"] == result.clips["one"]
    assert near.clips["one"].size == list(SIZE), "sides go to whole patches"


def test_one_bad_clip_does_not_lose_the_others(davis: Path, tiny_adapter: CoSettleAdapter) -> None:
    (davis / "Annotations" / "480p" / "two" / "00002.png").unlink()
    broken = davis / "JPEGImages" / "480p" / "three" / "00003.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    result = run(davis, tiny_adapter)
    assert list(result.clips) == ["one"]
    assert result.failed.keys() == {"two", "three"}
    assert "00002.png" in result.failed["two"]
    assert "00003.jpg" in result.failed["three"]
    (davis / "Annotations" / "480p" / "one" / "00000.png").unlink()
    with pytest.raises(FrameError, match=r"none of 3 clips could be scored. one: "):
        run(davis, tiny_adapter)


def test_an_interrupted_run_resumes(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output, predictions = tmp_path / "results.json", tmp_path / "p"

    def interrupt(done: int, total: int, name: str) -> None:
        if name == "three":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(davis, tiny_adapter, output=output, on_clip=interrupt)
    assert list(json.loads(output.read_text())["clips"]) == ["one", "two"]
    resumed = run(davis, tiny_adapter, output=output)
    text = output.read_text()
    output.unlink()
    assert resumed.clips == run(davis, tiny_adapter, output=output).clips
    assert output.read_text() == text, "as if it had not been interrupted"
    mark(output)
    assert is_marked(run(davis, tiny_adapter, output=output))
    assert list(run(davis, tiny_adapter, output=output, clips=["two"]).clips) == ["two"]
    assert json.loads(output.read_text())["clips"].keys() == {"one", "two", "three"}
    run(davis, tiny_adapter, output=output, predictions=predictions)
    assert len(list(predictions.rglob("*.png"))) == 4 * 3 * 5, "predictions wanted later"
    folders = sorted(path.name for path in predictions.iterdir())
    assert folders == ["adapted", "centred", "raw-last-layer", "raw-same-layer"]
    truth, predicted = davis / "Annotations" / "480p" / "two", predictions / "adapted" / "two"
    assert {p.name for p in predicted.iterdir()} == {p.name for p in truth.iterdir()}
    with Image.open(predicted / "00001.png") as mine, Image.open(truth / "00001.png") as theirs:
        assert (mine.mode, mine.size) == (theirs.mode, theirs.size)
        assert set(np.unique(np.asarray(mine))) <= {0, 1, 2}


@pytest.mark.parametrize(("kind", "byte"), [("Annotations", -1), ("JPEGImages", 15)])
def test_a_changed_file_of_the_same_size_is_scored_anew(
    kind: str, byte: int, davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    run(davis, tiny_adapter, output=output, clips=["one"])
    mark(output)
    path = next((davis / kind / "480p" / "one").glob("00002.*"))
    content = bytearray(path.read_bytes())
    content[byte] ^= 1  # the density of a JPEG, a checksum of a PNG
    path.write_bytes(content)
    assert not is_marked(run(davis, tiny_adapter, output=output, clips=["one"]))


def test_results_of_other_settings_are_not_mixed(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    run(davis, tiny_adapter, output=output, model="mine", clips=["one"])
    stored = json.loads(output.read_text())
    expected = {"task", "protocol", "context", "every", "frame_size", "model", "fingerprint"}
    expected |= {"layers", "projection", "patch", "stride", "dtype", "torch"}
    assert expected <= stored["settings"].keys()
    assert stored["settings"]["frame_size"] == stored["clips"]["one"]["size"] == list(SIZE)
    with pytest.raises(ValueError, match=r"other settings \(different: context\)"):
        run(davis, tiny_adapter, output=output, model="mine", context=3)
    output.write_text("{}")
    with pytest.raises(ValueError, match="is not a results file"):
        run(davis, tiny_adapter, output=output)
    assert output.read_text() == "{}"


def test_baselines_are_scored_in_the_same_pass_and_join_earlier_results(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"output": tmp_path / "results.json", "clips": ["one"]}
    alone = run(davis, tiny_adapter, **common)
    config = dataclasses.replace(tiny_adapter.config, layers=(-1,), kind="affine")
    other = Projection(config)  # the identity on the last layer, without its final norm
    longer = Projection(config)
    longer.load_state_dict({name: 3 * tensor for name, tensor in other.state_dict().items()})
    baselines = {"other": other, "same": longer}
    both = run(davis, tiny_adapter, {"baselines": baselines}, **common)
    assert list(both.total) == [RAW, SAME, CENTRED, ADAPTED, "other", "same"]
    assert both.clips["one"].scores[ADAPTED] == alone.clips["one"].scores[ADAPTED]
    other_values, same_values = (both.clips["one"].scores[name].values for name in baselines)
    assert other_values == pytest.approx(same_values, rel=1e-5), "cosine knows no length"
    assert list(run(davis, tiny_adapter, **common).total) == list(both.total), "it stays"
    with torch.no_grad():
        other.linears[0].weight.mul_(2)
    with pytest.raises(ValueError, match=r"other settings \(different: other\)"):
        run(davis, tiny_adapter, {"baselines": {"other": other}}, **common)


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_on_the_cpu(davis: Path, tiny_adapter: CoSettleAdapter) -> None:
    expected = run(davis, tiny_adapter).total
    for variant, values in run(davis, copy.deepcopy(tiny_adapter).to("cuda")).total.items():
        assert values == pytest.approx(expected[variant], abs=0.02, nan_ok=True)


def test_plain_json_has_no_nan() -> None:
    value = {"a": [1.0, math.nan, math.inf], 2: (True, None, "x"), "path": Path("y")}
    assert plain(value) == {"a": [1.0, None, None], "2": [True, None, "x"], "path": "y"}


FIVE, SEVEN = "centred layer 5", "centred layer 7"
TABLE = {
    "one/a": {RAW: 0.5, FIVE: 0.9, SEVEN: 0.6, ADAPTED: 0.7},
    "one/b": {RAW: 0.4, FIVE: 0.8, SEVEN: 0.7, ADAPTED: 0.6},
    "two/a": {RAW: 0.3, FIVE: 0.1, SEVEN: 0.2, ADAPTED: 0.6},
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
    found = gain(results(TABLE), ADAPTED, dict.fromkeys(TABLE, RAW))
    assert found.mean == pytest.approx((0.2 + 0.2 + 0.3) / 3)
    assert found.low <= found.mean <= found.high
    table = {**TABLE, "one/c": {RAW: math.nan, ADAPTED: 0.1}, "one/d": {ADAPTED: 0.1}}
    lacking = results(table)
    assert gain(lacking, ADAPTED, dict.fromkeys(table, RAW)) == found, "those do not count"
    nothing = gain(lacking, ADAPTED, dict.fromkeys(table, "settled"))
    assert (str(nothing), nothing.clip) == ("-", "")
    one = gain(results({"a": {RAW: 0.5, ADAPTED: 0.7}}), ADAPTED, {"a": RAW})
    assert str(one) == "+20.0", "one clip has no interval"
    found = gain(results(TABLE), ADAPTED, dict(zip(TABLE, (FIVE, SEVEN, SEVEN), strict=True)))
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
    mine = next(row for row in variants.rows if row[1] == ADAPTED)
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
