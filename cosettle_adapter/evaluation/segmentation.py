"""Video object segmentation by label propagation, scored as DAVIS scores it.

Scores follow the official semi-supervised evaluation: every object of the first frame is one
value a frame, first and last frame do not count, and a data set's figure is the mean over objects
(for DAVIS-2016, with its one object a clip, the mean over clips).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.correspondence import LabelPropagator
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.masks import boundary_f, region_similarity

Labels = NDArray[np.uint8]
VOID = 255  # pixels that belong to no object and do not count


class SequenceScores(NamedTuple):
    """J and F in [0, 1] of a clip: of every object, a value for each frame that counts."""

    objects: tuple[int, ...]  # their ids
    j: tuple[tuple[float, ...], ...]
    f: tuple[tuple[float, ...], ...]

    @property
    def per_object(self) -> list[float]:
        """J&F of every object: the mean of its mean J and its mean F."""
        return [(_mean(j) + _mean(f)) / 2 for j, f in zip(self.j, self.f, strict=True)]

    @property
    def j_and_f(self) -> float:
        """J&F of the clip: the mean over its objects."""
        return _mean(self.per_object)


def evaluate_sequence(
    features: Tensor | Iterable[Tensor],
    masks: Labels,
    *,
    annotated: Sequence[int] | None = None,
    on_mask: Callable[[int, Labels], None] = lambda index, mask: None,
    **options: Any,
) -> SequenceScores:
    """Propagate the first mask of a clip by features and score the others.

    Features and options are those of :func:`propagate_masks`. Masks are ``(T, H, W)`` uint8 object
    ids, 0 the background, 255 void. Where not every frame has one, ``annotated`` is the frame of
    each, ascending from 0; the others are propagated through and not scored. ``on_mask`` is called
    with the index of every frame and its propagated object ids ``(H, W)``.

    Raises:
        FrameError: masks that cannot be scored, or another number of feature maps than masks.
        GeometryError: features that do not fit together.
    """
    masks = np.asarray(masks)
    frames = list(range(len(masks))) if annotated is None else list(annotated)
    objects = _checked_objects(masks, frames)
    truths = dict(zip(frames, masks, strict=True))
    scores: dict[int, list[tuple[float, float]]] = {}
    count = 0
    for index, ids in enumerate(propagate_masks(features, masks[0], (0, *objects), **options)):
        count = index + 1
        on_mask(index, ids)
        if index and index in truths:
            truth, void = truths[index], truths[index] == VOID
            pairs = [(truth == label, ids == label) for label in objects]
            scores[index] = [
                (region_similarity(gt, pred, void=void), boundary_f(gt, pred, void=void))
                for gt, pred in pairs
            ]
    if count <= frames[-1] or (annotated is None and count != len(masks)):
        raise FrameError(
            f"got masks up to frame {frames[-1]}, but {count} feature maps; give one map for every "
            "frame, and a mask for every frame unless annotated says which have one"
        )
    scores.pop(count - 1, None)  # the last frame does not count
    if not scores:
        raise FrameError(
            f"none of the masks of the frames {frames[:9]} counts: the first and the last frame "
            f"of the clip's {count} do not; annotate one between them"
        )
    j, f = (
        tuple(tuple(row[i][measure] for row in scores.values()) for i in range(len(objects)))
        for measure in (0, 1)
    )
    return SequenceScores(objects, j, f)


def mean_over_objects(scores: Iterable[SequenceScores]) -> float:
    """Return the official figure of a data set: mean J&F over all objects of all clips."""
    return _mean([value for score in scores for value in score.per_object])


def propagate_masks(
    features: Tensor | Iterable[Tensor],
    mask: Labels,
    classes: Sequence[int],
    *,
    protocol: Literal["crw", "dino"] = "crw",
    **options: Any,
) -> Iterator[Labels]:
    """Propagate a label map through a clip and yield that of every frame, at constant memory.

    The first map is one-hot at its full size and brought to the grid: bilinear and soft for
    ``crw``, nearest for ``dino``. Propagated labels are brought back bilinear to the size of the
    map (for ``dino`` each then stretched to [0, 1]) and the strongest one wins.

    Features are ``(T, C, h, w)``, or an iterable of maps ``(C, h, w)`` or ``(1, C, h, w)``, the map
    is ``(H, W)`` uint8. The first of the classes is the background, which takes whatever has no
    other of these labels. Options are those of
    :class:`~cosettle_adapter.correspondence.LabelPropagator`.
    """
    names = np.asarray(classes, dtype=np.uint8)
    propagator: LabelPropagator | None = None
    for feature in features:
        if propagator is None:
            first = _first_labels(mask, classes, feature.shape[-2:], protocol).to(feature.device)
            propagator = LabelPropagator(first, protocol=protocol, **options)
        yield names[_decode(propagator.step(feature), mask.shape, protocol)]


def _checked_objects(masks: Labels, frames: Sequence[int]) -> tuple[int, ...]:
    """Return the ids of the first mask's objects, of masks that can be scored."""
    right = masks.ndim == 3 and masks.dtype == np.uint8
    if not right or frames[:1] != [0] or len(frames) != len(masks):
        raise FrameError(
            f"got {masks.dtype} masks of shape {masks.shape} for the frames {frames[:9]}, expected "
            "uint8 (T, H, W), one mask for each, the first of frame 0"
        )
    objects = tuple(int(label) for label in np.unique(masks[0]) if label not in (0, VOID))
    if not objects:
        raise FrameError(
            "the first mask has no object (no value from 1 to 254), so there is nothing to "
            "propagate; start the clip at a frame that shows one"
        )
    return objects


def _first_labels(
    mask: Labels, classes: Sequence[int], grid: Sequence[int], protocol: str
) -> Tensor:
    ids = torch.from_numpy(mask.astype("int64"))
    masks = torch.stack([ids == label for label in classes[1:]])
    one_hot = torch.cat([~masks.any(0, keepdim=True), masks])
    mode = "nearest-exact" if protocol == "dino" else "bilinear"
    resized = F.interpolate(rearrange(one_hot, "k h w -> 1 k h w").float(), tuple(grid), mode=mode)
    return rearrange(resized, "1 k h w -> k h w")


def _decode(labels: Tensor, size: Sequence[int], protocol: str) -> NDArray[np.int64]:
    """Positions ``(H, W)`` of the strongest label among the classes."""
    soft = F.interpolate(rearrange(labels, "k h w -> 1 k h w"), tuple(size), mode="bilinear")
    soft = rearrange(soft, "1 k h w -> k h w")
    if protocol == "dino":
        low = soft.amin((1, 2), keepdim=True)
        height = soft.amax((1, 2), keepdim=True) - low
        soft = torch.where(height > 0, (soft - low) / height, soft)
    ids: NDArray[np.int64] = soft.max(0).indices.cpu().numpy()
    return ids


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
