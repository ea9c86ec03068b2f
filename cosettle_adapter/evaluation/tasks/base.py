"""What every task on clips has in common: its clips, a frame size, scores that add up."""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch import Tensor

from cosettle_adapter.files import atomic_path
from cosettle_adapter.video.geometry import Geometry

if TYPE_CHECKING:
    from cosettle_adapter.analysis import Correspondence
    from cosettle_adapter.evaluation.datasets import Clip

ClipT = TypeVar("ClipT", bound="Clip")


@dataclasses.dataclass(frozen=True)
class ClipScores:
    """One clip's scores for one kind of features; plain values, so that they can be stored.

    Attributes:
        values: measure to figure, shown for the clip.
        counts: what the data set's figures are made of, where they are no mean over clips.
    """

    values: Mapping[str, float]
    counts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Task(abc.ABC, Generic[ClipT]):
    """A benchmark on clips that frozen features alone can solve.

    Attributes:
        name: how it is called on the command line.
        measures: names of its figures, shares of 1, the one to compare by first.
        drift_by: where :meth:`correspondences` are from; empty where there are none.
    """

    name: ClassVar[str]
    measures: ClassVar[tuple[str, ...]]
    drift_by: ClassVar[str] = ""

    @abc.abstractmethod
    def clips(self) -> Sequence[ClipT]:
        """List the clips; what is wrong with one is its ``problem``."""

    @abc.abstractmethod
    def size(self, clip: ClipT) -> tuple[int, int]:
        """``(height, width)`` in pixels that the protocol resizes frames to."""

    @abc.abstractmethod
    def score(
        self, clip: ClipT, features: Tensor, geometry: Geometry, *, predictions: Path | None = None
    ) -> ClipScores:
        """Solve the task on a clip with features ``(T, C, h, w)`` and score it.

        Args:
            clip: what the features are of.
            features: in the order of the clip's frames.
            geometry: from the clip's frames to the features' grid.
            predictions: folder to write predictions to.
        """

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything the figures depend on besides model, data and frame size."""

    def correspondences(
        self, clip: ClipT, geometry: Geometry
    ) -> Mapping[int, Sequence[Correspondence]] | None:
        """Gap to the patches that truly correspond; by default None: the motion is unknown."""
        del clip, geometry
        return None

    def total(self, scores: Sequence[ClipScores]) -> dict[str, float]:
        """The data set's figures; by default the mean over clips."""
        return {
            measure: mean([clip.values[measure] for clip in scores]) for measure in self.measures
        }


def mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are numbers; NaN without any."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def save_positions(xy: Any, folder: Path) -> None:
    """Write predicted (x, y) pixels of a clip's frames as ``positions.json``."""
    with atomic_path(folder / "positions.json") as path:
        path.write_text(json.dumps({"xy": xy.tolist()}), encoding="utf-8")
