"""Is the projection getting better? Figures without labels, on clips that are not trained on.

The best projection so far is the one whose features keep a known mask best: the **overlap** of the
propagated mask of a cut-out with where it truly is, on clips rendered from the validation videos'
own frames, by which ``cosettle-adapter fit`` chooses its layers as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.evaluation.drift import tracking_error
from cosettle_adapter.evaluation.representation import RepresentationMetrics
from cosettle_adapter.projection import Projection, ProjectionConfig
from cosettle_adapter.training.corpus import Corpus, Video
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.model_selection import mask_overlap, render_from
from cosettle_adapter.video.geometry import resize

CRITERION = "overlap"

_CLIPS = 32
_FRAMES = 8
_RENDERED = 12
_POINTS = 8  # a side


class Validation:
    """Clips whose tokens are computed once; then only the head runs.

    At most 32 clips are used, spread evenly over the corpus, and 8 frames of each, resized to the
    square that is trained on. ``skipped`` says which could not be read, and why.

    Raises:
        TrainingError: no clip could be read.
    """

    def __init__(
        self, backbone: Backbone, corpus: Corpus, config: ProjectionConfig, *, size: int, seed: int
    ) -> None:
        self._adapter = CoSettleAdapter.raw(backbone)
        self._config, self._size = config, size
        self.skipped: dict[str, str] = {}
        self._clips: dict[str, Tensor] = {}
        photos: list[Tensor] = []
        count = min(_CLIPS, len(corpus))
        for video in (corpus.videos[index * len(corpus) // count] for index in range(count)):
            try:
                frames = read_evenly(video, _FRAMES)
            except (CosettleError, OSError) as error:
                self.skipped[video.name] = str(error)
                continue
            photos.append(frames[0])
            self._clips[video.name] = self._encode(resize(frames, (size, size)) / 255)
        if not photos:
            reason = next(iter(self.skipped.values()))
            raise TrainingError(f"no validation clip could be read; the first: {reason}")
        rendered = render_from(photos, count=_RENDERED, size=(size, size), seed=seed)
        self._rendered = [(clip, self._encode(clip.frames.float() / 255)) for clip in rendered]

    def measure(self, projection: Projection | None) -> dict[str, float | None]:
        """Measure a projection, or with ``None`` the backbone's own tokens.

        Returns:
            ``overlap``: intersection over union of propagated masks on rendered clips, in [0, 1];
            more is better, and the best projection is chosen by it. ``tracking_error``: mean
            distance of tracked points from the truth on rendered clips, pixels.
            ``cycle_accuracy``: share of patches with consistent cycles in real clips, in [0, 1].
            ``d_intra``: distance to the nearest patch of the next frame, in diameters of the clip.
            ``d_inter``: distance to other clips, in diameters; ``None`` for a single clip.
        """
        metrics = RepresentationMetrics()
        for name, tokens in self._clips.items():
            metrics.add(self._project(projection, tokens), name=name)
        geometry = self._adapter.geometry(self._size, self._size)
        centres = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) * (self._size / _POINTS)
        points = torch.cartesian_prod(centres, centres)
        overlaps, errors = [], []
        for clip, tokens in self._rendered:
            features = self._project(projection, tokens)
            overlaps.append(mask_overlap(features, clip))
            errors.append(tracking_error(features, geometry, points, *clip.track(points))["mean"])
        found = metrics.result()
        figures = {
            CRITERION: sum(overlaps) / len(overlaps),
            "tracking_error": sum(errors) / len(errors),
            "cycle_accuracy": found.cycle_accuracy,
            "d_intra": found.d_intra,
            "d_inter": found.d_inter,
        }
        return {name: None if math.isnan(value) else value for name, value in figures.items()}

    @torch.no_grad()
    def _encode(self, frames: Tensor) -> Tensor:
        """Tokens ``(T, C, h, w)`` on the CPU, of frames ``(T, 3, S, S)`` in [0, 1]."""
        images = self._adapter.preprocess(frames.clamp(0, 1))
        maps = self._adapter.backbone.intermediate_tokens(
            images, self._config.layers, norm=self._config.norm
        )
        return torch.cat(maps, dim=1).float().cpu()

    @torch.no_grad()
    def _project(self, projection: Projection | None, tokens: Tensor) -> Tensor:
        if projection is None:
            return tokens
        projected: Tensor = projection(tokens.to(self._adapter.device)).cpu()
        return projected


def read_evenly(video: Video, count: int) -> Tensor:
    """Return ``count`` frames ``(T, 3, H, W)`` uint8 spread over a video; fewer of a short one."""
    length = video.length()
    if length < 2:
        raise TrainingError(f"{video.name} has {length} frame, and nothing to follow")
    count = min(count, length)
    return video.read([index * (length - 1) // (count - 1) for index in range(count)])
