"""Patch features as colours: three principal components, one basis for a whole clip.

A basis fitted frame by frame changes sign, order and scale from one frame to the next, and the
film flickers even where the features do not. Here mean, components and colour range are those of
the clip; whatever still flickers is in the features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cosettle_adapter.errors import FrameError, GeometryError

_PERCENTILES = (1.0, 99.0)
_MODES = ("nearest", "bilinear")


@dataclass(frozen=True)
class PCABasis:
    """A linear map from features to colours, and the range that colours span.

    Attributes:
        mean: ``(C,)`` float32, subtracted first.
        components: ``(k, C)`` float32, one row a channel. Orthonormal rows, strongest first,
            unless the basis was aligned to another one (see :func:`fit_pca`).
        low: ``(k,)`` float32, the score shown as 0: the clip's 1st percentile.
        high: ``(k,)`` float32, the score shown as 255: the clip's 99th percentile.
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """Project ``(T, C, h, w)`` features onto the components: ``(T, k, h, w)`` float32.

        Raises:
            GeometryError: the features are not four-dimensional or have another width ``C``.
        """
        _check_maps([features])
        if features.shape[1] != self.mean.shape[0]:
            raise GeometryError(
                f"got features with {features.shape[1]} channels, but the basis was fitted on "
                f"{self.mean.shape[0]}. Fit one basis for each kind of features."
            )
        mean, components = self.mean.to(features.device), self.components.to(features.device)
        tokens = rearrange(features, "t c h w -> t h w c").float()
        return rearrange((tokens - mean) @ components.T, "t h w k -> t k h w")

    def colours(self, features: Tensor) -> Tensor:
        """Scores of ``(T, C, h, w)`` features within the range: ``(T, k, h, w)`` in [0, 1]."""
        scores = self.scores(features)
        low = rearrange(self.low.to(scores.device), "k -> k 1 1")
        high = rearrange(self.high.to(scores.device), "k -> k 1 1")
        return ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0.0, 1.0)


def fit_pca(
    features: Tensor | Sequence[Tensor],
    *,
    components: int = 3,
    samples: int = 20_000,
    seed: int = 0,
    align_to: Tensor | Sequence[Tensor] | None = None,
) -> PCABasis:
    """Fit one PCA basis to all frames of a clip.

    The covariance is diagonalised in float64. Each component's sign makes its largest loading
    positive, so the same features give the same colours on every run.

    Args:
        features: ``(T, C, h, w)`` floats, or several such clips that shall share one basis.
        components: number of components ``k``; 3 give a colour picture.
        samples: patches the covariance is estimated from; the colour range always comes from all.
        seed: seed of that choice.
        align_to: scores of another basis on the same cells, ``basis.scores(other)`` of shape
            ``(T, k, h, w)`` (a sequence where ``features`` is one). The new components, each
            scaled to unit variance, are then rotated among themselves to agree with those scores
            as well as an orthogonal map can (Procrustes), so that two panels share their colours
            where the features share their structure. It is one rotation for the clip: it cannot
            hide flicker.

    Returns:
        The basis, on the CPU.

    Raises:
        GeometryError: features that are not ``(T, C, h, w)``, fewer channels or patches than
            components, or ``align_to`` that does not lie on the same cells.
        FrameError: features that are not finite.
    """
    clips = [features] if isinstance(features, Tensor) else list(features)
    width = _check_maps(clips)
    patches = sum(clip.shape[0] * clip.shape[2] * clip.shape[3] for clip in clips)
    if not 1 <= components <= min(width, patches - 1):
        raise GeometryError(
            f"got components={components} for {patches} patches of {width} channels, expected "
            f"1 to {min(width, patches - 1)}. Give more frames or ask for fewer components."
        )
    for frame in _frames(clips):
        if not frame.isfinite().all():
            raise FrameError(
                "got features with NaN or infinite values, which have no principal components. "
                "Look for the first frame where features.isfinite().all() is False."
            )

    sample = _sample(clips, patches, samples, seed)
    mean = sample.mean(dim=0)
    centred = sample - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred / len(sample))  # ascending
    rows = vectors[:, -components:].flip(-1).T
    rows = rows * _largest_loading(rows).sign()

    # frame by frame: a float32 copy of a long clip would be the largest thing here
    tokens = (_tokens(frame) for frame in _frames(clips))
    scores = torch.cat([(each - mean.float()) @ rows.float().T for each in tokens])
    if align_to is not None:
        rotation = _procrustes(scores, _reference_scores(align_to, clips, components))
        rows, scores = rotation.T @ rows, scores @ rotation.float()
    low, high = (_percentile(scores, percent) for percent in _PERCENTILES)
    return PCABasis(mean.float(), rows.float(), low, high)


def pca_frames(
    features: Tensor, basis: PCABasis, *, size: tuple[int, int], mode: str = "nearest"
) -> Tensor:
    """Paint features in the colours of a basis.

    Args:
        features: ``(T, C, h, w)`` floats.
        basis: a three-component basis from :func:`fit_pca`.
        size: ``(H, W)`` of the pictures in pixels; the grid is stretched over all of it.
        mode: ``"nearest"`` shows the cells as they are, ``"bilinear"`` smooths between them.

    Returns:
        ``(T, 3, H, W)`` uint8 on the CPU.

    Raises:
        GeometryError: a basis that has not three components, or features of another width.
        ValueError: an unknown mode.
    """
    if mode not in _MODES:
        raise ValueError(f"got mode={mode!r}, expected one of {', '.join(map(repr, _MODES))}.")
    if len(basis.components) != 3:
        raise GeometryError(
            f"got a basis of {len(basis.components)} components; a colour picture needs 3. "
            "Fit it with fit_pca(features, components=3)."
        )
    colours = basis.colours(features)
    smooth = {"align_corners": False} if mode == "bilinear" else {}
    painted = F.interpolate(colours, size=size, mode=mode, **smooth)
    return (painted * 255).round().to(torch.uint8).cpu()


def _check_maps(clips: Sequence[Tensor]) -> int:
    """Return the width ``C`` that all clips share."""
    if not clips:
        raise GeometryError("got no features at all; give at least one (T, C, h, w) tensor.")
    for clip in clips:
        if clip.ndim != 4 or not clip.is_floating_point():
            raise GeometryError(
                f"got features of shape {tuple(clip.shape)} and dtype {clip.dtype}, expected "
                "floats of shape (T, C, h, w). Add the time axis with features[None]."
            )
    widths = sorted({clip.shape[1] for clip in clips})
    if len(widths) != 1:
        raise GeometryError(
            f"got clips of {' and '.join(map(str, widths))} channels; one basis needs features "
            "of one kind. Fit a basis for each kind."
        )
    return widths[0]


def _frames(clips: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield every frame of every clip, ``(1, C, h, w)``."""
    for clip in clips:
        yield from torch.split(clip, 1)


def _sample(clips: Sequence[Tensor], patches: int, samples: int, seed: int) -> Tensor:
    """Draw ``(samples, C)`` float64 patches of all clips without repetition."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(patches, generator=generator)[:samples].sort().values
    drawn, passed = [], 0
    for frame in _frames(clips):
        count = frame.shape[2] * frame.shape[3]
        here = chosen[(chosen >= passed) & (chosen < passed + count)]
        drawn.append(_tokens(frame)[here - passed].double())
        passed += count
    return torch.cat(drawn)


def _tokens(clip: Tensor) -> Tensor:
    return rearrange(clip.detach(), "t c h w -> (t h w) c").float().cpu()


def _largest_loading(rows: Tensor) -> Tensor:
    return rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))


def _reference_scores(
    align_to: Tensor | Sequence[Tensor], clips: Sequence[Tensor], components: int
) -> Tensor:
    references = [align_to] if isinstance(align_to, Tensor) else list(align_to)
    got = [tuple(reference.shape) for reference in references]
    expected = [(clip.shape[0], components, *clip.shape[2:]) for clip in clips]
    if got != expected:
        raise GeometryError(
            f"got align_to of shape {got}, expected {expected}: scores of as many components on "
            "the same cells. Take them from basis.scores(other_features) of the same frames."
        )
    return torch.cat([_tokens(reference) for reference in references])


def _procrustes(scores: Tensor, reference: Tensor) -> Tensor:
    """``(k, k)`` map: unit variance, then the rotation that meets the reference best."""
    deviation = scores.double().std(dim=0).clamp_min(1e-12)
    standard = (scores.double() - scores.double().mean(dim=0)) / deviation
    target = reference.double() - reference.double().mean(dim=0)
    target = target / target.std(dim=0).clamp_min(1e-12)
    left, _, right = torch.linalg.svd(standard.T @ target)
    rotation: Tensor = (left @ right) / rearrange(deviation, "k -> k 1")
    return rotation


def _percentile(scores: Tensor, percent: float) -> Tensor:
    # kthvalue, because torch.quantile refuses more than 16 million values
    rank = round(percent / 100 * (len(scores) - 1)) + 1
    return scores.kthvalue(rank, dim=0).values
