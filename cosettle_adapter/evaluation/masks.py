"""Masks: DAVIS's J and F, VIP's mean IoU, PNG files, and label propagation scored like DAVIS.

J and F equal the official evaluation (davis2017-evaluation) up to rounding. Where the official F
dilates whole frames, this one finds boundary pixels near one another with a k-d tree, whose cost
does not depend on the size of the frame. As in the official semi-supervised evaluation, the objects
are 1 to the highest id of the first mask, void pixels are background, the first and the last frame
do not count, and the figure of a data set is the mean over objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.correspondence import LabelPropagator
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.clips import Masks
from cosettle_adapter.evaluation.protocols import LabelProtocol, label_protocol
from cosettle_adapter.evaluation.run import mean
from cosettle_adapter.imports import require
from cosettle_adapter.io import atomic_path

Mask = NDArray[np.bool_]
VOID = 255  # label of pixels that belong to no object


class Summary(NamedTuple):
    """Statistics of a measure over the frames of one object."""

    mean: float
    recall: float  # share of frames above 0.5
    decay: float  # mean of the first quarter of the frames minus mean of the last quarter


def region_similarity(gt: ArrayLike, pred: ArrayLike, *, void: ArrayLike | None = None) -> float:
    """Return J in [0, 1], the intersection over union of two masks; 1 if both are empty.

    Masks are ``(H, W)`` boolean; pixels of ``void`` do not count.
    """
    truth, guess = _masks(gt, pred, void)
    union = int((truth | guess).sum())
    return int((truth & guess).sum()) / union if union else 1.0


def boundary_f(
    gt: ArrayLike, pred: ArrayLike, tolerance: float = 0.008, *, void: ArrayLike | None = None
) -> float:
    """Return F in [0, 1], the harmonic mean of precision and recall of a mask's boundary.

    A boundary pixel is matched if a boundary pixel of the other mask lies within the tolerance, by
    Euclidean distance. F is 1 if neither mask has a boundary, 0 if only one has.

    Masks are ``(H, W)`` boolean; pixels of ``void`` are background in both. A tolerance below 1 is
    a share of the frame's diagonal, rounded up to whole pixels; otherwise it is in pixels.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance}")
    truth, guess = _masks(gt, pred, void)
    reach = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*truth.shape))
    truth_points, guess_points = _boundary_points(truth), _boundary_points(guess)
    if not len(truth_points) or not len(guess_points):
        return float(len(truth_points) == len(guess_points))
    recall = _share_near(truth_points, guess_points, reach)
    precision = _share_near(guess_points, truth_points, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def summarise(values: ArrayLike) -> Summary:
    """Summarise a measure over frames ``(T,)`` as the official evaluation does.

    NaN marks frames that do not count. Neighbouring quarters share a frame. The decay of clips of
    more than 255 frames follows the definition; in the official code the frame index overflows.
    """
    series: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if series.ndim != 1 or not len(series):
        raise ValueError(f"got values of shape {series.shape}, expected (T,) with T at least 1")
    edges = np.round(np.linspace(1, len(series), 5) + 1e-10).astype(int) - 1
    first, last = series[: edges[1] + 1], series[edges[3] :]
    # recall counts a frame without a value as a miss
    return Summary(mean(series), float((series > 0.5).mean()), mean(first) - mean(last))


class ConfusionMatrix:
    """Counts of annotated (rows) and predicted (columns) classes over any number of frames.

    ``counts`` is ``(K, K)`` int64 for K classes, including the background.
    """

    def __init__(self, classes: int) -> None:
        self.counts: NDArray[np.int64] = np.zeros((classes, classes), dtype=np.int64)

    def add(self, gt: ArrayLike, pred: ArrayLike, ignore: int | None = 255) -> None:
        """Count integer labels of one shape; pixels annotated with ``ignore`` do not count.

        Raises:
            FrameError: the shapes differ, or a pixel that counts is not a class.
        """
        classes = len(self.counts)
        truth, guess = np.asarray(gt), np.asarray(pred)
        if truth.shape != guess.shape:
            raise FrameError(
                f"got pred of shape {guess.shape}, expected {truth.shape} like gt: resize the "
                "prediction to the annotation first (nearest)"
            )
        counted = np.full(truth.shape, True) if ignore is None else truth != ignore
        for name, labels in (("gt", truth), ("pred", guess)):
            wrong = labels[counted & ~np.isin(labels, np.arange(classes))]
            if wrong.size:
                raise FrameError(
                    f"{name} has class {wrong.flat[0]}, expected 0 to {classes - 1}; create the "
                    "matrix with more classes, or pass an annotated value as ignore"
                )
        pairs = truth[counted].astype(np.int64) * classes + guess[counted].astype(np.int64)
        counts = np.bincount(pairs, minlength=classes**2)
        self.counts += rearrange(counts, "(truth guess) -> truth guess", truth=classes)

    def mean_iou(self) -> float:
        """Return the mean IoU over all classes that occur; NaN if none does.

        As in VIP's published evaluation, a class that is only predicted counts as 0.
        """
        correct = np.diag(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - correct
        return mean(correct[union > 0] / union[union > 0])


def palette() -> bytes:
    """Return the palette of PASCAL VOC and DAVIS: 256 RGB colours."""
    # each three bits of a label are one bit of red, green and blue, the highest first
    return bytes(
        sum((label >> (3 * place + channel) & 1) << (7 - place) for place in range(3))
        for label in range(256)
        for channel in range(3)
    )


def save_labels(labels: NDArray[np.uint8], path: Path) -> None:
    """Write a label map ``(H, W)`` as a palette PNG, which the official DAVIS evaluation reads."""
    image: Any = require("PIL.Image", extra="eval", purpose="writing predictions")
    picture = image.fromarray(labels, mode="P")
    picture.putpalette(palette())
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


class SequenceScores(NamedTuple):
    """J and F in [0, 1] of a clip's objects in each frame that counts."""

    objects: tuple[int, ...]  # object ids
    j: tuple[tuple[float, ...], ...]  # by object, then by frame
    f: tuple[tuple[float, ...], ...]

    @property
    def per_object(self) -> list[float]:
        """J&F of every object: the mean of its mean J and its mean F."""
        return [(mean(j) + mean(f)) / 2 for j, f in zip(self.j, self.f, strict=True)]

    @property
    def j_and_f(self) -> float:
        """J&F of the clip, the mean over its objects."""
        return mean(self.per_object)


def evaluate_sequence(
    features: Tensor | Iterable[Tensor],
    masks: Masks,
    *,
    annotated: Sequence[int] | None = None,
    on_mask: Callable[[int, Masks], None] = lambda index, mask: None,
    **options: Any,
) -> SequenceScores:
    """Propagate the first mask of a clip by features and score the others.

    Features and options are those of :func:`propagate_masks`. Masks are ``(T, H, W)`` uint8 object
    ids, 0 background, 255 void. The objects are 1 to the highest id of the first mask: ids in no
    mask score as perfect, ids only in later masks as missed. If not every frame has a mask,
    ``annotated`` is the frame of each mask, ascending from 0; only these frames are scored.
    ``on_mask`` is called with the index of every frame and its propagated object ids ``(H, W)``.

    Raises:
        FrameError: the masks cannot be scored, or the number of feature maps does not fit them.
        GeometryError: the features do not fit together.
    """
    masks = np.asarray(masks)
    frames = list(range(len(masks))) if annotated is None else list(annotated)
    objects = _checked_objects(masks, frames)
    truths = dict(zip(frames, masks, strict=True))
    scores: dict[int, list[tuple[float, float]]] = {}
    count = 0
    classes = [0, *np.intersect1d(masks[0], objects).tolist()]
    for index, ids in enumerate(propagate_masks(features, masks[0], classes, **options)):
        count = index + 1
        on_mask(index, ids)
        if index and index in truths:
            pairs = [(truths[index] == label, ids == label) for label in objects]
            scores[index] = [(region_similarity(*pair), boundary_f(*pair)) for pair in pairs]
    if count <= frames[-1] or (annotated is None and count != len(masks)):
        raise FrameError(
            f"got masks up to frame {frames[-1]}, but {count} feature maps; pass one map for every "
            "frame, and a mask for every frame unless annotated lists the frames with a mask"
        )
    scores.pop(count - 1, None)  # the last frame does not count
    if not scores:
        raise FrameError(
            f"got masks for the frames {frames[:9]}, none of which counts: the first and the last "
            f"of the clip's {count} frames do not; annotate a frame between them"
        )
    rows, columns = list(scores.values()), range(len(objects))
    return SequenceScores(
        objects,
        j=tuple(tuple(row[i][0] for row in rows) for i in columns),
        f=tuple(tuple(row[i][1] for row in rows) for i in columns),
    )


def mean_over_objects(scores: Iterable[SequenceScores]) -> float:
    """Return the official figure of a data set: mean J&F over all objects of all clips."""
    return mean([value for score in scores for value in score.per_object])


def propagate_masks(
    features: Tensor | Iterable[Tensor],
    mask: Masks,
    classes: Sequence[int],
    *,
    protocol: str | LabelProtocol = "best",
    size: tuple[int, int] | None = None,
    **options: Any,
) -> Iterator[Masks]:
    """Propagate a label map through a clip in constant memory; yield the map of every frame.

    The protocol, a :class:`LabelProtocol` or its name, defines how the first map is reduced to the
    grid and how propagated labels are enlarged. ``size`` is the (height, width) of the encoded
    frames, by default the map's. Features are ``(T, C, h, w)``, or an iterable of maps
    ``(C, h, w)`` or ``(1, C, h, w)``; the label map is ``(H, W)`` uint8. The first class is the
    background: all pixels with none of the other labels. Options are those of
    :class:`~cosettle_adapter.correspondence.LabelPropagator`.
    """
    record = label_protocol(protocol) if isinstance(protocol, str) else protocol
    names, size = np.asarray(classes, dtype=np.uint8), size or (mask.shape[0], mask.shape[1])
    propagator: LabelPropagator | None = None
    for feature in features:
        if propagator is None:
            first = _first_labels(mask, classes, feature.shape[-2:], size, record)
            propagator = LabelPropagator(first.to(feature.device), protocol=record, **options)
        ids = names[_decode(propagator.step(feature), mask.shape, size, record)]
        yield _nearest(ids, mask.shape, record.nearest)


def _checked_objects(masks: Masks, frames: Sequence[int]) -> tuple[int, ...]:
    """Check that masks can be scored; return the ids of the first mask's objects."""
    valid = masks.ndim == 3 and masks.dtype == np.uint8
    if not valid or frames[:1] != [0] or len(frames) != len(masks):
        raise FrameError(
            f"got {masks.dtype} masks of shape {masks.shape} for the frames {frames[:9]}, expected "
            "uint8 (T, H, W), one mask per frame, the first of frame 0"
        )
    objects = tuple(range(1, int(masks[0][masks[0] != VOID].max(initial=0)) + 1))
    if not objects:
        raise FrameError(
            "the first mask has no object (no value from 1 to 254) to propagate; start the clip at "
            "a frame that shows one"
        )
    return objects


def _first_labels(
    mask: Masks,
    classes: Sequence[int],
    grid: Sequence[int],
    size: Sequence[int],
    protocol: LabelProtocol,
) -> Tensor:
    """Return soft labels ``(K, h, w)`` of the first frame."""
    if protocol.first_labels == "nearest":
        mask = _nearest(mask, grid, protocol.nearest)
    elif protocol.argmax == "frames":
        mask = _nearest(mask, size, "OpenCV")
    ids = torch.from_numpy(mask.astype("int64"))
    masks = torch.stack([ids == label for label in classes[1:]])
    one_hot = torch.cat([~masks.any(0, keepdim=True), masks])
    resized = F.interpolate(rearrange(one_hot, "k h w -> 1 k h w").float(), grid, mode="bilinear")
    return rearrange(resized, "1 k h w -> k h w")


def _decode(
    labels: Tensor, masks: Sequence[int], frames: Sequence[int], protocol: LabelProtocol
) -> NDArray[np.int64]:
    """Return the index of the strongest label of every pixel of a mask or of a frame."""
    size = masks if protocol.argmax == "masks" else frames
    soft = F.interpolate(rearrange(labels, "k h w -> 1 k h w"), size, mode="bilinear")
    soft = rearrange(soft, "1 k h w -> k h w")
    if protocol.stretch:
        low = soft.amin((1, 2), keepdim=True)
        height = soft.amax((1, 2), keepdim=True) - low
        soft = torch.where(height > 0, (soft - low) / height, soft)
    ids: NDArray[np.int64] = soft.max(0).indices.cpu().numpy()
    return ids


def _nearest(labels: Masks, size: Sequence[int], rule: str) -> Masks:
    """Resize a label map by nearest neighbours of pixel corners (OpenCV) or centres (Pillow)."""
    if rule == "Pillow":
        image: Any = require("PIL.Image", extra="eval", purpose="resizing labels")
        picture = image.fromarray(labels).resize((size[1], size[0]), image.Resampling.NEAREST)
        return np.array(picture)
    pairs = zip(size, labels.shape, strict=True)
    # OpenCV's order of operations decides ties
    index = [(np.arange(new) * (1 / (new / old))).astype(int) for new, old in pairs]
    return labels[np.ix_(*index)]


def _masks(gt: ArrayLike, pred: ArrayLike, void: ArrayLike | None) -> tuple[Mask, Mask]:
    truth, guess = np.asarray(gt), np.asarray(pred)
    ignored: Mask = np.zeros(truth.shape, dtype=bool) if void is None else np.asarray(void)
    if truth.ndim != 2 or not truth.shape == guess.shape == ignored.shape:
        raise FrameError(
            f"got gt {truth.shape}, pred {guess.shape} and void {ignored.shape}, expected (H, W) of"
            " one size: resize the prediction to the annotation first (nearest)"
        )
    if not truth.dtype == guess.dtype == ignored.dtype == np.bool_:
        raise FrameError(
            f"got gt {truth.dtype}, pred {guess.dtype} and void {ignored.dtype}, expected boolean "
            "masks; for an object of a label map use labels == id"
        )
    return truth & ~ignored, guess & ~ignored


def _boundary_points(mask: Mask) -> NDArray[np.int64]:
    """Return ``(N, 2)`` pixels that differ from their right, lower or lower right neighbour."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    if not len(rows):
        return np.zeros((0, 2), dtype=np.int64)
    # all boundary pixels lie in the mask's bounding box or one pixel above or left of it
    top, left = max(rows[0] - 1, 0), max(columns[0] - 1, 0)
    box = mask[top : rows[-1] + 2, left : columns[-1] + 2]
    # the last row and column continue outside the frame, as in the official seg2bmap
    padded = np.pad(box, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    edges = (box ^ right) | (box ^ below) | (box ^ diagonal)
    points: NDArray[np.int64] = np.argwhere(edges) + np.array([top, left])
    return points


def _share_near(points: Any, others: Any, reach: float) -> float:
    """Return the share of integer points within ``reach`` of any of the others."""
    spatial: Any = require("scipy.spatial", extra="eval", purpose="measuring boundaries")
    # squared distances are whole numbers, so a strict bound between two of them is exact
    bound = math.sqrt(math.floor(reach**2) + 0.5)
    distance, _ = spatial.cKDTree(others).query(points, distance_upper_bound=bound)
    return float((distance < bound).mean())
