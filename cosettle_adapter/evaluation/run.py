"""Run a benchmark on clips: all variants of features from one encoder pass, results as JSON.

A run with an existing output file resumes: results in the file are not computed again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter, Size
from cosettle_adapter.backbones.weights import fingerprint
from cosettle_adapter.errors import CosettleError, FrameError, MissingExtraError
from cosettle_adapter.evaluation.clips import A, Clip
from cosettle_adapter.evaluation.drift import (
    GAPS,
    Correspondence,
    drift_by_gap,
    mutual_correspondences,
)
from cosettle_adapter.evaluation.variants import (
    FeatureVariant,
    Preprocess,
    encode_variants,
    feature_variants,
    guide_variant,
)
from cosettle_adapter.io import atomic_path
from cosettle_adapter.projection import Projection
from cosettle_adapter.version import __version__
from cosettle_adapter.video import open_frames
from cosettle_adapter.video.geometry import Geometry, nearest_valid, plan_geometry

logger = logging.getLogger(__name__)

DRIFTS = tuple(f"drift@{gap}" for gap in GAPS)


@dataclasses.dataclass(frozen=True)
class ClipScores:
    """One clip's figures by measure, for one variant of features.

    The data set's figures are computed from ``counts`` if they are not the mean over clips.
    """

    values: Mapping[str, float]
    counts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Protocol(Generic[A]):
    """A benchmark on clips for frozen features.

    ``size`` returns the ``(height, width)`` in pixels to which a clip's frames are resized.
    ``score`` solves the task on a clip with features ``(T, C, h, w)`` and the geometry of their
    grid, and scores the result; given a folder, it writes predictions there.
    """

    name: str
    measures: tuple[str, ...]  # shares in [0, 1]; variants are compared by the first
    clips: Callable[[], Sequence[Clip[A]]]
    size: Callable[[Clip[A]], tuple[int, int]]
    score: Callable[[Clip[A], Tensor, Geometry, Path | None], ClipScores]
    settings: Mapping[str, Any]  # that affect the figures, besides model, data and frame size
    total: Callable[[Sequence[ClipScores]], dict[str, float]] | None = None  # by default the mean
    preprocess: Preprocess = CoSettleAdapter.preprocess  # converts frames to the backbone's images
    correspondences: (  # by gap, the patches that truly correspond, if known
        Callable[[Clip[A], Geometry], Mapping[int, Sequence[Correspondence]]] | None
    ) = None

    def totals(self, scores: Sequence[ClipScores]) -> dict[str, float]:
        """Return the data set's figures."""
        if self.total is not None:
            return self.total(scores)
        return {name: mean(clip.values[name] for clip in scores) for name in self.measures}


@dataclasses.dataclass
class ClipResult:
    """A clip's scores by variant of features."""

    inputs: str  # digest of the clip, by which a resumed run detects changes
    size: list[int]  # (height, width) of the encoded frames
    scores: dict[str, ClipScores]


@dataclasses.dataclass
class Evaluation:
    """Results of a model on a benchmark; scores and totals include :data:`DRIFTS`."""

    task: str
    measures: tuple[str, ...]  # variants are compared by the first
    settings: dict[str, Any]  # everything that affects the figures
    clips: dict[str, ClipResult] = dataclasses.field(default_factory=dict)
    total: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by variant
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # unscored clip to the reason

    def first(self, variant: str) -> dict[str, float]:
        """Return the first measure of a variant by clip, without NaN."""
        values = {
            name: clip.scores[variant].values[self.measures[0]]
            for name, clip in self.clips.items()
            if variant in clip.scores
        }
        return {name: value for name, value in values.items() if value == value}


def evaluate(
    protocol: Protocol[Any],
    adapter: CoSettleAdapter,
    variants: Sequence[FeatureVariant] | None = None,
    *,
    model: str = "",
    output: Path | None = None,
    predictions: Path | None = None,
    size: Size | None = None,
    batch_size: int = 8,
    on_clip: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Evaluation:
    """Evaluate all variants of a model's features on a benchmark.

    Args:
        protocol: the benchmark.
        adapter: the model; the results call it ``model``.
        variants: variants to compare; by default
            :func:`~cosettle_adapter.evaluation.variants.feature_variants`.
        output: JSON file that is written after every clip. An existing file with the same settings
            is resumed: its scores are not computed again, unless a clip's files changed or
            predictions are missing. It keeps clips and variants that this run does not request.
        predictions: folder for predictions, ``<variant>/<clip>/...``.
        size: ``(height, width)`` or shorter side of the encoded frames, rounded to whole patches;
            by default the protocol's.
        batch_size: frames per forward pass.
        on_clip: called with the number of clips done, the number of all and the next clip's name.

    Raises:
        FrameError: no clip could be scored; the message gives the reasons.
        ValueError: ``output`` holds results of other settings.
    """
    variants = variants or feature_variants(adapter)
    guide = guide_variant(adapter, variants)
    clips = protocol.clips()
    settings = {
        "task": protocol.name,
        **protocol.settings,
        "frame_size": size or "the protocol's",
        "model": model or adapter.config.backbone,
        **model_settings(adapter),
        "drift": guide.name if protocol.correspondences is None else "true motion",
        "kinds": {variant.name: _described(variant) for variant in variants},
    }
    result = Evaluation(protocol.name, protocol.measures, settings)
    if output is not None and output.is_file():
        _resume(result, output)

    def folder(variant: str, clip: Clip[Any]) -> Path | None:
        if predictions is None:
            return None
        return predictions / variant.replace(" ", "-") / clip.name

    def score(clip: Clip[Any], missing: Sequence[FeatureVariant], entry: ClipResult) -> None:
        height, width = clip.read_frame(0).shape[:2]
        patch, stride = adapter.backbone.patch, adapter.backbone.stride
        sides = size or protocol.size(clip)
        if not isinstance(sides, int):
            rows, columns = (nearest_valid(side, patch, stride) for side in sides)
            sides = rows, columns
        geometry = plan_geometry(height, width, patch=patch, stride=stride, size=sides)
        truth = protocol.correspondences
        matches = None if truth is None else truth(clip, geometry)
        encoded = [*([guide] if matches is None else []), *missing]
        frames = (clip.read_frame(index) for index in range(len(clip)))
        batches = (chunk.frames for chunk in open_frames(frames, chunk_size=batch_size))
        new = {}
        for name, features in encode_variants(
            adapter, batches, encoded, size=geometry.resized, preprocess=protocol.preprocess
        ):
            if matches is None:  # the guide comes first
                matches = {gap: mutual_correspondences(features, gap) for gap in GAPS}
                continue
            scores = protocol.score(clip, features, geometry, folder(name, clip))
            values = {**scores.values, **drift_by_gap(features, matches)}
            new[name] = dataclasses.replace(scores, values=values)
        entry.size = list(geometry.resized)
        entry.scores |= new
        result.clips[clip.name] = entry

    for number, clip in enumerate(clips):
        on_clip(number, len(clips), clip.name)
        entry, digest = result.clips.get(clip.name), clip.digest()
        if entry is None or entry.inputs != digest:
            result.clips.pop(clip.name, None)
            entry = ClipResult(digest, [], {})
        missing = []
        for variant in variants:
            path = folder(variant.name, clip)
            if variant.name not in entry.scores or (path and not path.is_dir()):
                missing.append(variant)
        if not missing:
            continue
        try:
            score(clip, missing, entry)
        except MissingExtraError:  # would fail for every clip
            raise
        except (CosettleError, OSError) as error:
            logger.warning("%s: %s", clip.name, error)
            result.failed[clip.name] = str(error)
        if output is not None:
            _add_up(result, protocol)
            write_json(result, output)
    on_clip(len(clips), len(clips), "")
    scored = result.clips
    result.clips = {clip.name: scored[clip.name] for clip in clips if clip.name in scored}
    if not result.clips:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(result.failed.items())[:3])
        raise FrameError(f"none of {len(clips)} clips could be scored. {reasons}")
    _add_up(result, protocol)
    return result


def mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if value == value]
    return float(sum(known) / len(known)) if known else math.nan


def save_positions(xy: Any, folder: Path | None) -> None:
    """Write predicted (x, y) pixels as ``positions.json``, if ``folder`` is given."""
    if folder is not None:
        write_json({"xy": xy.tolist()}, folder / "positions.json")


def write_json(value: Any, path: Path) -> None:
    """Write a value as a JSON file, atomically; see :func:`plain`."""
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """Convert records to dictionaries, and NaN and infinities, which JSON lacks, to None."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def model_settings(adapter: CoSettleAdapter) -> dict[str, Any]:
    """Return the properties of a model that affect its figures."""
    config, backbone = adapter.config, adapter.backbone
    return {
        "backbone": config.backbone,
        "fingerprint": backbone.fingerprint,
        "layers": list(config.layers),
        "norm": config.norm,
        "projection": _tensors(adapter.projection),
        "patch": backbone.patch,
        "stride": backbone.stride,
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "cosettle_adapter": __version__,
        "torch": torch.__version__,
    }


def _tensors(projection: Projection) -> str:
    tensors = dict(projection.state_dict())
    return fingerprint(tensors) if tensors else projection.config.kind


def _described(variant: FeatureVariant) -> str:
    """Return a text that differs if the variant's features differ."""
    projection = variant.projection
    applied = None if projection is None else (_tensors(projection), projection.config.averaging)
    finish = None if variant.finish is None else variant.finish.__name__
    return str((variant.reads, applied, finish, variant.fusion))


def _resume(result: Evaluation, output: Path) -> None:
    """Add the clips and variants of an earlier run, which must have the same settings."""
    try:
        stored = json.loads(output.read_text(encoding="utf-8"))
        before, scored = stored["settings"], stored["settings"].pop("kinds")
        for name, clip in stored["clips"].items():
            scores = {kind: ClipScores(**_numbers(row)) for kind, row in clip["scores"].items()}
            result.clips[name] = ClipResult(**clip | {"scores": scores})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{output} is not a results file ({error}); move it away or choose another file"
        ) from error
    now = plain(result.settings)
    kinds = now.pop("kinds")
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    changed += [name for name, text in kinds.items() if scored.get(name, text) != text]
    if changed:
        raise ValueError(
            f"{output} holds results of other settings (different: {', '.join(changed)}); move it "
            "away or choose another file"
        )
    result.settings["kinds"] = {**kinds, **scored}


def _numbers(value: Any) -> Any:
    """Undo :func:`plain` for figures: None becomes NaN."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return math.nan if value is None else value


def _add_up(result: Evaluation, protocol: Protocol[Any]) -> None:
    """Compute the totals of all variants, including those of an earlier run."""
    result.total = {}
    for name in result.settings["kinds"]:
        scores = [clip.scores[name] for clip in result.clips.values() if name in clip.scores]
        if scores:
            drifts = {  # short clips lack the long gaps
                gap: mean(clip.values.get(gap, math.nan) for clip in scores) for gap in DRIFTS
            }
            result.total[name] = protocol.totals(scores) | drifts
