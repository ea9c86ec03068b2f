"""Video object segmentation: DAVIS, and folders of frames and masks of one's own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from cosettle_adapter.evaluation.datasets import (
    MaskClip,
    davis_sequences,
    folder_clips,
    newest_year,
)
from cosettle_adapter.evaluation.datasets.layout import pick
from cosettle_adapter.evaluation.metrics import summarise
from cosettle_adapter.evaluation.palette import save_labels
from cosettle_adapter.evaluation.segmentation import evaluate_sequence
from cosettle_adapter.evaluation.tasks.base import ClipScores, Task, mean
from cosettle_adapter.video.geometry import Geometry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FRAME_SIZE = (480, 880)  # the published protocol squashes frames to it


class _Masks(Task[MaskClip]):
    """J and F of propagated masks."""

    measures = ("J&F", "J mean", "J recall", "J decay", "F mean", "F recall", "F decay")

    def __init__(
        self,
        list_clips: Callable[[], Sequence[MaskClip]],
        *,
        protocol: Literal["crw", "dino"] = "crw",
        **options: Any,
    ) -> None:
        self._list_clips = list_clips
        self.protocol: Literal["crw", "dino"] = protocol
        self.options = {key: value for key, value in options.items() if value is not None}

    def clips(self) -> Sequence[MaskClip]:
        """List the clips."""
        return self._list_clips()

    def size(self, clip: MaskClip) -> tuple[int, int]:
        """``crw``: 480 x 880, whatever the aspect; ``dino``: 480 and what is left of 64s."""
        if self.protocol == "crw":
            return FRAME_SIZE
        height, width = clip.read_frame(0).shape[:2]
        short, step = FRAME_SIZE[0], 64
        long = int(short * max(height, width) / min(height, width)) // step * step
        return (long, short) if height > width else (short, long)

    def score(
        self,
        clip: MaskClip,
        features: Tensor,
        geometry: Geometry,
        *,
        predictions: Path | None = None,
    ) -> ClipScores:
        """Propagate the first mask and score the others; every object counts once."""
        del geometry

        def save(index: int, labels: NDArray[np.uint8]) -> None:
            if predictions is not None:
                save_labels(labels, predictions / f"{clip.frames[index].stem}.png")

        found = evaluate_sequence(
            features,
            clip.read_masks(),
            protocol=self.protocol,
            annotated=clip.annotated,
            on_mask=save,
            **self.options,
        )
        objects = []
        for j, f in zip(found.j, found.f, strict=True):
            by_measure = {"J": summarise(j), "F": summarise(f)}
            objects.append(
                {
                    f"{measure} {statistic}": getattr(summary, statistic)
                    for measure, summary in by_measure.items()
                    for statistic in ("mean", "recall", "decay")
                }
            )
        return ClipScores(_over_objects(objects), counts={"objects": objects})

    def total(self, scores: Sequence[ClipScores]) -> dict[str, float]:
        """Mean over all objects of all clips, as the official evaluation has it."""
        return _over_objects([each for clip in scores for each in clip.counts["objects"]])

    def settings(self) -> dict[str, Any]:
        """Protocol and what differs from it."""
        return {"protocol": self.protocol, **self.options}


def _over_objects(objects: Sequence[dict[str, float]]) -> dict[str, float]:
    measures = _Masks.measures[1:]
    figures = {measure: mean([each[measure] for each in objects]) for measure in measures}
    return {"J&F": (figures["J mean"] + figures["F mean"]) / 2, **figures}


class Davis(_Masks):
    """DAVIS-2016 or 2017 in the official layout; several folders are parts of one evaluation."""

    name = "davis"

    def __init__(
        self,
        *data: Path,
        clips: Sequence[str] | None = None,
        every: int | Sequence[int] = 1,
        max_frames: int | None = None,
        year: Literal["2016", "2017"] | None = None,
        **options: Any,
    ) -> None:
        """See :func:`~cosettle_adapter.evaluation.datasets.davis_sequences`.

        Args:
            *data: folders of DAVIS. Clips of several are called ``<folder>/<clip>``.
            clips: names of the clips wanted, with the folder or without.
            every: keep every n-th frame, one number for all folders or one for each.
            max_frames: keep at most this many frames of a clip.
            year: which release; by default the newest that the first folder has.
            **options: of the propagation.

        Raises:
            ValueError: two folders of one name, or another number of ``every``.
        """
        super().__init__(self._sequences, **options)
        steps = [every] if isinstance(every, int) else list(every)
        steps = steps * len(data) if len(steps) == 1 else steps
        self.parts = [] if len(data) == 1 else [folder.resolve().name for folder in data]
        if len(steps) != len(data) or len(set(self.parts)) != len(self.parts):
            raise ValueError(
                f"got {len(data)} folders of DAVIS and {len(steps)} numbers of frames to step; "
                "expected one number for all or one for each, and folders of different names"
            )
        self._roots, self._clips = dict(zip(data, steps, strict=True)), clips
        self._frames = {"every": steps[0] if len(set(steps)) == 1 else steps}
        self._limits: dict[str, Any] = {"max_frames": max_frames, "year": year}

    def _sequences(self) -> Sequence[MaskClip]:
        only = None if self.parts else self._clips
        found: list[MaskClip] = []
        for number, (root, every) in enumerate(self._roots.items()):
            clips = davis_sequences(root, sequences=only, every=every, **self._limits)
            part = f"{self.parts[number]}/" if self.parts else ""
            found += [dataclasses.replace(clip, name=f"{part}{clip.name}") for clip in clips]
        if only is self._clips:
            return found
        known = {clip.name for clip in found} | {clip.name.split("/")[-1] for clip in found}
        for name in self._clips or ():
            pick(name, known, f"clip {name!r} in {', '.join(map(str, self._roots))}")
        wanted = set(self._clips or ())
        return [clip for clip in found if wanted & {clip.name, clip.name.split("/")[-1]}]

    def settings(self) -> dict[str, Any]:
        """Protocol, and which frames."""
        year = self._limits["year"] or newest_year(next(iter(self._roots)))
        parts = {"parts": self.parts} if self.parts else {}
        return super().settings() | self._frames | self._limits | {"year": year} | parts


class Folder(_Masks):
    """Clips of one's own: ``frames/`` and ``masks/``, or several such folders."""

    name = "folder"

    def __init__(
        self,
        data: Path,
        *,
        clips: Sequence[str] | None = None,
        late_labels: Literal["error", "void"] = "error",
        **options: Any,
    ) -> None:
        """See :func:`~cosettle_adapter.evaluation.datasets.folder_clips`."""
        listing = functools.partial(folder_clips, data, clips=clips, late_labels=late_labels)
        super().__init__(listing, **options)
        self._late_labels = late_labels

    def settings(self) -> dict[str, Any]:
        """Protocol, and what becomes of labels that the first mask does not have."""
        return super().settings() | {"late_labels": self._late_labels}
