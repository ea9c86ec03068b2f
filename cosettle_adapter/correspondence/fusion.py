"""Averaging patches that look alike: within a frame, and between frames (temporal fusion).

A backbone encodes each frame alone, so the features of an object flicker. Averaging along the
motion removes the flicker. Non-local means (Buades, Coll & Morel, CVPR 2005; for video: "Denoising
image sequences does not require motion estimation", AVSS 2005) does so without estimating motion:
it averages patches that look alike. With x_i(t) the feature of patch i of frame t, the result is::

    y_i(t) = x_i(t) + share / K  sum_k g_ik (m_ik - x_i(t))

over the K neighbouring frames k within the window that no cut separates from t. m_ik is the mean
of the five patches of frame k that are most similar to patch i, weighted by softmax(cosine / 0.1).

A patch that is occluded or outside frame k still has matches, but wrong ones: they rarely match
back and rarely move like the patches around them. The gate lowers their weight::

    g_ik = exp(-d^2 / 2 - s^2 / 8)

where d is the distance in patches between i and the best match in frame t of i's best match in
frame k, and s the distance between i's displacement to its match and the median displacement of
the 3 x 3 patches around i. The whole frame is searched, so no motion is too fast. Two frames are
separated by a cut if few pairs of adjacent patches match back and have adjacent matches.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.correspondence.matching import patch_distances
from cosettle_adapter.errors import GeometryError

FusionMode = Literal["symmetric", "causal"]

# Chosen by label propagation on 25 DAVIS sequences. Shares from 0.5 to 0.75 differ only by noise,
# as do windows of two and three frames; two cost less.
SHARE = 0.5
MATCHES = 5
TEMPERATURE = 0.1
WINDOW = 2
APART = 2.0  # patches, standard deviation of s
# A cut has a share below CUT / (h + w) of adjacent patches that match back and have adjacent
# matches. On ten DAVIS clips, every third frame, successive frames have at least 0.21 on 8 x 14
# patches and 0.08 on 34 x 63, frames of two clips at most 0.15 and 0.03.
CUT = 5.5
CUT_AT_MOST = 0.2

_BAND = 1 << 20  # cosines computed at a time: 4 MB

# Within a frame, chosen in the same way: radii of 2 and 5 differ by at most 0.4 J&F, an unlimited
# radius loses 2.
RADIUS = 3  # patches
_ROWS = 4  # of patches compared at a time


class TemporalFusion:
    """Fuses a stream of feature maps, in frame order, in constant memory.

    The result does not depend on how frames are split over calls. Frames are never fused across a
    scene cut.
    """

    def __init__(self, mode: FusionMode = "symmetric", window: int = WINDOW) -> None:
        """Start a clip; ``window`` is the number of frames on each side.

        ``symmetric`` averages over frames on both sides and returns a frame ``window`` frames
        later; ``causal`` averages over past frames only and returns each frame at once.
        """
        if mode not in get_args(FusionMode):
            raise ValueError(f"temporal fusion must be 'symmetric' or 'causal', got {mode!r}")
        if window < 1:
            raise ValueError(f"window must be at least 1 frame, got {window}")
        self._symmetric, self._window = mode == "symmetric", window
        # the last frames since a cut; in symmetric mode those that wait for later frames
        self._recent: collections.deque[_Frame] = collections.deque()
        self._like = torch.empty(0)

    @torch.no_grad()
    def push(self, features: Tensor, guide: Tensor | None = None) -> Tensor:
        """Add the clip's next frames ``(N, C, h, w)``; return the frames now finished, in order.

        Matches are found in the maps ``guide`` ``(N, G, h, w)``, by default the features. A change
        of shape while frames wait is a GeometryError: call :meth:`flush` before.
        """
        guide = features if guide is None else guide
        _check(features, guide)
        shape = features.shape[1:]
        channels = self._recent[-1].unit.shape[1] if self._recent else guide.shape[1]
        if self._like.shape[1:] != shape or channels != guide.shape[1]:
            if self._symmetric and self._recent:
                raise GeometryError(
                    f"got features of shape {tuple(shape)} with {guide.shape[1]} guide channels "
                    f"while {len(self._recent)} frames of shape {tuple(self._like.shape[1:])} with "
                    f"{channels} wait for later frames; call flush() before a change of shape"
                )
            self._recent.clear()
        self._like = features.new_empty((0, *shape))
        finished: list[Tensor] = []
        for frame, matched in zip(features, guide, strict=True):
            finished += self._add(_Frame.of(frame, matched), (frame.shape[1], frame.shape[2]))
        return self._maps(finished)

    @torch.no_grad()
    def flush(self) -> Tensor:
        """End the clip and return the frames that wait, ``(M, C, h, w)``; a new clip can follow."""
        return self._maps(self._end())

    def _add(self, new: _Frame, grid: tuple[int, int]) -> list[Tensor]:
        finished: list[Tensor] = []
        for gap, old in enumerate(reversed(self._recent), 1):
            forth, back = _match(new.unit, old.unit)
            from_new, from_old = _miss(forth, back, grid), _miss(back, forth, grid)
            if gap == 1 and _is_cut((forth, from_new), (back, from_old), grid=grid):
                finished = self._end()
                break
            new.average(old.patches, forth, _gate(forth, from_new, grid))
            if self._symmetric:
                old.average(new.patches, back, _gate(back, from_old, grid))
        self._recent.append(new)
        if not self._symmetric:
            finished = [new.fused()]
        if len(self._recent) > self._window:
            oldest = self._recent.popleft()
            finished += [oldest.fused()] if self._symmetric else []
        return finished

    def _end(self) -> list[Tensor]:
        finished = [frame.fused() for frame in self._recent] if self._symmetric else []
        self._recent.clear()
        return finished

    def _maps(self, finished: list[Tensor]) -> Tensor:
        maps = self._like.new_empty((len(finished), *self._like.shape[1:]))
        for out, frame in zip(maps, finished, strict=True):
            out.copy_(rearrange(frame, "(h w) c -> c h w", w=maps.shape[-1]))
        return maps


def temporal_fusion(
    features: Tensor,
    guide: Tensor | None = None,
    *,
    mode: FusionMode = "symmetric",
    window: int = WINDOW,
) -> Tensor:
    """Average every patch of a clip ``(T, C, h, w)`` with its matches in neighbouring frames.

    Arguments and errors are those of :class:`TemporalFusion` and its ``push``.
    """
    fusion = TemporalFusion(mode, window)
    return torch.cat([fusion.push(features, guide), fusion.flush()])


def fusion_guide(tokens: Tensor, widths: Sequence[int]) -> Tensor:
    """Return maps to find matches in: the middle layer of tokens ``(T, C, h, w)``, centred."""
    # One layer gives better matches than all layers together. The mean is half of the tokens' power
    # and makes all patches similar.
    guide = torch.split(tokens, list(widths), dim=1)[len(widths) // 2]
    return guide - reduce(guide, "t c h w -> t c 1 1", "mean")


def average_neighbours(features: Tensor, share: float) -> Tensor:
    """Average every patch of ``(B, C, h, w)`` with its most similar neighbours in the frame.

    With x_i the feature of patch i, the result is ``(1 - share) x_i + share m_i``, where m_i is
    the mean of the five patches within three patches of i that are most similar to it (cosine),
    weighted by softmax(cosine / 0.1). The dtype is kept; maps of a single patch are unchanged.
    """
    batch, _, height, width = features.shape
    count = min(MATCHES, height * width - 1)
    if count < 1 or share == 0:
        return features
    patches = rearrange(features.float(), "b c h w -> b (h w) c")
    unit = F.normalize(patches, dim=-1)
    frame = torch.arange(batch, device=features.device) * (height * width)
    means = []
    bands = [(0, height)]  # a graph of any size cannot loop over bands
    if type(height) is int:
        bands = [(top, min(top + _ROWS, height)) for top in range(0, height, _ROWS)]
    for top, bottom in bands:
        low, high = max(0, top - RADIUS), min(height, bottom + RADIUS)
        keys = unit[:, low * width : high * width]
        cosine = einsum(unit[:, top * width : bottom * width], keys, "b q c, b n c -> b q n")
        along, across = patch_distances(
            slice(top, bottom), slice(low, high), width, features.device
        )
        squared = rearrange(along.square() + across.square(), "a s b t -> (a s) (b t)")
        near = (squared > 0) & (squared <= RADIUS**2)
        cosine, index = cosine.masked_fill(~near, -torch.inf).topk(min(count, keys.shape[1]))
        weights = torch.softmax(cosine / TEMPERATURE, dim=-1)
        index = index + low * width + rearrange(frame, "b -> b 1 1")
        means.append(_weighted(rearrange(patches, "b n c -> (b n) c"), index, weights))
    averaged = torch.lerp(patches, torch.cat(means, dim=1), share)
    return rearrange(averaged, "b (h w) c -> b c h w", h=height).to(features.dtype)


def _weighted(patches: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums ``(B, q, C)`` of the patches ``(B n, C)`` at ``index`` ``(B, q, k)``."""
    if torch.compiler.is_exporting():  # ONNX has no embedding_bag
        return einsum(patches[index], weights, "b q k c, b q k -> b q c")
    batch = len(index)
    index, weights = (rearrange(tensor, "b q k -> (b q) k") for tensor in (index, weights))
    sums = F.embedding_bag(index, patches, mode="sum", per_sample_weights=weights)
    return rearrange(sums, "(b q) c -> b q c", b=batch)


class _Matches(NamedTuple):
    """The best matches of every patch in another frame, best first."""

    cosine: Tensor  # (h w, k)
    patch: Tensor  # (h w, k) patch numbers


@dataclasses.dataclass
class _Frame:
    """A frame and the sums over its neighbours."""

    patches: Tensor  # (h w, C) float32
    unit: Tensor  # (h w, G) of unit length
    means: Tensor  # (h w, C), sum over neighbours of gate times mean of the matches
    gates: Tensor  # (h w, 1), sum over neighbours
    neighbours: int = 0

    @classmethod
    def of(cls, features: Tensor, guide: Tensor) -> _Frame:
        patches, guides = (
            rearrange(maps.float(), "c h w -> (h w) c") for maps in (features, guide)
        )
        unit = F.normalize(guides, dim=1)
        # half precision is fast on GPUs and slow on CPUs
        unit = unit.to(guide.dtype) if guide.device.type == "cuda" else unit
        patches = patches.contiguous()
        return cls(patches, unit, torch.zeros_like(patches), torch.zeros_like(patches[:, :1]))

    def average(self, other: Tensor, matches: _Matches, gate: Tensor) -> None:
        gate = rearrange(gate, "q -> q 1")
        weights = torch.softmax(matches.cosine.float() / TEMPERATURE, dim=1) * gate
        self.means += F.embedding_bag(matches.patch, other, mode="sum", per_sample_weights=weights)
        self.gates += gate
        self.neighbours += 1

    def fused(self) -> Tensor:
        share = SHARE / max(self.neighbours, 1)
        return torch.addcmul(self.patches, self.gates, self.patches, value=-share).add_(
            self.means, alpha=share
        )


def _match(here: Tensor, there: Tensor) -> tuple[_Matches, _Matches]:
    """Best matches in both directions, computed from bands of the affinity matrix."""
    count = len(here)
    k = min(MATCHES, count)
    band = max(k, _BAND // count)
    forth, back = [], []
    for start in range(0, count, band):
        block = here[start : start + band] @ there.T
        forth.append(block.topk(k, dim=1))
        cosine, index = block.T.contiguous().topk(min(k, len(block)), dim=1)
        back.append((cosine, index + start))
    cosine, index = (torch.cat(parts, dim=1) for parts in zip(*back, strict=True))
    cosine, chosen = cosine.topk(k, dim=1)
    matches = _Matches(*(torch.cat(parts) for parts in zip(*forth, strict=True)))
    return matches, _Matches(cosine, index.gather(1, chosen))


def _miss(forth: _Matches, back: _Matches, grid: tuple[int, int]) -> Tensor:
    """Distance ``(h w,)`` in patches between every patch and the match of its match."""
    distance: Tensor = _moved(back.patch[forth.patch[:, 0], 0], grid).float().norm(dim=0)
    return distance


def _gate(matches: _Matches, miss: Tensor, grid: tuple[int, int]) -> Tensor:
    """Weight ``(h w,)`` in [0, 1] of every patch's matches: g in the module's docstring."""
    moved = _moved(matches.patch[:, 0], grid).float()
    maps = rearrange(moved, "yx (h w) -> yx 1 h w", h=grid[0])
    around = F.unfold(F.pad(maps, (1, 1, 1, 1), mode="replicate"), 3)
    apart = (moved - around.median(dim=1).values).square().sum(0)
    return torch.exp(-miss.square() / 2 - apart / (2 * APART**2))


def _is_cut(*directions: tuple[_Matches, Tensor], grid: tuple[int, int]) -> bool:
    """Whether few adjacent patches match back, to within one patch, and have adjacent matches."""
    consistent: list[Tensor] = []
    for matches, miss in directions:
        moved = rearrange(_moved(matches.patch[:, 0], grid), "yx (h w) -> yx h w", h=grid[0])
        returned = rearrange(miss <= 1, "(h w) -> h w", h=grid[0])
        for axis, size in enumerate(grid):
            both = returned.narrow(axis, 0, size - 1) & returned.narrow(axis, 1, size - 1)
            adjacent = moved.diff(dim=axis + 1).abs().amax(0) <= 1
            consistent.append(rearrange(both & adjacent, "h w -> (h w)"))
    return float(torch.cat(consistent).float().mean()) < min(CUT_AT_MOST, CUT / sum(grid))


def _moved(index: Tensor, grid: tuple[int, int]) -> Tensor:
    """Displacement ``(2, h w)`` in rows and columns from every patch to ``index``."""
    width = grid[1]
    start = torch.arange(len(index), device=index.device)
    return torch.stack([index // width - start // width, index % width - start % width])


def _check(features: Tensor, guide: Tensor) -> None:
    for name, maps in (("features", features), ("guide", guide)):
        if maps.ndim != 4 or not maps.is_floating_point() or 0 in maps.shape[1:]:
            raise GeometryError(
                f"got {name} of shape {tuple(maps.shape)} and {maps.dtype}, expected floating "
                "point (T, C, h, w) of one clip, in frame order"
            )
    if guide.shape[:1] + guide.shape[2:] != features.shape[:1] + features.shape[2:]:
        raise GeometryError(
            f"got a guide of shape {tuple(guide.shape)} for features of shape "
            f"{tuple(features.shape)}, expected the same frames and grid"
        )
