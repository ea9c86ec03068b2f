"""A benchmark on all its clips: every variant of features from one encoder pass, as JSON.

A run that is repeated with the same output resumes: what the file holds is not computed again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cosettle_adapter.backbones.weights import fingerprint
from cosettle_adapter.errors import CosettleError, FrameError, MissingExtraError
from cosettle_adapter.evaluation.clips import Clip
from cosettle_adapter.evaluation.drift import GAPS, drift_by_gap, mutual_correspondences
from cosettle_adapter.evaluation.protocols import ClipScores, Protocol, mean
from cosettle_adapter.evaluation.variants import (
    FeatureVariant,
    encode_variants,
    feature_variants,
    guide_variant,
)
from cosettle_adapter.io import atomic_path
from cosettle_adapter.version import __version__
from cosettle_adapter.video import open_frames
from cosettle_adapter.video.geometry import nearest_valid, plan_geometry

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.projection import Projection

logger = logging.getLogger(__name__)

DRIFTS = tuple(f"drift@{gap}" for gap in GAPS)


@dataclasses.dataclass
class Evaluation:
    """Figures of a model on a benchmark.

    Attributes:
        task: its name.
        measures: names of its figures, the one to compare by first. Scores and totals have those
            of :data:`DRIFTS` as well.
        settings: everything the figures depend on.
        sizes: clip to the ``(height, width)`` that its frames were encoded at.
        inputs: clip to a hash of its files, by which a resumed run knows them again.
        clips: clip to variant of features to scores.
        total: variant of features to measure to the data set's figure.
        failed: clip to why it could not be scored; those do not count.
    """

    task: str
    measures: tuple[str, ...]
    settings: dict[str, Any]
    sizes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    clips: dict[str, dict[str, ClipScores]] = dataclasses.field(default_factory=dict)
    total: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def variants(self) -> list[str]:
        """Variants of features that were scored, in the order of a table."""
        return list(self.total)

    def first(self, variant: str) -> dict[str, float]:
        """Clip to the first measure of a variant of features, where it is a number."""
        values = {
            name: row[variant].values[self.measures[0]]
            for name, row in self.clips.items()
            if variant in row
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
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    on_clip: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Evaluation:
    """Evaluate all variants of a model's features on a benchmark.

    Args:
        protocol: what to solve.
        adapter: the model.
        variants: what to compare, encoded in the same pass; by default those of
            :func:`~cosettle_adapter.evaluation.variants.feature_variants`.
        model: what to call it in the results.
        output: JSON file that is written after every clip. One of an earlier run with the same
            settings is continued: what it has is not computed again, unless a clip's files changed
            or predictions are wanted that are not there. Clips and variants not asked for stay in
            it.
        predictions: folder for predictions, ``<variant>/<clip>/...``.
        size: ``(height, width)`` in place of the protocol's; sides go to the nearest whole patch.
        batch_size: frames a forward pass.
        on_clip: called with the number of clips done, their number and the name of the next.

    Raises:
        FrameError: no clips, or not one that could be scored; the reasons are given.
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
        **_model_settings(adapter),
        "drift": guide.name if protocol.correspondences is None else "true motion",
        "kinds": {variant.name: _checksum(variant) for variant in variants},
    }
    result = Evaluation(protocol.name, protocol.measures, settings)
    if output is not None and output.is_file():
        _resume(result, output)
    for number, clip in enumerate(clips):
        on_clip(number, len(clips), clip.name)
        digest = clip.digest()
        if digest != result.inputs.get(clip.name):
            for part in (result.clips, result.sizes, result.inputs):
                part.pop(clip.name, None)
        row = result.clips.get(clip.name, {})
        folders = {each.name: _folder(predictions, each.name, clip.name) for each in variants}
        missing = [
            each for each in variants if each.name not in row or not _is_there(folders[each.name])
        ]
        if not missing:
            continue
        try:
            sides = _sides(protocol, adapter, clip, size)
            scores = _score(protocol, adapter, clip, missing, guide, sides, batch_size, folders)
            result.clips[clip.name] = row | scores
            result.sizes[clip.name], result.inputs[clip.name] = sides, digest
        except MissingExtraError:
            raise
        except (CosettleError, OSError) as error:
            logger.warning("%s: %s", clip.name, error)
            result.failed[clip.name] = str(error)
        if output is not None:
            _add_up(result, protocol)
            write_json(result, output)
    on_clip(len(clips), len(clips), "")
    asked = [clip.name for clip in clips if clip.name in result.clips]
    if not asked:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(result.failed.items())[:3])
        raise FrameError(f"none of {len(clips)} clips could be scored. {reasons}")
    result.clips = {name: result.clips[name] for name in asked}
    result.sizes = {name: result.sizes[name] for name in asked}
    result.inputs = {name: result.inputs[name] for name in asked}
    _add_up(result, protocol)
    return result


def write_json(value: Any, path: Path) -> None:
    """Write a value as a JSON file, whole or not at all; see :func:`plain`."""
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """Return a value as dictionaries, lists, strings, numbers and None.

    Data classes become dictionaries, keys strings, and NaN and infinities None, because JSON has
    neither.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _numbers(value: Any) -> Any:
    """Undo :func:`plain` for figures: None becomes NaN again."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return math.nan if value is None else value


def _score(
    protocol: Protocol[Any],
    adapter: CoSettleAdapter,
    clip: Clip[Any],
    variants: Sequence[FeatureVariant],
    guide: FeatureVariant,
    sides: tuple[int, int],
    batch_size: int,
    folders: Mapping[str, Path | None],
) -> dict[str, ClipScores]:
    height, width = clip.read_frame(0).shape[:2]
    patch, stride = adapter.backbone.patch, adapter.backbone.stride
    geometry = plan_geometry(height, width, patch=patch, stride=stride, size=sides)
    truth = protocol.correspondences
    matches = None if truth is None else truth(clip, geometry)
    wanted = [*([guide] if matches is None else []), *variants]
    frames = (clip.read_frame(index) for index in range(len(clip)))
    batches = (chunk.frames for chunk in open_frames(frames, chunk_size=batch_size))
    found = {}
    for name, features in encode_variants(adapter, batches, wanted, size=sides):
        if matches is None:  # the first one is the guide
            matches = {gap: mutual_correspondences(features, gap) for gap in GAPS}
            continue
        scores = protocol.score(clip, features, geometry, folders[name])
        values = {**scores.values, **drift_by_gap(features, matches)}
        found[name] = dataclasses.replace(scores, values=values)
    return found


def _sides(
    protocol: Protocol[Any],
    adapter: CoSettleAdapter,
    clip: Clip[Any],
    size: tuple[int, int] | None,
) -> tuple[int, int]:
    """Sides that frames are encoded at: the protocol's or those asked for, in whole patches."""
    if clip.problem is not None:
        raise FrameError(clip.problem)
    patch, stride = adapter.backbone.patch, adapter.backbone.stride
    height, width = size or protocol.size(clip)
    return nearest_valid(height, patch, stride), nearest_valid(width, patch, stride)


def _model_settings(adapter: CoSettleAdapter) -> dict[str, Any]:
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
        "seed": None,  # nothing is drawn
        "cosettle_adapter": __version__,
        "torch": torch.__version__,
    }


def _tensors(projection: Projection) -> str:
    tensors = dict(projection.state_dict())
    return fingerprint(tensors) if tensors else projection.config.kind


def _checksum(variant: FeatureVariant) -> str:
    """Text that differs where a variant's features do."""
    layers, norm = variant.reads
    read = f"blocks {', '.join(map(str, layers))}{', normed' if norm else ''}"
    made = "as they are" if variant.projection is None else _tensors(variant.projection)
    if variant.projection is not None and variant.projection.config.averaging:
        made += f", averaging {variant.projection.config.averaging}"
    parts = [read, made] + ([] if variant.finish is None else [variant.finish.__name__])
    return "; ".join(parts + ([] if variant.fusion is None else [f"fused {variant.fusion}"]))


def _resume(result: Evaluation, output: Path) -> None:
    """Take over what an earlier run found; the variants that it had join the settings."""
    try:
        stored = json.loads(output.read_text(encoding="utf-8"))
        scored = stored["settings"].pop("kinds", {})
        result.clips = {
            name: {variant: ClipScores(**_numbers(scores)) for variant, scores in row.items()}
            for name, row in stored["clips"].items()
        }
        result.sizes = {name: (int(h), int(w)) for name, (h, w) in stored["sizes"].items()}
        result.inputs = dict(stored["inputs"])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{output} is not a results file ({error}); move it away or choose another"
        ) from error
    if not all(digest.startswith("sha256:") for digest in result.inputs.values()):
        raise ValueError(
            f"{output} was written by version 0.1, whose record of the clips' files does not show "
            "whether they changed; move it away or choose another file"
        )
    kinds = result.settings["kinds"]
    expected = plain({key: value for key, value in result.settings.items() if key != "kinds"})
    changed = sorted(
        key
        for key in {*stored["settings"], *expected}
        if stored["settings"].get(key) != expected.get(key)
    )
    changed += [name for name, made in kinds.items() if scored.get(name, made) != made]
    if changed:
        raise ValueError(
            f"{output} holds results of other settings (different: {', '.join(changed)}); move it "
            "away or choose another file"
        )
    result.settings["kinds"] = {**kinds, **scored}


def _folder(predictions: Path | None, variant: str, clip: str) -> Path | None:
    return None if predictions is None else predictions / variant.replace(" ", "-") / clip


def _is_there(folder: Path | None) -> bool:
    return folder is None or folder.is_dir()


def _add_up(result: Evaluation, protocol: Protocol[Any]) -> None:
    """Total what was scored, also variants of an earlier run."""
    rows = list(result.clips.values())
    result.total = {}
    names = [name for name in result.settings["kinds"] if any(name in row for row in rows)]
    for name in names:
        scores = [row[name] for row in rows if name in row]
        drifts = {
            drift: mean(clip.values[drift] for clip in scores if drift in clip.values)
            for drift in DRIFTS
            if any(drift in clip.values for clip in scores)  # a short clip has no frames that far
        }
        result.total[name] = protocol.totals(scores) | drifts
