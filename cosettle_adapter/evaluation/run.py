"""A task on all its clips: every kind of features from one encoder pass, resumable, as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cosettle_adapter.analysis import (
    ADAPTED,
    GAPS,
    FeatureKind,
    drift_by_gap,
    feature_kinds,
    guide_kind,
    mutual_correspondences,
)
from cosettle_adapter.backbones.weights import fingerprint
from cosettle_adapter.errors import CosettleError, FrameError, MissingExtraError
from cosettle_adapter.evaluation.clip_features import clip_features
from cosettle_adapter.evaluation.plain_json import numbers, plain, write_json
from cosettle_adapter.evaluation.tasks import ClipScores, Task
from cosettle_adapter.evaluation.tasks.base import mean
from cosettle_adapter.version import __version__
from cosettle_adapter.video.geometry import plan_geometry
from cosettle_adapter.video.sides import nearest_valid

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.correspondence.fusion import FusionMode
    from cosettle_adapter.projection import Projection

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, ClipScores]]  # clip, kind of features
DRIFTS = tuple(f"drift@{gap}" for gap in GAPS)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures of a model on a task.

    Attributes:
        task: its name.
        measures: names of its figures, the one to compare by first. Scores and totals have those
            of :data:`DRIFTS` beside them.
        settings: everything the figures depend on.
        sizes: clip to the ``(height, width)`` that its frames were encoded at.
        inputs: clip to a digest of its files, by which a continued run knows them again.
        clips: clip to kind of features to scores.
        total: kind of features to measure to the data set's figure.
        failed: clip to why it could not be scored; those do not count.
    """

    task: str
    measures: tuple[str, ...]
    settings: Mapping[str, Any]
    sizes: Mapping[str, tuple[int, int]]
    inputs: Mapping[str, str]
    clips: Mapping[str, Mapping[str, ClipScores]]
    total: Mapping[str, Mapping[str, float]]
    failed: Mapping[str, str]

    @property
    def kinds(self) -> list[str]:
        """Kinds of features that were scored, in the order of a table."""
        return list(self.total)

    def first(self, kind: str) -> dict[str, float]:
        """Clip to the first measure of a kind of features, where it is a number."""
        values = {
            name: row[kind].values[self.measures[0]]
            for name, row in self.clips.items()
            if kind in row
        }
        return {name: value for name, value in values.items() if value == value}


def evaluate(
    task: Task[Any],
    adapter: CoSettleAdapter,
    *,
    model: str = "",
    output: Path | None = None,
    predictions: Path | None = None,
    size: tuple[int, int] | None = None,
    raw_only: bool = False,
    beside: Mapping[str, Projection] | None = None,
    settle: bool | None = None,
    centre: bool = False,
    baseline_layers: Sequence[int] = (),
    fusion: FusionMode | None = None,
    batch_size: int = 8,
    on_clip: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Evaluation:
    """Evaluate a model on a task, beside what needs no projection.

    Args:
        task: what to solve.
        adapter: the model.
        model: what to call it in the results.
        output: JSON file that is written after every clip. One of an earlier run with the same
            settings is continued: what it has is not computed again, unless a clip's files changed
            or predictions are wanted that are not there. Clips and kinds of features not asked
            for stay in it.
        predictions: folder for predictions, ``<kind of features>/<clip>/...``.
        size: ``(height, width)`` in place of the protocol's; sides go to the nearest whole patch.
        raw_only: score the backbone's own features only.
        beside: name to other projections of the same backbone to score in the same pass.
        settle, centre, baseline_layers, fusion: further kinds of features, as
            :func:`~cosettle_adapter.analysis.feature_kinds` says.
        batch_size: frames a forward pass.
        on_clip: called with the number of clips done, their number and the name of the next.

    Raises:
        FrameError: no clips, or not one that could be scored; the reasons are given.
        ValueError: ``output`` holds results of other settings.
        BackboneMismatchError: a projection of another backbone beside.
    """
    known = feature_kinds(
        adapter,
        beside=beside,
        settle=settle,
        centre=centre,
        baseline_layers=baseline_layers,
        fusion=fusion,
    )
    kinds = [kind for kind in known if not (raw_only and kind.name.startswith(ADAPTED))]
    guide = guide_kind(adapter, kinds)
    clips = task.clips()
    if not clips:
        raise FrameError(f"no clips for {task.name}: nothing to evaluate")
    settings = _settings(task, adapter, model=model, size=size)
    settings["drift"] = task.drift_by or guide.name
    settings["kinds"] = {kind.name: _checksum(kind) for kind in kinds}
    stored = _resumed(output, settings)
    failed: dict[str, str] = {}
    for number, clip in enumerate(clips):
        on_clip(number, len(clips), clip.name)
        digest = _digest(clip)
        if digest != stored.inputs.get(clip.name):
            stored.forget(clip.name)
        row = stored.clips.get(clip.name, {})
        missing = [kind for kind in kinds if not _done(row, kind.name, predictions, clip.name)]
        if not missing:
            continue
        try:
            sides = _sides(task, adapter, clip, size)
            scores = _score(
                task,
                adapter,
                clip,
                missing,
                guide,
                sides=sides,
                batch_size=batch_size,
                predictions=predictions,
            )
        except MissingExtraError:
            raise
        except (CosettleError, OSError) as error:
            logger.warning("%s: %s", clip.name, error)
            failed[clip.name] = str(error)
        else:
            stored.add(clip.name, digest, sides, {**row, **scores})
        if output is not None:
            write_json(_summarised(task, settings, stored, failed, kinds), output)
    on_clip(len(clips), len(clips), "")
    wanted = stored.only([clip.name for clip in clips])
    if not wanted.clips:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(failed.items())[:3])
        raise FrameError(f"none of {len(clips)} clips could be scored. {reasons}")
    return _summarised(task, settings, wanted, failed, kinds)


@dataclasses.dataclass
class _Stored:
    """Clips that are scored: their scores, the sizes and digests that those belong to."""

    clips: Scores = dataclasses.field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(
        self, name: str, digest: str, size: tuple[int, int], scores: dict[str, ClipScores]
    ) -> None:
        self.clips[name], self.sizes[name], self.inputs[name] = scores, size, digest

    def forget(self, name: str) -> None:
        for part in (self.clips, self.sizes, self.inputs):
            part.pop(name, None)

    def only(self, names: Sequence[str]) -> _Stored:
        known = [name for name in names if name in self.clips]
        return _Stored(
            {name: self.clips[name] for name in known},
            {name: self.sizes[name] for name in known},
            {name: self.inputs[name] for name in known},
        )


def _digest(clip: Any) -> str:
    """Digest of what a clip is made of: names and sizes of its files, or its arrays."""
    digest = hashlib.sha256(f"{clip.name} {len(clip)}".encode())
    for field in ("frames", "annotations", "segmentations", "joints_file"):
        paths = getattr(clip, field, ())
        for path in (paths,) if isinstance(paths, Path) else paths:
            size = path.stat().st_size if path.is_file() else None
            digest.update(f"{field} {path.name} {size}".encode())
    for field in ("points", "occluded"):
        digest.update(bytes(getattr(clip, field, b"")))
    return digest.hexdigest()


def _score(
    task: Task[Any],
    adapter: CoSettleAdapter,
    clip: Any,
    kinds: Sequence[FeatureKind],
    guide: FeatureKind,
    *,
    sides: tuple[int, int],
    batch_size: int,
    predictions: Path | None,
) -> dict[str, ClipScores]:
    patch, stride = adapter.backbone.patch, adapter.backbone.stride
    frame = clip.read_frame(0).shape
    geometry = plan_geometry(frame[0], frame[1], patch=patch, stride=stride, size=sides)
    matches = task.correspondences(clip, geometry)
    wanted = [*([guide] if matches is None else []), *kinds]
    found: dict[str, ClipScores] = {}
    for kind, features in clip_features(adapter, clip, wanted, size=sides, batch_size=batch_size):
        if matches is None:  # the first kind is the guide
            matches = {gap: mutual_correspondences(features, gap) for gap in GAPS}
            continue
        folder = None if predictions is None else _folder(predictions, kind, clip.name)
        scores = task.score(clip, features, geometry, predictions=folder)
        values = {**scores.values, **drift_by_gap(features, matches)}
        found[kind] = dataclasses.replace(scores, values=values)
    return found


def _sides(
    task: Task[Any], adapter: CoSettleAdapter, clip: Any, size: tuple[int, int] | None
) -> tuple[int, int]:
    """Sides that frames are encoded at: the protocol's or those asked for, in whole patches."""
    if clip.problem is not None:
        raise FrameError(clip.problem)
    patch, stride = adapter.backbone.patch, adapter.backbone.stride
    height, width = size or task.size(clip)
    return nearest_valid(height, patch, stride), nearest_valid(width, patch, stride)


def _settings(
    task: Task[Any],
    adapter: CoSettleAdapter,
    *,
    model: str,
    size: tuple[int, int] | None,
) -> dict[str, Any]:
    config, backbone = adapter.config, adapter.backbone
    return {
        "task": task.name,
        **task.settings(),
        "frame_size": "the protocol's" if size is None else list(size),
        "model": model or config.backbone,
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


def _checksum(kind: FeatureKind) -> str:
    """Text that differs where a kind's features do."""
    layers, norm = kind.blocks
    read = f"blocks {', '.join(map(str, layers))}{', normed' if norm else ''}"
    made = "as they are" if kind.projection is None else _tensors(kind.projection)
    if kind.projection is not None and kind.projection.config.averaging:
        made += f", averaging {kind.projection.config.averaging}"
    parts = [read, made] + ([] if kind.finish is None else [kind.finish.__name__])
    return "; ".join(parts + ([] if kind.fusion is None else [f"fused {kind.fusion}"]))


def _resumed(output: Path | None, settings: dict[str, Any]) -> _Stored:
    """What an earlier run found; the kinds of features that it had join the settings."""
    if output is None or not output.is_file():
        return _Stored()
    try:
        stored = json.loads(output.read_text(encoding="utf-8"))
        scored = stored["settings"].pop("kinds", {})
        found = _Stored(
            clips={
                name: {kind: ClipScores(**numbers(scores)) for kind, scores in row.items()}
                for name, row in stored["clips"].items()
            },
            sizes={name: (int(h), int(w)) for name, (h, w) in stored["sizes"].items()},
            inputs=dict(stored["inputs"]),
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{output} is not a results file ({error}); move it away or choose another"
        ) from error
    expected = plain({key: value for key, value in settings.items() if key != "kinds"})
    changed = sorted(
        key
        for key in {*stored["settings"], *expected}
        if stored["settings"].get(key) != expected.get(key)
    )
    changed += [name for name, made in settings["kinds"].items() if scored.get(name, made) != made]
    if changed:
        raise ValueError(
            f"{output} holds results of other settings (different: {', '.join(changed)}); move it "
            "away or choose another file"
        )
    settings["kinds"] = {**settings["kinds"], **scored}
    return found


def _done(row: Mapping[str, ClipScores], kind: str, predictions: Path | None, name: str) -> bool:
    """Whether a clip has scores of a kind, and predictions where they are wanted."""
    written = predictions is None or _folder(predictions, kind, name).is_dir()
    return kind in row and written


def _folder(predictions: Path, kind: str, name: str) -> Path:
    return predictions / kind.replace(" ", "-") / name


def _summarised(
    task: Task[Any],
    settings: Mapping[str, Any],
    stored: _Stored,
    failed: Mapping[str, str],
    kinds: Sequence[FeatureKind],
) -> Evaluation:
    # an earlier run may have scored more kinds
    names = [kind.name for kind in kinds] + [kind for row in stored.clips.values() for kind in row]
    by_kind: dict[str, Sequence[ClipScores]] = {
        kind: [row[kind] for row in stored.clips.values() if kind in row]
        for kind in dict.fromkeys(names)
    }
    return Evaluation(
        task=task.name,
        measures=task.measures,
        settings=settings,
        sizes=dict(stored.sizes),
        inputs=dict(stored.inputs),
        clips=dict(stored.clips),
        total={kind: _total(task, scores) for kind, scores in by_kind.items() if scores},
        failed=dict(failed),
    )


def _total(task: Task[Any], scores: Sequence[ClipScores]) -> dict[str, float]:
    total = task.total(scores)
    for drift in DRIFTS:  # a short clip has no frames that far apart
        known = [clip.values[drift] for clip in scores if drift in clip.values]
        total |= {drift: mean(known)} if known else {}
    return total
