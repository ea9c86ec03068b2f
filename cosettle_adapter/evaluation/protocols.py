"""What a benchmark on clips is: a record of its clips, frame size, scores and totals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from torch import Tensor

from cosettle_adapter.evaluation.clips import Clip
from cosettle_adapter.evaluation.masks import save_labels, summarise
from cosettle_adapter.evaluation.segmentation import evaluate_sequence
from cosettle_adapter.io import atomic_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cosettle_adapter.evaluation.drift import Correspondence
    from cosettle_adapter.video.geometry import Geometry

A = TypeVar("A")

MASK_MEASURES = ("J&F", "J mean", "J recall", "J decay", "F mean", "F recall", "F decay")
_FRAME_SIZE = (480, 880)  # the published protocol resizes frames to it, whatever their aspect


@dataclasses.dataclass(frozen=True)
class ClipScores:
    """One clip's figures by measure, for one variant of features.

    ``counts`` are what the data set's figures are made of, where they are no mean over clips.
    """

    values: Mapping[str, float]
    counts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Protocol(Generic[A]):
    """A benchmark on clips that frozen features alone can solve.

    Attributes:
        name: how it is called on the command line.
        measures: names of its figures, shares of 1, the one to compare by first.
        clips: lists the clips.
        size: ``(height, width)`` in pixels that frames of a clip are resized to.
        score: solves the task on a clip with features ``(T, C, h, w)``, given the geometry from
            frames to the grid, and scores it; writes predictions to a folder, if there is one.
        settings: everything the figures depend on besides model, data and frame size.
        total: the data set's figures; None for the mean over clips.
        correspondences: gap to the patches that truly correspond; None where that is unknown.
    """

    name: str
    measures: tuple[str, ...]
    clips: Callable[[], Sequence[Clip[A]]]
    size: Callable[[Clip[A]], tuple[int, int]]
    score: Callable[[Clip[A], Tensor, Geometry, Path | None], ClipScores]
    settings: Mapping[str, Any]
    total: Callable[[Sequence[ClipScores]], dict[str, float]] | None = None
    correspondences: (
        Callable[[Clip[A], Geometry], Mapping[int, Sequence[Correspondence]]] | None
    ) = None

    def totals(self, scores: Sequence[ClipScores]) -> dict[str, float]:
        """Return the data set's figures."""
        if self.total is not None:
            return self.total(scores)
        return {name: mean(clip.values[name] for clip in scores) for name in self.measures}


@dataclasses.dataclass(frozen=True)
class Propagation:
    """How labels are propagated through a clip.

    Attributes:
        protocol: the published settings to start from: crw or dino.
        topk: matches that vote for a patch, in place of the protocol's.
        context: preceding frames to match with, in place of the protocol's.
        radius: patches within which matches are looked for, in place of the protocol's.
    """

    protocol: Literal["crw", "dino"] = "crw"
    topk: int | None = None
    context: int | None = None
    radius: float | None = None

    def options(self) -> dict[str, Any]:
        """Return the protocol and what differs from it, as keywords of ``LabelPropagator``."""
        given = dataclasses.asdict(self)
        return {name: value for name, value in given.items() if value is not None}


PUBLISHED = Propagation()


def mask_protocol(
    name: str,
    clips: Callable[[], Sequence[Clip[NDArray[np.uint8]]]],
    propagation: Propagation,
    settings: Mapping[str, Any],
) -> Protocol[NDArray[np.uint8]]:
    """Return the record of a data set scored by J and F of propagated masks."""

    def size(clip: Clip[NDArray[np.uint8]]) -> tuple[int, int]:
        """``crw``: 480 x 880; ``dino``: the shorter side 480, the other a multiple of 64."""
        if propagation.protocol == "crw":
            return _FRAME_SIZE
        height, width = clip.read_frame(0).shape[:2]
        short = _FRAME_SIZE[0]
        long = int(short * max(height, width) / min(height, width)) // 64 * 64
        return (long, short) if height > width else (short, long)

    def score(
        clip: Clip[NDArray[np.uint8]], features: Tensor, _: Geometry, predictions: Path | None
    ) -> ClipScores:
        """Propagate the first mask and score the others; every object counts once."""

        def save(index: int, labels: NDArray[np.uint8]) -> None:
            if predictions is not None:
                save_labels(labels, predictions / f"{clip.frames[index].stem}.png")

        masks = clip.read_annotations()
        found = evaluate_sequence(
            features, masks, annotated=clip.annotated, on_mask=save, **propagation.options()
        )
        objects = []
        for j, f in zip(found.j, found.f, strict=True):
            summaries = (*summarise(j), *summarise(f))  # mean, recall, decay of each
            objects.append(dict(zip(MASK_MEASURES[1:], summaries, strict=True)))
        return ClipScores(_over_objects(objects), counts={"objects": objects})

    def total(scores: Sequence[ClipScores]) -> dict[str, float]:
        """Mean over all objects of all clips, as the official evaluation has it."""
        return _over_objects([each for clip in scores for each in clip.counts["objects"]])

    settings = {**propagation.options(), **settings}
    return Protocol(name, MASK_MEASURES, clips, size, score, settings, total)


def mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are numbers; NaN without any."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def save_positions(xy: Any, folder: Path | None) -> None:
    """Write predicted (x, y) pixels of a clip's frames as ``positions.json``, given a folder."""
    if folder is not None:
        with atomic_path(folder / "positions.json") as path:
            path.write_text(json.dumps({"xy": xy.tolist()}), encoding="utf-8")


def _over_objects(objects: Sequence[Mapping[str, float]]) -> dict[str, float]:
    figures = {name: mean(each[name] for each in objects) for name in MASK_MEASURES[1:]}
    return {"J&F": (figures["J mean"] + figures["F mean"]) / 2, **figures}
