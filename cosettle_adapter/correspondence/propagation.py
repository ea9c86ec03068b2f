"""Label propagation: carry a segmentation of the first frame through a clip by its features.

Memory stays small: a band of grid lines is compared with a few context frames at a time, only with
the lines within the radius, and only the top-k affinities are kept.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor

from cosettle_adapter.correspondence.matching import each_map, patch_distances, unit_map
from cosettle_adapter.errors import FrameError, GeometryError

Protocol = Literal["best", "crw", "dino"]

_CHUNK, _CHUNK_ON_CPU = 8192, 256  # patches of a frame compared at a time
_SMALL = 1024  # patches; smaller frames are not split on CPUs
_CONTEXT_CHUNK = 8192  # approximate number of context patches compared at a time


@dataclasses.dataclass(frozen=True)
class PropagationProtocol:
    """Settings of label propagation.

    Results are comparable only for the same protocol, frame size and frame rate.
    """

    context: int  # preceding frames to search besides the first
    radius: float  # search radius around a patch's own position; ``math.inf`` for the whole frame
    topk: int  # number of most similar patches, over all context frames, to average the labels of
    temperature: float  # the average's weights are the softmax of cosine / temperature
    # ``disk``: Euclidean distance below the radius; ``square``: row and column distance up to and
    # including it
    neighbourhood: Literal["disk", "square"]
    restrict_first: bool  # whether the neighbourhood applies to the first frame as well
    # whether copies of the first frame, restricted to the neighbourhood, replace missing preceding
    # frames
    repeat_first: bool

    def __post_init__(self) -> None:
        for name, allowed, valid in (
            ("context", "0 or more preceding frames", self.context >= 0),
            ("radius", "above 0 patches, math.inf for the whole frame", self.radius > 0),
            ("topk", "at least 1 patch", self.topk >= 1),
            ("temperature", "above 0", self.temperature > 0),
        ):
            if not valid:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)}")


PROTOCOLS: dict[str, PropagationProtocol] = {
    # That of SiamMAE, CropMAE and T-CoRe, which use the loader of "crw".
    "best": PropagationProtocol(
        context=20, radius=20, topk=7, temperature=0.7, neighbourhood="disk",
        restrict_first=False, repeat_first=True,
    ),
    # videowalk's test.py as its README calls it. Its loader puts `context` copies of frame 0
    # before the clip: they are in the sliding window, restricted to the radius, and count once
    # each. So all ten votes for a patch of frame 1 come from the single best patch nearby.
    "crw": PropagationProtocol(
        context=20, radius=12, topk=10, temperature=0.05, neighbourhood="disk",
        restrict_first=False, repeat_first=True,
    ),
    # DINO's eval_video_segmentation.py: the queue starts empty and never holds frame 0.
    "dino": PropagationProtocol(
        context=7, radius=12, topk=5, temperature=0.1, neighbourhood="square",
        restrict_first=True, repeat_first=False,
    ),
}  # fmt: skip


class LabelPropagator:
    """Propagates labels frame by frame and stores only the context frames."""

    def __init__(
        self,
        first_labels: Tensor,
        *,
        protocol: Protocol | PropagationProtocol = "best",
        chunk: int | None = None,
        **changes: float | None,
    ) -> None:
        """Start a clip.

        Args:
            first_labels: ``(K, h, w)`` floating point, soft labels of the first frame.
            protocol: settings, or their name in :data:`PROTOCOLS`.
            chunk: patches of a frame compared at a time; bounds memory only.
            **changes: fields of :class:`PropagationProtocol` that override the protocol's.
        """
        if isinstance(protocol, str):
            if protocol not in PROTOCOLS:
                known = ", ".join(map(repr, PROTOCOLS))
                raise ValueError(f"got protocol {protocol!r}, expected one of {known}")
            protocol = PROTOCOLS[protocol]
        overrides: Any = {name: value for name, value in changes.items() if value is not None}
        self.protocol = dataclasses.replace(protocol, **overrides)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1 patch, got {chunk}")
        self.chunk = chunk
        if (
            first_labels.ndim != 3
            or 0 in first_labels.shape
            or not first_labels.is_floating_point()
        ):
            raise GeometryError(
                f"got first_labels of shape {tuple(first_labels.shape)} and {first_labels.dtype}, "
                "expected floating point (K, h, w): one-hot encode the label ids over K, resize "
                "them to the grid of the features and call .float()"
            )
        self._first_labels = first_labels.clone()
        # Patches are (long, short, C) of unit length, the grid's longer side first: bands split
        # that side, along which the radius excludes the most. Labels are (long short, K).
        self._first: Tensor | None = None
        self._recent: collections.deque[tuple[Tensor, Tensor]] = collections.deque(
            maxlen=self.protocol.context
        )

    @torch.no_grad()
    def step(self, features: Tensor) -> Tensor:
        """Return the soft labels ``(K, h, w)`` of the next frame; of the first, ``first_labels``.

        ``features`` are ``(C, h, w)`` or ``(1, C, h, w)`` on the grid of the labels.
        """
        unit = unit_map(features)
        grid, expected = tuple(unit.shape[1:]), tuple(self._first_labels.shape[1:])
        if grid != expected:
            raise GeometryError(
                f"got features on a grid of {grid}, expected the labels' {expected}: resize "
                "first_labels to the feature grid (bilinear, from the full-size one-hot masks)"
            )
        wide = grid[1] > grid[0]
        patches = rearrange(unit, "c h w -> w h c" if wide else "c h w -> h w c").contiguous()
        if self._first is None:
            self._first = patches
            self._first_labels = self._first_labels.to(patches.device)
            return self._first_labels.clone()
        if patches.shape != self._first.shape:
            raise GeometryError(
                f"got features of {patches.shape[-1]} channels after a first frame of "
                f"{self._first.shape[-1]}; start a new LabelPropagator for other features"
            )
        flat = "(w h) k" if wide else "(h w) k"
        first_labels = rearrange(self._first_labels, f"k h w -> {flat}")
        labels = self._propagate(patches, self._first, first_labels)
        self._recent.append((patches, labels))
        return rearrange(labels, f"{flat} -> k h w", h=grid[0]).clone()

    def _propagate(self, patches: Tensor, first: Tensor, first_labels: Tensor) -> Tensor:
        """Labels ``(long short, K)`` of ``patches``, computed a band of lines at a time."""
        lines, short, _ = patches.shape
        height = max(1, self._chunk(patches) // short)
        labels = torch.cat([first_labels, *(labels for _, labels in self._recent)])
        bands = []
        for start in range(0, lines, height):
            band = range(start, min(start + height, lines))
            cosine, index = self._nearest(patches, first, band)
            weights = torch.softmax(cosine / self.protocol.temperature, dim=1).to(labels.dtype)
            bands.append(einsum(weights, labels[index], "q n, q n k -> q k"))
        return torch.cat(bands)

    def _nearest(self, patches: Tensor, first: Tensor, band: range) -> tuple[Tensor, Tensor]:
        """Top-k of a band: cosines and indices into first and recent patches, ``(q, k)``."""
        protocol = self.protocol
        lines, short, _ = patches.shape
        queries = rearrange(patches[band.start : band.stop], "l s c -> (l s) c")
        reach = lines if math.isinf(protocol.radius) else math.floor(protocol.radius)
        low, high = max(0, band.start - reach), min(lines, band.stop + reach)
        mask = _locality_mask(protocol, band, range(low, high), short, queries)
        candidates: list[tuple[Tensor, Tensor]] = []

        def add(blocks: Tensor, first_patch: int, copies: int = 1) -> None:
            cosine, index = _topk_of_lines(blocks, short, protocol.topk)
            n = blocks.shape[2]
            index = first_patch + index // n * (lines * short) + index % n
            copies = min(copies, protocol.topk)
            cosine, index = (
                repeat(values, "q n -> q (copies n)", copies=copies) for values in (cosine, index)
            )
            candidates.append((cosine, index))

        # The first frame, whole or within the radius; then a copy per missing preceding frame.
        missing = protocol.context - len(self._recent) if protocol.repeat_first else 0
        if protocol.restrict_first:
            near = torch.addmm(mask, queries, _columns(first[low:high]))
            add(rearrange(near, "q n -> 1 q n"), low * short)
        else:
            block = queries @ _columns(first)
            add(rearrange(block, "q n -> 1 q n"), 0)
            near = block[:, low * short : high * short]
            near = near + mask if missing else near
        if missing:
            add(rearrange(near, "q n -> 1 q n"), low * short, missing)
        # The preceding frames, a few at a time.
        together = max(1, _CONTEXT_CHUNK // mask.shape[1])
        for begin in range(0, len(self._recent), together):
            frames = list(itertools.islice(self._recent, begin, begin + together))
            blocks = mask.new_empty(len(frames), *mask.shape)
            for block, (keys, _) in zip(blocks, frames, strict=True):
                torch.addmm(mask, queries, _columns(keys[low:high]), out=block)
            add(blocks, ((1 + begin) * lines + low) * short)
        cosine, index = (torch.cat(parts, dim=1) for parts in zip(*candidates, strict=True))
        cosine, chosen = cosine.topk(min(protocol.topk, cosine.shape[1]), dim=1)
        return cosine, index.gather(1, chosen)

    def _chunk(self, patches: Tensor) -> int:
        if self.chunk is not None:
            return self.chunk
        count = patches.shape[0] * patches.shape[1]
        return _CHUNK_ON_CPU if patches.device.type == "cpu" and count > _SMALL else _CHUNK


def propagate_labels(
    features: Tensor | Iterable[Tensor], first_labels: Tensor, **options: Any
) -> Tensor:
    """Carry soft labels of the first frame through a clip.

    Every patch takes the labels of its most similar patches in the first frame and in the frames
    just before it, weighted by similarity; the labels stay soft. If ``features`` is an iterable,
    only the context frames are held in memory.

    Args:
        features: ``(T, C, h, w)``, or an iterable of maps ``(C, h, w)`` or ``(1, C, h, w)``; any
            floating dtype, not necessarily normalised.
        first_labels: ``(K, h, w)`` floating point, soft labels of the first frame.
        **options: those of :class:`LabelPropagator`.

    Returns:
        Labels ``(T, K, h, w)``; those of the first frame are ``first_labels``.
    """
    propagator = LabelPropagator(first_labels, **options)
    labels = [propagator.step(frame) for frame in each_map(features)]
    if not labels:
        raise FrameError("got no feature maps to propagate labels through; expected at least one")
    return torch.stack(labels)


def _locality_mask(
    protocol: PropagationProtocol, queries: range, keys: range, short: int, like: Tensor
) -> Tensor:
    """Mask ``(queries * short, keys * short)``: 0 within the neighbourhood and -inf elsewhere."""
    along, across = patch_distances(queries, keys, short, like.device)
    if protocol.neighbourhood == "disk":
        near = along.square() + across.square() < protocol.radius**2
    else:
        near = torch.maximum(along, across) <= protocol.radius
    mask = like.new_zeros(near.shape).masked_fill_(~near, -torch.inf)
    return rearrange(mask, "a s b t -> (a s) (b t)")


def _topk_of_lines(blocks: Tensor, short: int, k: int) -> tuple[Tensor, Tensor]:
    """Top-k values and indices ``(q, k)`` over the ``f n`` patches of blocks ``(f, q, n)``."""
    # The k best patches lie in the k lines with the highest maxima, and maxima are much cheaper
    # than a sort.
    frames, _, n = blocks.shape
    if frames * n // short <= 2 * k:
        values, index = rearrange(blocks, "f q n -> q (f n)").topk(min(k, frames * n), dim=1)
        return values, index
    lines = rearrange(blocks, "f q (l s) -> f q l s", s=short)
    maxima = rearrange(reduce(lines, "f q l s -> f q l", "max"), "f q l -> q (f l)")
    best = maxima.topk(k, dim=1).indices  # of the f l lines
    query = rearrange(torch.arange(len(best), device=best.device), "q -> q 1")
    inside = lines[best // lines.shape[2], query, best % lines.shape[2]]
    values, chosen = rearrange(inside, "q k s -> q (k s)").topk(k, dim=1)
    return values, best.gather(1, chosen // short) * short + chosen % short


def _columns(patches: Tensor) -> Tensor:
    return rearrange(patches, "l s c -> c (l s)")
