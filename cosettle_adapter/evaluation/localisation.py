"""Action localisation: each frame takes the label of its nearest segments in other videos.

The feature of a frame is the mean of its patches, that of a segment the mean of its frames. A run
of frames outside all labelled segments is a segment of the background.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations, groupby
from pathlib import Path
from typing import NamedTuple

import torch

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.classification import Predictions, nearest_votes
from cosettle_adapter.evaluation.clips import few, read_text
from cosettle_adapter.evaluation.videos import VideoFrames, with_centred

BACKGROUND = "background"
_COLUMNS = ("video", "start", "end", "label")


class Segment(NamedTuple):
    """A labelled part of a video."""

    video: str  # path below the data folder, as in the file
    start: float  # in seconds
    end: float  # in seconds, exclusive
    label: str


def read_segments(path: str | os.PathLike[str]) -> list[Segment]:
    """Read a CSV file with the header ``video,start,end,label``, times in seconds.

    Other columns and blank lines are ignored; segments of different labels must not overlap. They
    are returned sorted by video, in order of first occurrence, then by start.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FrameError(f"{path} does not exist; expected a CSV file with {','.join(_COLUMNS)}")
    with io.StringIO(read_text(path), newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or ()
        missing = [name for name in _COLUMNS if name not in columns]
        if missing:
            raise FrameError(
                f"{path} has the columns {', '.join(columns) or 'none'}, and lacks "
                f"{', '.join(missing)}; its first line must be {','.join(_COLUMNS)}"
            )
        rows = [_segment(row, path, reader.line_num) for row in reader]
    if not rows:
        raise FrameError(f"{path} has no segments below its header; expected at least one")
    order = list(dict.fromkeys(row.video for row in rows))
    rows.sort(key=lambda row: (order.index(row.video), row.start, row.end))
    for video, own in groupby(rows, key=lambda row: row.video):
        for first, second in combinations(own, 2):
            if first.label != second.label and second.start < first.end:
                raise FrameError(
                    f"{path}: {first.label!r} and {second.label!r} overlap in {video} at "
                    f"{second.start:g} s; a frame can have only one label, so shorten one of them"
                )
    return rows


def localise(
    videos: Sequence[VideoFrames], segments: Sequence[Segment], *, ks: Sequence[int] = (1, 5)
) -> dict[str, dict[int, Predictions]]:
    """Label the frames of each video by the k nearest segments of all other videos.

    Segments of videos that are not among these are ignored, and so is the background if only one
    video has any. Centred features are the raw ones minus the mean of the segments searched.

    Returns:
        Predictions for all frames by variant of features, then by k.
    """
    runs = [
        (row, label, frames)
        for row, video in enumerate(videos)
        for label, frames in _runs(video, segments)
    ]
    videos_with = Counter(label for _, label in {(row, label) for row, label, _ in runs})
    if videos_with[BACKGROUND] == 1:
        runs = [run for run in runs if run[1] != BACKGROUND]
        del videos_with[BACKGROUND]
    if not videos_with.keys() & {segment.label for segment in segments}:
        raise FrameError(
            "no frame lies within a segment; check that start and end are seconds of the videos, "
            "or positions of the images in a folder"
        )
    single = sorted(label for label, count in videos_with.items() if count < 2)
    if single:
        raise FrameError(
            f"only one readable video shows {few(single)}, expected at least two; add videos that "
            "show it, or remove its segments"
        )
    classes = sorted(videos_with)
    labels = torch.tensor([classes.index(label) for _, label, _ in runs])
    rows = torch.tensor([row for row, _, _ in runs])
    means = {
        name: torch.stack([videos[row].features[name][frames].mean(0) for row, _, frames in runs])
        for name in videos[0].features
    }
    predicted: defaultdict[str, defaultdict[int, list[str]]] = defaultdict(
        lambda: defaultdict(list)
    )
    truth: list[tuple[str, str]] = []  # video and label of each frame
    for row, video in enumerate(videos):
        own = [(frame, label) for at, label, frames in runs if at == row for frame in frames]
        truth += [(video.video, label) for _, label in own]
        tested = [frame for frame, _ in own]
        features = {name: values[tested] for name, values in video.features.items()}
        bank = {name: values[rows != row] for name, values in means.items()}
        queries, bank_labels = with_centred(features, bank), labels[rows != row]
        for name, keys in with_centred(bank, bank).items():
            votes = nearest_votes(keys, bank_labels, queries[name], ks=ks, classes=len(classes))
            for k, by_class in votes.items():
                predicted[name][k] += [classes[best] for best in by_class.argmax(dim=1).tolist()]
    names, shown = zip(*truth, strict=True)
    return {
        variant: {k: Predictions(names, shown, tuple(column)) for k, column in by_k.items()}
        for variant, by_k in predicted.items()
    }


def _runs(video: VideoFrames, segments: Sequence[Segment]) -> list[tuple[str, list[int]]]:
    """Split a video into runs of frames of one segment or of none: label and frames of each."""
    own = [segment for segment in segments if segment.video == video.video]

    def segment_at(frame: int) -> int:
        time = float(video.times[frame])
        return next((i for i, s in enumerate(own) if s.start <= time < s.end), -1)

    grouped = groupby(range(len(video.times)), key=segment_at)
    return [(own[i].label if i >= 0 else BACKGROUND, list(frames)) for i, frames in grouped]


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
