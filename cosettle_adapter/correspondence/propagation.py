"""Label propagation: carry a segmentation of the first frame through a clip by its features.

The two protocols in the literature differ in more than numbers, so each is a row of data. A
figure is only comparable with others of the same protocol, frame size and frame rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor

from cosettle_adapter.correspondence.maps import each_map, unit_map
from cosettle_adapter.errors import FrameError, GeometryError

Protocol = Literal["crw", "dino"]


@dataclasses.dataclass(frozen=True)
class PropagationProtocol:
    """How labels reach a frame from the frames before it.

    Attributes:
        context: preceding frames that are looked at besides the first.
        radius: how far from its own place a cell may look, in cells; ``math.inf`` for anywhere.
        topk: most similar cells, over all context frames together, whose labels are averaged.
        temperature: the average's weights are the softmax of cosine / temperature.
        neighbourhood: ``disk`` is Euclidean distance strictly below the radius, ``square`` is
            row and column distance up to and including it.
        restrict_first: apply the neighbourhood to the first frame as well.
        repeat_first: before ``context`` preceding frames exist, copies of the first frame (under
            the neighbourhood) stand in for the missing ones and compete for the top-k.
    """

    context: int
    radius: float
    topk: int
    temperature: float
    neighbourhood: Literal["disk", "square"]
    restrict_first: bool
    repeat_first: bool

    def __post_init__(self) -> None:
        if self.context < 0:
            raise ValueError(f"context must be 0 or more preceding frames, got {self.context}")
        if self.topk < 1:
            raise ValueError(f"topk must be at least 1 cell, got {self.topk}")
        if not self.radius > 0:
            raise ValueError(
                f"radius must be above 0 cells, got {self.radius}; use math.inf to look anywhere"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


PROTOCOLS: dict[str, PropagationProtocol] = {
    # videowalk's test.py as SiamMAE and CropMAE use it. Its loader puts `context` copies of frame
    # 0 before the clip: they lie in the sliding window, hence under the radius, and count once
    # each. So frame 1 takes all seven votes from the single best cell near by: a plain copy.
    "crw": PropagationProtocol(
        context=20,
        radius=20,
        topk=7,
        temperature=0.7,
        neighbourhood="disk",
        restrict_first=False,
        repeat_first=True,
    ),
    # DINO's eval_video_segmentation.py: the queue starts empty and never holds frame 0.
    "dino": PropagationProtocol(
        context=7,
        radius=12,
        topk=5,
        temperature=0.1,
        neighbourhood="square",
        restrict_first=True,
        repeat_first=False,
    ),
}


class _Frame(NamedTuple):
    cells: Tensor  # (long, short, C), unit length; the grid's longer side first
    labels: Tensor  # (long short, K)


class _Source(NamedTuple):
    frame: _Frame
    restricted: bool
    copies: int


class LabelPropagator:
    """Propagates labels frame by frame, keeping the features of the context alone.

    Example:
        >>> propagator = LabelPropagator(torch.rand(3, 20, 35))
        >>> for features in torch.randn(4, 384, 20, 35):
        ...     labels = propagator.step(features)  # (3, 20, 35)
    """

    def __init__(
        self,
        first_labels: Tensor,
        *,
        context: int | None = None,
        radius: float | None = None,
        topk: int | None = None,
        temperature: float | None = None,
        protocol: Protocol = "crw",
        chunk: int | None = None,
    ) -> None:
        """Start a clip.

        Args:
            first_labels: ``(K, h, w)`` floating point, soft labels of the first frame at the
                grid of the features.
            context: preceding frames, in place of the protocol's.
            radius: in cells, in place of the protocol's; ``math.inf`` for no restriction.
            topk: number of cells averaged, in place of the protocol's.
            temperature: of the softmax, in place of the protocol's.
            protocol: ``crw`` (videowalk, SiamMAE, CropMAE, Co-Settle) or ``dino``.
            chunk: cells of a frame compared at a time; bounds memory and does not change the
                result. By default 256 on a CPU and 8192 elsewhere.

        Raises:
            GeometryError: labels of another shape or dtype.
            ValueError: an unknown protocol, or an option out of range.
        """
        if protocol not in PROTOCOLS:
            known = " or ".join(repr(name) for name in PROTOCOLS)
            raise ValueError(f"got protocol {protocol!r}, expected {known}")
        given = {"context": context, "radius": radius, "topk": topk, "temperature": temperature}
        changes = {name: value for name, value in given.items() if value is not None}
        self.protocol = dataclasses.replace(PROTOCOLS[protocol], **changes)  # type: ignore[arg-type]
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1 cell, got {chunk}")
        self.chunk = chunk
        if first_labels.ndim != 3 or first_labels.numel() == 0:
            raise GeometryError(
                f"got first_labels of shape {tuple(first_labels.shape)}, expected (K, h, w): one "
                "map for each of K labels, at the grid of the features"
            )
        if not first_labels.is_floating_point():
            raise GeometryError(
                f"got first_labels of dtype {first_labels.dtype}, expected floating point: "
                "one-hot the label ids over K, bring them to the grid and call .float()"
            )
        self._first_labels = first_labels
        self._first: _Frame | None = None
        self._recent: deque[_Frame] = deque(maxlen=self.protocol.context)
        self._steps = 0

    @torch.no_grad()
    def step(self, features: Tensor) -> Tensor:
        """Return the soft labels of the next frame.

        Args:
            features: ``(C, h, w)`` or ``(1, C, h, w)``, any floating dtype; need not be
                normalised.

        Returns:
            ``(K, h, w)`` on the features' device; the first call returns the first labels.

        Raises:
            GeometryError: features of another grid than the labels, or of other channels than
                the frames before.
        """
        unit = unit_map(features)
        grid = tuple(unit.shape[1:])
        if grid != tuple(self._first_labels.shape[1:]):
            raise GeometryError(
                f"got features on a grid of {grid}, expected the labels' "
                f"{tuple(self._first_labels.shape[1:])}: bring first_labels to the feature grid "
                "(bilinear, from the full-size one-hot masks)"
            )
        cells = rearrange(unit, "c h w -> w h c" if _wide(grid) else "c h w -> h w c").contiguous()
        if self._first is None:
            labels = self._first_labels.to(cells.device)
            pattern = "k h w -> (w h) k" if _wide(grid) else "k h w -> (h w) k"
            self._first = _Frame(cells, rearrange(labels, pattern).contiguous())
        else:
            if cells.shape != self._first.cells.shape:
                raise GeometryError(
                    f"got features of {cells.shape[-1]} channels after a first frame of "
                    f"{self._first.cells.shape[-1]}; start a new LabelPropagator for other features"
                )
            frame = _Frame(cells, self._propagate(cells, list(self._sources(self._first))))
            self._recent.append(frame)
            pattern = "(w h) k -> k h w" if _wide(grid) else "(h w) k -> k h w"
            labels = rearrange(frame.labels, pattern, h=grid[0])
        self._steps += 1
        return labels

    def _sources(self, first: _Frame) -> Iterator[_Source]:
        yield _Source(first, restricted=self.protocol.restrict_first, copies=1)
        missing = self.protocol.context - len(self._recent)
        if self.protocol.repeat_first and missing > 0:
            yield _Source(first, restricted=True, copies=missing)
        for frame in self._recent:
            yield _Source(frame, restricted=True, copies=1)

    def _propagate(self, cells: Tensor, sources: list[_Source]) -> Tensor:
        """Labels ``(long short, K)`` of ``cells``, a band of lines at a time."""
        lines, short, _ = cells.shape
        chunk = self.chunk or (256 if cells.device.type == "cpu" else 8192)
        height = max(1, chunk // short)
        labels = torch.cat([source.frame.labels for source in sources])
        bands = []
        for start in range(0, lines, height):
            stop = min(start + height, lines)
            cosine, index = self._nearest(cells, start, stop, sources)
            weights = torch.softmax(cosine / self.protocol.temperature, dim=1).to(labels.dtype)
            bands.append(einsum(weights, labels[index], "q n, q n k -> q k"))
        return torch.cat(bands)

    def _nearest(
        self, cells: Tensor, start: int, stop: int, sources: list[_Source]
    ) -> tuple[Tensor, Tensor]:
        """Top-k of a band of lines: cosines and indices into the sources' cells, ``(q, k)``."""
        lines, short, _ = cells.shape
        queries = rearrange(cells[start:stop], "l s c -> (l s) c")
        reach = lines if math.isinf(self.protocol.radius) else math.floor(self.protocol.radius)
        low, high = max(0, start - reach), min(lines, stop + reach)
        mask = self._mask(range(start, stop), range(low, high), short, queries)
        found: list[Tensor] = []
        where: list[Tensor] = []
        for position, (frame, restricted, copies) in enumerate(sources):
            if restricted:
                keys = rearrange(frame.cells[low:high], "l s c -> c (l s)")
                block = torch.addmm(mask, queries, keys)
            else:
                block = queries @ rearrange(frame.cells, "l s c -> c (l s)")
            cosine, index = _topk(block, short, self.protocol.topk)
            index = index + (position * lines + (low if restricted else 0)) * short
            copies = min(copies, self.protocol.topk)
            found.append(repeat(cosine, "q n -> q (copies n)", copies=copies))
            where.append(repeat(index, "q n -> q (copies n)", copies=copies))
        candidates = torch.cat(found, dim=1)
        cosine, chosen = candidates.topk(min(self.protocol.topk, candidates.shape[1]), dim=1)
        return cosine, torch.cat(where, dim=1).gather(1, chosen)

    def _mask(self, queries: range, keys: range, short: int, like: Tensor) -> Tensor:
        """0 where a query may look and -inf elsewhere, ``(lines short, lines short)``."""
        along = _distances(queries, keys, like.device)
        across = _distances(range(short), range(short), like.device)
        along, across = rearrange(along, "a b -> a 1 b 1"), rearrange(across, "s t -> 1 s 1 t")
        if self.protocol.neighbourhood == "disk":
            near = along.square() + across.square() < self.protocol.radius**2
        else:
            near = torch.maximum(along, across) <= self.protocol.radius
        mask = like.new_zeros(near.shape).masked_fill_(~near, -torch.inf)
        return rearrange(mask, "a s b t -> (a s) (b t)")


def propagate_labels(
    features: Tensor | Iterable[Tensor],
    first_labels: Tensor,
    *,
    context: int | None = None,
    radius: float | None = None,
    topk: int | None = None,
    temperature: float | None = None,
    protocol: Protocol = "crw",
    chunk: int | None = None,
) -> Tensor:
    """Carry soft labels of the first frame through a clip.

    Every cell takes the labels of its most similar cells in the first frame and in the frames
    just before it, weighted by similarity; labels stay soft and are carried on as they are.
    Memory grows with the context, not with the clip, when ``features`` is an iterable.

    Args:
        features: ``(T, C, h, w)``, or an iterable of maps ``(C, h, w)`` or ``(1, C, h, w)``; any
            floating dtype, need not be normalised.
        first_labels: ``(K, h, w)`` floating point, soft labels of the first frame.
        context: preceding frames, in place of the protocol's.
        radius: in cells, in place of the protocol's; ``math.inf`` for no restriction.
        topk: number of cells averaged, in place of the protocol's.
        temperature: of the softmax, in place of the protocol's.
        protocol: ``crw`` or ``dino``; see :data:`PROTOCOLS` for the numbers.
        chunk: cells compared at a time; bounds memory and does not change the result.

    Returns:
        ``(T, K, h, w)``; the first frame's are ``first_labels``.

    Raises:
        FrameError: no frames.
        GeometryError: shapes that do not fit together.
        ValueError: an unknown protocol, or an option out of range.
    """
    propagator = LabelPropagator(
        first_labels,
        context=context,
        radius=radius,
        topk=topk,
        temperature=temperature,
        protocol=protocol,
        chunk=chunk,
    )
    labels = [propagator.step(frame) for frame in each_map(features)]
    if not labels:
        raise FrameError("got no feature maps to propagate labels through; expected at least one")
    return torch.stack(labels)


def _wide(grid: tuple[int, ...]) -> bool:
    # bands run along the longer side, where the radius leaves the most out
    return grid[1] > grid[0]


def _distances(a: range, b: range, device: torch.device) -> Tensor:
    ends = (torch.arange(side.start, side.stop, device=device) for side in (a, b))
    first, second = ends
    return (rearrange(first, "a -> a 1") - second).abs()


def _topk(block: Tensor, short: int, k: int) -> tuple[Tensor, Tensor]:
    """Top-k of rows of whole lines; exact, as the k best cells lie in the k best lines."""
    n = block.shape[1]
    if n // short <= 2 * k:
        values, index = block.topk(min(k, n), dim=1)
        return values, index
    lines = rearrange(block, "q (l s) -> q l s", s=short)
    best = reduce(lines, "q l s -> q l", "max").topk(k, dim=1).indices
    inside = lines.gather(1, repeat(best, "q n -> q n s", s=short))
    values, chosen = rearrange(inside, "q n s -> q (n s)").topk(min(k, n), dim=1)
    return values, best.gather(1, chosen // short) * short + chosen % short
