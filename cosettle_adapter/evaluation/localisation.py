"""Does a frame's feature tell what happens in it? Its neighbours among labelled segments.

Every frame is one query: the mean of its patches. What it is compared with are the labelled
segments of all other videos, each the mean of its frames. Frames outside every segment are
background, and each stretch of them a segment too.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.frame_features import VideoFrames
from cosettle_adapter.evaluation.labelled_videos import some_of
from cosettle_adapter.evaluation.pooling import with_centred
from cosettle_adapter.evaluation.probe import nearest_votes
from cosettle_adapter.evaluation.segments import Segment

BACKGROUND = "background"


@dataclasses.dataclass(frozen=True)
class LabelledFrames:
    """What the frames of a video were taken for.

    Attributes:
        video: its name.
        times: seconds of the frames that were judged.
        labels: what they show.
        predicted: what they were taken for.
    """

    video: str
    times: tuple[float, ...]
    labels: tuple[str, ...]
    predicted: tuple[str, ...]

    @property
    def correct(self) -> int:
        """Number of frames that were taken for what they are."""
        return sum(a == b for a, b in zip(self.labels, self.predicted, strict=True))

    @property
    def accuracy(self) -> float:
        """Share of the frames, in [0, 1]."""
        return self.correct / len(self.labels)


@dataclasses.dataclass(frozen=True)
class Localisation:
    """Localisation by one kind of features and one number of neighbours.

    Attributes:
        k: number of neighbouring segments.
        videos: a row for each video that had frames to judge.
    """

    k: int
    videos: tuple[LabelledFrames, ...]

    @property
    def accuracy(self) -> float:
        """Share of all frames, in [0, 1]."""
        frames = sum(len(video.labels) for video in self.videos)
        return sum(video.correct for video in self.videos) / frames

    @property
    def per_class(self) -> dict[str, float]:
        """Label to the share of its frames that were found, in order of name."""
        pairs = Counter(
            pair for row in self.videos for pair in zip(row.labels, row.predicted, strict=True)
        )
        count: Counter[str] = Counter()
        for (label, _), frames in pairs.items():
            count[label] += frames
        return {label: pairs[label, label] / count[label] for label in sorted(count)}

    @property
    def mean_per_class(self) -> float:
        """Mean over labels, background among them, in [0, 1]."""
        shares = self.per_class
        return sum(shares.values()) / len(shares)


@dataclasses.dataclass(frozen=True)
class LocalisationReport:
    """Localisation by every kind of features.

    Attributes:
        results: kind of features to k to result.
        segments: number of segments that had frames, background among them.
        skipped: name to why, of videos that could not be read.
    """

    results: Mapping[str, Mapping[int, Localisation]]
    segments: int
    skipped: Mapping[str, str]


def localise(
    videos: Sequence[VideoFrames],
    segments: Sequence[Segment],
    *,
    ks: Sequence[int] = (1, 5),
    temperature: float = 0.07,
    background: str | None = BACKGROUND,
    skipped: Mapping[str, str] | None = None,
) -> LocalisationReport:
    """Label the frames of each video by the segments of all others.

    Args:
        videos: see :func:`~cosettle_adapter.evaluation.frame_features.encode_videos`.
        segments: of these videos; those of others are ignored.
        ks: numbers of neighbouring segments; all where a number is larger.
        temperature: of their weights, as in
            :func:`~cosettle_adapter.evaluation.probe.nearest_votes`.
        background: what frames outside every segment are; None leaves them out. They are also
            left out when only one video has any.
        skipped: to hand on in the report.

    Returns:
        Results for raw, centred (minus the mean of the segments that are searched) and adapted
        features.

    Raises:
        FrameError: fewer than two videos, or a label that only one of them shows.
        ValueError: an option out of range.
    """
    stretches = [_stretches(video, segments, background) for video in videos]
    shown = Counter(label for row in stretches for label in {stretch.label for stretch in row})
    if background is not None and shown[background] == 1:
        stretches = [[s for s in row if s.label != background] for row in stretches]
        del shown[background]
    _check(videos, shown)
    classes = sorted(shown)
    number = {label: index for index, label in enumerate(classes)}
    rows: dict[str, dict[int, list[LabelledFrames]]] = {}
    for video, own in zip(videos, stretches, strict=True):
        if not own:
            continue
        others = [
            (other, stretch)
            for other, row in zip(videos, stretches, strict=True)
            if other is not video
            for stretch in row
        ]
        labels = torch.tensor([number[stretch.label] for _, stretch in others])
        bank = {
            name: torch.stack([o.features[name][stretch.frames].mean(0) for o, stretch in others])
            for name in video.features
        }
        judged = [frame for stretch in own for frame in stretch.frames]
        truth = tuple(stretch.label for stretch in own for _ in stretch.frames)
        queries = with_centred({n: v[judged] for n, v in video.features.items()}, bank)
        searched = with_centred(bank, bank)
        for name, values in queries.items():
            votes = nearest_votes(
                searched[name], labels, values, ks=ks, classes=len(classes), temperature=temperature
            )
            for k, tally in votes.items():
                predicted = tuple(classes[best] for best in tally.argmax(dim=1).tolist())
                times = tuple(video.times[judged].tolist())
                found = LabelledFrames(video.video, times, truth, predicted)
                rows.setdefault(name, {}).setdefault(k, []).append(found)
    results = {
        name: {k: Localisation(k, tuple(found)) for k, found in by_k.items()}
        for name, by_k in rows.items()
    }
    return LocalisationReport(results, sum(map(len, stretches)), dict(skipped or {}))


class _Stretch(NamedTuple):
    label: str
    frames: list[int]


def _stretches(
    video: VideoFrames, segments: Sequence[Segment], background: str | None
) -> list[_Stretch]:
    """Consecutive frames of one segment, or of none, that have a label."""
    own = [segment for segment in segments if segment.video == video.video]

    def segment_at(frame: int) -> int:
        time = float(video.times[frame])
        return next((i for i, s in enumerate(own) if s.start <= time < s.end), -1)

    found = []
    for index, frames in groupby(range(len(video.times)), key=segment_at):
        label = own[index].label if index >= 0 else background
        if label is not None:
            found.append(_Stretch(label, list(frames)))
    return found


def _check(videos: Sequence[VideoFrames], shown: Mapping[str, int]) -> None:
    if len(videos) < 2:
        raise FrameError(
            f"got {len(videos)} readable videos with segments, expected at least 2: the frames of "
            "each are labelled by the segments of the others"
        )
    if not shown:
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
