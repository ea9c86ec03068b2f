"""Mean intersection over union from one confusion matrix, as semantic benchmarks take it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from einops import rearrange

from cosettle_adapter.errors import FrameError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class ConfusionMatrix:
    """Counts of (annotated, predicted) classes over any number of frames.

    VIP's published evaluation has one matrix over all frames of all clips, the first ones, whose
    labels are given, included; of its 20 classes 0 is the background and counts like any other.

    Attributes:
        counts: ``(K, K)`` int64, rows the annotated class, columns the predicted one.

    Example:
        >>> matrix = ConfusionMatrix(2)
        >>> matrix.add([[0, 1]], [[0, 0]])
        >>> matrix.mean_iou()
        0.25
    """

    def __init__(self, classes: int) -> None:
        """Start with no frames; ``classes`` is K, the background included."""
        if classes < 1:
            raise ValueError(f"got {classes} classes, expected at least 1, background included")
        self.counts: NDArray[np.int64] = np.zeros((classes, classes), dtype=np.int64)

    def add(self, gt: ArrayLike, pred: ArrayLike, ignore: int | None = 255) -> None:
        """Count the pixels of one frame, or of several of one size.

        Args:
            gt: ``(..., H, W)`` whole numbers, the annotated class of every pixel.
            pred: like ``gt``, the predicted class.
            ignore: pixels annotated with this value do not count; None if all do.

        Raises:
            FrameError: shapes that differ, values that are not whole numbers, or a class outside
                [0, K) in a pixel that counts; the matrix is then as it was.
        """
        classes = len(self.counts)
        truth, guess = np.asarray(gt), np.asarray(pred)
        if truth.shape != guess.shape:
            raise FrameError(
                f"got pred of shape {guess.shape}, expected {truth.shape} like gt: bring the "
                "prediction to the size of the annotation first (nearest)"
            )
        counted = np.full(truth.shape, True) if ignore is None else truth != ignore
        for name, labels in (("gt", truth), ("pred", guess)):
            if labels.dtype.kind not in "biu":
                raise FrameError(
                    f"got {name} of dtype {labels.dtype}, expected whole numbers; for soft labels "
                    "take the argmax"
                )
            wrong = labels[counted & ((labels < 0) | (labels >= classes))]
            if wrong.size:
                raise FrameError(
                    f"{name} has class {int(wrong.flat[0])}, expected 0 to {classes - 1}; make "
                    "the matrix with more classes"
                    + (", or pass that value as ignore" if name == "gt" else "")
                )
        pairs = truth[counted].astype(np.int64) * classes + guess[counted].astype(np.int64)
        counts = np.bincount(pairs, minlength=classes**2)
        self.counts += rearrange(counts, "(truth guess) -> truth guess", truth=classes)

    def per_class_iou(self) -> NDArray[np.float64]:
        """Return ``(K,)`` IoU in [0, 1]; NaN for a class neither annotated nor predicted."""
        correct = np.diag(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - correct
        iou: NDArray[np.float64] = np.full(len(union), np.nan)
        np.divide(correct, union, out=iou, where=union > 0)
        return iou

    def mean_iou(self) -> float:
        """Return the mean IoU in [0, 1] over classes annotated or predicted somewhere.

        As in VIP's published evaluation, a class that is only predicted counts as 0. NaN before
        any pixel was counted.
        """
        iou = self.per_class_iou()
        iou = iou[~np.isnan(iou)]
        return float(iou.mean()) if len(iou) else float("nan")
