"""Lists of labelled videos, and features of whole videos by variant."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from einops import reduce
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter, Size
from cosettle_adapter.errors import CosettleError, FrameError, MissingExtraError
from cosettle_adapter.evaluation.clips import data_folder, entries, images_in
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

Result = TypeVar("Result")
Part = Literal["train", "val"]


class LabelledVideo(NamedTuple):
    """A video and its class."""

    path: Path  # video file or folder of images
    label: str
    name: str  # path below the data folder, with forward slashes
    part: Part | None = None  # of the split, if the folder has one


def labelled_videos(root: str | os.PathLike[str]) -> list[LabelledVideo]:
    """List the videos of ``DIR/<class>/<video>``, or of ``DIR/train`` and ``DIR/val``.

    A video is a video file or a folder of images. If ``train`` and ``val`` are the only folders
    of ``root``, each is a folder of classes. Videos are sorted by name.
    """
    root = data_folder(Path(root), "a folder of <class>/<video>")
    if {folder.name for folder in _folders(root)} == {"train", "val"}:
        return _classes(root / "train", root, "train") + _classes(root / "val", root, "val")
    return _classes(root, root, None)


class VideoFrames(NamedTuple):
    """One feature per frame of a video, the mean over its patches."""

    video: str
    times: Tensor  # (T,) float64 seconds; positions in a folder of images
    features: Mapping[str, Tensor]  # variant to (T, C) float32


class PooledVideos(NamedTuple):
    """One feature per labelled video, the mean over its patches and frames."""

    videos: tuple[LabelledVideo, ...]  # the readable videos
    features: Mapping[str, Tensor]  # variant to (V, C) float32, one row per readable video
    skipped: Mapping[str, str]  # name of an unreadable video to the reason


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
    """Encode video files or folders of images into one feature per frame.

    Frames are selected by :func:`frames_of` and encoded ``batch_size`` at a time. Variants that
    need a whole clip, such as centred features, are left out. ``on_video`` is called with the
    number of videos done and the number of all.

    Returns:
        The readable videos, and the reason for each unreadable one; see :func:`each_readable`.
    """
    variants = [v for v in variants or feature_variants(adapter) if not v.needs_clip]
    reads = [variant.reads for variant in variants]

    def read(name: str) -> VideoFrames:
        select = frames_of(paths[name], frames=frames, rate=rate)
        parts: dict[str, list[Tensor]] = {variant.name: [] for variant in variants}
        times: list[Tensor] = []
        for chunk in open_frames(paths[name], select, chunk_size=batch_size):
            images = adapter.preprocess(chunk.frames, size=size)
            tokens = read_layers(adapter.backbone, images, reads)
            for variant in variants:
                maps = variant.of_frames(tokens[variant.reads]).cpu()
                parts[variant.name].append(reduce(maps, "t c h w -> t c", "mean"))
            times.append(chunk.timestamps)
        features = {variant: torch.cat(means) for variant, means in parts.items()}
        return VideoFrames(name, torch.cat(times), features)

    return each_readable(list(paths), read, on_video)


def pool_videos(
    adapter: CoSettleAdapter, videos: Sequence[LabelledVideo], *, frames: int = 16, **options: Any
) -> PooledVideos:
    """Encode videos into one feature each, from about ``frames`` evenly spread frames.

    Options are those of :func:`encode_videos`.
    """
    by_name = {video.name: video for video in videos}
    paths = {name: video.path for name, video in by_name.items()}
    encoded, skipped = encode_videos(adapter, paths, frames=frames, **options)
    features = {
        variant: torch.stack([reduce(v.features[variant], "t c -> c", "mean") for v in encoded])
        for variant in encoded[0].features
    }
    return PooledVideos(tuple(by_name[v.video] for v in encoded), features, skipped)


def with_centred(
    features: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Insert centred features after the raw ones: these minus the mean of ``reference`` ``(M, C)``.

    The reference are the videos trained on or searched, without their labels: subtracting a video's
    own mean would leave nothing of its pooled feature.
    """
    raw = {name: features[name] for name in (RAW_LAST, RAW_SAME) if name in features}
    if not raw:
        return dict(features)
    return {**raw, CENTRED: raw_same(features) - raw_same(reference).mean(dim=0), **features}


def frames_of(
    path: Path, *, frames: int | None = None, rate: float | None = None
) -> FrameSelection:
    """Select frames of a video file or a folder of images.

    ``frames`` spreads about that many, and at most that many, evenly over the source; ``rate``
    selects about that many per second, or all frames of a source without frame times.
    """
    if (frames is not None and frames < 1) or (rate is not None and not rate > 0):
        raise ValueError(f"got frames={frames} and rate={rate}, expected both above 0")
    info = probe(path)
    if frames is not None:
        return FrameSelection(every=max(1, (info.frames or 0) // frames), max_frames=frames)
    return FrameSelection(every=max(1, round(info.fps / rate)) if info.fps and rate else 1)


def each_readable(
    names: Sequence[str], read: Callable[[str], Result], on_video: Callable[[int, int], None]
) -> tuple[list[Result], dict[str, str]]:
    """Read videos one by one; return the results, and the reason for each unreadable video."""
    results, skipped = [], {}
    for done, name in enumerate(names, start=1):
        try:
            results.append(read(name))
        except MissingExtraError:  # would fail for every video
            raise
        except (CosettleError, OSError) as error:
            logger.warning("skipped %s: %s", name, error)
            skipped[name] = str(error)
        on_video(done, len(names))
    if not names:
        raise FrameError("got no videos to read; expected at least one")
    if not results:
        name, reason = next(iter(skipped.items()))
        raise FrameError(f"none of {len(names)} videos could be read. The first, {name}: {reason}")
    return results, skipped


def _classes(folder: Path, root: Path, part: Part | None) -> list[LabelledVideo]:
    videos = []
    for label in _folders(folder):
        paths = [label / name for name in entries(label)]
        usable = [path for path in paths if images_in(path) or (path.is_file() and is_video(path))]
        if not usable:
            raise FrameError(
                f"{label} holds no videos: expected video files ({', '.join(VIDEO_SUFFIXES)}) or "
                "folders of images. Add videos or remove the folder"
            )
        videos += [
            LabelledVideo(path, label.name, path.relative_to(root).as_posix(), part)
            for path in usable
        ]
    if not videos:
        raise FrameError(
            f"{folder} has no folders; expected one for each class, {folder.name}/<class>/<video>"
        )
    return videos


def _folders(folder: Path) -> list[Path]:
    return [folder / name for name in entries(folder) if (folder / name).is_dir()]
