"""A benchmark on clips and its run: every variant of features from one encoder pass, as JSON.

A run that is repeated with the same output resumes: what the file holds is not computed again.
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

from cosettle_adapter.adapter import CoSettleAdapter
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

    ``counts`` are what the data set's figures are made of, where they are no mean over clips.
    """

    values: Mapping[str, float]
    counts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Protocol(Generic[A]):
    """A benchmark on clips that frozen features alone can solve.

    ``size`` is the ``(height, width)`` in pixels that frames of a clip are resized to. ``score``
    solves the task on a clip with features ``(T, C, h, w)``, given the geometry from frames to the
    grid, and scores it; it writes predictions to a folder, if there is one.
    """

    name: str
    measures: tuple[str, ...]  # shares of 1, the one to compare by first
    clips: Callable[[], Sequence[Clip[A]]]
    size: Callable[[Clip[A]], tuple[int, int]]
    score: Callable[[Clip[A], Tensor, Geometry, Path | None], ClipScores]
    settings: Mapping[str, Any]  # all the figures depend on besides model, data and frame size
    total: Callable[[Sequence[ClipScores]], dict[str, float]] | None = None  # if no mean over clips
    correspondences: (  # by gap, the patches that truly correspond, where that is known
        Callable[[Clip[A], Geometry], Mapping[int, Sequence[Correspondence]]] | None
    ) = None

    def totals(self, scores: Sequence[ClipScores]) -> dict[str, float]:
        """Return the data set's figures."""
        if self.total is not None:
            return self.total(scores)
        return {name: mean(clip.values[name] for clip in scores) for name in self.measures}


@dataclasses.dataclass
class ClipResult:
    """A clip's scores by variant of features, and the size that its frames were encoded at.

    ``inputs`` is a hash of its files, by which a resumed run knows them again.
    """

    inputs: str
    size: list[int]
    scores: dict[str, ClipScores]


@dataclasses.dataclass
class Evaluation:
    """Figures of a model on a benchmark, which scores and totals have :data:`DRIFTS` beside."""

    task: str
    measures: tuple[str, ...]  # the one to compare by first
    settings: dict[str, Any]  # everything the figures depend on
    clips: dict[str, ClipResult] = dataclasses.field(default_factory=dict)
    total: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by variant
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # clips, which do not count

    def first(self, variant: str) -> dict[str, float]:
        """Clip to the first measure of a variant of features, where it is a number."""
        found = {
            name: clip.scores[variant].values[self.measures[0]]
            for name, clip in self.clips.items()
            if variant in clip.scores
        }
        return {name: value for name, value in found.items() if value == value}


def evaluate(
    protocol: Protocol[Any],
    adapter: CoSettleAdapter,
    variants: Sequence[FeatureVariant] | None = None,
    *,
    model: str = "",
    output: Path | None = None,
    predictions: Path | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    on_clip: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Evaluation:
    """Evaluate all variants of a model's features on a benchmark.

    Args:
        protocol: the benchmark.
        adapter: the model; ``model`` is what to call it in the results.
        variants: what to compare; by default
            :func:`~cosettle_adapter.evaluation.variants.feature_variants`.
        output: JSON file that is written after every clip. One of an earlier run with the same
            settings is continued: what it has is not computed again, unless a clip's files changed
            or predictions are wanted that are not there. Clips and variants not asked for stay.
        predictions: folder for predictions, ``<variant>/<clip>/...``.
        size: ``(height, width)`` in place of the protocol's; sides go to the nearest whole patch.
        batch_size: frames a forward pass.
        on_clip: called with the number of clips done, their number and the name of the next.

    Raises:
        FrameError: not one clip could be scored; the reasons are given.
        ValueError: ``output`` holds results of other settings.
    """
    variants = variants or feature_variants(adapter)
    guide = guide_variant(adapter, variants)
    clips = protocol.clips()
    settings = {
        "task": protocol.name,
        **protocol.settings,
        "frame_size": "the protocol's" if size is None else list(size),
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

    def score(clip: Clip[Any], missing: Sequence[FeatureVariant], held: ClipResult) -> None:
        height, width = clip.read_frame(0).shape[:2]
        patch, stride = adapter.backbone.patch, adapter.backbone.stride
        rows, columns = (nearest_valid(s, patch, stride) for s in size or protocol.size(clip))
        geometry = plan_geometry(height, width, patch=patch, stride=stride, size=(rows, columns))
        truth = protocol.correspondences
        matches = None if truth is None else truth(clip, geometry)
        wanted = [*([guide] if matches is None else []), *missing]
        frames = (clip.read_frame(index) for index in range(len(clip)))
        batches = (chunk.frames for chunk in open_frames(frames, chunk_size=batch_size))
        found = {}
        for name, features in encode_variants(adapter, batches, wanted, size=geometry.resized):
            if matches is None:  # the first one is the guide
                matches = {gap: mutual_correspondences(features, gap) for gap in GAPS}
                continue
            scores = protocol.score(clip, features, geometry, folder(name, clip))
            values = {**scores.values, **drift_by_gap(features, matches)}
            found[name] = dataclasses.replace(scores, values=values)
        held.size = list(geometry.resized)
        held.scores |= found
        result.clips[clip.name] = held

    for number, clip in enumerate(clips):
        on_clip(number, len(clips), clip.name)
        held, digest = result.clips.get(clip.name), clip.digest()
        if held is None or held.inputs != digest:
            result.clips.pop(clip.name, None)
            held = ClipResult(digest, [], {})
        missing = []
        for variant in variants:
            place = folder(variant.name, clip)
            if variant.name not in held.scores or (place and not place.is_dir()):
                missing.append(variant)
        if not missing:
            continue
        try:
            score(clip, missing, held)
        except MissingExtraError:
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
    """Return the mean of the values that are numbers; NaN without any."""
    known = [value for value in values if value == value]
    return float(sum(known) / len(known)) if known else math.nan


def save_positions(xy: Any, folder: Path | None) -> None:
    """Write predicted (x, y) pixels of a clip's frames as ``positions.json``, given a folder."""
    if folder is not None:
        write_json({"xy": xy.tolist()}, folder / "positions.json")


def write_json(value: Any, path: Path) -> None:
    """Write a value as a JSON file, whole or not at all; see :func:`plain`."""
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """Return a value as dictionaries, lists, strings, numbers and None.

    Records become dictionaries, keys strings, and NaN and infinities None: JSON has neither.
    """
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
    """Return what figures depend on of a model."""
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
    """Text that differs where a variant's features do."""
    projection = variant.projection
    made = None if projection is None else (_tensors(projection), projection.config.averaging)
    finish = None if variant.finish is None else variant.finish.__name__
    return str((variant.reads, made, finish, variant.fusion))


def _resume(result: Evaluation, output: Path) -> None:
    """Take over what an earlier run found; the variants that it had join the settings."""
    try:
        stored = json.loads(output.read_text(encoding="utf-8"))
        before, scored = stored["settings"], stored["settings"].pop("kinds")
        for name, clip in stored["clips"].items():
            scores = {each: ClipScores(**_numbers(row)) for each, row in clip["scores"].items()}
            result.clips[name] = ClipResult(**clip | {"scores": scores})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{output} is not a results file ({error}); move it away or choose another"
        ) from error
    now = plain(result.settings)
    kinds = now.pop("kinds")
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    changed += [name for name, made in kinds.items() if scored.get(name, made) != made]
    if changed:
        raise ValueError(
            f"{output} holds results of other settings (different: {', '.join(changed)}); move it "
            "away or choose another file"
        )
    result.settings["kinds"] = {**kinds, **scored}


def _numbers(value: Any) -> Any:
    """Undo :func:`plain` for figures: None becomes NaN again."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return math.nan if value is None else value


def _add_up(result: Evaluation, protocol: Protocol[Any]) -> None:
    """Total what was scored, also variants of an earlier run."""
    result.total = {}
    for name in result.settings["kinds"]:
        scores = [clip.scores[name] for clip in result.clips.values() if name in clip.scores]
        if scores:  # short clips lack the long gaps
            drifts = {
                gap: mean(clip.values.get(gap, math.nan) for clip in scores) for gap in DRIFTS
            }
            result.total[name] = protocol.totals(scores) | drifts
