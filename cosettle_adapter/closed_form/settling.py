"""Settling the features of a clip with the clip's own statistics, at test time."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.closed_form.affine import AffineMap, apply_to_maps, exact
from cosettle_adapter.correspondence import corresponding_patches
from cosettle_adapter.errors import StatisticsError

RIDGE = 1.0
PRIOR_PAIRS = 2000.0
_MAX_WAIT = 8  # frames between two solutions


class Settler:
    """Running statistics of one clip's features, and the map that settles them.

    The features may come from any projection, or from a backbone. The map subtracts the clip's mean
    token and damps the directions in which corresponding patches of adjacent frames differ::

        y = k (P + r s I)^(-1/2) (x - mean),   P = (n S + n0 s I) / (n + n0)

    with S the clip's intra-video covariance from n pairs, s its mean eigenvalue, and k such that
    P = s I gives k (...) = I. The prior is that all directions vary equally over time: features of
    few pairs, or of still frames, are little more than centred.

    Features must be added in frame order. Memory is one frame and a ``(C, C)`` matrix.
    """

    def __init__(
        self,
        width: int,
        *,
        ridge: float = RIDGE,
        prior_pairs: float = PRIOR_PAIRS,
        forgetting: float = 1.0,
    ) -> None:
        """Start a clip with features of ``width`` channels.

        ``ridge`` is r in units of S's mean eigenvalue; infinity only centres. ``prior_pairs`` is
        n0, the number of pairs at which the clip counts as much as the prior. Each new frame
        multiplies the earlier statistics by ``forgetting``; 0.99 remembers about 100 frames.
        """
        if not (ridge > 0 and 0 <= prior_pairs < math.inf and 0 < forgetting <= 1):
            raise ValueError(
                f"got ridge={ridge}, prior_pairs={prior_pairs} and forgetting={forgetting}, "
                "expected a positive ridge, at least 0 pairs, and forgetting in (0, 1]"
            )
        self.frames = 0  # frames added
        self.pairs = 0.0  # corresponding patches added, weighted by forgetting
        self._width = width
        self._ridge, self._prior, self._forgetting = ridge, prior_pairs, forgetting
        self._patches = 0.0
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._differences = torch.zeros(width, width, dtype=torch.float64)
        self._previous: Tensor | None = None
        self._weight: Tensor | None = None
        self._solved_at = 0

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add the clip's next frames, ``(N, C, h, w)`` floats."""
        if features.ndim != 4 or features.shape[1] != self._width:
            raise ValueError(
                f"expected features (N, {self._width}, h, w), got {tuple(features.shape)}"
            )
        for frame in features.float():
            self._add(frame)

    @torch.no_grad()
    def settle(self, features: Tensor) -> Tensor:
        """Add the clip's next frames ``(N, C, h, w)`` and settle each with the frames up to it.

        The mean is updated at every frame, the damping whenever the clip has grown by a quarter and
        at least every eight frames. The result has the dtype of ``features`` and does not depend on
        how frames are split over calls.
        """
        settled = []
        for frame in features:
            self.update(rearrange(frame, "c h w -> 1 c h w"))
            wait = min(max(self.frames // 4, 1), _MAX_WAIT)
            if self._weight is None or self.frames - self._solved_at >= wait:
                self._weight, self._solved_at = self._damping(), self.frames
            damping = AffineMap(self._weight, -(self._weight @ (self._sum / self._patches)))
            settled.append(apply_to_maps(damping, rearrange(frame, "c h w -> 1 c h w")))
        return torch.cat(settled) if settled else features

    @torch.no_grad()
    def solution(self) -> AffineMap:
        """Return the map for all frames added, on their device; the identity if there are none."""
        if not self._patches:
            return AffineMap.identity(self._width)
        weight = self._damping()
        return AffineMap(weight, -(weight @ (self._sum / self._patches)))

    def _damping(self) -> Tensor:
        eye = torch.eye(self._width, dtype=torch.float64, device=self._sum.device)
        total = self._differences.diagonal().sum()
        if math.isinf(self._ridge) or not float(total) > 0:
            return eye
        # Covariances in units of s, so that the trace of P is the width.
        intra = self._differences * (self._width / total)
        share = self.pairs / (self.pairs + self._prior)
        values, vectors = torch.linalg.eigh(share * intra + (1 - share + self._ridge) * eye)
        gain = ((1 + self._ridge) / values.clamp_min(self._ridge)).sqrt()
        weight: Tensor = (vectors * gain) @ vectors.T
        return weight

    def _add(self, frame: Tensor) -> None:
        if not self.frames:
            device = exact(frame[:0]).device
            self._sum, self._differences = self._sum.to(device), self._differences.to(device)
        patches = rearrange(frame, "c h w -> (h w) c")
        total = patches.sum(0, dtype=torch.float32).to(self._sum)
        if not bool(torch.isfinite(total).all()):
            raise StatisticsError(
                f"features of frame {self.frames} are not finite; compute them in float32 or "
                "bfloat16"
            )
        self._sum = self._forgetting * self._sum + total
        self._patches = self._forgetting * self._patches + len(patches)
        self.pairs *= self._forgetting
        self._differences *= self._forgetting
        if self._previous is not None and self._previous.shape == frame.shape:
            here, there = corresponding_patches(self._previous, frame)
            difference = here - there
            self.pairs += len(difference)
            self._differences += (difference.T @ difference).to(self._differences)
        self._previous = frame
        self.frames += 1


def settle_clip(
    features: Tensor, *, ridge: float = RIDGE, prior_pairs: float = PRIOR_PAIRS
) -> Tensor:
    """Settle the features ``(T, C, h, w)`` of a clip, in frame order, with all of its frames.

    The dtype is kept; ``ridge`` and ``prior_pairs`` are those of :class:`Settler`.
    """
    settler = Settler(features.shape[1], ridge=ridge, prior_pairs=prior_pairs)
    settler.update(features)
    return apply_to_maps(settler.solution(), features)
