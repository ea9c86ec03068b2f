"""Closed-form projections: affine maps that minimise an explicit objective.

T is the total covariance of the tokens, m their mean, and S the covariance of a patch around its
own mean over time (half the mean outer product of the differences of corresponding patches). A
projection should map corresponding patches to equal features (small ``tr W S W'``) without losing
what distinguishes patches; each solver defines that trade-off differently. All solvers centre the
tokens and scale the result to unit variance per channel, as a LayerNorm does; cosines do not depend
on the scale.

A *nuisance* covariance can replace S to add other variation that features should not depend on:
see :func:`nuisance_covariance`. A strength out of range is a :class:`ValueError`; no tokens or
pairs, or tokens that never vary, are a :class:`StatisticsError`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from cosettle_adapter.closed_form.affine import AffineMap
from cosettle_adapter.closed_form.statistics import TokenStatistics
from cosettle_adapter.errors import StatisticsError

Nuisance = Literal["intra", "intra+clips", "intra+positions"]
NUISANCES: tuple[Nuisance, ...] = get_args(Nuisance)


def nuisance_covariance(statistics: TokenStatistics, nuisance: Nuisance = "intra") -> Tensor:
    """Return the covariance ``(C, C)`` of what features should not depend on.

    ``intra`` is S; ``intra+clips`` adds the covariance of the clips' mean tokens, which damps what
    all patches of a clip share; ``intra+positions`` adds the position leakage.
    """
    if nuisance not in NUISANCES:
        raise ValueError(f"unknown nuisance {nuisance!r}; expected one of {', '.join(NUISANCES)}")
    covariance = statistics.intra_covariance
    if not float(covariance.diagonal().mean()) > 0:
        raise StatisticsError("corresponding patches never differ: the clips have no motion")
    if nuisance == "intra+clips":
        covariance = covariance + statistics.clip_covariance
    if nuisance == "intra+positions":
        covariance = covariance + statistics.leakage_covariance
    return covariance


def centre(
    statistics: TokenStatistics, strength: float = 1.0, nuisance: Nuisance = "intra"
) -> AffineMap:
    """Subtract the mean token: ``y = c (x - m)``.

    This keeps all angles, and is the limit of every other solver at the strength that damps
    nothing. ``strength`` and ``nuisance`` have no effect.
    """
    del strength, nuisance
    return _normalised(torch.eye(statistics.width, dtype=torch.float64), statistics)


def ridge_shrinkage(
    statistics: TokenStatistics, strength: float = 1.0, nuisance: Nuisance = "intra"
) -> AffineMap:
    """Shrink directions by their temporal variance: ``W = lambda (S + lambda I)^-1``.

    Minimises ``tr(W S W') + lambda |W - I|^2``, the remaining temporal variance plus the squared
    (Frobenius) distance from the identity: the derivative ``2 W S + 2 lambda (W - I)`` is zero
    there. A direction of variance s is scaled by ``lambda / (s + lambda)``.
    ``strength`` is lambda in units of S's mean eigenvalue; infinity only centres.
    """
    return _spectral(statistics, lambda s, r: r / (s + r), strength, nuisance)


def whiten(
    statistics: TokenStatistics,
    strength: float = 1.0,
    nuisance: Nuisance = "intra",
    *,
    power: float = 0.5,
    total: bool = False,
) -> AffineMap:
    """Whiten by a power of a covariance: ``W = (S + r I)^-a``, or of T.

    With ``a = 1/2``, distances between the new features are Mahalanobis distances for the
    covariance S + r I, that is S plus white noise of variance r. Directions of temporal variance
    far below r keep their relative scale, those far above are whitened. ``strength`` is r in units
    of the covariance's mean eigenvalue; infinity only centres.

    ``power`` is a; smaller powers whiten partially. With ``total``, T is whitened in place of S
    (PCA whitening): a baseline that uses no temporal information.
    """
    return _spectral(
        statistics,
        lambda s, r: (s + r).rsqrt() if power == 0.5 else (s + r) ** -power,
        strength,
        nuisance,
        total=total,
    )


def soft_threshold(
    statistics: TokenStatistics, strength: float = 1.0, nuisance: Nuisance = "intra"
) -> AffineMap:
    """Damp directions by the share of their variance that is temporal; remove the worst.

    The share s is the eigenvalue of a direction v in the generalised eigenproblem ``S v = s T v``,
    as in discriminant analysis. Each gain minimises ``(g - 1)^2 / 2 + tau s g`` over ``g >= 0``:
    fidelity against the paper's nuclear norm of the projected variation (Theorem 1). The derivative
    ``g - 1 + tau s`` is zero at ``g = 1 - tau s``; if that is negative, the minimum is at 0. So
    ``g = max(0, 1 - tau s)``. At ``tau = 1`` this is the Wiener filter ``(T - S) T^-1 (x - m)``,
    the best linear estimate of a patch's mean over time from one of its tokens. ``strength`` is
    tau; 0 only centres.
    """
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be finite and not negative, got {strength}")
    return _generalised(statistics, lambda s: (1 - strength * s).clamp_min(0), nuisance)


def surrogate(
    statistics: TokenStatistics, strength: float = 3.0, nuisance: Nuisance = "intra"
) -> AffineMap:
    """Minimise the paper's quadratic surrogate exactly: ``W = lambda T (2 S + lambda T)^-1``.

    The surrogate is ``E |W (x1 - x2)|^2 + lambda E |W x + b - (x - m)|^2``: consistency of
    corresponding patches plus fidelity to the centred tokens. The optimal bias is ``b = -W m``.
    With ``E (x1 - x2)(x1 - x2)' = 2 S`` it equals ``2 tr(W S W') + lambda tr((W - I) T (W - I)')``,
    whose derivative ``4 W S + 2 lambda (W - I) T`` is zero there. A direction with temporal share s
    (:func:`soft_threshold`) has gain ``lambda / (2 s + lambda)``. ``strength`` is lambda, the
    weight of fidelity; infinity only centres.
    """
    if not strength > 0:
        raise ValueError(f"strength must be positive, got {strength}")
    # lambda / (2 s + lambda), written so that an infinite lambda is its limit
    return _generalised(statistics, lambda s: 1 / (1 + 2 * s / strength), nuisance)


@dataclasses.dataclass(frozen=True)
class Solver:
    """A solver and its settings, a row of :data:`SOLVERS`."""

    name: str  # the value of ``--solver``
    solve: Callable[[TokenStatistics, float, Nuisance], AffineMap]
    formula: str  # one line that a projection's config records
    strength: float = 1.0  # default
    strengths: tuple[float, ...] = (0.1, 1.0, 10.0)  # values worth trying


SOLVERS: Mapping[str, Solver] = {
    row.name: row
    for row in (
        Solver("centre", centre, "centre: c (x - mean)", strengths=(1.0,)),
        Solver(
            "shrink",
            ridge_shrinkage,
            "centre, then shrink by the intra-video covariance: c r (S + r I)^-1 (x - mean)",
        ),
        Solver(
            "whiten",
            whiten,
            "centre, then damp by the intra-video covariance: c (S + r I)^(-1/2) (x - mean)",
        ),
        Solver(
            "whiten-quarter",
            functools.partial(whiten, power=0.25),
            "centre, then damp by the intra-video covariance: c (S + r I)^(-1/4) (x - mean)",
        ),
        Solver(
            "whiten-total",
            functools.partial(whiten, total=True),
            "PCA whitening: c (T + r I)^(-1/2) (x - mean), T the total covariance",
        ),
        Solver(
            "whiten-total-quarter",
            functools.partial(whiten, power=0.25, total=True),
            "half a PCA whitening: c (T + r I)^(-1/4) (x - mean), T the total covariance",
        ),
        Solver(
            "soft-threshold",
            soft_threshold,
            "gains max(0, 1 - tau s), s the share of a direction's variance that is temporal",
            strengths=(0.5, 1.0, 2.0),
        ),
        Solver(
            "surrogate",
            surrogate,
            "the paper's quadratic surrogate: c lambda T (2 S + lambda T)^-1 (x - mean)",
            strength=3.0,
            strengths=(0.3, 1.0, 3.0, 10.0),
        ),
    )
}


def solve_layers(
    statistics: TokenStatistics,
    widths: Sequence[int],
    solve: Callable[[TokenStatistics], AffineMap],
    *,
    out_width: int,
) -> AffineMap:
    """Solve for concatenated layers of ``widths`` channels, each with the same weight.

    Tokens of later layers are larger than those of earlier layers, so each layer is first scaled to
    the same total variance. The solver's features are then rotated to their principal axes, and the
    ``out_width`` axes of most variance are kept, with unit variance per channel on average. The
    returned map applies to the tokens as the encoder returns them.
    """
    if sum(widths) != statistics.width:
        raise ValueError(
            f"expected layers with {statistics.width} channels in total, got {list(widths)}"
        )
    if len(widths) == 1 and out_width >= widths[0]:
        return solve(statistics)
    scale = layer_scale(statistics.covariance.diagonal(), widths)
    balanced = statistics.scaled(scale)
    affine = solve(balanced)
    values, vectors = torch.linalg.eigh(affine.weight @ balanced.covariance @ affine.weight.T)
    axes = vectors.flip(1)[:, :out_width].T
    axes = axes / values.flip(0)[:out_width].clamp_min(0).mean().sqrt()
    return AffineMap(axes @ affine.weight * scale, axes @ affine.bias)


def layer_scale(variance: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the factors ``(C,)`` that give each layer the same total variance.

    ``variance`` is per channel, ``(C,)``; a layer without variance is a StatisticsError.
    """
    factors = []
    for number, part in enumerate(torch.split(variance, list(widths))):
        if not float(part.sum()) > 0:
            raise StatisticsError(f"all tokens of layer {number} of {len(widths)} are equal")
        factors.append(part.sum().rsqrt().expand(len(part)))
    scale = torch.cat(factors)
    return scale / scale.mean()  # a mean factor of 1 about keeps the channels' scale


def _spectral(
    statistics: TokenStatistics,
    gain: Callable[[Tensor, Tensor], Tensor],
    strength: float,
    nuisance: Nuisance,
    *,
    total: bool = False,
) -> AffineMap:
    """Scale the eigenvectors of S or T by ``gain(eigenvalues, strength x mean eigenvalue)``."""
    if not strength > 0:
        raise ValueError(f"strength must be positive, got {strength}")
    if math.isinf(strength):
        return centre(statistics)
    covariance = statistics.covariance if total else nuisance_covariance(statistics, nuisance)
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0)
    if not float(values.mean()) > 0:
        raise StatisticsError("all tokens are equal: the clips have no content")
    return _normalised((vectors * gain(values, strength * values.mean())) @ vectors.T, statistics)


def _generalised(
    statistics: TokenStatistics, gain: Callable[[Tensor], Tensor], nuisance: Nuisance
) -> AffineMap:
    """Scale the generalised eigenvectors ``S v = s T v`` by ``gain(s)``, in token coordinates."""
    # With T = E D E' and D^-1/2 E' S E D^-1/2 = U diag(s) U', this is
    # E D^1/2 U diag(g) U' D^-1/2 E'. Directions without variance stay unchanged.
    noise = nuisance_covariance(statistics, nuisance)
    values, vectors = torch.linalg.eigh(statistics.covariance)
    kept = values > values[-1].clamp_min(0) * len(values) * 1e-12
    values, vectors = values[kept], vectors[:, kept]
    colour, whitening = vectors * values.sqrt(), vectors * values.rsqrt()
    shares, rotation = torch.linalg.eigh(whitening.T @ noise @ whitening)
    eye = torch.eye(statistics.width, dtype=torch.float64)
    gains = gain(shares.clamp_min(0)) - 1
    change = (colour @ rotation) * gains @ (whitening @ rotation).T
    return _normalised(eye + change, statistics)


def _normalised(weight: Tensor, statistics: TokenStatistics) -> AffineMap:
    """Add centring, and scale to unit variance per channel."""
    mean, covariance = statistics.mean, statistics.covariance
    variance = (weight @ covariance @ weight.T).diagonal().mean()
    # The variance of equal tokens is not zero but a rounding error.
    rounding = 1e-12 * float(mean.square().mean())
    if not (float(variance) > 0 and float(covariance.diagonal().mean()) > rounding):
        raise StatisticsError("all tokens are equal: the clips have no content")
    weight = weight / variance.sqrt()
    return AffineMap(weight, -(weight @ mean))
