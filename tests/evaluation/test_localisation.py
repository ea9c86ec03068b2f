from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from cosettle_adapter.analysis import ADAPTED, CENTRED, RAW_LAST
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.frame_features import VideoFrames, encode_videos
from cosettle_adapter.evaluation.localisation import localise
from cosettle_adapter.evaluation.segments import Segment, read_segments

from helpers import write_video

if TYPE_CHECKING:
    from cosettle_adapter import CoSettleAdapter

RUN, JUMP, REST = torch.eye(4)[:3]
SEGMENTS = [
    Segment("a", 0, 2, "run"), Segment("a", 2, 4, "jump"),
    Segment("b", 1, 3, "jump"), Segment("b", 3, 5, "run"),
]  # fmt: skip


def frames(name: str, *shown: torch.Tensor, noise: float = 0.0, offset: float = 0.0) -> VideoFrames:
    """One frame a second."""
    generator = torch.Generator().manual_seed(len(shown))
    rows = torch.stack(shown) + noise * torch.randn(len(shown), 4, generator=generator)
    times = torch.arange(len(shown)).double()
    return VideoFrames(name, times, {RAW_LAST: rows + offset, ADAPTED: rows})


def two_videos(**options: float) -> list[VideoFrames]:
    return [
        frames("a", RUN, RUN, JUMP, JUMP, REST, **options),
        frames("b", REST, JUMP, JUMP, RUN, RUN, **options),
    ]


def test_frames_are_what_the_nearest_segments_of_other_videos_are() -> None:
    report = localise(two_videos(noise=0.05), SEGMENTS, ks=(1,))
    assert list(report.results) == [RAW_LAST, CENTRED, ADAPTED]
    assert report.segments == 6  # four labelled and a background each
    for by_k in report.results.values():
        assert by_k[1].accuracy == by_k[1].mean_per_class == 1.0
    rows = report.results[ADAPTED][1].videos
    assert rows[0].labels == ("run", "run", "jump", "jump", "background")
    assert rows[0].times == (0.0, 1.0, 2.0, 3.0, 4.0)


def test_figures_are_those_of_the_frames() -> None:
    videos = two_videos()
    # b's first jump looks like running, so a's later ones have a mixed neighbour
    videos[1].features[ADAPTED][1] = RUN
    found = localise(videos, SEGMENTS, ks=(1,)).results[ADAPTED][1]
    rows = {row.video: row for row in found.videos}
    assert rows["b"].predicted == ("background", "run", "jump", "run", "run")
    assert rows["b"].correct == 4
    assert rows["b"].accuracy == 0.8
    right = sum(row.correct for row in rows.values())
    assert found.accuracy == right / 10
    jumps = [
        p == "jump" for row in rows.values()
        for label, p in zip(row.labels, row.predicted, strict=True) if label == "jump"
    ]  # fmt: skip
    assert found.per_class["jump"] == sum(jumps) / 4
    assert found.mean_per_class == pytest.approx(sum(found.per_class.values()) / 3)


def test_predictions_equal_a_reference() -> None:
    videos = [
        frames(name, *torch.randn(8, 4, generator=torch.Generator().manual_seed(i)))
        for i, name in enumerate("abc")
    ]
    segments = [Segment(v, s, s + 2, label) for v in "abc" for s, label in ((0, "x"), (4, "y"))]
    report = localise(videos, segments, ks=(1,), background=None)
    for index, row in enumerate(report.results[ADAPTED][1].videos):
        others = [v for i, v in enumerate(videos) if i != index]
        bank = [(v.features[ADAPTED][s : s + 2].mean(0), x) for v in others
                for s, x in ((0, "x"), (4, "y"))]  # fmt: skip
        cosine = torch.nn.functional.cosine_similarity
        judged = videos[index].features[ADAPTED][[0, 1, 4, 5]]
        expected = [max(bank, key=lambda b: float(cosine(b[0], q, dim=0)))[1] for q in judged]
        assert list(row.predicted) == expected
        assert row.labels == ("x", "x", "y", "y")


def test_centring_takes_off_what_all_segments_share() -> None:
    videos = two_videos(noise=0.05, offset=100.0)
    segments = [*SEGMENTS[:2], Segment("b", 1, 2, "jump"), Segment("b", 2, 3, "jump"), SEGMENTS[3]]
    results = localise(videos, segments, ks=(3,), background=None).results
    assert results[CENTRED][3].accuracy == 1.0
    # under a large common offset all segments are equally near, and the commoner label wins
    assert results[RAW_LAST][3].videos[0].predicted == ("jump",) * 4


def test_background_can_be_left_out() -> None:
    report = localise(two_videos(), SEGMENTS, ks=(1,), background=None)
    assert list(report.results[ADAPTED][1].per_class) == ["jump", "run"]
    assert report.segments == 4
    # only one video has any: nothing could be learnt about it
    segments = [*SEGMENTS, Segment("a", 4, 9, "run")]
    report = localise(two_videos(), segments, ks=(1,))
    assert list(report.results[ADAPTED][1].per_class) == ["jump", "run"]


def test_what_cannot_be_learnt_is_said() -> None:
    with pytest.raises(FrameError, match="got 1 readable videos with segments, expected at least"):
        localise(two_videos()[:1], SEGMENTS)
    with pytest.raises(FrameError, match="only one readable video shows 'dive'"):
        localise(two_videos(), [*SEGMENTS[:3], Segment("b", 3, 5, "dive")], background=None)
    late = [Segment(s.video, s.start + 90, s.end + 90, s.label) for s in SEGMENTS]
    with pytest.raises(FrameError, match="no frame lies within a segment"):
        localise(two_videos(), late, background=None)


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_segments_are_read_in_order(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "s.csv",
        "\ufefflabel,video,end,start,comment\nrun,b.mp4,3,1.5,\njump, a.mp4 ,2,0,ok\n\n"
        '"run, fast",b.mp4,1.5,0,\n',
    )
    assert read_segments(path) == [
        Segment("b.mp4", 0.0, 1.5, "run, fast"),
        Segment("b.mp4", 1.5, 3.0, "run"),
        Segment("a.mp4", 0.0, 2.0, "jump"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,start,end\na,0,1\n", "lacks label; its first line must be video,start,end,label"),
        ("", "has the columns none"),
        ("video,start,end,label\n", "has a header and no segments"),
        ("video,start,end,label\na,0,1,x\na,2,1,y\n", "line 3: got video 'a', start '2', end '1'"),
        ("video,start,end,label\na,zero,1,x\n", "line 2: .*expected a video, a label and seconds"),
        ("video,start,end,label\na,0\n", "line 2"),
        ("video,start,end,label\na,0,inf,x\n", "line 2"),
        ("video,start,end,label\na,0,1,\n", "line 2"),
        (
            "video,start,end,label\na,0,9,x\na,1,2,x\na,5,6,y\n",
            "lines 2 and 4: 'x' and 'y' overlap in a at 5 s",
        ),
    ],
)
def test_a_table_that_cannot_be_meant_is_described(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        read_segments(write_csv(tmp_path / "s.csv", text))
    with pytest.raises(FrameError, match="does not exist; expected a CSV file"):
        read_segments(tmp_path / "none.csv")


def test_touching_and_equal_segments_do_not_overlap(tmp_path: Path) -> None:
    text = "video,start,end,label\na,0,1,x\na,1,2,y\na,0.5,1,x\nb,0,5,z\n"
    assert len(read_segments(write_csv(tmp_path / "s.csv", text))) == 4


def test_videos_are_encoded_at_a_rate_and_broken_ones_listed(
    tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    write_video(tmp_path / "a.mp4", frames=20, height=48, width=64)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    segments = [Segment(video, 0, 1, "x") for video in ("a.mp4", "broken.mp4", "gone.mp4")]
    done: list[tuple[int, int]] = []
    videos, skipped = encode_videos(
        tiny_adapter, tmp_path, segments, rate=12.5, size=48,
        on_video=lambda *progress: done.append(progress),
    )  # fmt: skip
    assert [video.video for video in videos] == ["a.mp4"]
    torch.testing.assert_close(videos[0].times, torch.arange(10).double() * 0.08)
    assert videos[0].features[ADAPTED].shape == (10, 192)
    assert list(skipped) == ["broken.mp4", "gone.mp4"]
    assert "does not exist" in skipped["gone.mp4"]
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_what_is_seen_is_localised_end_to_end(
    tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(6):
            frame = torch.full((48, 48, 3), 90, dtype=torch.uint8)
            if index >= 3:
                frame.random_(0, 256, generator=generator)
            image.fromarray(frame.numpy()).save(tmp_path / name / f"{index}.png")
    segments = [Segment(v, s, s + 3, x) for v in "ab" for s, x in ((0, "calm"), (3, "noise"))]
    videos, skipped = encode_videos(tiny_adapter, tmp_path, segments, size=48)
    report = localise(videos, segments, ks=(1,), skipped=skipped)
    for by_k in report.results.values():
        assert by_k[1].per_class == {"calm": 1.0, "noise": 1.0}
