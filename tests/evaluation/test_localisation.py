from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.localisation import Segment, localise, read_segments
from cosettle_adapter.evaluation.variants import ADAPTED, CENTRED, RAW_LAST
from cosettle_adapter.evaluation.videos import VideoFrames

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
    results = localise(two_videos(noise=0.05), SEGMENTS, ks=(1,))
    assert list(results) == [RAW_LAST, CENTRED, ADAPTED]
    for by_k in results.values():
        assert by_k[1].accuracy == 1.0
    found = results[ADAPTED][1]
    assert found.names == ("a",) * 5 + ("b",) * 5
    assert found.labels[:5] == ("run", "run", "jump", "jump", "background")


def test_figures_are_those_of_the_frames() -> None:
    videos = two_videos()
    videos[1].features[ADAPTED][1] = RUN  # b's first jump looks like running
    found = localise(videos, SEGMENTS, ks=(1,))[ADAPTED][1]
    assert found.predicted[5:] == ("background", "run", "jump", "run", "run")
    assert found.accuracy == 9 / 10
    assert found.per_class == {"background": 1, "jump": 3 / 4, "run": 1}


def test_predictions_equal_a_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    videos = [frames(name, *torch.randn(8, 4, generator=generator)) for name in "abc"]
    spans = [(0, 2, "x"), (4, 6, "y"), (2, 4, "background"), (6, 8, "background")]
    segments = [Segment(v, *span) for v in "abc" for span in spans[:2]]
    found = localise(videos, segments, ks=(1,))[ADAPTED][1]
    cosine = torch.nn.functional.cosine_similarity
    expected = []
    for video in videos:
        bank = [
            (other.features[ADAPTED][start:end].mean(0), label)
            for other in videos
            if other is not video
            for start, end, label in sorted(spans)
        ]
        expected += [
            max(bank, key=lambda each: float(cosine(each[0], query, dim=0)))[1]
            for query in video.features[ADAPTED]
        ]
    assert list(found.predicted) == expected


def test_centring_takes_off_what_all_segments_share() -> None:
    everywhere = [Segment(v, 0, 9, "jump") for v in "ab"]
    videos = [frames(v, RUN, RUN, JUMP, JUMP, JUMP, noise=0.05, offset=100.0) for v in "ab"]
    segments = [
        Segment(v, *span) for v in "ab"
        for span in ((0, 2, "run"), (2, 3, "jump"), (3, 4, "jump"), (4, 5, "jump"))
    ]  # fmt: skip
    results = localise(videos, segments, ks=(4,))
    assert results[CENTRED][4].accuracy == 1.0
    # under a large common offset all segments are equally near, and the commoner label wins
    assert set(results[RAW_LAST][4].predicted) == {"jump"}
    assert localise(videos, everywhere)[ADAPTED][1].accuracy == 1.0


def test_background_of_one_video_is_left_out() -> None:
    results = localise(two_videos(), [*SEGMENTS, Segment("a", 4, 9, "run")], ks=(1,))
    assert list(results[ADAPTED][1].per_class) == ["jump", "run"]


def test_what_cannot_be_learnt_is_described() -> None:
    with pytest.raises(FrameError, match="only one readable video shows jump, run"):
        localise(two_videos()[:1], SEGMENTS)
    with pytest.raises(FrameError, match="only one readable video shows dive"):
        localise(two_videos(), [*SEGMENTS, Segment("b", 0, 1, "dive")])
    late = [Segment(s.video, s.start + 90, s.end + 90, s.label) for s in SEGMENTS]
    with pytest.raises(FrameError, match="no frame lies within a segment"):
        localise(two_videos(), late)


def test_segments_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text(
        "\ufefflabel,video,end,start,comment\nrun,b.mp4,3,1.5,\njump, a.mp4 ,2,0,ok\n\n"
        '"run, fast",b.mp4,1.5,0,\njump,a.mp4,3,1,touching and equal segments do not overlap\n',
        encoding="utf-8",
    )
    assert read_segments(path) == [
        Segment("b.mp4", 0.0, 1.5, "run, fast"),
        Segment("b.mp4", 1.5, 3.0, "run"),
        Segment("a.mp4", 0.0, 2.0, "jump"),
        Segment("a.mp4", 1.0, 3.0, "jump"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,start,end\na,0,1\n", "lacks label; its first line must be video,start,end,label"),
        ("", "has the columns none"),
        ("video,start,end,label\n", "has no segments below its header"),
        ("video,start,end,label\na,0,1,x\na,2,1,y\n", "line 3: got video 'a', start '2', end '1'"),
        ("video,start,end,label\na,zero,1,x\n", "line 2: .*expected a video, a label and seconds"),
        ("video,start,end,label\na,0\n", "line 2"),
        ("video,start,end,label\na,0,1,\n", "line 2"),
        ("video,start,end,label\na,0,9,x\na,1,2,x\na,5,6,y\n", "'x' and 'y' overlap in a at 5 s"),
    ],
)
def test_a_table_that_cannot_be_meant_is_described(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(FrameError, match=message):
        read_segments(tmp_path / "s.csv")
    with pytest.raises(FrameError, match="does not exist; expected a CSV file"):
        read_segments(tmp_path / "none.csv")
