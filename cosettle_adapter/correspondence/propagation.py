"""Label propagation: carry a segmentation of the first frame through a clip by its features.

A clip's affinities are never held at once: a band of lines of the grid is compared with one context
frame at a time, only with the lines within reach, and all that stays is its top-k.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from cosettle_adapter.correspondence.affinity import locality_mask, topk_of_lines
from cosettle_adapter.correspondence.maps import each_map, unit_map
from cosettle_adapter.correspondence.protocols import PROTOCOLS, Protocol
from cosettle_adapter.errors import FrameError, GeometryError


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
        mask = locality_mask(
            self.protocol, range(start, stop), range(low, high), short, like=queries
        )
        found: list[Tensor] = []
        where: list[Tensor] = []
        for position, (frame, restricted, copies) in enumerate(sources):
            if restricted:
                keys = rearrange(frame.cells[low:high], "l s c -> c (l s)")
                block = torch.addmm(mask, queries, keys)
            else:
                block = queries @ rearrange(frame.cells, "l s c -> c (l s)")
            cosine, index = topk_of_lines(block, short, self.protocol.topk)
            index = index + (position * lines + (low if restricted else 0)) * short
            copies = min(copies, self.protocol.topk)
            found.append(repeat(cosine, "q n -> q (copies n)", copies=copies))
            where.append(repeat(index, "q n -> q (copies n)", copies=copies))
        candidates = torch.cat(found, dim=1)
        cosine, chosen = candidates.topk(min(self.protocol.topk, candidates.shape[1]), dim=1)
        return cosine, torch.cat(where, dim=1).gather(1, chosen)


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
