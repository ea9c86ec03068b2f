from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cosettle_adapter import evaluation
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.clips import Clip, bad_clip


def test_a_digest_is_of_contents_not_of_sizes(tmp_path: Path) -> None:
    mask, frame = tmp_path / "0.png", np.zeros((2, 2, 3), dtype=np.uint8)
    mask.write_bytes(b"one")
    clip = Clip("clip", [frame], lambda: None, inputs=(mask, b"jpeg", frame, "name"))
    before = clip.digest()
    assert clip.digest() == before
    for part in (b"JPEG", frame + 1, "eman"):
        inputs = tuple(part if type(old) is type(part) else old for old in clip.inputs)
        assert dataclasses.replace(clip, inputs=inputs).digest() != before
    mask.write_bytes(b"two")
    assert clip.digest() != before
    mask.unlink()
    assert clip.digest() != before


def test_what_is_wrong_with_a_clip_is_raised_by_reading_it() -> None:
    clip = bad_clip("clip", "no frames")
    for read in (clip.read_annotations, lambda: clip.read_frame(0)):
        with pytest.raises(FrameError, match="no frames"):
            read()
    broken = Clip("clip", [b"no picture"], lambda: None)
    with pytest.raises(FrameError, match="frame 0 of 'clip' cannot be read"):
        broken.read_frame(0)


def test_names_of_version_01_warn(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    gt, pred = random.random((2, 9, 12, 15)) > 0.4
    with pytest.warns(DeprecationWarning, match="use region_similarity and boundary_f"):
        scores = evaluation.j_and_f(gt, pred, tolerance=2)
    inner = range(1, 8)
    assert scores.j == tuple(evaluation.region_similarity(gt[t], pred[t]) for t in inner)
    assert scores.f == tuple(evaluation.boundary_f(gt[t], pred[t], 2) for t in inner)
    assert scores.j_and_f == pytest.approx((np.mean(scores.j) + np.mean(scores.f)) / 2)
    assert scores.j_summary.mean + scores.f_summary.mean == pytest.approx(2 * scores.j_and_f)
    with pytest.raises(FrameError, match="T at least 3"), pytest.warns():
        evaluation.j_and_f(gt[:2], pred[:2])
    by_threshold = dict.fromkeys((1, 2, 4, 8, 16), 0.5)
    some = evaluation.TapVidMetrics(0.5, 0.25, 0.1, by_threshold, by_threshold)
    with pytest.warns(DeprecationWarning, match="goes in version 0.3"):
        mean = evaluation.mean_over_videos([some, some._replace(delta_avg=float("nan"))])
    assert mean == some
    with pytest.raises(ValueError, match="no videos"), pytest.warns():
        evaluation.mean_over_videos([])
    with pytest.warns(DeprecationWarning, match="use Clip"):
        assert evaluation.DavisSequence is Clip
    with pytest.warns(DeprecationWarning, match="use davis_clips"):
        listed = evaluation.davis_sequences
    with pytest.raises(FrameError, match="expected JPEGImages"):
        listed(tmp_path, every=2)
    with pytest.warns(DeprecationWarning, match="use read_annotations"):
        assert Clip("clip", (), lambda: 3).read_masks() == 3
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        evaluation.nonsense  # noqa: B018
