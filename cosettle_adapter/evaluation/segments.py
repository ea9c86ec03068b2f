"""Labelled segments of videos: a table with the columns video, start, end and label."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from pathlib import Path

from cosettle_adapter.errors import FrameError

_COLUMNS = ("video", "start", "end", "label")


@dataclasses.dataclass(frozen=True)
class Segment:
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

    Args:
        path: the file, UTF-8; further columns and blank lines are ignored.

    Returns:
        Segments by video in order of first mention, each video's by start.

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
        rows = [(reader.line_num, _segment(row, path, reader.line_num)) for row in reader]
    if not rows:
        raise FrameError(f"{path} has a header and no segments")
    videos = list(dict.fromkeys(segment.video for _, segment in rows))
    ordered: list[Segment] = []
    for video in videos:
        own = sorted(
            ((line, s) for line, s in rows if s.video == video),
            key=lambda row: (row[1].start, row[1].end),
        )
        _check_overlap(own, path)
        ordered += [segment for _, segment in own]
    return ordered


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


def _check_overlap(rows: list[tuple[int, Segment]], path: Path) -> None:
    for index, (line, segment) in enumerate(rows):
        for other_line, other in rows[index + 1 :]:
            if other.start >= segment.end:
                break
            if other.label != segment.label:
                raise FrameError(
                    f"{path}, lines {line} and {other_line}: {segment.label!r} and "
                    f"{other.label!r} overlap in {segment.video} at {other.start:g} s; a frame "
                    "has one label, so cut one of them"
                )
