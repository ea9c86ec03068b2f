"""Second-order statistics of patch tokens, gathered in one pass at constant memory."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.correspondence import mutual_nearest
from cosettle_adapter.errors import CosettleError


class StatisticsError(CosettleError, ValueError):
    """Too little data to say anything."""


class TokenStatistics:
    """Mean, total covariance and intra-video covariance of patch tokens.

    Sums are kept in float64 and are plain sums, so merging the statistics of parts equals one
    pass over the whole.

    Attributes:
        tokens: number of tokens seen.
        pairs: number of corresponding pairs seen.
    """

    def __init__(self, width: int) -> None:
        self.tokens = 0
        self.pairs = 0
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._outer = torch.zeros(width, width, dtype=torch.float64)
        self._differences = torch.zeros(width, width, dtype=torch.float64)

    def add_tokens(self, tokens: Tensor) -> None:
        """Add tokens ``(N, C)``."""
        tokens = tokens.to("cpu", torch.float64)
        self.tokens += len(tokens)
        self._sum += tokens.sum(0)
        self._outer += tokens.T @ tokens

    def add_pairs(self, here: Tensor, there: Tensor) -> None:
        """Add corresponding tokens ``(M, C)`` of two frames of one video."""
        difference = (here - there).to("cpu", torch.float64)
        self.pairs += len(difference)
        self._differences += difference.T @ difference

    def merge(self, other: TokenStatistics) -> None:
        """Add what another pass saw."""
        self.tokens += other.tokens
        self.pairs += other.pairs
        self._sum += other._sum
        self._outer += other._outer
        self._differences += other._differences

    @property
    def mean(self) -> Tensor:
        """Mean token ``(C,)`` float64."""
        self._require(self.tokens, "tokens")
        return self._sum / self.tokens

    @property
    def covariance(self) -> Tensor:
        """Total covariance ``(C, C)`` float64."""
        mean = self.mean
        return self._outer / self.tokens - torch.outer(mean, mean)

    @property
    def intra_covariance(self) -> Tensor:
        """Covariance ``(C, C)`` of a patch around its own mean over neighbouring frames.

        Half the mean outer product of differences: for two draws of one distribution that is its
        covariance.
        """
        self._require(self.pairs, "corresponding pairs")
        return self._differences / (2 * self.pairs)

    @staticmethod
    def _require(count: int, what: str) -> None:
        if not count:
            raise StatisticsError(
                f"no {what} were gathered: every clip was unreadable, too short, or without motion"
            )


def corresponding_patches(here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Find patches of two frames of one video that show the same thing.

    Mutual nearest neighbours by cosine once the two frames' mean is taken off: the common
    component hides the differences.

    Args:
        here: ``(C, h, w)`` floats.
        there: ``(C, h, w)`` floats of another frame.

    Returns:
        Their patches, not centred, ``(M, C)`` each; none where the frames do not differ at all,
        because a still frame says nothing about motion.
    """
    maps = torch.stack([here, there])
    flat = rearrange(maps, "two c h w -> two (h w) c")
    if torch.equal(here, there):
        return flat[0, :0], flat[1, :0]
    centred = maps - maps.mean((0, 2, 3), keepdim=True)
    pairs, _ = mutual_nearest(centred[0], centred[1])
    return flat[0, pairs[:, 0]], flat[1, pairs[:, 1]]
