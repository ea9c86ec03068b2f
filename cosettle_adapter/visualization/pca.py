"""Show patch features as colours: three principal components, one basis for a whole clip.

A basis fitted per frame changes sign, order and scale between frames, and the film flickers even if
the features do not. Here mean, components and colour range are fitted to the whole clip, so any
flicker is in the features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import FrameError, GeometryError

_COMPONENTS = 3
_SAMPLES = 20_000  # patches to estimate the covariance from
_RANGE = (0.01, 0.99)  # quantiles of the scores at the ends of the colour range


@dataclass(frozen=True)
class PCABasis:
    """A linear map from features to three colours, and the colour range; float32."""

    mean: Tensor  # (C,), subtracted from features
    components: Tensor  # (3, C): orthonormal rows, strongest first, unless aligned
    low: Tensor  # (3,) scores shown as 0: the clip's 1st percentile
    high: Tensor  # (3,) scores shown as 255: the clip's 99th percentile

    def scores(self, features: Tensor) -> Tensor:
        """Project ``(T, C, h, w)`` features onto the components: ``(T, 3, h, w)`` float32."""
        _check_features(features)
        if features.shape[1] != self.mean.shape[0]:
            raise GeometryError(
                f"got features with {features.shape[1]} channels, but the basis was fitted on "
                f"{self.mean.shape[0]}. Fit a basis to each kind of features."
            )
        return _project(features, self.mean, self.components)

    def colours(self, features: Tensor) -> Tensor:
        """Scale the scores of ``(T, C, h, w)`` features to [0, 1]: ``(T, 3, h, w)`` float32."""
        scores = self.scores(features)
        low, high = (rearrange(end, "k -> k 1 1").to(scores) for end in (self.low, self.high))
        return ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0.0, 1.0)


def fit_pca(features: Tensor, *, align_to: Tensor | None = None) -> PCABasis:
    """Fit one PCA basis of three components to all frames of a clip.

    The covariance of 20,000 patches, sampled with a fixed seed, is diagonalised in float64. The
    largest loading of each component is positive, so the colours are the same on every run.

    Args:
        features: ``(T, C, h, w)`` floats.
        align_to: scores of another basis on the same patches, ``basis.scores(other)``, of shape
            ``(T, 3, h, w)``. The new components, scaled to unit variance, are rotated to match
            these scores (orthogonal Procrustes), so that similar structure has similar colours in
            both panels. One rotation serves the whole clip and cannot hide flicker.

    Raises:
        GeometryError: features of another shape, or too few patches or channels.
        FrameError: features that are not finite.
    """
    _check_features(features)
    frames, width, rows, columns = features.shape
    patches = frames * rows * columns
    if width < _COMPONENTS or patches <= _COMPONENTS:
        raise GeometryError(
            f"got {patches} patches of {width} channels, expected at least {_COMPONENTS + 1} "
            f"patches of {_COMPONENTS} channels."
        )
    if not features.isfinite().all():
        raise FrameError(
            "got features with NaN or infinite values, expected finite ones; check each frame with "
            "features[t].isfinite().all()"
        )
    generator = torch.Generator().manual_seed(0)
    indices = torch.randperm(patches, generator=generator)[:_SAMPLES].sort().values
    frame, row, column = torch.unravel_index(indices, (frames, rows, columns))
    sample = features.detach()[frame, :, row, column].cpu().double()
    mean = sample.mean(dim=0)
    centred = sample - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred / len(sample))  # ascending
    basis = vectors[:, -_COMPONENTS:].flip(-1).T
    basis = basis * basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()

    scores = _tokens(_project(features, mean, basis))
    if align_to is not None:
        if align_to.shape != (frames, _COMPONENTS, rows, columns):
            raise GeometryError(
                f"got align_to of shape {tuple(align_to.shape)}, expected "
                f"{(frames, _COMPONENTS, rows, columns)}: scores on the same patches. Take them "
                "from basis.scores(other_features) of the same frames."
            )
        rotation = _procrustes(scores, _tokens(align_to))
        basis, scores = rotation.T @ basis, scores @ rotation.float()
    # torch.quantile accepts at most 16 million values
    ranks = [round(share * (len(scores) - 1)) + 1 for share in _RANGE]
    low, high = (scores.kthvalue(rank, dim=0).values for rank in ranks)
    return PCABasis(mean.float(), basis.float(), low, high)


def fit_alike(features: Mapping[str, Tensor]) -> dict[str, PCABasis]:
    """Fit a basis to each of several features of one clip, aligned to the first basis."""
    bases: dict[str, PCABasis] = {}
    reference: Tensor | None = None
    for name, maps in features.items():
        bases[name] = fit_pca(maps, align_to=reference)
        reference = bases[name].scores(maps) if reference is None else reference
    return bases


def pca_frames(
    features: Tensor, basis: PCABasis, *, size: tuple[int, int], mode: str = "nearest"
) -> Tensor:
    """Draw ``(T, C, h, w)`` features in the colours of a basis.

    The grid is resized to ``size``, ``(H, W)`` pixels; the mode ``"bilinear"`` interpolates between
    patches. Returns ``(T, 3, H, W)`` uint8 on the CPU.
    """
    painted = F.interpolate(basis.colours(features), size=size, mode=mode)
    return (painted * 255).round().to(torch.uint8).cpu()


def _check_features(features: Tensor) -> None:
    if features.ndim != 4 or not features.is_floating_point():
        raise GeometryError(
            f"got features of shape {tuple(features.shape)} and dtype {features.dtype}, expected "
            "floats of shape (T, C, h, w). Add the time axis with features[None]."
        )


def _project(features: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    # converted before they move: MPS has no float64
    mean, components = (tensor.float().to(features.device) for tensor in (mean, components))
    # frame by frame, without a float32 copy of the clip
    scores = [
        einsum(frame.float() - rearrange(mean, "c -> c 1 1"), components, "c h w, k c -> k h w")
        for frame in features
    ]
    return torch.stack(scores)


def _tokens(scores: Tensor) -> Tensor:
    return rearrange(scores.detach().cpu(), "t k h w -> (t h w) k")


def _procrustes(scores: Tensor, reference: Tensor) -> Tensor:
    """``(3, 3)`` map: scale scores to unit variance, then rotate them to match the reference."""
    (standard, deviation), (target, _) = map(_standardised, (scores.double(), reference.double()))
    left, _, right = torch.linalg.svd(standard.T @ target)
    rotation: Tensor = (left @ right) / rearrange(deviation, "k -> k 1")
    return rotation


def _standardised(values: Tensor) -> tuple[Tensor, Tensor]:
    deviation = values.std(dim=0).clamp_min(1e-12)
    return (values - values.mean(dim=0)) / deviation, deviation
