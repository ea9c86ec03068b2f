from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import cosettle_adapter
from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone, VisionTransformerBackbone
from cosettle_adapter.closed_form import SOLVERS, StatisticsError
from cosettle_adapter.correspondence import propagate_labels
from cosettle_adapter.training.corpus import Corpus, Video
from cosettle_adapter.training.fit import (
    Candidate,
    FitSettings,
    candidates,
    fit_projection,
    labels,
    layer_sets,
    mask_overlap,
    split,
)
from cosettle_adapter.training.statistics import collect_statistics, pair_starts
from cosettle_adapter.video import read_frames, render_clip

from helpers import write_video

QUICK = FitSettings(layers=(0, 1), size=64, pairs=2, rendered=1)
ONE_LAYER = dataclasses.replace(QUICK, layers=(1,))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoded")
    (folder / "more").mkdir(parents=True)
    for name in ("a.mp4", "b.mkv", "more/c.mp4"):
        write_video(folder / name, frames=30, height=64, width=96, noisy=True)
    (folder / "notes.txt").write_text("not a clip")
    return folder


@pytest.fixture
def clips(encoded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoded, tmp_path / "clips"))


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 20))
def test_pairs_are_spread_evenly_over_a_clip(length: int, pairs: int, gap: int) -> None:
    starts = pair_starts(length, pairs, gap)
    assert bool(starts) is (length > gap)
    assert starts == sorted(set(starts))
    assert len(starts) <= pairs
    assert all(start >= 0 and start + gap < length for start in starts)
    if length - gap > 2 * pairs > 2:
        steps = [later - start for start, later in pairwise(starts)]
        assert max(steps) - min(steps) <= 1
        assert starts[0] == 0


def test_every_fifth_of_many_clips_is_held_out() -> None:
    paths = [f"{number}.mp4" for number in range(12)]
    fitted_on, held_out = split(paths)
    assert held_out == [paths[4], paths[9]]
    assert fitted_on == [path for path in paths if path not in held_out]
    assert split(paths[:9]) == (paths[:9], paths[:9])


def test_one_encoder_pass_serves_all_sets_of_layers(backbone: Backbone, clips: Path) -> None:
    sets = ((0,), (1, 0), (0, 1))
    done: list[int] = []
    found, _ = collect_statistics(
        backbone, Corpus.open(clips / "a.mp4").videos, sets, FitSettings(size=48, pairs=6),
        on_clip=lambda: done.append(1),
    )  # fmt: skip
    indices = [i for start in pair_starts(30, 6, 3) for i in (start, start + 3)]
    images = CoSettleAdapter.raw(backbone).preprocess(
        read_frames(clips / "a.mp4", indices), size=48
    )
    tokens = backbone.intermediate_tokens(images, [0, 1], norm=False)
    for layers in sets:
        joined = torch.cat([tokens[layer] for layer in layers], dim=1).double()
        flat = rearrange(joined, "t c h w -> (t h w) c")
        covariance = torch.cov(flat.T, correction=0)
        torch.testing.assert_close(found[layers].mean, flat.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[layers].covariance, covariance, atol=1e-5, rtol=1e-4)
        assert (found[layers].tokens, found[layers].clips) == (len(flat), 1)
    assert done == [1]


@pytest.mark.parametrize("how", ["hard", "soft"])
def test_a_still_clip_has_tokens_but_no_pairs(
    how: Any, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = torch.randint(0, 256, (1, 3, 48, 64), dtype=torch.uint8).expand(2, -1, -1, -1)
    monkeypatch.setattr(Video, "length", lambda _: 5)
    monkeypatch.setattr(Video, "read", lambda *_: still)
    plan, clip = FitSettings(size=48, pairs=1, correspondences=how), Video("still", Path("still"))
    found, _ = collect_statistics(backbone, [clip], [(0,), (0, 1)], plan)
    assert all((each.tokens, each.pairs) == (24, 0) for each in found.values())


def test_a_fit_chooses_and_records_how(backbone: Backbone, clips: Path) -> None:
    (clips / "broken.mp4").write_bytes(b"not a video")
    write_video(clips / "short.mp4", frames=3, height=64, width=96)
    seen: list[tuple[int, int]] = []
    on_clip = lambda done, total: seen.append((done, total))  # noqa: E731
    result = fit_projection(backbone, clips, QUICK, data="noise", on_clip=on_clip)
    assert seen == [(done, 6) for done in range(1, 7)]
    assert result.skipped.keys() == {"broken.mp4"}
    assert result.scores[result.chosen] == max(result.scores.values())
    config = result.projection.config
    assert (config.layers, config.norm, config.kind) == (result.chosen.layers, False, "affine")
    record = config.fit
    assert (record["data"], record["clips"], record["skipped"]) == ("noise", 5, ["broken.mp4"])
    assert record["tokens"] == 3 * 2 * 2 * 24
    assert record["overlap_by_block"].keys() == {"0", "1"}
    again = fit_projection(backbone, clips, QUICK, data="noise", workers=1)
    for name, tensor in result.projection.state_dict().items():
        assert torch.equal(tensor, again.projection.state_dict()[name]), "workers change nothing"


def test_no_readable_clip_and_no_clip_to_render_from(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    with pytest.raises(StatisticsError, match="no corresponding pairs were collected"):
        fit_projection(backbone, tmp_path, QUICK)
    write_video(tmp_path / "c.mp4", frames=30, height=64, width=96, noisy=True)
    for name in range(9):  # the fifth and the tenth clip are held out
        (tmp_path / f"{name}.mp4").write_bytes(b"not a video")
    with pytest.raises(StatisticsError, match="none of the 2 held-out clips can be read"):
        fit_projection(backbone, tmp_path, QUICK)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_fits(backbone: Backbone, clips: Path, solver: str, tmp_path: Path) -> None:
    plan = dataclasses.replace(ONE_LAYER, solvers=(solver,), pairs=1)
    result = fit_projection(backbone, clips / "a.mp4", plan)
    assert result.scores == {}
    fit, row = result.projection.config.fit, SOLVERS[solver]
    assert fit["method"] == row.formula
    assert (fit["settings"]["solver"], fit["settings"]["strength"]) == (solver, row.strength)
    assert "overlap_by_block" not in fit
    result.projection.save(tmp_path / "fitted")
    json.loads((tmp_path / "fitted" / "config.json").read_text(), parse_constant=pytest.fail)


def test_layers_read_together_cost_no_more_than_one(backbone: Backbone, clips: Path) -> None:
    plan = dataclasses.replace(ONE_LAYER, layers=(), concatenations=((0, -1),))
    adapter = cosettle_adapter.fit(backbone, clips, plan, data="squares")
    assert adapter.backbone is backbone
    assert (adapter.config.licence, adapter.config.fit["data"]) == ("Apache-2.0", "squares")
    config = adapter.config
    assert (config.layers, config.in_width, config.out_width) == ((0, 1), 64, 32)
    features = adapter(torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8))
    assert features.shape == (2, 32, 4, 6)
    assert bool(torch.isfinite(features).all())
    with pytest.raises(TypeError, match="already loaded: omit device or give a name"):
        cosettle_adapter.fit(backbone, clips, plan, device="cpu")


def test_options_change_the_statistics_and_are_recorded(backbone: Backbone, clips: Path) -> None:
    write_video(clips / "dark.mp4", frames=30, height=64, width=96)
    weights = [fit_projection(backbone, clips, ONE_LAYER).projection.linears[0].weight]
    for option, value in (
        ("gaps", (3, 9)), ("correspondences", "soft"), ("nuisance", "intra+clips"),
        ("nuisance", "intra+positions"),
    ):  # fmt: skip
        plan = dataclasses.replace(ONE_LAYER, **{option: value})  # type: ignore[arg-type]
        projection = fit_projection(backbone, clips, plan).projection
        recorded = projection.config.fit["settings"][option]
        assert recorded == (list(value) if isinstance(value, tuple) else value)
        weights.append(projection.linears[0].weight)
    assert all(bool(torch.isfinite(weight).all()) for weight in weights)
    assert all(not torch.equal(weight, weights[0]) for weight in weights[1:])


def test_solvers_and_strengths_are_chosen_from(backbone: Backbone, clips: Path) -> None:
    plan = dataclasses.replace(
        QUICK, layers=(1,), solvers=("whiten", "surrogate"), strengths=(0.5, 4.0)
    )
    result = fit_projection(backbone, clips, plan)
    assert result.projection.config.fit["overlap_by_block"].keys() == {
        "1 whiten 0.5", "1 whiten 4", "1 surrogate 0.5", "1 surrogate 4",
    }  # fmt: skip
    with pytest.raises(ValueError, match="4 projections to choose from but no rendered clips"):
        fit_projection(backbone, clips, dataclasses.replace(plan, rendered=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solvers": ("whiten", "whitten")}, "unknown solver whitten; expected centre, shrink, "),
        ({"solvers": ()}, r"unknown solver \(none\)"),
        ({"layers": ()}, "no layers to choose from"),
        ({"layers": (), "concatenations": ((7, 12),)}, "has layers 0 to 11"),
        ({"gaps": ()}, "pairs and gaps must be at least 1"),
        ({"correspondences": "sof"}, "correspondences must be hard or soft, got 'sof'"),
        ({"gaps": (3, 0)}, r"must be at least 1, got pairs 4 and gaps \(3, 0\)"),
    ],
)
def test_settings_that_make_no_sense(
    changes: dict[str, Any], message: str, tiny_backbone: VisionTransformerBackbone
) -> None:
    with pytest.raises(ValueError, match=message):
        candidates(tiny_backbone, FitSettings(**changes))


def test_every_combination_is_a_candidate(tiny_backbone: VisionTransformerBackbone) -> None:
    singles = [(layer,) for layer in range(4, 12)]
    for plan, sets in {
        FitSettings(): singles + [(layer, 11) for layer in range(4, 11)],
        FitSettings(concatenations=()): singles,
        FitSettings(layers=(7,)): [(7,)],
        FitSettings(layers=(-1, 3, 11), concatenations=((9, -5),)): [(3,), (11,), (7, 9)],
    }.items():
        assert layer_sets(tiny_backbone, plan) == sets
    default = candidates(tiny_backbone, FitSettings(layers=(3,), concatenations=((7, 9),)))
    assert default == [Candidate((3,), "shrink", 1.0), Candidate((7, 9), "shrink", 1.0)]
    assert list(labels(default).values()) == ["3", "7+9"]
    plan = FitSettings(layers=(3,), solvers=("whiten", "surrogate", "whiten"), strengths=())
    every = candidates(tiny_backbone, plan)
    listed = [each.strength for each in every if each.solver == "surrogate"]
    assert listed == list(SOLVERS["surrogate"].strengths)
    assert len(set(every)) == len(every)
    assert labels(every)[Candidate((3,), "whiten", 0.1)] == "3 whiten 0.1"


@given(seed=st.integers(0, 100))
@settings(max_examples=5, deadline=None)
def test_overlap_is_that_of_the_strongest_label(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    photos = torch.randint(0, 256, (2, 3, 60, 80), dtype=torch.uint8, generator=generator)
    clip = render_clip(photos[0], cutout=photos[1], frames=3, size=(48, 64), seed=seed)
    masks = clip.object_mask
    assert masks is not None
    # rounded, so that many cells tie
    features = torch.randn(3, 2, 6, 8, generator=generator).round()
    first = torch.stack([~masks[0], masks[0]]).float()
    given_labels = F.interpolate(first[None], (6, 8), mode="bilinear", align_corners=False)[0]
    propagated = propagate_labels(features, given_labels)
    found = F.interpolate(propagated, (48, 64), mode="bilinear").argmax(1) == 1
    both, either = (found & masks)[1:].sum((1, 2)), (found | masks)[1:].sum((1, 2))
    assert mask_overlap(features, clip) == pytest.approx(float((both / either).mean()))
    with pytest.raises(ValueError, match="no moving object"):
        mask_overlap(features, render_clip(photos[0], frames=4, size=(48, 64)))


@pytest.fixture(autouse=True)
def few_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosettle_adapter.training.fit._GRID", (6, 8))
