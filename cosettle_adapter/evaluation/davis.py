"""DAVIS: its folders, and video object segmentation by label propagation on its clips.

Scores follow the official semi-supervised evaluation: every object of the first frame is one
value a frame, first and last frame do not count, and a data set's figure is the mean over objects
(for DAVIS-2016, with its one object a clip, the mean over clips).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.correspondence import LabelPropagator
from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.evaluation.metrics import boundary_f, region_similarity
from cosettle_adapter.extras import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VOID = 255  # pixels that belong to no object and do not count


@dataclasses.dataclass(frozen=True)
class DavisSequence:
    """One clip of DAVIS, read when asked.

    Attributes:
        name: the clip's folder.
        frames: paths of its frames, in order.
        annotations: paths of its masks, one for every frame.
        merge: take all objects of a mask as one, as DAVIS-2016 does.
    """

    name: str
    frames: tuple[Path, ...]
    annotations: tuple[Path, ...]
    merge: bool

    def read_frame(self, index: int) -> NDArray[np.uint8]:
        """Read one frame: ``(H, W, 3)`` uint8, RGB."""
        np: Any = require("numpy", extra="eval", purpose="reading DAVIS")
        image: Any = require("PIL.Image", extra="eval", purpose="reading DAVIS")
        with image.open(self.frames[index]) as opened:
            frame: NDArray[np.uint8] = np.asarray(opened.convert("RGB"))
        return frame

    def read_masks(self) -> NDArray[np.uint8]:
        """Read all masks: ``(T, H, W)`` uint8 object ids, 0 the background, 255 void.

        Raises:
            FrameError: a mask that is not a palette or grey image, or of another size.
        """
        np: Any = require("numpy", extra="eval", purpose="reading DAVIS")
        masks = [self._read_mask(path) for path in self.annotations]
        for path, mask in zip(self.annotations, masks, strict=True):
            if mask.shape != masks[0].shape:
                raise FrameError(
                    f"{path} is {mask.shape[0]} x {mask.shape[1]}, but the sequence's first mask "
                    f"is {masks[0].shape[0]} x {masks[0].shape[1]}; all must have one size"
                )
        stacked: NDArray[np.uint8] = np.stack(masks)
        return (stacked > 0).astype(np.uint8) if self.merge else stacked

    def _read_mask(self, path: Path) -> NDArray[np.uint8]:
        np: Any = require("numpy", extra="eval", purpose="reading DAVIS")
        image: Any = require("PIL.Image", extra="eval", purpose="reading DAVIS")
        with image.open(path) as opened:
            if opened.mode not in ("P", "L", "1"):
                raise FrameError(
                    f"{path} is a {opened.mode} image, expected a palette (P) or grey (L) PNG "
                    "whose values are object ids; take DAVIS's own annotations"
                )
            mask: NDArray[np.uint8] = np.asarray(opened).astype(np.uint8)
        return mask


def davis_sequences(
    root: str | Path,
    *,
    year: Literal["2016", "2017"] | None = None,
    subset: str = "val",
    resolution: str = "480p",
    sequences: Sequence[str] | None = None,
    every: int = 1,
    max_frames: int | None = None,
) -> list[DavisSequence]:
    """List the clips of a DAVIS folder in the official layout; nothing is read but names.

    The layout is ``JPEGImages/<resolution>/<clip>/*.jpg``,
    ``Annotations/<resolution>/<clip>/*.png`` and ``ImageSets/<year>/<subset>.txt``.

    Args:
        root: the folder that holds ``JPEGImages`` and ``Annotations``.
        year: ``"2017"`` has several objects a clip, ``"2016"`` merges them into one; by default
            the newest that the folder has.
        subset: ``"val"`` or ``"train"``.
        resolution: ``"480p"`` or ``"Full-Resolution"``.
        sequences: names of the clips wanted; by default all of the subset.
        every: keep every n-th frame; other than 1, figures do not compare with published ones.
        max_frames: keep at most this many frames of a clip; likewise.

    Returns:
        The clips, in the order of ``sequences`` or of the subset's list.

    Raises:
        FrameError: a folder, list, clip or annotation that should be there is not.
        ValueError: an option out of range.
    """
    if every < 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(
            f"got every={every} and max_frames={max_frames}, expected at least 1 for both"
        )
    root = Path(root)
    year = year or _newest(root)
    listed = _listed(root, year, subset)
    for name in sequences or ():
        if name not in listed:
            raise FrameError(
                f"no clip {name!r} in the {subset} subset of DAVIS-{year} in {root}."
                + (did_you_mean(name, listed) or f" It has {len(listed)}: {', '.join(listed[:9])}")
            )
    found = []
    for name in listed if sequences is None else sequences:
        pattern = root / "JPEGImages" / resolution / name / "*.jpg"
        frames = sorted(pattern.parent.glob(pattern.name))[::every][:max_frames]
        folder = root / "Annotations" / resolution / name
        annotations = [folder / f"{frame.stem}.png" for frame in frames]
        missing = next((path for path in annotations if not path.is_file()), None)
        if not frames or missing:
            raise FrameError(
                f"DAVIS clip {name!r} is not complete: no {missing or pattern}; unpack the "
                f"{resolution} archive of DAVIS-{year} again, or leave the clip out of sequences"
            )
        found.append(DavisSequence(name, tuple(frames), tuple(annotations), merge=year == "2016"))
    return found


def _newest(root: Path) -> Literal["2016", "2017"]:
    if (root / "ImageSets" / "2017").is_dir():
        return "2017"
    return "2016"


def _listed(root: Path, year: str, subset: str) -> list[str]:
    """Clip names of a subset; a line is a name, or the paths of a frame (DAVIS-2016's own)."""
    lists = [root / "ImageSets" / year / f"{subset}.txt"]
    if year == "2016":
        lists.append(root / "ImageSets" / "480p" / f"{subset}.txt")
    for path in lists:
        if path.is_file():
            entries = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
            names = [Path(entry).parent.name if "/" in entry else entry for entry in entries]
            return list(dict.fromkeys(names))
    raise FrameError(
        f"no DAVIS-{year} {subset} list in {root}: expected {' or '.join(map(str, lists))}; give "
        "the folder that holds JPEGImages, Annotations and ImageSets"
    )


@dataclasses.dataclass(frozen=True)
class SequenceScores:
    """J and F of a clip, in [0, 1].

    Attributes:
        objects: ids of the objects of the first frame.
        j: for every object, J of every frame that counts (all but the first and the last).
        f: F likewise.
    """

    objects: tuple[int, ...]
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
    masks: NDArray[np.uint8],
    *,
    protocol: Literal["crw", "dino"] = "crw",
    **options: Any,
) -> SequenceScores:
    """Propagate the first mask of a clip by features and score the others.

    The first mask is one-hot at its full size and brought to the grid: bilinear and soft for
    ``crw``, nearest for ``dino``. Propagated labels are brought back bilinear to the size of the
    masks (for ``dino`` each then stretched to [0, 1]) and the strongest one wins.

    Args:
        features: ``(T, C, h, w)``, or an iterable of maps ``(C, h, w)`` or ``(1, C, h, w)``, one
            for every mask; an iterable is consumed at constant memory.
        masks: ``(T, H, W)`` uint8 object ids, 0 the background, 255 void.
        protocol: ``crw`` or ``dino``.
        **options: what :class:`~cosettle_adapter.correspondence.LabelPropagator` takes.

    Raises:
        FrameError: fewer than three masks, no object in the first one, or another number of
            feature maps than masks.
        GeometryError: features that do not fit together.
    """
    np: Any = require("numpy", extra="eval", purpose="measuring masks")
    masks = np.asarray(masks)
    if masks.ndim != 3 or len(masks) < 3 or masks.dtype != np.uint8:
        raise FrameError(
            f"got {masks.dtype} masks of shape {masks.shape}, expected uint8 (T, H, W) with T at "
            "least 3: first and last frame do not count"
        )
    objects = tuple(int(i) for i in np.unique(masks[0]) if i not in (0, VOID))
    if not objects:
        raise FrameError(
            "the first mask has no object (no value from 1 to 254), so there is nothing to "
            "propagate; start the clip at a frame that shows one"
        )
    scores: list[list[tuple[float, float]]] = [[] for _ in objects]
    count = 0
    for count, labels in enumerate(_propagated(features, masks[0], objects, protocol, options), 1):
        if count > len(masks):
            break
        if 1 < count < len(masks):
            truth = masks[count - 1]
            void = truth == VOID
            ids = _decode(labels, truth.shape, protocol)
            for index, object_id in enumerate(objects):
                gt, pred = truth == object_id, ids == index + 1
                score = region_similarity(gt, pred, void=void), boundary_f(gt, pred, void=void)
                scores[index].append(score)
    if count != len(masks):
        raise FrameError(
            f"got {len(masks)} masks, but {'more' if count > len(masks) else count} feature maps; "
            "give one map for every mask"
        )
    return SequenceScores(
        objects,
        j=tuple(tuple(j for j, _ in frames) for frames in scores),
        f=tuple(tuple(f for _, f in frames) for frames in scores),
    )


def mean_over_objects(scores: Iterable[SequenceScores]) -> float:
    """Return the official figure of a data set: mean J&F over all objects of all clips."""
    return _mean([value for score in scores for value in score.per_object])


def _propagated(
    features: Tensor | Iterable[Tensor],
    mask: Any,
    objects: tuple[int, ...],
    protocol: Literal["crw", "dino"],
    options: dict[str, Any],
) -> Iterator[Tensor]:
    propagator: LabelPropagator | None = None
    for feature in features:
        if propagator is None:
            first = _first_labels(mask, objects, feature.shape[-2:], protocol).to(feature.device)
            propagator = LabelPropagator(first, protocol=protocol, **options)
        yield propagator.step(feature)


def _first_labels(
    mask: Any, objects: tuple[int, ...], grid: Sequence[int], protocol: str
) -> Tensor:
    ids = torch.from_numpy(mask.astype("int64"))
    masks = torch.stack([ids == object_id for object_id in objects])
    one_hot = torch.cat([~masks.any(0, keepdim=True), masks])
    mode = "nearest-exact" if protocol == "dino" else "bilinear"
    resized = F.interpolate(rearrange(one_hot, "k h w -> 1 k h w").float(), tuple(grid), mode=mode)
    return rearrange(resized, "1 k h w -> k h w")


def _decode(labels: Tensor, size: Sequence[int], protocol: str) -> NDArray[np.int64]:
    """Label ids ``(H, W)``: 0 the background, then objects by position."""
    soft = F.interpolate(rearrange(labels, "k h w -> 1 k h w"), tuple(size), mode="bilinear")
    soft = rearrange(soft, "1 k h w -> k h w")
    if protocol == "dino":
        low = soft.amin((1, 2), keepdim=True)
        height = soft.amax((1, 2), keepdim=True) - low
        soft = torch.where(height > 0, (soft - low) / height, soft)
    ids: NDArray[np.int64] = soft.argmax(0).cpu().numpy()
    return ids


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
