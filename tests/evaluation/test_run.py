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
from PIL import Image
from test_davis import write_davis
from test_segmentation import moving_squares
from torch import Tensor

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.correspondence import temporal_fusion
from cosettle_adapter.correspondence.fusion import FusionMode
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
from cosettle_adapter.evaluation.run import DRIFTS, plain
from cosettle_adapter.evaluation.variants import compare_features, feature_variants
from cosettle_adapter.projection import Projection

from helpers import projection_for

SIZE = (48, 80)
RAW, SAME, CENTRED, ADAPTED = "raw last layer", "raw same layer", "centred", "adapted"


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    _, masks = moving_squares()
    return write_davis(tmp_path / "davis", {"one": masks, "two": masks[:, ::-1], "three": masks})


def run(
    davis: Path, adapter: CoSettleAdapter, variants: dict[str, Any] | None = None, **options: Any
) -> Evaluation:
    protocol = davis_protocol(davis, propagation=Propagation(context=2))
    chosen = feature_variants(adapter, **(variants or {}))
    return evaluate(protocol, adapter, chosen, **{"size": SIZE, **options})


def features_of(davis: Path, adapter: CoSettleAdapter, **options: object) -> Mapping[str, Tensor]:
    clip = davis_clips(davis)[0]
    frames = torch.stack([torch.from_numpy(clip.read_frame(t)) for t in range(len(clip))])
    variants = feature_variants(adapter, **options)  # type: ignore[arg-type]
    return compare_features(adapter, frames.permute(0, 3, 1, 2), size=SIZE, variants=variants)


def mark(output: Path) -> None:
    """Change a stored figure: a sign that it is not computed again."""
    stored = json.loads(output.read_text())
    stored["clips"]["one"][RAW]["values"]["J&F"] = 0.123
    output.write_text(json.dumps(stored))


def is_marked(result: Evaluation) -> bool:
    return result.clips["one"][RAW].values["J&F"] == 0.123


def test_every_variant_of_features_is_scored(davis: Path, tiny_adapter: CoSettleAdapter) -> None:
    result = run(davis, tiny_adapter)
    assert list(result.clips) == ["one", "two", "three"]
    assert result.variants == [RAW, SAME, CENTRED, ADAPTED]
    assert not result.failed
    masks = davis_clips(davis)[0].read_annotations()
    for variant, maps in features_of(davis, tiny_adapter).items():
        scores = evaluate_sequence(maps, masks, context=2)
        assert result.clips["one"][variant].values["J&F"] == pytest.approx(scores.j_and_f), variant
    assert run(davis, tiny_adapter, {"centre": True}).variants[-1] == "adapted, centred"
    near = run(davis, tiny_adapter, size=(50, 85))
    assert near.total == result.total
    assert set(near.sizes.values()) == {SIZE}, "sides go to whole patches"


def test_several_layers_are_compared_with_each_earlier_one(
    davis: Path, tiny_backbone: VisionTransformerBackbone
) -> None:
    projection = projection_for(tiny_backbone, layers=(5, 11), in_width=2 * tiny_backbone.width)
    both = run(davis, CoSettleAdapter(tiny_backbone, projection))
    singles = ["raw layer 5", "centred layer 5"]
    assert both.variants == [RAW, SAME, CENTRED, *singles, ADAPTED]
    raw = run(davis, CoSettleAdapter.raw(tiny_backbone, layer=5))
    assert ADAPTED not in raw.variants
    for name, scores in both.clips.items():
        assert scores["raw layer 5"] == raw.clips[name][SAME]
        assert scores["centred layer 5"] == raw.clips[name][CENTRED]


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
    output = tmp_path / "results.json"

    def interrupt(done: int, total: int, name: str) -> None:
        if name == "three":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(davis, tiny_adapter, output=output, on_clip=interrupt)
    assert list(json.loads(output.read_text())["clips"]) == ["one", "two"]
    mark(output)
    result = run(davis, tiny_adapter, output=output)
    assert list(result.clips) == ["one", "two", "three"]
    assert is_marked(result)
    whole = run(davis, tiny_adapter)
    assert result.clips["three"] == whole.clips["three"]
    assert json.loads(output.read_text())["total"].keys() == whole.total.keys()
    protocol = davis_protocol(davis, clips=["two"], propagation=Propagation(context=2))
    assert list(evaluate(protocol, tiny_adapter, size=SIZE, output=output).clips) == ["two"]
    assert json.loads(output.read_text())["clips"].keys() == {"one", "two", "three"}
    run(davis, tiny_adapter, output=output, predictions=tmp_path / "p")
    assert len(list((tmp_path / "p").rglob("*.png"))) == 4 * 3 * 5, "predictions wanted later"


@pytest.mark.parametrize("kind", ["Annotations", "JPEGImages"])
def test_a_changed_file_of_the_same_size_is_scored_anew(
    kind: str, davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    run(davis, tiny_adapter, output=output)
    mark(output)
    assert is_marked(run(davis, tiny_adapter, output=output))
    path = next((davis / kind / "480p" / "one").glob("00002.*"))
    content = bytearray(path.read_bytes())
    content[15 if kind == "JPEGImages" else -1] ^= 1  # the density of a JPEG, a checksum of a PNG
    path.write_bytes(content)
    assert not is_marked(run(davis, tiny_adapter, output=output))


def test_results_of_other_settings_are_not_mixed(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    run(davis, tiny_adapter, output=output, model="mine")
    stored = json.loads(output.read_text())
    expected = {"task", "protocol", "context", "every", "frame_size", "model", "fingerprint"}
    expected |= {"layers", "projection", "patch", "stride", "dtype", "seed", "torch"}
    assert expected <= stored["settings"].keys()
    assert stored["settings"]["year"] == "2017"
    assert stored["settings"]["frame_size"] == list(SIZE)
    assert stored["sizes"] == {name: list(SIZE) for name in ("one", "two", "three")}
    other = davis_protocol(davis, propagation=Propagation(context=3))
    with pytest.raises(ValueError, match=r"other settings \(different: context\)"):
        evaluate(other, tiny_adapter, size=SIZE, output=output, model="mine")
    output.write_text(json.dumps({**stored, "inputs": {"one": "0123"}}))
    with pytest.raises(ValueError, match=r"was written by version 0\.1"):
        run(davis, tiny_adapter, output=output, model="mine")
    output.write_text("{}")
    with pytest.raises(ValueError, match="is not a results file"):
        run(davis, tiny_adapter, output=output)
    assert output.read_text() == "{}"


def test_predictions_are_what_the_official_evaluation_reads(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    run(davis, tiny_adapter, predictions=tmp_path / "predictions")
    folders = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert folders == ["adapted", "centred", "raw-last-layer", "raw-same-layer"]
    predicted = tmp_path / "predictions" / "adapted" / "two"
    truth = davis / "Annotations" / "480p" / "two"
    assert {p.name for p in predicted.iterdir()} == {p.name for p in truth.iterdir()}
    with Image.open(predicted / "00001.png") as mine, Image.open(truth / "00001.png") as theirs:
        assert mine.mode == theirs.mode == "P"
        assert mine.size == theirs.size
        assert set(np.unique(np.asarray(mine))) <= {0, 1, 2}


def test_baselines_are_scored_in_the_same_pass_and_join_earlier_results(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    alone = run(davis, tiny_adapter, output=output)
    config = dataclasses.replace(tiny_adapter.config, layers=(-1,), kind="affine")
    other = Projection(config)  # the identity on the last layer, without its final norm
    longer = Projection(config)
    longer.load_state_dict({name: 3 * tensor for name, tensor in other.state_dict().items()})
    baselines = {"other": other, "same": longer}
    both = run(davis, tiny_adapter, {"baselines": baselines}, output=output)
    assert both.variants == [RAW, SAME, CENTRED, ADAPTED, "other", "same"]
    assert both.clips["one"][ADAPTED] == alone.clips["one"][ADAPTED]
    other_values, same_values = (both.clips["one"][name].values for name in baselines)
    assert other_values == pytest.approx(same_values, rel=1e-5), "cosine knows no length"
    again = run(davis, tiny_adapter, output=output)
    assert again.variants == both.variants, "what was scored stays"
    assert json.loads(output.read_text())["settings"]["kinds"].keys() == set(both.variants)
    with torch.no_grad():
        other.linears[0].weight.mul_(2)
    with pytest.raises(ValueError, match=r"other settings \(different: other\)"):
        run(davis, tiny_adapter, {"baselines": {"other": other}}, output=output)
    stranger = dataclasses.replace(tiny_adapter.config, fingerprint="sha256:other")
    with pytest.raises(BackboneMismatchError, match="stranger was fitted on another backbone"):
        run(davis, tiny_adapter, {"baselines": {"stranger": Projection(stranger)}})


def test_drift_is_measured_by_a_layer_that_nothing_compared_reads(
    davis: Path, tiny_adapter: CoSettleAdapter
) -> None:
    result = run(davis, tiny_adapter)  # reads layer 7
    assert result.settings["drift"] == "matches of centred layer 8"
    features = features_of(davis, tiny_adapter, baseline_layers=[8])
    for variant in result.variants:
        values = result.clips["one"][variant].values
        matches = mutual_correspondences(features["centred layer 8"], 4)
        expected = temporal_drift(features[variant], matches)
        assert values["drift@4"] == pytest.approx(expected, rel=1e-4)
        assert "drift@8" not in values, "five frames have no pair eight apart"
        over_clips = [row[variant].values["drift@1"] for row in result.clips.values()]
        assert result.total[variant]["drift@1"] == pytest.approx(sum(over_clips) / 3)
        assert set(DRIFTS[:2]) <= values.keys()
    fused = run(davis, tiny_adapter, {"baseline_layers": [8, 6], "fusion": "symmetric"})
    assert fused.settings["drift"] == "matches of centred layer 9", "fusion matches by layer 8"


@pytest.mark.parametrize(("mode", "ending"), [("symmetric", ""), ("causal", " causally")])
def test_fused_features_are_compared_as_well(
    davis: Path, tiny_adapter: CoSettleAdapter, mode: FusionMode, ending: str
) -> None:
    baselines = {"other": tiny_adapter.projection}
    options = {"fusion": mode, "baseline_layers": [-3], "baselines": baselines}
    result = run(davis, tiny_adapter, options)
    single = "centred layer 9"
    fused = [f"{name}, fused{ending}" for name in (single, ADAPTED, "other")]
    assert result.variants == [RAW, SAME, CENTRED, single, ADAPTED, "other", *fused]
    features = features_of(davis, tiny_adapter, baseline_layers=[9], fusion=mode)
    clip = davis_clips(davis)[0]
    frames = torch.stack([torch.from_numpy(clip.read_frame(t)) for t in range(len(clip))])
    chunks = tiny_adapter.stream(frames.permute(0, 3, 1, 2), size=SIZE, temporal_fusion=mode)
    streamed = torch.cat([chunk.features for chunk in chunks])
    torch.testing.assert_close(features[fused[1]], streamed, rtol=1e-4, atol=1e-4)
    guide = features[single] - features[single].mean((2, 3), keepdim=True)
    expected = temporal_fusion(features[single], guide, mode=mode)
    torch.testing.assert_close(features[fused[0]], expected, rtol=1e-4, atol=1e-4)


def test_plain_json_has_no_nan() -> None:
    value = {"a": [1.0, math.nan, math.inf], 2: (True, None, "x"), "path": Path("y")}
    assert plain(value) == {"a": [1.0, None, None], "2": [True, None, "x"], "path": "y"}
