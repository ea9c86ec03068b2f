from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from cosettle_adapter.training.clips import find_clips, neighbouring_frames

import cosettle_adapter
from cosettle_adapter import CoSettleAdapter, Projection
from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.closed_form import SOLVERS, StatisticsError
from cosettle_adapter.errors import FrameError
from cosettle_adapter.training.fit import FitSettings, fit_projection, split
from cosettle_adapter.training.statistics import collect_statistics
from cosettle_adapter.video import FrameSelection, open_frames, probe
from cosettle_adapter.video.decoder import SourceInfo
from cosettle_adapter.video.selection import PendingFrame

from helpers import write_video

QUICK = FitSettings(layers=(2, 5), size=64, pairs=2, rendered=1)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    for name in ("a.mp4", "b.mkv", "more/c.mp4"):
        write_video(folder / name, frames=30, height=64, width=96, noisy=True)
    (folder / "notes.txt").write_text("not a clip")
    return folder


def test_clips_are_found_below_a_folder(clips: Path, tmp_path: Path) -> None:
    assert [path.name for path in find_clips(clips)] == ["a.mp4", "b.mkv", "c.mp4"]
    for hidden in ("._a.mp4", ".trash/d.mp4"):
        (clips / hidden).parent.mkdir(exist_ok=True)
        (clips / hidden).write_bytes(b"what a Mac leaves")
    (clips / "folder.mp4").mkdir()
    assert [path.name for path in find_clips(clips)] == ["a.mp4", "b.mkv", "c.mp4"]
    with pytest.raises(FrameError, match="is not a folder"):
        find_clips(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FrameError, match="no video files below"):
        find_clips(tmp_path / "empty")


def test_pairs_are_a_gap_apart(clips: Path) -> None:
    pairs = list(neighbouring_frames(clips / "a.mp4", pairs=3, gap=3))
    assert [tuple(pair.shape) for pair in pairs] == [(2, 3, 64, 96)] * 3
    bright = [
        [int((frame[0] > 180)[12:20].float().mean(0).gt(0.9).sum()) for frame in p] for p in pairs
    ]
    assert all(count >= 10 for pair in bright for count in pair)
    assert not torch.equal(pairs[0][0], pairs[0][1])


@pytest.mark.parametrize("far", [0.0, 0.3, 10.0])  # a reading a pair, a few, one for all
@pytest.mark.parametrize(("pairs", "gap"), [(1, 1), (4, 3), (9, 5), (40, 2)])
def test_pairs_are_the_same_in_however_many_readings(
    clips: Path, pairs: int, gap: int, far: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = clips / "a.mp4"
    info = probe(clip)
    assert info.frames is not None
    assert info.fps is not None
    last = (info.frames - gap - 1) / info.fps
    expected = []
    for index in range(pairs):
        chunks = open_frames(
            clip, FrameSelection(start=last * index / pairs, every=gap, max_frames=2)
        )
        expected.append(next(chunks).frames)
    monkeypatch.setattr("cosettle_adapter.training.clips._FAR", far)
    found = list(neighbouring_frames(clip, pairs=pairs, gap=gap))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))


def test_a_pair_is_of_two_frames(clips: Path) -> None:
    with pytest.raises(FrameError, match="at least 1 frame apart, got 0"):
        next(neighbouring_frames(clips / "a.mp4", pairs=2, gap=0))


def test_a_pair_of_two_sizes_is_passed_over(monkeypatch: pytest.MonkeyPatch, clips: Path) -> None:
    shapes = [(3, 8, 8)] * 10 + [(3, 4, 8)] * 10
    frames = [
        PendingFrame(t / 8, f"frame {t}", partial(torch.full, shape, t))
        for t, shape in enumerate(shapes)
    ]
    monkeypatch.setattr(
        "cosettle_adapter.training.clips.pending_frames", lambda *_: (each for each in frames)
    )
    monkeypatch.setattr(
        "cosettle_adapter.training.clips.probe", lambda clip: SourceInfo(frames=20, fps=8.0)
    )
    found = list(neighbouring_frames(clips / "a.mp4", pairs=4, gap=3))
    assert [pair[:, 0, 0, 0].tolist() for pair in found] == [[0, 3], [4, 7], [12, 15]]


def test_pairs_before_the_end_of_a_broken_clip_are_used(
    tiny_backbone: VisionTransformerBackbone, tmp_path: Path
) -> None:
    whole = write_video(tmp_path / "whole.mkv", frames=60, height=64, width=96, noisy=True)
    broken = tmp_path / "broken.mkv"
    broken.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    read = []
    with pytest.raises(FrameError):
        read.extend(neighbouring_frames(broken, pairs=6, gap=3))
    assert 0 < len(read) < 6
    plan = FitSettings(size=64, pairs=6)
    found, skipped = collect_statistics(tiny_backbone, [broken], [(2,)], plan)
    assert skipped.keys() == {broken}
    assert found[2,].tokens == len(read) * 2 * (64 // 16) * (96 // 16)


def test_a_fit_is_a_projection_that_loads(
    tiny_backbone: VisionTransformerBackbone, clips: Path, tmp_path: Path
) -> None:
    done: list[tuple[int, int]] = []
    result = fit_projection(
        tiny_backbone, find_clips(clips), QUICK, licence="MIT", data="squares",
        on_clip=lambda *progress: done.append(progress),
    )  # fmt: skip
    assert done[-1][0] == done[-1][1]
    config = result.projection.config
    assert {each.layers for each in result.scores} == {(2,), (5,)}
    assert config.layers == result.chosen.layers
    assert result.scores[result.chosen] == max(result.scores.values())
    assert config.fit["overlap_by_block"].keys() == {"2", "5"}
    assert (config.kind, config.licence, config.fit["data"]) == ("affine", "MIT", "squares")
    result.projection.save(tmp_path / "fitted")
    adapter = CoSettleAdapter(tiny_backbone, Projection.load(tmp_path / "fitted"))
    features = adapter(torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8))
    assert bool(torch.isfinite(features).all())


def test_every_fifth_of_many_clips_is_held_out() -> None:
    """The number of comparisons grows with the number of clips, not with its square."""
    compared = 0

    class Counted(type(Path())):  # type: ignore[misc]
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return super().__eq__(other)

        __hash__ = type(Path()).__hash__

    clips = [Counted(f"{number:04d}.mp4") for number in range(2000)]
    fitted_on, held_out = split(clips)
    assert held_out == clips[4::5]
    assert len(fitted_on) == 1600
    assert compared < 4 * len(clips)
    assert split(clips[:9]) == (clips[:9], clips[:9])


def test_a_fit_is_the_same_twice(tiny_backbone: VisionTransformerBackbone, clips: Path) -> None:
    first, second = (fit_projection(tiny_backbone, find_clips(clips), QUICK) for _ in range(2))
    assert first.projection.config == second.projection.config
    for name, tensor in first.projection.state_dict().items():
        assert torch.equal(tensor, second.projection.state_dict()[name])


def test_a_broken_clip_is_skipped_and_listed(
    tiny_backbone: VisionTransformerBackbone, clips: Path
) -> None:
    (clips / "broken.mp4").write_bytes(b"not a video")
    result = fit_projection(tiny_backbone, find_clips(clips), QUICK)
    assert [path.name for path in result.skipped] == ["broken.mp4"]
    assert result.projection.config.fit["skipped"] == ["broken.mp4"]


def test_no_readable_clip_is_an_error(
    tiny_backbone: VisionTransformerBackbone, tmp_path: Path
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    with pytest.raises(StatisticsError, match="no corresponding pairs were gathered"):
        fit_projection(tiny_backbone, [tmp_path / "broken.mp4"], QUICK)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_fits(
    tiny_backbone: VisionTransformerBackbone, clips: Path, solver: str, tmp_path: Path
) -> None:
    settings = dataclasses.replace(QUICK, layers=(3,), solvers=(solver,), rendered=0, pairs=1)
    result = fit_projection(tiny_backbone, find_clips(clips)[:1], settings)
    assert result.scores == {}
    fit = result.projection.config.fit
    assert fit["method"] == SOLVERS[solver].formula
    assert (fit["settings"]["solver"], fit["settings"]["strength"]) == (
        solver,
        SOLVERS[solver].strength,
    )
    assert "overlap_by_block" not in fit
    result.projection.save(tmp_path / "fitted")
    json.loads((tmp_path / "fitted" / "config.json").read_text(), parse_constant=pytest.fail)


def test_blocks_read_together_cost_no_more_than_one(
    tiny_backbone: VisionTransformerBackbone, clips: Path
) -> None:
    settings = FitSettings(layers=(), concatenations=((5, 7, 9, -1),), size=64, pairs=2, rendered=0)
    result = fit_projection(tiny_backbone, find_clips(clips), settings)
    config = result.projection.config
    assert (config.layers, config.norm) == ((5, 7, 9, 11), False)
    assert (config.in_width, config.out_width, config.kind) == (768, 192, "affine")
    features = CoSettleAdapter(tiny_backbone, result.projection)(
        torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    )
    assert features.shape == (2, 192, 4, 6)
    assert bool(torch.isfinite(features).all())


def test_options_change_the_statistics_and_are_recorded(
    tiny_backbone: VisionTransformerBackbone, clips: Path
) -> None:
    write_video(clips / "dark.mp4", frames=30, height=64, width=96)
    plain = dataclasses.replace(QUICK, layers=(5,), rendered=0)
    changes = {
        "nothing": {},
        "gaps": {"gaps": (3, 9)},
        "correspondences": {"correspondences": "soft"},
        "clips": {"nuisance": "intra+clips"},
        "positions": {"nuisance": "intra+positions"},
    }
    weights = {}
    for name, change in changes.items():
        settings = dataclasses.replace(plain, **change)  # type: ignore[arg-type]
        result = fit_projection(tiny_backbone, find_clips(clips), settings)
        weights[name] = result.projection.linears[0].weight
        for option, value in change.items():
            recorded = result.projection.config.fit["settings"][option]
            assert recorded == (list(value) if isinstance(value, tuple) else value)
    for name, weight in weights.items():
        assert bool(torch.isfinite(weight).all())
        assert name == "nothing" or not torch.equal(weight, weights["nothing"])


def test_solvers_and_strengths_are_chosen_from(
    tiny_backbone: VisionTransformerBackbone, clips: Path
) -> None:
    settings = dataclasses.replace(
        QUICK, layers=(5,), solvers=("whiten", "surrogate"), strengths=(0.5, 4.0)
    )
    result = fit_projection(tiny_backbone, find_clips(clips), settings)
    assert result.projection.config.fit["overlap_by_block"].keys() == {
        "5 whiten 0.5", "5 whiten 4", "5 surrogate 0.5", "5 surrogate 4",
    }  # fmt: skip
    assert result.projection.config.fit["settings"]["solver"] == result.chosen.solver
    with pytest.raises(ValueError, match="4 projections to choose from and no rendered clips"):
        fit_projection(tiny_backbone, find_clips(clips), dataclasses.replace(settings, rendered=0))


def test_a_fit_in_one_call_is_an_adapter(
    tiny_backbone: VisionTransformerBackbone, clips: Path
) -> None:
    settings = dataclasses.replace(QUICK, layers=(5,), rendered=0)
    adapter = cosettle_adapter.fit(tiny_backbone, clips, settings, data="squares")
    assert isinstance(adapter, CoSettleAdapter)
    assert adapter.backbone is tiny_backbone
    assert (adapter.config.licence, adapter.config.fit["data"]) == ("Apache-2.0", "squares")
    again = cosettle_adapter.fit(tiny_backbone, [str(clip) for clip in find_clips(clips)], settings)
    frames = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    assert torch.equal(adapter(frames), again(frames))
