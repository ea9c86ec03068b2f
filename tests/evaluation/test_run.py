from __future__ import annotations

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
from torch import Tensor

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import BackboneMismatchError, FrameError
from cosettle_adapter.evaluation import (
    Evaluation,
    Propagation,
    davis_clips,
    davis_protocol,
    evaluate,
    evaluate_sequence,
)
from cosettle_adapter.evaluation.drift import mutual_correspondences, temporal_drift
from cosettle_adapter.evaluation.run import plain
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
    names = options.pop("clips", None)
    protocol = davis_protocol(davis, clips=names, propagation=Propagation(context=2))
    chosen = feature_variants(adapter, **(variants or {}))
    return evaluate(protocol, adapter, chosen, **{"size": SIZE, **options})


def features_of(davis: Path, adapter: CoSettleAdapter, **options: Any) -> Mapping[str, Tensor]:
    clip = davis_clips(davis)[0]
    frames = torch.stack([torch.from_numpy(clip.read_frame(t)) for t in range(len(clip))])
    frames = rearrange(frames, "t h w c -> t c h w")
    variants = feature_variants(adapter, **options)
    return compare_features(adapter, frames, size=SIZE, variants=variants)


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
    masks = davis_clips(davis)[0].read_annotations()
    features = features_of(davis, tiny_adapter, baseline_layers=[8])
    for variant in result.total:
        scores = evaluate_sequence(features[variant], masks, context=2)
        assert result.clips["one"].scores[variant].values["J&F"] == pytest.approx(scores.j_and_f), (
            variant
        )
    near = run(davis, tiny_adapter, size=(50, 85))
    assert near.clips == result.clips
    assert near.clips["one"].size == list(SIZE), "sides go to whole patches"
    # drift is measured by the matches of a layer that nothing compared reads
    assert result.settings["drift"] == "matches of centred layer 8"
    for variant in result.total:
        values = result.clips["one"].scores[variant].values
        matches = mutual_correspondences(features["centred layer 8"], 4)
        expected = temporal_drift(features[variant], matches)
        assert values["drift@4"] == pytest.approx(expected, rel=1e-4)
        assert "drift@8" not in values, "five frames have no pair eight apart"
        over_clips = [clip.scores[variant].values["drift@1"] for clip in result.clips.values()]
        assert result.total[variant]["drift@1"] == pytest.approx(sum(over_clips) / 3)


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
    truth = davis / "Annotations" / "480p" / "two"
    predicted = predictions / "adapted" / "two"
    assert {p.name for p in predicted.iterdir()} == {p.name for p in truth.iterdir()}
    with Image.open(predicted / "00001.png") as mine, Image.open(truth / "00001.png") as theirs:
        assert (mine.mode, mine.size) == (theirs.mode, theirs.size)
        assert set(np.unique(np.asarray(mine))) <= {0, 1, 2}


@pytest.mark.parametrize("kind", ["Annotations", "JPEGImages"])
def test_a_changed_file_of_the_same_size_is_scored_anew(
    kind: str, davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    run(davis, tiny_adapter, output=output, clips=["one"])
    mark(output)
    assert is_marked(run(davis, tiny_adapter, output=output, clips=["one"]))
    path = next((davis / kind / "480p" / "one").glob("00002.*"))
    content = bytearray(path.read_bytes())
    content[15 if kind == "JPEGImages" else -1] ^= 1  # the density of a JPEG, a checksum of a PNG
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
    other = davis_protocol(davis, propagation=Propagation(context=3))
    with pytest.raises(ValueError, match=r"other settings \(different: context\)"):
        evaluate(other, tiny_adapter, size=SIZE, output=output, model="mine")
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
    stranger = dataclasses.replace(tiny_adapter.config, fingerprint="sha256:other")
    with pytest.raises(BackboneMismatchError, match="stranger was fitted on another backbone"):
        run(davis, tiny_adapter, {"baselines": {"stranger": Projection(stranger)}})


def test_plain_json_has_no_nan() -> None:
    value = {"a": [1.0, math.nan, math.inf], 2: (True, None, "x"), "path": Path("y")}
    assert plain(value) == {"a": [1.0, None, None], "2": [True, None, "x"], "path": "y"}
