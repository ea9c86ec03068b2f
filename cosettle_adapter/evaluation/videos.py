"""Videos: listed by class and split, as features by variant, labelled by their neighbours."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.adapter import CoSettleAdapter, Size
from cosettle_adapter.errors import CosettleError, FrameError, MissingExtraError
from cosettle_adapter.evaluation.clips import data_folder, entries, few, images_in
from cosettle_adapter.evaluation.variants import (
    CENTRED,
    RAW_LAST,
    RAW_SAME,
    FeatureVariant,
    feature_variants,
    raw_same,
    read_layers,
)
from cosettle_adapter.video import FrameSelection, is_video, open_frames, probe
from cosettle_adapter.video.files import VIDEO_SUFFIXES

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Found = TypeVar("Found")
Part = Literal["train", "val"]

TEMPERATURE = 0.07  # of the neighbours' weights, as in DINO's kNN evaluation
_CHUNK = 1024  # queries compared at a time
_VALIDATION = 0.25  # of each class


@dataclasses.dataclass(frozen=True)
class LabelledVideo:
    """A video of a class."""

    path: Path  # a video file, or a folder of images
    label: str
    name: str  # path below the data folder, with forward slashes
    part: Part | None = None  # if the folder has these parts

    def __str__(self) -> str:
        return self.name


def labelled_videos(root: str | os.PathLike[str]) -> list[LabelledVideo]:
    """List the videos of ``DIR/<class>/<video>``, or of ``DIR/train`` and ``DIR/val``.

    A video is a video file or a folder of images. When ``train`` and ``val`` are the only folders
    of ``root``, each is read as a folder of classes. Videos come in order of name.

    Raises:
        FrameError: no classes, or a class without videos.
    """
    root = data_folder(Path(root), "a folder of <class>/<video>")
    if {folder.name for folder in _folders(root)} == {"train", "val"}:
        return _classes(root / "train", root, "train") + _classes(root / "val", root, "val")
    return _classes(root, root, None)


def split_videos(videos: Sequence[LabelledVideo], *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split videos into rows to learn from and rows to be judged by.

    A given split is kept. Otherwise a quarter of each class is judged, see :func:`held_out`.

    Raises:
        FrameError: a class that there is nothing to learn from, or nothing to be judged by.
    """
    labels = [video.label for video in videos]
    given = any(video.part for video in videos)
    if given:
        val = [row for row, video in enumerate(videos) if video.part == "val"]
    else:
        val = held_out([video.name for video in videos], labels, share=_VALIDATION, seed=seed)
    train = sorted(set(range(len(videos))) - set(val))
    learnt, judged = ({labels[row] for row in rows} for rows in (train, val))
    lacking = sorted(map(repr, judged - learnt if given else learnt - judged))
    if not train or not val or lacking:
        few_videos = "no readable video to learn from of" if given else "a single readable video of"
        raise FrameError(
            f"got {len(train)} videos to learn from and {len(val)} to be judged by"
            + (f", and {few_videos} {few(lacking)}" if lacking else "")
            + "; expected both of every class: add videos or leave the class out"
        )
    return train, val


def held_out(names: Sequence[str], labels: Sequence[str], *, share: float, seed: int) -> list[int]:
    """Choose rows of every class: the nearest to ``share`` of it, at least one, never all.

    Classes of one row give none. Which rows depends on names and seed alone, not on order or
    platform, and a video that is added or missing moves few others.
    """
    by_label: defaultdict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        by_label[label].append(row)
    chosen: list[int] = []
    for rows in by_label.values():
        if len(rows) > 1:
            rows.sort(key=lambda row: hashlib.sha256(f"{seed}/{names[row]}".encode()).digest())
            chosen += rows[: min(max(1, math.floor(share * len(rows) + 0.5)), len(rows) - 1)]
    return sorted(chosen)


class VideoFrames(NamedTuple):
    """One feature a frame of a video, the mean over its patches."""

    video: str
    times: Tensor  # (T,) float64 seconds; positions in a folder of images
    features: Mapping[str, Tensor]  # variant to (T, C) float32


class PooledVideos(NamedTuple):
    """One feature a labelled video, the mean over its patches and frames."""

    videos: tuple[LabelledVideo, ...]  # those that could be read
    features: Mapping[str, Tensor]  # variant to (V, C) float32, a row for each of these
    skipped: Mapping[str, str]  # name to why, of those that could not


def encode_videos(
    adapter: CoSettleAdapter,
    paths: Mapping[str, Path],
    *,
    frames: int | None = None,
    rate: float | None = None,
    size: Size | None = 224,
    batch_size: int = 8,
    variants: Sequence[FeatureVariant] | None = None,
    on_video: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[VideoFrames], dict[str, str]]:
    """Encode videos, files or folders of images, into one feature a frame.

    Frames are chosen as in :func:`frames_of`, ``batch_size`` is that of a forward pass. Variants
    made of a whole clip, such as centred features, are left out. ``on_video`` is called with the
    number of videos done and their number.

    Returns:
        Videos that could be read, and name to why of those that could not; see
        :func:`each_readable`.
    """
    variants = [each for each in variants or feature_variants(adapter) if not each.needs_clip]
    wanted = [variant.reads for variant in variants]
    skipped: dict[str, str] = {}

    def read(name: str) -> VideoFrames:
        select = frames_of(paths[name], frames=frames, rate=rate)
        parts: dict[str, list[Tensor]] = {variant.name: [] for variant in variants}
        times: list[Tensor] = []
        for chunk in open_frames(paths[name], select, chunk_size=batch_size):
            images = adapter.preprocess(chunk.frames, size=size)
            tokens = read_layers(adapter.backbone, images, wanted)
            for variant in variants:
                maps = variant.of_frames(tokens[variant.reads]).cpu()
                parts[variant.name].append(reduce(maps, "t c h w -> t c", "mean"))
            times.append(chunk.timestamps)
        features = {variant: torch.cat(means) for variant, means in parts.items()}
        return VideoFrames(name, torch.cat(times), features)

    return each_readable(list(paths), read, skipped, on_video), skipped


def pool_videos(
    adapter: CoSettleAdapter, videos: Sequence[LabelledVideo], *, frames: int = 16, **options: Any
) -> PooledVideos:
    """Encode videos into one feature each, the mean over patches and frames.

    ``frames`` of a video, about so many, are evenly spread over it; the options and errors are
    those of :func:`encode_videos`.
    """
    named = {video.name: video for video in videos}
    paths = {name: video.path for name, video in named.items()}
    found, skipped = encode_videos(adapter, paths, frames=frames, **options)
    features = {
        variant: torch.stack([reduce(each.features[variant], "t c -> c", "mean") for each in found])
        for variant in found[0].features
    }
    return PooledVideos(tuple(named[each.video] for each in found), features, skipped)


def with_centred(
    features: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Add the centred features, raw ones minus the mean of a reference ``(M, C)``, after the raw.

    A video's own mean would leave nothing of a pooled feature, so it is the mean of the videos
    that are learnt from or searched; it uses no labels.
    """
    raw = {name: features[name] for name in (RAW_LAST, RAW_SAME) if name in features}
    if not raw:
        return dict(features)
    return {**raw, CENTRED: raw_same(features) - raw_same(reference).mean(dim=0), **features}


def frames_of(
    path: Path, *, frames: int | None = None, rate: float | None = None
) -> FrameSelection:
    """Select frames of a video file or a folder of images.

    ``frames`` spreads about so many evenly over the whole source, and takes no more; ``rate``
    takes about so many a second, or all where the source has no times of its own.
    """
    if (frames is not None and frames < 1) or (rate is not None and not rate > 0):
        raise ValueError(f"got frames={frames} and rate={rate}, expected both above 0")
    info = probe(path)
    if frames is not None:
        return FrameSelection(every=max(1, (info.frames or 0) // frames), max_frames=frames)
    return FrameSelection(every=max(1, round(info.fps / rate)) if info.fps and rate else 1)


def each_readable(
    items: Sequence[Item],
    read: Callable[[Item], Found],
    skipped: dict[str, str],
    on_item: Callable[[int, int], None] = lambda done, total: None,
) -> list[Found]:
    """Read items one by one; one that cannot be read is logged and gets its reason in ``skipped``.

    Raises:
        MissingExtraError: what would fail for every item alike.
        FrameError: not a single item could be read, or there is none.
    """
    found = []
    for done, item in enumerate(items, start=1):
        try:
            found.append(read(item))
        except MissingExtraError:
            raise
        except (CosettleError, OSError) as error:
            logger.warning("skipped %s: %s", item, error)
            skipped[str(item)] = str(error)
        on_item(done, len(items))
    if not items:
        raise FrameError("got no videos to read; expected at least one")
    if not found:
        name, why = next(iter(skipped.items()))
        raise FrameError(f"none of {len(items)} videos could be read. The first, {name}: {why}")
    return found


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What videos, or frames of videos, show and what they were taken for."""

    names: tuple[str, ...]  # of the videos, once for each label
    labels: tuple[str, ...]
    predicted: tuple[str, ...]
    settings: Mapping[str, float | None] = dataclasses.field(default_factory=dict)  # of the method

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Label to how many show it and how many of them were recognised, in order of name."""
        pairs = Counter(zip(self.labels, self.predicted, strict=True))
        count = Counter(self.labels)
        return {label: (count[label], pairs[label, label]) for label in sorted(count)}

    @property
    def accuracy(self) -> float:
        """Share that was recognised, in [0, 1]."""
        return sum(correct for _, correct in self.counts.values()) / len(self.labels)

    @property
    def per_class(self) -> dict[str, float]:
        """Label to the share that was recognised, in order of name."""
        return {label: correct / count for label, (count, correct) in self.counts.items()}

    @property
    def mean_per_class(self) -> float:
        """Mean over labels, in [0, 1]."""
        return sum(self.per_class.values()) / len(self.per_class)


def nearest_votes(
    train: Tensor, labels: Tensor, queries: Tensor, *, ks: Sequence[int], classes: int
) -> dict[int, Tensor]:
    """Let the k nearest neighbours by cosine vote, as DINO's kNN evaluation does.

    Each of ``train`` ``(N, C)``, labelled in [0, classes), votes for its class with the weight
    exp(cosine / temperature) on each of ``queries`` ``(Q, C)``. Of equally near ones the earlier
    counts; where k is larger than N, all vote.

    Returns:
        k to votes ``(Q, classes)``, float64, each row summing to 1.

    Raises:
        ValueError: nothing to compare with, or a k below 1.
    """
    if not len(train) or not ks or min(ks) < 1:
        raise ValueError(
            f"got {len(train)} training features and ks={tuple(ks)}, expected at least one "
            "feature and ks of at least 1"
        )
    keys = F.normalize(train.double(), dim=1)
    votes = {k: keys.new_zeros(len(queries), classes) for k in ks}
    for start in range(0, len(queries), _CHUNK):
        part = F.normalize(queries[start : start + _CHUNK].double(), dim=1)
        cosine, order = (part @ keys.T).sort(dim=1, descending=True, stable=True)
        for k in ks:
            weights = torch.softmax(cosine[:, :k] / TEMPERATURE, dim=1)
            votes[k][start : start + _CHUNK].scatter_add_(1, labels[order[:, :k]], weights)
    return votes


def _classes(folder: Path, root: Path, part: Part | None) -> list[LabelledVideo]:
    videos = []
    for label in _folders(folder):
        paths = [label / name for name in entries(label)]
        found = [path for path in paths if images_in(path) or (path.is_file() and is_video(path))]
        if not found:
            raise FrameError(
                f"{label} holds no videos: expected video files ({', '.join(VIDEO_SUFFIXES)}) or "
                "folders of images. Fill the folder or remove it"
            )
        videos += [
            LabelledVideo(path, label.name, path.relative_to(root).as_posix(), part)
            for path in found
        ]
    if not videos:
        raise FrameError(
            f"{folder} has no folders; expected one for each class, {folder.name}/<class>/<video>"
        )
    return videos


def _folders(folder: Path) -> list[Path]:
    return [folder / name for name in entries(folder) if (folder / name).is_dir()]
