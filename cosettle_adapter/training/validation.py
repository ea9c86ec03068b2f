"""Validation: label-free figures of a projection on clips that are not trained on."""

from __future__ import annotations

import math
from statistics import fmean

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
from cosettle_adapter.training.fit import mask_overlap, render_from
from cosettle_adapter.video.geometry import resize

CRITERION = "overlap"

_CLIPS = 32
_FRAMES = 8
_RENDERED = 12
_POINTS = 8  # per side


class Validation:
    """Tokens of 8 frames of at most 32 clips; ``skipped`` lists unreadable ones with reasons."""

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
            raise TrainingError(
                f"none of the {count} validation clips can be read; the first: {reason}"
            )
        rendered = render_from(
            photos, count=_RENDERED, frames=_FRAMES, size=(size, size), seed=seed
        )
        self._rendered = [(clip, self._encode(clip.frames.float() / 255)) for clip in rendered]

    def measure(self, projection: Projection | None) -> dict[str, float | None]:
        """Measure a projection, or the backbone's own tokens if it is ``None``.

        Returns mask ``overlap`` in [0, 1] and ``tracking_error`` in pixels on rendered clips, and
        ``cycle_consistency``, ``d_intra`` and ``d_inter`` on the videos; None if not computable.
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
        figures = {CRITERION: fmean(overlaps), "tracking_error": fmean(errors)}
        measured = metrics.result()
        for name in ("cycle_consistency", "d_intra", "d_inter"):
            figures[name] = getattr(measured, name)
        return {name: None if math.isnan(value) else value for name, value in figures.items()}

    @torch.no_grad()
    def _encode(self, frames: Tensor) -> Tensor:
        """Encode frames ``(T, 3, S, S)`` in [0, 1]: tokens ``(T, C, h, w)`` on the CPU."""
        images = self._adapter.preprocess(frames.clamp(0, 1))
        backbone, config = self._adapter.backbone, self._config
        maps = backbone.intermediate_tokens(images, config.layers, norm=config.norm)
        return torch.cat(maps, dim=1).float().cpu()

    @torch.no_grad()
    def _project(self, projection: Projection | None, tokens: Tensor) -> Tensor:
        return tokens if projection is None else projection(tokens.to(self._adapter.device)).cpu()


def read_evenly(video: Video, count: int) -> Tensor:
    """Read ``count`` evenly spaced frames ``(T, 3, H, W)`` uint8; all frames of a short video."""
    length = video.length()
    if length < 2:
        raise TrainingError(f"{video.name} has {length} frame(s); expected at least 2")
    count = min(count, length)
    return video.read([index * (length - 1) // (count - 1) for index in range(count)])
