"""Mean intersection over union from one confusion matrix, as semantic benchmarks take it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from einops import rearrange

from cosettle_adapter.errors import FrameError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class ConfusionMatrix:
    """Counts of annotated (rows) and predicted classes over any number of frames.

    ``counts`` is ``(K, K)`` int64 for K classes, of which the background is one.
    """

    def __init__(self, classes: int) -> None:
        self.counts: NDArray[np.int64] = np.zeros((classes, classes), dtype=np.int64)

    def add(self, gt: ArrayLike, pred: ArrayLike, ignore: int | None = 255) -> None:
        """Count whole numbers of one shape; pixels annotated with ``ignore`` do not count.

        Raises:
            FrameError: shapes that differ, or a pixel that counts and is no class.
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
                raise FrameError(f"got {name} of dtype {labels.dtype}, expected whole numbers")
            wrong = labels[counted & ((labels < 0) | (labels >= classes))]
            if wrong.size:
                raise FrameError(
                    f"{name} has class {int(wrong.flat[0])}, expected 0 to {classes - 1}; make "
                    "the matrix with more classes, or pass an annotated value as ignore"
                )
        pairs = truth[counted].astype(np.int64) * classes + guess[counted].astype(np.int64)
        counts = np.bincount(pairs, minlength=classes**2)
        self.counts += rearrange(counts, "(truth guess) -> truth guess", truth=classes)

    def mean_iou(self) -> float:
        """Return the mean IoU over classes annotated or predicted somewhere; NaN without any.

        As in VIP's published evaluation, a class that is only predicted counts as 0.
        """
        correct = np.diag(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - correct
        iou = correct[union > 0] / union[union > 0]
        return float(iou.mean()) if len(iou) else float("nan")
