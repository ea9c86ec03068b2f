"""Closed-form projections: affine maps that minimise an objective one can write down.

With T the total covariance of the tokens, m their mean, and S the covariance of a patch around
its own mean over time (half the mean outer product of the differences of corresponding patches),
a projection should map corresponding patches to equal features (small ``tr W S W'``) without
losing what distinguishes patches. Every solver makes that precise in its own way. All centre the
tokens, and scale the result to unit variance per channel, as a LayerNorm would; cosines do not
depend on the scale.

S can be replaced by a *nuisance* covariance, which adds other things that a feature should not
depend on: see :func:`nuisance_covariance`. A strength out of its range is a :class:`ValueError`;
no tokens or pairs, or tokens that never vary, are a :class:`StatisticsError`.
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

    ``intra`` is S; ``intra+clips`` adds the covariance of the clips' mean tokens, so that what a
    whole clip has in common counts little as well; ``intra+positions`` adds the position leakage.
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

    The affine map of most variance among those that keep all angles, and the limit of every other
    solver at the strength that damps nothing. ``strength`` and ``nuisance`` have no effect.
    """
    del strength, nuisance
    return _finished(torch.eye(statistics.width, dtype=torch.float64), statistics)


def ridge_shrinkage(
    statistics: TokenStatistics, strength: float = 1.0, nuisance: Nuisance = "intra"
) -> AffineMap:
    """Shrink directions by their temporal variance: ``W = lambda (S + lambda I)^-1``.

    Minimises ``tr(W S W') + lambda |W - I|^2``, the temporal variance left plus the (Frobenius)
    distance from leaving tokens as they are: the derivative ``2 W S + 2 lambda (W - I)`` is zero
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

    With ``a = 1/2``, cosines in the new features are those of a space whose Mahalanobis distance
    weighs every direction by how little it should vary: the whitening of S + r I, which is S plus
    white noise of variance r. Directions of temporal variance far below r keep their relative
    scale, those far above are whitened. ``strength`` is r in units of the covariance's mean
    eigenvalue; infinity only centres.

    ``power`` is a; smaller ones go half the way. With ``total``, T is whitened in place of S (PCA
    whitening), which uses nothing temporal: it is a baseline.
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

    In coordinates in which T is white, along the eigenvectors of S there (the generalised
    eigenproblem ``S v = s T v``, the one of discriminant analysis), s is the share of a
    direction's variance that is temporal. Each gain minimises ``(g - 1)^2 / 2 + tau s g`` over
    ``g >= 0``: fidelity against the paper's nuclear norm of the projected variation (Theorem 1).
    The derivative ``g - 1 + tau s`` is zero at ``g = 1 - tau s``; where that is negative, the
    minimum is at 0. So ``g = max(0, 1 - tau s)``. At ``tau = 1`` this is the Wiener filter
    ``(T - S) T^-1 (x - m)``, the best linear guess at a patch's mean over time from one look at it.
    ``strength`` is tau; 0 only centres.
    """
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be finite and not negative, got {strength}")
    return _generalised(statistics, lambda s: (1 - strength * s).clamp_min(0), nuisance)


def surrogate(
    statistics: TokenStatistics, strength: float = 3.0, nuisance: Nuisance = "intra"
) -> AffineMap:
    """Minimise the paper's quadratic surrogate exactly: ``W = lambda T (2 S + lambda T)^-1``.

    The surrogate is ``E |W (x1 - x2)|^2 + lambda E |W x + b - (x - m)|^2``, consistency of
    corresponding patches plus fidelity to the tokens; to the centred ones, since the mean token
    distinguishes nothing. Its best bias is ``b = -W m``. With ``E (x1 - x2)(x1 - x2)' = 2 S`` it is
    then ``2 tr(W S W') + lambda tr((W - I) T (W - I)')``, whose derivative
    ``4 W S + 2 lambda (W - I) T`` is zero there. A direction whose share of temporal variance is
    s (as in :func:`soft_threshold`) has gain ``lambda / (2 s + lambda)``.
    ``strength`` is lambda, the weight of fidelity; infinity only centres.
    """
    if not strength > 0:
        raise ValueError(f"strength must be positive, got {strength}")
    # lambda / (2 s + lambda), written so that an infinite lambda is its limit
    return _generalised(statistics, lambda s: 1 / (1 + 2 * s / strength), nuisance)


@dataclasses.dataclass(frozen=True)
class Solver:
    """A row of :data:`SOLVERS`."""

    name: str  # the value of ``--solver``
    solve: Callable[[TokenStatistics, float, Nuisance], AffineMap]
    formula: str  # what it does, in one line, recorded in a projection's config
    strength: float = 1.0  # the default one
    strengths: tuple[float, ...] = (0.1, 1.0, 10.0)  # those worth trying


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

    Later layers of an encoder have larger tokens than earlier ones, which says nothing about
    their worth: each layer is first scaled to the same total variance. The solver's features are
    then turned to their principal axes, of which the ``out_width`` of most variance are kept, so
    that what follows costs no more than with one layer. What is kept has unit variance per
    channel, on average. The map is one of the tokens as the encoder returns them.
    """
    if sum(widths) != statistics.width:
        raise ValueError(f"layers of {list(widths)} channels are not {statistics.width} in all")
    if len(widths) == 1 and out_width >= widths[0]:
        return solve(statistics)
    scale = layer_scale(statistics.covariance.diagonal(), widths)
    balanced = statistics.scaled(scale)
    found = solve(balanced)
    values, axes = torch.linalg.eigh(found.weight @ balanced.covariance @ found.weight.T)
    kept = axes.flip(1)[:, :out_width].T
    kept = kept / values.flip(0)[:out_width].clamp_min(0).mean().sqrt()
    return AffineMap(kept @ found.weight * scale, kept @ found.bias)


def layer_scale(variance: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the factors ``(C,)`` that give each layer the same total variance.

    ``variance`` is that of each channel, ``(C,)``; a layer without any is a StatisticsError.
    """
    factors = []
    for number, part in enumerate(torch.split(variance, list(widths))):
        if not float(part.sum()) > 0:
            raise StatisticsError(f"all tokens of layer {number} of {len(widths)} are equal")
        factors.append(part.sum().rsqrt().expand(len(part)))
    scale = torch.cat(factors)
    return scale / scale.mean()  # mean factor 1: the channels keep about their own scale


def _spectral(
    statistics: TokenStatistics,
    gain: Callable[[Tensor, Tensor], Tensor],
    strength: float,
    nuisance: Nuisance,
    *,
    total: bool = False,
) -> AffineMap:
    """``gain(eigenvalues, strength x mean eigenvalue)`` along the eigenvectors of S or T."""
    if not strength > 0:
        raise ValueError(f"strength must be positive, got {strength}")
    if math.isinf(strength):
        return centre(statistics)
    covariance = statistics.covariance if total else nuisance_covariance(statistics, nuisance)
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0)
    if not float(values.mean()) > 0:
        raise StatisticsError("all tokens are equal: the clips show nothing")
    return _finished((vectors * gain(values, strength * values.mean())) @ vectors.T, statistics)


def _generalised(
    statistics: TokenStatistics, gain: Callable[[Tensor], Tensor], nuisance: Nuisance
) -> AffineMap:
    """``gain(s)`` along the generalised eigenvectors ``S v = s T v``, in token coordinates.

    With ``T = E D E'`` and ``D^-1/2 E' S E D^-1/2 = U diag(s) U'`` that is ``E D^1/2 U diag(g) U'
    D^-1/2 E'``. Directions in which no token varied, where s would be 0 / 0, are left as they are.
    """
    noise = nuisance_covariance(statistics, nuisance)
    values, vectors = torch.linalg.eigh(statistics.covariance)
    kept = values > values[-1].clamp_min(0) * len(values) * 1e-12
    values, vectors = values[kept], vectors[:, kept]
    out, into = vectors * values.sqrt(), vectors * values.rsqrt()
    shares, turn = torch.linalg.eigh(into.T @ noise @ into)
    eye = torch.eye(statistics.width, dtype=torch.float64)
    changed = (out @ turn) * (gain(shares.clamp_min(0)) - 1) @ (into @ turn).T
    return _finished(eye + changed, statistics)


def _finished(weight: Tensor, statistics: TokenStatistics) -> AffineMap:
    """Centre, and scale to unit variance per channel."""
    mean, covariance = statistics.mean, statistics.covariance
    variance = (weight @ covariance @ weight.T).diagonal().mean()
    # Tokens that are equal up to rounding leave a variance that is nothing but rounding.
    rounding = 1e-12 * float(mean.square().mean())
    if not (float(variance) > 0 and float(covariance.diagonal().mean()) > rounding):
        raise StatisticsError("all tokens are equal: the clips show nothing")
    weight = weight / variance.sqrt()
    return AffineMap(weight, -(weight @ mean))
