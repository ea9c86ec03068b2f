from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from training_fakes import QUICK, FakeData

from cosettle_adapter import Projection
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.training.checkpoint import read_metrics
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.processes import make_accelerator
from cosettle_adapter.training.train import train
from cosettle_adapter.training.validation import Validation, read_evenly

from helpers import write_video


@pytest.fixture(autouse=True)
def few_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosettle_adapter.training.validation._RENDERED", 4)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, frames in (("a", 12), ("b", 5), ("c", 1)):
        write_video(folder / f"{name}.mp4", frames=frames, height=72, width=96, noisy=True)
    (folder / "d.mp4").write_bytes(b"not a video")
    return folder


def validation(backbone: Backbone, clips: Path) -> Validation:
    config = QUICK.head_config(backbone)
    return Validation(backbone, Corpus.open(clips), config, size=64, seed=0)


def test_figures_tell_features_apart(backbone: Backbone, clips: Path) -> None:
    measured = validation(backbone, clips)
    assert measured.skipped.keys() == {"c.mp4", "d.mp4"}
    assert "has 1 frame(s); expected at least 2" in measured.skipped["c.mp4"]
    raw = measured.measure(None)
    config = dataclasses.replace(QUICK.head_config(backbone), kind="affine")
    same = Projection(config)
    # an affine head starts as the identity
    assert measured.measure(same) == pytest.approx(raw, rel=1e-5)
    with torch.no_grad():
        same.linears[0].weight[:, 1:] = 0
    one_channel = measured.measure(same)
    assert one_channel["overlap"] < raw["overlap"]
    assert one_channel["cycle_consistency"] < raw["cycle_consistency"]
    for figures in (raw, one_channel):
        assert 0 <= figures["overlap"] <= 1
        assert 0 <= figures["cycle_consistency"] <= 1
        assert figures["d_inter"] > 0


def test_a_single_clip_has_no_others(backbone: Backbone, clips: Path) -> None:
    measured = validation(backbone, clips / "a.mp4").measure(None)
    assert measured["d_inter"] is None
    assert measured["overlap"] is not None


def test_frames_are_spread_evenly(clips: Path) -> None:
    videos = Corpus.open(clips).videos
    assert torch.equal(read_evenly(videos[0], 4), videos[0].read([0, 3, 7, 11]))
    assert len(read_evenly(videos[1], 8)) == 5


def test_no_clip_that_can_be_read_is_an_error(backbone: Backbone, clips: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"none of the . validation clips can be read; the first: .*d.mp4"
    ):
        validation(backbone, clips / "d.mp4")


def test_the_best_so_far_is_the_result(
    backbone: Backbone, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.2, 0.3, 0.6, 0.4, 0.6])
    steps: list[dict[str, torch.Tensor]] = []

    def measure(self: Validation, projection: Projection | None) -> dict[str, float]:
        if projection is None:
            return {"overlap": 0.1}
        state = projection.state_dict()
        steps.append({name: tensor.clone() for name, tensor in state.items()})
        return {"overlap": next(scores)}

    monkeypatch.setattr(Validation, "measure", measure)
    trained = train(
        backbone, FakeData(), tmp_path / "out", QUICK,
        validation=Corpus.open(clips), accelerator=make_accelerator("cpu"),
    )  # fmt: skip
    assert trained.chosen_step == 12, "the first of equals"
    for name, tensor in Projection.load(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, steps[2][name])
    overlaps = {name: figures["overlap"] for name, figures in trained.figures.items()}
    assert overlaps == {"raw": 0.1, "first": 0.2, "last": 0.6, "chosen": 0.6}
    lines = [line for line in read_metrics(tmp_path / "out") if "validation/overlap" in line]
    assert [line["step"] for line in lines] == [0, 6, 12, 18, 24]
    assert read_metrics(tmp_path / "out")[0]["raw/overlap"] == 0.1
