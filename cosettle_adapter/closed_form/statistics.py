"""Second-order statistics of patch tokens, collected in one pass in constant memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cosettle_adapter.closed_form.affine import exact
from cosettle_adapter.errors import StatisticsError

_COUNTS = ("tokens", "pairs", "clips", "views")
_VECTORS = ("sum", "clip_sum", "view_sum")
_MATRICES = ("outer", "differences", "clip_outer", "view_outer")


class TokenStatistics:
    """Statistics of patch tokens for closed-form projections.

    They are sums in float64, so that merging the statistics of parts, in any order, equals one pass
    over all. Memory is a few ``(C, C)`` matrices. Reading statistics that were not collected is a
    :class:`StatisticsError`.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._sums: dict[str, Tensor] = {}
        # of the current clip
        self._clip_tokens, self._clip_sum = 0, torch.zeros(width, dtype=torch.float64)

    @property
    def tokens(self) -> int:
        """Number of tokens added."""
        return int(self._get("tokens"))

    @property
    def pairs(self) -> int:
        """Number of corresponding pairs added; for soft pairs, the sum of their weights."""
        return round(float(self._get("pairs")))

    @property
    def clips(self) -> int:
        """Number of complete clips."""
        return int(self._get("clips"))

    def add_tokens(self, tokens: Tensor) -> None:
        """Add tokens ``(N, C)``."""
        tokens = self._checked(tokens)
        self.add_moments(len(tokens), tokens.sum(0), tokens.T @ tokens)

    def add_moments(self, count: int, total: Tensor, outer: Tensor) -> None:
        """Add tokens by their number, sum ``(C,)`` and sum of outer products ``(C, C)``."""
        if total.shape != (self.width,) or outer.shape != (self.width, self.width):
            raise ValueError(
                f"expected sums ({self.width},) and ({self.width}, {self.width}), "
                f"got {tuple(total.shape)} and {tuple(outer.shape)}"
            )
        self._add("tokens", count)
        self._add("sum", total)
        self._add("outer", outer)
        self._clip_tokens += count
        self._clip_sum += total.cpu()

    def end_clip(self) -> None:
        """Count the tokens added since the last call as one clip."""
        if self._clip_tokens:
            mean = self._clip_sum / self._clip_tokens
            self._add("clips", 1)
            self._add("clip_sum", mean)
            self._add("clip_outer", torch.outer(mean, mean))
        self._clip_tokens, self._clip_sum = 0, torch.zeros_like(self._clip_sum)

    def add_pairs(self, here: Tensor, there: Tensor) -> None:
        """Add corresponding tokens ``(M, C)`` of two frames of one video."""
        difference = self._checked(here) - self._checked(there)
        self._add("pairs", len(difference))
        self._add("differences", difference.T @ difference)

    def add_soft_pairs(self, here: Tensor, there: Tensor, weights: Tensor) -> None:
        """Add all pairs of tokens ``(N, C)`` and ``(M, C)`` of two frames of one video.

        ``weights`` ``(N, M)``, at least 0, are the likelihoods that two tokens correspond.
        """
        here, there = self._checked(here), self._checked(there)
        weights = weights.to(here)
        # sum_ij w_ij (x_i - y_j)(x_i - y_j)^T without the N M differences
        cross = here.T @ (weights @ there)
        outer = (here.T * weights.sum(1)) @ here + (there.T * weights.sum(0)) @ there
        self._add("pairs", weights.sum())
        self._add("differences", outer - cross - cross.T)

    def add_views(self, plain: Tensor, perturbed: Tensor) -> None:
        """Add tokens ``(N, C)`` and the same tokens with perturbed positions."""
        difference = self._checked(plain) - self._checked(perturbed)
        self._add("views", len(difference))
        self._add("view_sum", difference.sum(0))
        self._add("view_outer", difference.T @ difference)

    def scaled(self, scale: Tensor) -> TokenStatistics:
        """Return the statistics of tokens whose channels are multiplied by ``scale`` ``(C,)``."""
        scale = scale.to("cpu", torch.float64)
        factors = dict.fromkeys(_VECTORS, scale)
        factors |= dict.fromkeys(_MATRICES, torch.outer(scale, scale))
        scaled = TokenStatistics(self.width)
        scaled._sums = {name: value * factors.get(name, 1.0) for name, value in self._sums.items()}
        return scaled

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all sums as float64 tensors, for ``safetensors``."""
        width = torch.tensor(self.width, dtype=torch.float64)
        return {"width": width} | {name: value.clone() for name, value in self._sums.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TokenStatistics:
        """Restore statistics from :meth:`to_tensors`; other tensors are a StatisticsError."""
        unknown = sorted(tensors.keys() - {"width", *_COUNTS, *_VECTORS, *_MATRICES})
        if "width" not in tensors or unknown:
            raise StatisticsError(
                f"expected the tensors of token statistics, got {', '.join(sorted(tensors))}"
            )
        statistics = cls(int(tensors["width"]))
        for name, value in tensors.items():
            if name == "width":
                continue
            expected = statistics._get(name).shape
            if value.shape != expected:
                raise StatisticsError(
                    f"{name} has shape {tuple(value.shape)}, expected {tuple(expected)} at width "
                    f"{statistics.width}"
                )
            statistics._add(name, value)
        return statistics

    @property
    def mean(self) -> Tensor:
        """Mean token ``(C,)`` float64."""
        self._require("tokens", "tokens")
        return self._get("sum") / self._get("tokens")

    @property
    def covariance(self) -> Tensor:
        """Total covariance ``(C, C)`` float64."""
        mean = self.mean
        return self._get("outer") / self._get("tokens") - torch.outer(mean, mean)

    @property
    def intra_covariance(self) -> Tensor:
        """Covariance ``(C, C)`` of a patch around its own mean over neighbouring frames."""
        self._require("pairs", "corresponding pairs")
        return self._get("differences") / (2 * self._get("pairs"))

    @property
    def clip_covariance(self) -> Tensor:
        """Covariance ``(C, C)`` of the clips' mean tokens, each clip with the same weight."""
        self._require("clips", "whole clips")
        mean = self._get("clip_sum") / self._get("clips")
        return self._get("clip_outer") / self._get("clips") - torch.outer(mean, mean)

    @property
    def leakage_covariance(self) -> Tensor:
        """Covariance ``(C, C)`` of a token around the mean of itself with and without position.

        It excludes a change common to all tokens, which centring removes.
        """
        self._require("views", "tokens with perturbed positions")
        mean = self._get("view_sum") / self._get("views")
        return (self._get("view_outer") / self._get("views") - torch.outer(mean, mean)) / 2

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.shape[1] != self.width:
            raise ValueError(f"expected tokens (N, {self.width}), got {tuple(tokens.shape)}")
        return exact(tokens)

    def _get(self, name: str) -> Tensor:
        if name in self._sums:
            return self._sums[name]
        sides = {**dict.fromkeys(_VECTORS, 1), **dict.fromkeys(_MATRICES, 2)}.get(name, 0)
        return torch.zeros([self.width] * sides, dtype=torch.float64)

    def _add(self, name: str, value: Tensor | int) -> None:
        self._sums[name] = self._get(name) + (value.cpu() if isinstance(value, Tensor) else value)

    def _require(self, name: str, what: str) -> None:
        if not float(self._get(name)) > 0:
            raise StatisticsError(
                f"no {what} were collected: every clip is unreadable, too short or without motion"
            )
