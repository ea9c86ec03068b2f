"""Does a frame's feature tell what happens in it? Its neighbours among labelled segments.

Every frame is one query: the mean of its patches. What it is compared with are the labelled
segments of all other videos, each the mean of its frames. Frames outside every segment are
background, and each stretch of them a segment too.
"""

from __future__ import annotations

import csv
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
from cosettle_adapter.evaluation.clips import few
from cosettle_adapter.evaluation.videos import VideoFrames, with_centred

BACKGROUND = "background"
_COLUMNS = ("video", "start", "end", "label")


class Segment(NamedTuple):
    """A labelled stretch of a video."""

    video: str  # path below the data folder, as the table has it
    start: float  # first second
    end: float  # second it stops before
    label: str


def read_segments(path: str | os.PathLike[str]) -> list[Segment]:
    """Read a CSV file with the header ``video,start,end,label``, times in seconds.

    Further columns and blank lines are ignored. Segments come by video in order of first mention,
    each video's by start.

    Raises:
        FrameError: no such table, a row that cannot be meant, or segments of a video that overlap
            although their labels differ.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FrameError(f"{path} does not exist; expected a CSV file with {','.join(_COLUMNS)}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        held = reader.fieldnames or ()
        missing = [name for name in _COLUMNS if name not in held]
        if missing:
            raise FrameError(
                f"{path} has the columns {', '.join(held) or 'none'}, and lacks "
                f"{', '.join(missing)}; its first line must be {','.join(_COLUMNS)}"
            )
        rows = [_segment(row, path, reader.line_num) for row in reader]
    if not rows:
        raise FrameError(f"{path} has a header and no segments")
    order = list(dict.fromkeys(row.video for row in rows))
    rows.sort(key=lambda row: (order.index(row.video), row.start, row.end))
    for video, own in groupby(rows, key=lambda row: row.video):
        for first, second in combinations(own, 2):
            if first.label != second.label and second.start < first.end:
                raise FrameError(
                    f"{path}: {first.label!r} and {second.label!r} overlap in {video} at "
                    f"{second.start:g} s; a frame has one label, so cut one of them"
                )
    return rows


def localise(
    videos: Sequence[VideoFrames], segments: Sequence[Segment], *, ks: Sequence[int] = (1, 5)
) -> dict[str, dict[int, Predictions]]:
    """Label the frames of each video by the k nearest segments of all others.

    Segments of other videos than these are ignored, and so is background that one video alone has.

    Returns:
        Variant (centred features are raw ones minus the mean of the segments searched) to k to
        what frames were taken for.

    Raises:
        FrameError: no frame lies within a segment, or only one video shows a label.
    """
    stretches = [
        (row, label, frames)
        for row, video in enumerate(videos)
        for label, frames in _stretches(video, segments)
    ]
    shown = Counter(label for _, label in {each[:2] for each in stretches})
    if shown[BACKGROUND] == 1:
        stretches = [each for each in stretches if each[1] != BACKGROUND]
        del shown[BACKGROUND]
    if not shown.keys() & {segment.label for segment in segments}:
        raise FrameError(
            "no frame lies within a segment; check that start and end are seconds of the videos, "
            "or positions of the images in a folder"
        )
    lonely = sorted(label for label, count in shown.items() if count < 2)
    if lonely:
        raise FrameError(
            f"only one readable video shows {few(lonely)}, so nothing can be learnt about it from "
            "others; add videos that show it or remove its segments"
        )
    classes = sorted(shown)
    labels = torch.tensor([classes.index(label) for _, label, _ in stretches])
    rows = torch.tensor([row for row, _, _ in stretches])
    means = {
        name: torch.stack([videos[row].features[name][at].mean(0) for row, _, at in stretches])
        for name in videos[0].features
    }
    columns: defaultdict[str, defaultdict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    shows: list[tuple[str, str]] = []  # video and label of each frame
    for row, video in enumerate(videos):
        mine = [(frame, label) for at, label, frames in stretches if at == row for frame in frames]
        shows += [(video.video, label) for _, label in mine]
        judged = [frame for frame, _ in mine]
        own = {name: values[judged] for name, values in video.features.items()}
        bank = {name: values[rows != row] for name, values in means.items()}
        queries, known = with_centred(own, bank), labels[rows != row]
        for name, keys in with_centred(bank, bank).items():
            votes = nearest_votes(keys, known, queries[name], ks=ks, classes=len(classes))
            for k, tally in votes.items():
                columns[name][k] += [classes[best] for best in tally.argmax(dim=1).tolist()]
    names, truth = zip(*shows, strict=True)
    return {
        variant: {k: Predictions(names, truth, tuple(found)) for k, found in by_k.items()}
        for variant, by_k in columns.items()
    }


def _stretches(video: VideoFrames, segments: Sequence[Segment]) -> list[tuple[str, list[int]]]:
    """Label and frames of each stretch of a video that is of one segment, or of none."""
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
