from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from cosettle_adapter.analysis import (
    ADAPTED,
    CENTRED,
    RAW_LAST,
    RAW_SAME,
    RepresentationMetrics,
    SpectrumStatistics,
    comes_home,
    compare_features,
)
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.encoding import central_square
from cosettle_adapter.evaluation.representation import (
    RepresentationSettings,
    evaluate_representation,
)
from cosettle_adapter.video import open_frames

from helpers import write_video

if TYPE_CHECKING:
    from cosettle_adapter import CoSettleAdapter

QUICK = RepresentationSettings(frames=6, rate=12.5, size=48, crop=0.75, gap=2, trim=1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("clips")
    return [
        write_video(root / f"{name}.mp4", frames=16, height=height, width=96, noisy=True)
        for name, height in (("a", 64), ("b", 80), ("c", 64))
    ]


def features_of(adapter: CoSettleAdapter, path: Path) -> dict[str, torch.Tensor]:
    chunks = open_frames(path, every=2, max_frames=6)
    frames = central_square(torch.cat([chunk.frames for chunk in chunks]), 0.75)
    return compare_features(adapter, frames, size=48)


def test_one_pass_gives_what_the_parts_give(
    tiny_adapter: CoSettleAdapter, clips: list[Path]
) -> None:
    done: list[tuple[int, int]] = []
    report = evaluate_representation(
        tiny_adapter, clips, QUICK, batch_size=4, on_video=lambda *p: done.append(p)
    )
    assert list(report.results) == [RAW_LAST, RAW_SAME, CENTRED, ADAPTED]
    assert done == [(1, 3), (2, 3), (3, 3)]
    metrics = {kind: RepresentationMetrics(gap=2, trim=1) for kind in report.results}
    statistics = SpectrumStatistics()
    for path in clips:
        features = features_of(tiny_adapter, path)
        statistics.add(features[RAW_SAME])
        for kind, gathered in metrics.items():
            gathered.add(features[kind], name=path.name)
    for kind, gathered in metrics.items():
        expected, found = gathered.result(), report.results[kind]
        assert found.d_intra == pytest.approx(expected.d_intra, rel=1e-4)
        assert found.d_inter == pytest.approx(expected.d_inter, rel=1e-4)
        assert found.effective_rank == pytest.approx(expected.effective_rank, rel=1e-4)
        assert [video.name for video in found.videos] == ["a.mp4", "b.mp4", "c.mp4"]
    assert report.spectrum is not None
    expected_spectrum = statistics.spectrum(tiny_adapter.projection.project)
    torch.testing.assert_close(report.spectrum.intra, expected_spectrum.intra, rtol=1e-3, atol=1e-6)
    assert report.spectrum.videos == 3


def test_the_worst_moments_come_first(tiny_adapter: CoSettleAdapter, clips: list[Path]) -> None:
    report = evaluate_representation(tiny_adapter, clips, QUICK, failures=2)
    assert len(report.failures) == 2
    shares = {}
    for path in clips:
        home = comes_home(features_of(tiny_adapter, path)[ADAPTED], gap=2)
        shares[path.name] = float(home.double().mean((1, 2)).min())
    assert [m.cycle_accuracy for m in report.failures] == pytest.approx(sorted(shares.values())[:2])
    for moment in report.failures:
        assert moment.cycle_accuracy == pytest.approx(shares[moment.video])
        assert moment.home.shape == (3, 3)
        assert moment.frames.shape[:2] == (2, 3)
        assert moment.frames.dtype == torch.uint8
        assert moment.when.endswith(" s")


def test_a_video_that_cannot_be_used_does_not_lose_the_others(
    tiny_adapter: CoSettleAdapter, clips: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    short = write_video(tmp_path / "short.mp4", frames=4, height=64, width=64)
    report = evaluate_representation(
        tiny_adapter, [tmp_path / "broken.mp4", clips[0], short, clips[1]], QUICK
    )
    assert list(report.skipped) == ["broken.mp4", "short.mp4"]
    assert "got 2 frames at 12.5 a second, expected at least 4" in report.skipped["short.mp4"]
    assert all(len(result.videos) == 2 for result in report.results.values())
    with pytest.raises(FrameError, match="none of 1 videos could be read"):
        evaluate_representation(tiny_adapter, [short], QUICK)


def test_features_that_are_not_finite_are_not_counted_by_halves(
    tiny_adapter: CoSettleAdapter, clips: list[Path]
) -> None:
    tiny_adapter.projection.linears[0].bias.fill_(math.nan)
    with pytest.raises(FrameError, match=r"features \(adapted\) hold values that are not finite"):
        evaluate_representation(tiny_adapter, clips, QUICK)


def test_a_single_video_has_no_spectrum(tiny_adapter: CoSettleAdapter, clips: list[Path]) -> None:
    report = evaluate_representation(tiny_adapter, clips[:1], QUICK)
    assert report.spectrum is None
    assert math.isnan(report.results[ADAPTED].d_inter[95.0])


def test_image_folders_and_equal_names(
    tiny_adapter: CoSettleAdapter, clips: list[Path], tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for parent in ("x", "y"):
        (tmp_path / parent / "clip").mkdir(parents=True)
        for index in range(8):
            pixels = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8, generator=generator)
            image.fromarray(pixels.numpy()).save(tmp_path / parent / "clip" / f"{index}.png")
    folders = [tmp_path / "x" / "clip", tmp_path / "y" / "clip"]
    report = evaluate_representation(tiny_adapter, [*folders, clips[0]], QUICK)
    names = [video.name for video in report.results[ADAPTED].videos]
    assert names == [str(folders[0]), str(folders[1]), "a.mp4"]
    assert report.results[ADAPTED].videos[0].frames == 6
    when = {moment.video: moment.when for moment in report.failures}
    assert when[names[0]].startswith("frame ")
