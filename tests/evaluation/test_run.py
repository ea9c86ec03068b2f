from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_davis import moving_squares, write_davis

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.analysis import (
    FeatureKind,
    compare_features,
    feature_kinds,
    mutual_correspondences,
    temporal_drift,
)
from cosettle_adapter.backbones import VisionTransformerBackbone, build_backbone, lookup
from cosettle_adapter.backbones.architectures import meta_model
from cosettle_adapter.correspondence import temporal_fusion
from cosettle_adapter.correspondence.fusion import FusionMode
from cosettle_adapter.errors import BackboneMismatchError, FrameError
from cosettle_adapter.evaluation import davis_sequences, evaluate_sequence
from cosettle_adapter.evaluation.clip_features import clip_features
from cosettle_adapter.evaluation.plain_json import numbers, plain
from cosettle_adapter.evaluation.run import DRIFTS, Evaluation, evaluate
from cosettle_adapter.evaluation.tasks import Davis
from cosettle_adapter.projection import Projection

from helpers import projection_for

SIZE = (48, 80)
RAW, SAME, CENTRED, ADAPTED = "raw last block", "raw same block", "centred", "adapted"


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    _, masks = moving_squares()
    return write_davis(tmp_path / "davis", {"one": masks, "two": masks[:, ::-1], "three": masks})


def run(davis: Path, adapter: CoSettleAdapter, **options: object) -> Evaluation:
    return evaluate(Davis(davis, context=2), adapter, size=SIZE, **options)  # type: ignore[arg-type]


def test_every_kind_of_features_is_scored_from_one_pass(
    davis: Path, tiny_adapter: CoSettleAdapter
) -> None:
    result = run(davis, tiny_adapter)
    assert list(result.clips) == ["one", "two", "three"]
    assert result.kinds == [RAW, SAME, CENTRED, ADAPTED]
    assert not result.failed
    clip = davis_sequences(davis)[0]
    kinds = feature_kinds(tiny_adapter)
    features = dict(clip_features(tiny_adapter, clip, kinds, size=SIZE))
    frames = torch.stack([torch.from_numpy(clip.read_frame(t)) for t in range(len(clip))])
    frames = frames.permute(0, 3, 1, 2)
    raw, adapted = tiny_adapter(frames, size=SIZE, return_backbone=True)
    torch.testing.assert_close(features[SAME], raw, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[ADAPTED], adapted, rtol=1e-4, atol=1e-5)
    centred = raw - raw.mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(features[CENTRED], centred, rtol=1e-4, atol=1e-5)
    for kind, maps in features.items():
        scores = evaluate_sequence(maps, clip.read_masks(), context=2)
        assert result.clips["one"][kind].values["J&F"] == pytest.approx(scores.j_and_f), kind


def test_several_blocks_stand_beside_each_earlier_one(
    davis: Path, tiny_backbone: VisionTransformerBackbone
) -> None:
    projection = projection_for(tiny_backbone, layers=(5, 11), in_width=2 * tiny_backbone.width)
    adapter = CoSettleAdapter(tiny_backbone, projection)
    singles = ["raw layer 5", "centred layer 5"]
    assert run(davis, adapter).kinds == [RAW, SAME, CENTRED, *singles, ADAPTED]
    raw = run(davis, CoSettleAdapter.raw(tiny_backbone, layer=5))
    both = run(davis, adapter)
    for name, scores in both.clips.items():
        assert scores["raw layer 5"] == raw.clips[name][SAME]
        assert scores["centred layer 5"] == raw.clips[name][CENTRED]


def test_the_backbone_alone_needs_no_projection(
    davis: Path, tiny_backbone: VisionTransformerBackbone, tiny_adapter: CoSettleAdapter
) -> None:
    assert ADAPTED not in run(davis, CoSettleAdapter.raw(tiny_backbone)).kinds
    assert ADAPTED not in run(davis, tiny_adapter, raw_only=True).kinds


def test_one_bad_clip_does_not_lose_the_others(davis: Path, tiny_adapter: CoSettleAdapter) -> None:
    (davis / "Annotations" / "480p" / "two" / "00002.png").unlink()
    broken = davis / "JPEGImages" / "480p" / "three" / "00003.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    result = run(davis, tiny_adapter)
    assert list(result.clips) == ["one"]
    assert result.failed.keys() == {"two", "three"}
    assert "00002.png" in result.failed["two"]
    assert "00003.jpg" in result.failed["three"]


def test_nothing_but_bad_clips_is_an_error(davis: Path, tiny_adapter: CoSettleAdapter) -> None:
    for name in ("one", "two", "three"):
        (davis / "Annotations" / "480p" / name / "00000.png").unlink()
    with pytest.raises(FrameError, match=r"none of 3 clips could be scored. one: "):
        run(davis, tiny_adapter)


def test_a_run_that_broke_off_goes_on(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"

    def interrupt(done: int, total: int, name: str) -> None:
        if name == "three":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(davis, tiny_adapter, output=output, on_clip=interrupt)
    stored = json.loads(output.read_text())
    assert list(stored["clips"]) == ["one", "two"]
    stored["clips"]["one"][RAW]["values"]["J&F"] = 0.123  # a sign that it is not computed again
    output.write_text(json.dumps(stored))
    result = run(davis, tiny_adapter, output=output)
    assert list(result.clips) == ["one", "two", "three"]
    assert result.clips["one"][RAW].values["J&F"] == 0.123
    whole = run(davis, tiny_adapter)
    assert result.clips["three"] == whole.clips["three"]
    assert json.loads(output.read_text())["total"].keys() == whole.total.keys()


def test_results_of_other_settings_are_not_mixed(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    run(davis, tiny_adapter, output=output)
    with pytest.raises(ValueError, match=r"other settings \(different: context\)"):
        evaluate(Davis(davis, context=3), tiny_adapter, size=SIZE, output=output)
    output.write_text("{}")
    with pytest.raises(ValueError, match="is not a results file"):
        run(davis, tiny_adapter, output=output)
    assert output.read_text() == "{}"


def test_a_run_with_the_projection_completes_a_raw_one(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    run(davis, tiny_adapter, output=output, raw_only=True)
    assert ADAPTED in run(davis, tiny_adapter, output=output).kinds


def test_the_file_says_everything_the_figures_depend_on(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    run(davis, tiny_adapter, output=tmp_path / "r.json", model="mine")
    settings = json.loads((tmp_path / "r.json").read_text())["settings"]
    expected = {"task", "protocol", "context", "every", "frame_size", "model", "fingerprint"}
    expected |= {"layers", "projection", "patch", "stride", "dtype", "seed", "torch"}
    assert expected <= settings.keys()
    assert settings["frame_size"] == list(SIZE)
    assert settings["model"] == "mine"


def test_sides_go_to_whole_patches(davis: Path, tiny_adapter: CoSettleAdapter) -> None:
    exact, near = (
        run(davis, tiny_adapter),
        evaluate(Davis(davis, context=2), tiny_adapter, size=(50, 85)),
    )
    assert near.total == exact.total
    assert set(near.sizes.values()) == {SIZE}


def test_predictions_are_what_the_official_evaluation_reads(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    run(davis, tiny_adapter, predictions=tmp_path / "predictions")
    folders = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert folders == ["adapted", "centred", "raw-last-block", "raw-same-block"]
    predicted = tmp_path / "predictions" / "adapted" / "two"
    truth = davis / "Annotations" / "480p" / "two"
    assert {p.name for p in predicted.iterdir()} == {p.name for p in truth.iterdir()}
    with Image.open(predicted / "00001.png") as mine, Image.open(truth / "00001.png") as theirs:
        assert mine.mode == theirs.mode == "P"
        assert mine.size == theirs.size
        assert set(np.unique(np.asarray(mine))) <= {0, 1, 2}


def test_plain_json_has_no_nan() -> None:
    value = {"a": [1.0, math.nan, math.inf], 2: (True, None, "x"), "path": Path("y")}
    assert plain(value) == {"a": [1.0, None, None], "2": [True, None, "x"], "path": "y"}
    assert math.isnan(numbers({"a": [None]})["a"][0])


def test_other_files_of_the_same_name_are_scored_anew(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    run(davis, tiny_adapter, output=output)
    stored = json.loads(output.read_text())
    stored["clips"]["one"][RAW]["values"]["J&F"] = 0.123  # a sign of what is not computed again
    output.write_text(json.dumps(stored))
    _, masks = moving_squares(frames=6)
    other = write_davis(tmp_path / "other", {"one": masks, "two": masks, "three": masks})
    second = run(other, tiny_adapter, output=output)
    assert second.clips["one"][RAW].values["J&F"] != 0.123
    assert second.clips == run(other, tiny_adapter).clips


def test_clips_that_were_not_asked_for_stay_in_the_file(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    run(davis, tiny_adapter, output=output)
    task = Davis(davis, clips=["two"], context=2)
    result = evaluate(task, tiny_adapter, size=SIZE, output=output)
    assert list(result.clips) == ["two"]
    assert json.loads(output.read_text())["clips"].keys() == {"one", "two", "three"}


def test_predictions_wanted_later_are_made(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    run(davis, tiny_adapter, output=output)
    run(davis, tiny_adapter, output=output, predictions=tmp_path / "p")
    assert len(list((tmp_path / "p").rglob("*.png"))) == 4 * 3 * 5


def test_the_release_that_was_read_is_told(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    run(davis, tiny_adapter, output=output)
    stored = json.loads(output.read_text())
    assert stored["settings"]["year"] == "2017"
    assert stored["sizes"] == {name: list(SIZE) for name in ("one", "two", "three")}


def test_feature_maps_are_compared_at_the_registered_grid() -> None:
    row = lookup("timm:test_resnet")
    state = {
        name: torch.randn(tensor.shape) * 0.05
        if tensor.is_floating_point()
        else torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, tensor in meta_model(row).state_dict().items()
    }
    state = {name: t.abs() + 0.5 if "running_var" in name else t for name, t in state.items()}
    backbone = build_backbone(row, state, fingerprint="sha256:0")
    frames = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features = compare_features(CoSettleAdapter.raw(backbone), frames)
    assert SAME not in features
    assert features[RAW].shape[1] == backbone.width


def test_projections_beside_are_scored_in_the_same_pass_and_join_earlier_results(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    alone = run(davis, tiny_adapter, output=output)
    config = dataclasses.replace(tiny_adapter.config, layers=(-1,), kind="affine")
    other = Projection(config)  # the identity on the last block, without its final norm
    both = run(davis, tiny_adapter, output=output, beside={"other": other, "same": adapted(other)})
    assert both.kinds == [RAW, SAME, CENTRED, ADAPTED, "other", "same"]
    assert both.clips["one"][ADAPTED] == alone.clips["one"][ADAPTED]
    other_values, same_values = (both.clips["one"][kind].values for kind in ("other", "same"))
    assert other_values == pytest.approx(same_values, rel=1e-5), "cosine knows no length"
    again = run(davis, tiny_adapter, output=output)  # what was scored stays
    assert again.kinds == both.kinds
    assert json.loads(output.read_text())["settings"]["kinds"].keys() == set(both.kinds)
    with torch.no_grad():
        other.linears[0].weight.mul_(2)
    with pytest.raises(ValueError, match=r"other settings \(different: other\)"):
        run(davis, tiny_adapter, output=output, beside={"other": other})


def test_a_projection_of_another_backbone_cannot_stand_beside(
    davis: Path, tiny_adapter: CoSettleAdapter
) -> None:
    config = dataclasses.replace(tiny_adapter.config, fingerprint="sha256:other")
    with pytest.raises(BackboneMismatchError, match="stranger was fitted on another backbone"):
        run(davis, tiny_adapter, beside={"stranger": Projection(config)})


def test_drift_is_measured_by_a_layer_that_nothing_compared_reads(
    davis: Path, tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "r.json"
    result = run(davis, tiny_adapter, output=output)  # reads layer 7
    assert result.settings["drift"] == "matches of centred layer 8"
    clip = davis_sequences(davis)[0]
    kinds = [FeatureKind("guide", ((8,), False)), *feature_kinds(tiny_adapter)]
    features = dict(clip_features(tiny_adapter, clip, kinds, size=SIZE))
    guide = features["guide"] - features["guide"].mean((0, 2, 3), keepdim=True)
    for kind in result.kinds:
        values = result.clips["one"][kind].values
        expected = temporal_drift(features[kind], mutual_correspondences(guide, 4))
        assert values["drift@4"] == pytest.approx(expected, rel=1e-4)
        assert "drift@8" not in values, "five frames have no pair eight apart"
        over_clips = [row[kind].values["drift@1"] for row in result.clips.values()]
        assert result.total[kind]["drift@1"] == pytest.approx(sum(over_clips) / 3)
    assert json.loads(output.read_text())["clips"]["one"][RAW]["values"].keys() >= set(DRIFTS[:2])
    fused = run(davis, tiny_adapter, baseline_layers=[8, 6], fusion="symmetric")
    assert fused.settings["drift"] == "matches of centred layer 9", "fusion matches by layer 8"


@pytest.mark.parametrize(("mode", "ending"), [("symmetric", ""), ("causal", " causally")])
def test_fused_features_stand_beside_the_others(
    davis: Path, tiny_adapter: CoSettleAdapter, mode: FusionMode, ending: str
) -> None:
    options = {"baseline_layers": [-3], "beside": {"other": tiny_adapter.projection}}
    result = run(davis, tiny_adapter, fusion=mode, **options)
    single = "centred layer 9"
    fused = [f"{kind}, fused{ending}" for kind in (single, ADAPTED, "other")]
    assert result.kinds == [RAW, SAME, CENTRED, single, ADAPTED, "other", *fused]
    clip = davis_sequences(davis)[0]
    kinds = feature_kinds(tiny_adapter, baseline_layers=[9], fusion=mode)
    features = dict(clip_features(tiny_adapter, clip, kinds, size=SIZE))
    frames = torch.stack([torch.from_numpy(clip.read_frame(t)) for t in range(len(clip))])
    chunks = tiny_adapter.stream(frames.permute(0, 3, 1, 2), size=SIZE, temporal_fusion=mode)
    streamed = torch.cat([chunk.features for chunk in chunks])
    torch.testing.assert_close(
        features[f"{ADAPTED}, fused{ending}"], streamed, rtol=1e-4, atol=1e-4
    )
    guide = features[single] - features[single].mean((2, 3), keepdim=True)
    expected = temporal_fusion(features[single], guide, mode=mode)
    got = features[f"{single}, fused{ending}"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_clips_mean_can_be_taken_off_the_adapted_features(
    davis: Path, tiny_adapter: CoSettleAdapter
) -> None:
    result = run(davis, tiny_adapter, centre=True)
    assert result.kinds[-1] == "adapted, centred"
    assert result.total["adapted, centred"] != result.total[ADAPTED]


def adapted(projection: Projection) -> Projection:
    """Another projection with the same features up to their length."""
    copy = Projection(projection.config)
    copy.load_state_dict({name: 3 * tensor for name, tensor in projection.state_dict().items()})
    return copy
