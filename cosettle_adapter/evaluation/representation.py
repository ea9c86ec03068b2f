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

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.consistency import cycle_consistent
from cosettle_adapter.evaluation.representation_metrics import (
    Representation,
    RepresentationMetrics,
)
from cosettle_adapter.evaluation.spectra import Spectrum, SpectrumStatistics
from cosettle_adapter.evaluation.variants import (
    ADAPTED,
    CENTRED,
    FeatureVariant,
    encode_variants,
    feature_variants,
    raw_same,
)
from cosettle_adapter.evaluation.videos import each_readable, frames_of
from cosettle_adapter.video import open_frames
from cosettle_adapter.video.geometry import resize

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
class WorstMoment:
    """The two frames of a video between which features lose most patches.

    Attributes:
        video: its name.
        when: times of the two frames, or their positions in an image folder.
        frames: ``(2, 3, H, W)`` uint8, made small.
        consistent: ``(h, w)`` bool, patches of the first frame that come home.
        cycle_accuracy: share of them.
    """

    video: str
    when: str
    frames: Tensor
    consistent: Tensor
    cycle_accuracy: float


@dataclasses.dataclass(frozen=True, eq=False)
class RepresentationReport:
    """What :func:`evaluate_representation` measured.

    Attributes:
        results: variant to figures: raw last layer, raw same layer (where that is another),
            centred by the video's mean token, adapted.
        spectrum: of the tokens the projection reads; None with a single video or no motion.
        failures: the worst moments of the adapted features (of raw ones, without a projection),
            worst first, of different videos.
        skipped: name to why, of videos that could not be used.
        settings: how it was done.
    """

    results: Mapping[str, Representation]
    spectrum: Spectrum | None
    failures: tuple[WorstMoment, ...]
    skipped: Mapping[str, str]
    settings: RepresentationSettings


def evaluate_representation(
    adapter: CoSettleAdapter,
    videos: Sequence[str | Path],
    settings: RepresentationSettings | None = None,
    *,
    failures: int = 6,
    batch_size: int = 8,
    variants: Sequence[FeatureVariant] | None = None,
    on_video: Callable[[int, int], None] = lambda done, total: None,
) -> RepresentationReport:
    """Measure what stays together within videos and apart between them, one video at a time.

    Args:
        adapter: backbone and projection.
        videos: video files, or folders of images.
        settings: see :class:`RepresentationSettings`.
        failures: how many worst moments to keep.
        batch_size: frames a forward pass.
        variants: those of :func:`~cosettle_adapter.evaluation.variants.feature_variants` by
            default.
        on_video: called with the number of videos done and their number.

    Raises:
        FrameError: no video could be used.
        MissingExtraError: PyAV or Pillow is needed and not installed.
    """
    settings = settings or RepresentationSettings()
    # of what is made of a whole clip, only the centred features
    measured = [
        each
        for each in variants or feature_variants(adapter)
        if not each.needs_clip or each.name == CENTRED
    ]
    metrics = {
        each.name: RepresentationMetrics(gap=settings.gap, trim=settings.trim, seed=settings.seed)
        for each in measured
    }
    statistics = SpectrumStatistics(gap=settings.spectrum_gap)
    worst: list[WorstMoment] = []
    skipped: dict[str, str] = {}
    paths = _named(videos)

    def measure(name: str) -> None:
        features, times, frames = _read(adapter, paths[name], settings, batch_size, measured)
        same = raw_same(features)
        for variant, maps in features.items():
            metrics[variant].add(maps, name=name)
        statistics.add(same)
        consistent = cycle_consistent(features.get(ADAPTED, same), gap=settings.gap)
        shares = reduce(consistent.double(), "t h w -> t", "mean")
        lost = int(shares.argmin())
        pair = [lost, lost + settings.gap]
        first, second = times[pair].tolist()
        # images in a folder have positions, not times
        video = paths[name].is_file()
        when = f"{first:.2f} s to {second:.2f} s" if video else f"frame {first:g} to {second:g}"
        worst.append(WorstMoment(name, when, frames[pair], consistent[lost], float(shares[lost])))
        worst.sort(key=lambda moment: moment.cycle_accuracy)
        del worst[failures:]

    each_readable(list(paths), measure, skipped, on_video)
    enough = statistics.videos > 1 and statistics.pairs > 0 and ADAPTED in metrics
    return RepresentationReport(
        results={variant: gathered.result() for variant, gathered in metrics.items()},
        spectrum=statistics.spectrum(adapter.projection.project) if enough else None,
        failures=tuple(worst),
        skipped=skipped,
        settings=settings,
    )


def _named(videos: Sequence[str | Path]) -> dict[str, Path]:
    """Names are those of the files, or whole paths where two would have the same."""
    paths = list(dict.fromkeys(Path(video) for video in videos))
    count = Counter(path.name for path in paths)
    return {path.name if count[path.name] == 1 else str(path): path for path in paths}


def _read(
    adapter: CoSettleAdapter,
    path: Path,
    settings: RepresentationSettings,
    batch_size: int,
    variants: Sequence[FeatureVariant],
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Features, times and small frames of a video, refused before anything of it is counted."""
    select = dataclasses.replace(frames_of(path, rate=settings.rate), max_frames=settings.frames)
    times, frames = [], []

    def batches() -> Iterator[Tensor]:
        for chunk in open_frames(path, select, chunk_size=batch_size):
            square = central_square(chunk.frames, settings.crop)
            side = min(_THUMBNAIL, square.shape[-1])
            frames.append(resize(square, (side, side)).round().to(torch.uint8))
            times.append(chunk.timestamps)
            yield square

    features = dict(encode_variants(adapter, batches(), variants, size=settings.size))
    found = sum(map(len, times))
    needed = max(2 * settings.trim + 2, settings.gap + 1, settings.spectrum_gap + 1)
    if found < needed:
        raise FrameError(
            f"got {found} frames at {settings.rate:g} a second, expected at least {needed}; take "
            "more a second (rate), or a smaller gap and trim"
        )
    for name, maps in features.items():
        if not bool(maps.isfinite().all()):
            raise FrameError(f"its features ({name}) hold values that are not finite")
    return features, torch.cat(times), torch.cat(frames)


def central_square(frames: Tensor, share: float = 1.0) -> Tensor:
    """Cut the central square out of frames ``(N, 3, H, W)``: ``share`` times the short side."""
    if not 0 < share <= 1:
        raise ValueError(f"got a crop of {share}, expected a share of the short side in (0, 1]")
    height, width = frames.shape[-2:]
    side = max(1, round(share * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    return frames[..., top : top + side, left : left + side]
