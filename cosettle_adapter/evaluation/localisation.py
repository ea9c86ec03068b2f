"""Does a frame's feature tell what happens in it? Its neighbours among labelled segments.

Every frame is one query: the mean of its patches. What it is compared with are the labelled
segments of all other videos, each the mean of its frames. Frames outside every segment are
background, and each stretch of them a segment too.
"""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.labelled_videos import some_of
from cosettle_adapter.evaluation.predictions import Predictions, nearest_votes
from cosettle_adapter.evaluation.videos import VideoFrames, with_centred

BACKGROUND = "background"
_COLUMNS = ("video", "start", "end", "label")


class Segment(NamedTuple):
    """A labelled stretch of a video.

    Attributes:
        video: path below the data folder, as the table has it.
        start: first second.
        end: second it stops before.
        label: what happens.
    """

    video: str
    start: float
    end: float
    label: str


def read_segments(path: str | os.PathLike[str]) -> list[Segment]:
    """Read a CSV file with the header ``video,start,end,label``, times in seconds.

    Further columns and blank lines are ignored. Segments come by video in order of first mention,
    each video's by start.

    Raises:
        FrameError: no such file, a column is missing, a row without a video or a label or with
            times that are not numbers in order, or two segments of a video that overlap although
            their labels differ.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FrameError(f"{path} does not exist; expected a CSV file with {','.join(_COLUMNS)}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise FrameError(
                f"{path} has the columns {', '.join(reader.fieldnames or ()) or 'none'}, and "
                f"lacks {', '.join(missing)}; its first line must be {','.join(_COLUMNS)}"
            )
        rows = [(_segment(row, path, reader.line_num), reader.line_num) for row in reader]
    if not rows:
        raise FrameError(f"{path} has a header and no segments")
    order = {video: index for index, video in enumerate(dict.fromkeys(s.video for s, _ in rows))}
    rows.sort(key=lambda row: (order[row[0].video], row[0].start, row[0].end))
    for index, (segment, line) in enumerate(rows):
        for other, other_line in rows[index + 1 :]:
            if other.video != segment.video or other.start >= segment.end:
                break
            if other.label != segment.label:
                raise FrameError(
                    f"{path}, lines {line} and {other_line}: {segment.label!r} and "
                    f"{other.label!r} overlap in {segment.video} at {other.start:g} s; a frame "
                    "has one label, so cut one of them"
                )
    return [segment for segment, _ in rows]


def _segment(row: dict[str, str], path: Path, line: int) -> Segment:
    video, label = (row["video"] or "").strip(), (row["label"] or "").strip()
    try:
        start, end = float(row["start"]), float(row["end"])
    except (TypeError, ValueError):
        start = end = math.nan
    if not video or not label or not 0 <= start < end < math.inf:
        raise FrameError(
            f"{path}, line {line}: got video {video!r}, start {row['start']!r}, end "
            f"{row['end']!r}, label {label!r}; expected a video, a label and seconds with "
            "0 <= start < end"
        )
    return Segment(video, start, end, label)


def localise(
    videos: Sequence[VideoFrames], segments: Sequence[Segment], *, ks: Sequence[int] = (1, 5)
) -> dict[str, dict[int, Predictions]]:
    """Label the frames of each video by the segments of all others.

    Background is left out when only one video has any.

    Args:
        videos: see :func:`~cosettle_adapter.evaluation.videos.encode_videos`.
        segments: of these videos; those of others are ignored.
        ks: numbers of neighbouring segments; all where a number is larger.

    Returns:
        Number of neighbours to what frames were taken for, for raw, centred (minus the mean of
        the segments that are searched) and adapted features.

    Raises:
        FrameError: fewer than two videos, or a label that only one of them shows.
        ValueError: a k below 1.
    """
    stretches = [
        each for row, video in enumerate(videos) for each in _stretches(row, video, segments)
    ]
    shown = Counter(label for _, label in {(each.row, each.label) for each in stretches})
    if shown[BACKGROUND] == 1:
        stretches = [each for each in stretches if each.label != BACKGROUND]
        del shown[BACKGROUND]
    _check(videos, segments, shown)
    classes = sorted(shown)
    labels = torch.tensor([classes.index(each.label) for each in stretches])
    rows = torch.tensor([each.row for each in stretches])
    means = {
        name: torch.stack([videos[s.row].features[name][s.frames].mean(0) for s in stretches])
        for name in videos[0].features
    }
    columns: dict[str, dict[int, list[str]]] = {}
    frames: list[tuple[str, str, float]] = []  # name of the video, label, time
    for row, video in enumerate(videos):
        judged = [(f, each.label) for each in stretches if each.row == row for f in each.frames]
        frames += [(video.video, label, float(video.times[frame])) for frame, label in judged]
        own = {name: values[[f for f, _ in judged]] for name, values in video.features.items()}
        bank = {name: values[rows != row] for name, values in means.items()}
        queries = with_centred(own, bank)
        for name, keys in with_centred(bank, bank).items():
            votes = nearest_votes(
                keys, labels[rows != row], queries[name], ks=ks, classes=len(classes)
            )
            for k, tally in votes.items():
                column = columns.setdefault(name, {}).setdefault(k, [])
                column += [classes[best] for best in tally.argmax(dim=1).tolist()]
    names, truth, times = zip(*frames, strict=True)
    return {
        name: {
            k: Predictions(names, truth, tuple(predicted), times, {"k": k})
            for k, predicted in by_k.items()
        }
        for name, by_k in columns.items()
    }


class _Stretch(NamedTuple):
    """Consecutive frames of a video (by row) that are of one segment, or of none."""

    row: int
    label: str
    frames: list[int]


def _stretches(row: int, video: VideoFrames, segments: Sequence[Segment]) -> list[_Stretch]:
    own = [segment for segment in segments if segment.video == video.video]

    def segment_at(frame: int) -> int:
        time = float(video.times[frame])
        return next((i for i, s in enumerate(own) if s.start <= time < s.end), -1)

    return [
        _Stretch(row, own[index].label if index >= 0 else BACKGROUND, list(frames))
        for index, frames in groupby(range(len(video.times)), key=segment_at)
    ]


def _check(
    videos: Sequence[VideoFrames], segments: Sequence[Segment], shown: Mapping[str, int]
) -> None:
    if len(videos) < 2:
        raise FrameError(
            f"got {len(videos)} readable videos with segments, expected at least 2: the frames of "
            "each are labelled by the segments of the others"
        )
    if not shown.keys() & {segment.label for segment in segments}:
        raise FrameError(
            "no frame lies within a segment; check that start and end are seconds of the videos, "
            "or positions of the images in a folder"
        )
    lonely = sorted(label for label, count in shown.items() if count < 2)
    if lonely:
        raise FrameError(
            f"only one readable video shows {some_of(lonely)}, so nothing can be learnt about it "
            "from others; add videos that show it or remove its segments"
        )
