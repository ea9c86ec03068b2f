"""The paper's Figure 1 and section 4 on a set of videos, before and after the projection."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import reduce
from torch import Tensor

from cosettle_adapter.analysis import (
    ADAPTED,
    CENTRED,
    RAW_LAST,
    RAW_SAME,
    FeatureKind,
    Representation,
    RepresentationMetrics,
    Spectrum,
    SpectrumStatistics,
    centred,
    comes_home,
)
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.encoding import (
    EncodedChunk,
    Source,
    each_readable,
    encoded_chunks,
    joined,
    step_of,
)
from cosettle_adapter.video.resampling import resize

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter

_THUMBNAIL = 256  # pixels of the longest side that is kept of a frame


@dataclasses.dataclass(frozen=True)
class RepresentationSettings:
    """How videos are read and measured; the defaults follow the released ``cal_metric`` code.

    Attributes:
        frames: at most this many of a video, from its beginning.
        rate: about how many frames a second; all of image folders. The released code takes 40
            frames of clips of 10 seconds.
        size: side of the square that is encoded, rounded to whole patches.
        crop: side of the central square, as a share of the short side: 224 of 256.
        gap: frames between the two ends of a cycle; the released code's mean distance at 40.
        trim: frames left out of D_intra at both ends.
        spectrum_gap: frames between corresponding patches of the intra-video covariance.
        seed: of the patch positions of D_inter.
    """

    frames: int = 40
    rate: float = 4.0
    size: int = 224
    crop: float = 224 / 256
    gap: int = 6
    trim: int = 3
    spectrum_gap: int = 1
    seed: int = 42


@dataclasses.dataclass(frozen=True, eq=False)
class LostCells:
    """The moment at which the adapted features of a video (raw ones, without) lose most cells.

    Attributes:
        video: its name.
        when: times of the two frames, or their positions in an image folder.
        frames: ``(2, 3, H, W)`` uint8, made small.
        home: ``(h, w)`` bool, cells of the first frame that come home from the second.
        cycle_accuracy: share of them, in [0, 1].
    """

    video: str
    when: str
    frames: Tensor
    home: Tensor
    cycle_accuracy: float


@dataclasses.dataclass(frozen=True, eq=False)
class RepresentationReport:
    """What :func:`evaluate_representation` measured.

    Attributes:
        results: kind of features to figures: raw last block, raw same block (where that is
            another), centred by the video's mean token, adapted.
        spectrum: of the tokens the projection reads; None with a single video or no motion.
        failures: the worst moments, worst first, of different videos.
        skipped: name to why, of videos that could not be used.
        settings: how it was done.
    """

    results: Mapping[str, Representation]
    spectrum: Spectrum | None
    failures: tuple[LostCells, ...]
    skipped: Mapping[str, str]
    settings: RepresentationSettings


def evaluate_representation(
    adapter: CoSettleAdapter,
    videos: Sequence[Source],
    settings: RepresentationSettings | None = None,
    *,
    failures: int = 6,
    batch_size: int = 8,
    kinds: Sequence[FeatureKind] | None = None,
    on_video: Callable[[int, int], None] = lambda done, total: None,
) -> RepresentationReport:
    """Measure what stays together within videos and apart between them.

    Videos are read one at a time, each in one pass of the backbone for all kinds of features.

    Args:
        adapter: backbone and projection.
        videos: video files, or folders of images.
        settings: see :class:`RepresentationSettings`.
        failures: how many worst moments to keep.
        batch_size: frames a forward pass.
        kinds: as for :func:`~cosettle_adapter.evaluation.encoding.encoded_chunks`.
        on_video: called with the number of videos done and their number.

    Raises:
        FrameError: no video could be used.
        MissingExtraError: PyAV or Pillow is needed and not installed.
    """
    settings = settings or RepresentationSettings()
    metrics: dict[str, RepresentationMetrics] = {}
    statistics = SpectrumStatistics(gap=settings.spectrum_gap)
    worst: list[LostCells] = []
    skipped: dict[str, str] = {}
    paths = _named(videos)

    def measure(name: str) -> None:
        chunks = list(_read(adapter, paths[name], settings, batch_size, kinds))
        features, times = joined(chunks)
        _check(features, settings)
        same = features.get(RAW_SAME, features[RAW_LAST])
        adapted = features.get(ADAPTED)
        raw = {name: features.pop(name) for name in (RAW_LAST, RAW_SAME) if name in features}
        features = {**raw, CENTRED: centred(same), **features}
        for kind, maps in features.items():
            if kind not in metrics:
                metrics[kind] = RepresentationMetrics(
                    gap=settings.gap, trim=settings.trim, seed=settings.seed
                )
            metrics[kind].add(maps, name=name)
        statistics.add(same)
        frames = torch.cat([chunk.frames for chunk in chunks])
        judged = same if adapted is None else adapted
        worst.append(_lost_cells(name, paths[name], judged, frames, times, settings.gap))
        worst.sort(key=lambda moment: moment.cycle_accuracy)
        del worst[failures:]

    each_readable(list(paths), measure, skipped, on_video)
    enough = statistics.videos > 1 and statistics.pairs > 0 and ADAPTED in metrics
    return RepresentationReport(
        results={kind: gathered.result() for kind, gathered in metrics.items()},
        spectrum=statistics.spectrum(adapter.projection.project) if enough else None,
        failures=tuple(worst),
        skipped=skipped,
        settings=settings,
    )


def _named(videos: Sequence[Source]) -> dict[str, Path]:
    """Names are those of the files, or whole paths where two would have the same."""
    paths = list(dict.fromkeys(Path(video) for video in videos))
    count = Counter(path.name for path in paths)
    return {path.name if count[path.name] == 1 else str(path): path for path in paths}


def _read(
    adapter: CoSettleAdapter,
    path: Path,
    settings: RepresentationSettings,
    batch_size: int,
    kinds: Sequence[FeatureKind] | None,
) -> Iterator[EncodedChunk]:
    """Chunks of a video whose frames, once encoded, are small."""
    for chunk in encoded_chunks(
        adapter,
        path,
        every=step_of(path, rate=settings.rate),
        max_frames=settings.frames,
        size=settings.size,
        crop=settings.crop,
        batch_size=batch_size,
        kinds=kinds,
    ):
        side = min(_THUMBNAIL, chunk.frames.shape[-1])
        small = resize(chunk.frames, (side, side)).round().to(torch.uint8)
        yield dataclasses.replace(chunk, frames=small)


def _check(features: Mapping[str, Tensor], settings: RepresentationSettings) -> None:
    """Refuse a video before anything of it is counted."""
    needed = max(2 * settings.trim + 2, settings.gap + 1, settings.spectrum_gap + 1)
    found = len(features[RAW_LAST])
    if found < needed:
        raise FrameError(
            f"got {found} frames at {settings.rate:g} a second, expected at least {needed}; take "
            "more a second (rate), or a smaller gap and trim"
        )
    for kind, maps in features.items():
        if not bool(maps.isfinite().all()):
            raise FrameError(f"its features ({kind}) hold values that are not finite")


def _lost_cells(
    name: str, path: Path, adapted: Tensor, frames: Tensor, times: Tensor, gap: int
) -> LostCells:
    home = comes_home(adapted, gap=gap)
    shares = reduce(home.double(), "t h w -> t", "mean")
    worst = int(shares.argmin())
    pair = [worst, worst + gap]
    first, second = times[pair].tolist()
    # images in a folder have positions, not times
    when = (
        f"{first:.2f} s to {second:.2f} s" if path.is_file() else f"frame {first:g} to {second:g}"
    )
    return LostCells(name, when, frames[pair], home[worst], float(shares[worst]))
