"""Label propagation: carry a segmentation of the first frame through a clip by its features.

A clip's affinities are never held at once: a band of lines of the grid is compared with a few
context frames at a time, only with the lines within reach, and all that stays is its top-k.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from cosettle_adapter.correspondence.affinity import locality_mask, topk_of_lines
from cosettle_adapter.correspondence.maps import each_map, unit_map
from cosettle_adapter.correspondence.protocols import PROTOCOLS, Protocol
from cosettle_adapter.errors import FrameError, GeometryError

_CHUNK, _CHUNK_ON_CPU = 8192, 256  # cells of a frame
_SMALL = 1024  # cells of a frame that is not worth splitting
_AGAINST = 8192  # cells of the context that a chunk is compared with, about


class _Window:
    """The last frames, at most ``size``, in one tensor, so that they are compared together."""

    def __init__(self, size: int) -> None:
        self._size, self._added = size, 0
        self._cells = torch.empty(0)
        self._labels = torch.empty(0)

    def __len__(self) -> int:
        return min(self._added, self._size)

    @property
    def cells(self) -> Tensor:
        """``(n, long, short, C)``, in no order."""
        return self._cells[: len(self)]

    @property
    def labels(self) -> Tensor:
        """``(n, long short, K)``."""
        return self._labels[: len(self)]

    def add(self, cells: Tensor, labels: Tensor) -> None:
        """Put a frame in the place of the oldest."""
        if not self._size:
            return
        if self._added == len(self._cells) < self._size:
            room = min(self._size, max(4, 2 * self._added))
            with torch.inference_mode(False):  # else nothing could be put in outside that mode
                grown = cells.new_empty(room, *cells.shape), labels.new_empty(room, *labels.shape)
            if self._added:
                grown[0][: self._added], grown[1][: self._added] = self._cells, self._labels
            self._cells, self._labels = grown
        place = self._added % self._size
        self._cells[place], self._labels[place] = cells, labels
        self._added += 1


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
                result. By default 8192, and 256 of a frame of more than 1024 on a CPU.

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
        self._first_labels = first_labels.clone()
        self._first: Tensor | None = None  # (long, short, C), unit length; the longer side first
        self._recent = _Window(self.protocol.context)

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
        to_cells = "k h w -> (w h) k" if _wide(grid) else "k h w -> (h w) k"
        if self._first is None:
            self._first = cells
            self._first_labels = self._first_labels.to(cells.device)
            return self._first_labels.clone()
        if cells.shape != self._first.shape:
            raise GeometryError(
                f"got features of {cells.shape[-1]} channels after a first frame of "
                f"{self._first.shape[-1]}; start a new LabelPropagator for other features"
            )
        first_labels = rearrange(self._first_labels, to_cells)
        found = self._propagate(cells, self._first, first_labels)
        self._recent.add(cells, found)
        before, _, after = to_cells.partition(" -> ")
        return rearrange(found, f"{after} -> {before}", h=grid[0])

    def _propagate(self, cells: Tensor, first: Tensor, first_labels: Tensor) -> Tensor:
        """Labels ``(long short, K)`` of ``cells``, a band of lines at a time."""
        lines, short, _ = cells.shape
        height = max(1, self._chunk(cells) // short)
        recent = self._recent.labels
        labels = torch.cat([first_labels, *recent])
        bands = []
        for start in range(0, lines, height):
            stop = min(start + height, lines)
            cosine, index = self._nearest(cells, first, start, stop)
            weights = torch.softmax(cosine / self.protocol.temperature, dim=1).to(labels.dtype)
            bands.append(einsum(weights, labels[index], "q n, q n k -> q k"))
        return torch.cat(bands)

    def _nearest(
        self, cells: Tensor, first: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Top-k of a band of lines: cosines and indices into first and recent cells, ``(q, k)``."""
        lines, short, _ = cells.shape
        protocol = self.protocol
        queries = rearrange(cells[start:stop], "l s c -> (l s) c")
        reach = lines if math.isinf(protocol.radius) else math.floor(protocol.radius)
        low, high = max(0, start - reach), min(lines, stop + reach)
        mask = locality_mask(protocol, range(start, stop), range(low, high), short, like=queries)
        found: list[tuple[Tensor, Tensor]] = []

        def add(blocks: Tensor, first_cell: int, copies: int = 1) -> None:
            cosine, index = topk_of_lines(blocks, short, protocol.topk)
            n = blocks.shape[2]
            index = first_cell + index // n * (lines * short) + index % n
            copies = min(copies, protocol.topk)
            cosine, index = (
                repeat(each, "q n -> q (copies n)", copies=copies) for each in (cosine, index)
            )
            found.append((cosine, index))

        # The first frame, anywhere or within reach; then as often as preceding frames are missing.
        missing = protocol.context - len(self._recent) if protocol.repeat_first else 0
        if protocol.restrict_first:
            near = torch.addmm(mask, queries, rearrange(first[low:high], "l s c -> c (l s)"))
            add(rearrange(near, "q n -> 1 q n"), low * short)
        else:
            block = queries @ rearrange(first, "l s c -> c (l s)")
            add(rearrange(block, "q n -> 1 q n"), 0)
            near = block[:, low * short : high * short]
            near = near + mask if missing else near
        if missing:
            add(rearrange(near, "q n -> 1 q n"), low * short, missing)
        # The preceding frames, a few together.
        together = max(1, _AGAINST // mask.shape[1])
        for begin in range(0, len(self._recent), together):
            keys = self._recent.cells[begin : begin + together, low:high]
            keys = rearrange(keys, "f l s c -> f c (l s)")
            blocks = torch.baddbmm(mask, repeat(queries, "q c -> f q c", f=len(keys)), keys)
            add(blocks, ((1 + begin) * lines + low) * short)
        cosine, chosen = torch.cat([cosine for cosine, _ in found], dim=1).topk(
            min(protocol.topk, sum(cosine.shape[1] for cosine, _ in found)), dim=1
        )
        return cosine, torch.cat([index for _, index in found], dim=1).gather(1, chosen)

    def _chunk(self, cells: Tensor) -> int:
        if self.chunk is not None:
            return self.chunk
        count = cells.shape[0] * cells.shape[1]
        return _CHUNK_ON_CPU if cells.device.type == "cpu" and count > _SMALL else _CHUNK


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
