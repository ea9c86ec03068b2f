"""The tasks of ``evaluate`` on whole videos: representation, classification, retrieval, ..."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosettle_adapter.cli.evaluate import adapter_of, projections_beside
from cosettle_adapter.cli.options import frame_progress

if TYPE_CHECKING:
    from rich.console import Console

    from cosettle_adapter.adapter import CoSettleAdapter

Advance = Callable[[int, int], None]
Table = Mapping[str, Mapping[str, str]]  # measure, kind of features


@dataclasses.dataclass(frozen=True)
class VideoResult:
    """What a task on videos found, ready to be shown and stored.

    Attributes:
        table: measure to kind of features to figure, as text.
        total: the same as numbers.
        settings: what the figures depend on.
        notes: sentences below the table.
        skipped: video to why it could not be used.
        details: figures by video or class.
    """

    table: Table
    total: Mapping[str, Mapping[str, float]]
    settings: Mapping[str, Any]
    notes: Sequence[str]
    skipped: Mapping[str, str]
    details: Any


def run(options: argparse.Namespace, console: Console) -> int:
    """Run the task, print its table, write its files."""
    from rich.table import Table as RichTable

    from cosettle_adapter.evaluation.plain_json import write_json

    tasks: dict[str, Callable[[argparse.Namespace, CoSettleAdapter, Advance], VideoResult]] = {
        "representation": representation,
        "classification": classification,
        "retrieval": retrieval,
        "localisation": localisation,
    }
    _check(options)
    with console.status(f"loading {options.model}"):
        adapter = adapter_of(options)
    with frame_progress(console) as progress:
        bar = progress.add_task("videos", total=None, rate="")

        def advance(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        result = tasks[options.task](options, adapter, advance)
    kinds = list(dict.fromkeys(kind for row in result.table.values() for kind in row))
    table = RichTable(title=f"{options.task}: {options.model}", title_justify="left")
    table.add_column("", no_wrap=True)
    for kind in kinds:
        table.add_column(kind, justify="right")
    for measure, row in result.table.items():
        table.add_row(measure, *(row.get(kind, "") for kind in kinds))
    console.print(table)
    for note in result.notes:
        console.print(note, markup=False)
    for name, reason in result.skipped.items():
        console.print(f"skipped {name}: {reason}", markup=False, style="red", soft_wrap=True)
    if options.output:
        stored = {
            "task": options.task,
            "settings": {**result.settings, **_model_settings(options, adapter)},
            "total": result.total,
            "skipped": result.skipped,
            "details": result.details,
        }
        write_json(stored, options.output)
        console.print(f"results in {options.output}", markup=False)
    return 1 if result.skipped else 0


def representation(
    options: argparse.Namespace, adapter: CoSettleAdapter, advance: Advance
) -> VideoResult:
    """The paper's Figure 1 and its theory, on a folder of videos or of image folders."""
    from cosettle_adapter.evaluation.representation import (
        RepresentationSettings,
        evaluate_representation,
    )

    settings = RepresentationSettings(
        **_given(options, {"frames": "frames", "rate": "rate", "size": "size", "seed": "seed"})
    )
    found = evaluate_representation(
        adapter,
        find_videos(options.data, wanted=options.clips),
        settings,
        batch_size=options.batch_size,
        kinds=_kinds(options, adapter),
        on_video=advance,
    )
    figures: dict[str, Callable[[Any], float]] = {
        "D_intra": lambda each: each.d_intra[95.0],
        "D_inter": lambda each: each.d_inter[95.0],
        "margin D": lambda each: each.margin(),
        "effective rank": lambda each: each.effective_rank,
        "cycle accuracy": lambda each: each.cycle_accuracy,
    }
    total = {
        kind: {measure: figure(each) for measure, figure in figures.items()}
        for kind, each in found.results.items()
    }
    notes = ["distances are shares of the diameter (95th percentile)"]
    if found.spectrum is not None:
        prediction = found.spectrum.prediction
        notes.append(
            "the projection's gain against temporal variance: Spearman "
            f"{prediction.spearman:+.2f}; against its share of all variance "
            f"{prediction.spearman_share:+.2f} (the paper's theory predicts negative)"
        )
    if options.report is not None:
        _write_report(options, found)
        notes.append(f"report: {options.report}")
    return VideoResult(
        table=_by_measure(total, lambda measure, value: f"{value:.4f}"),
        total=total,
        settings=dataclasses.asdict(settings),
        notes=notes,
        skipped=found.skipped,
        details={kind: each.videos for kind, each in found.results.items()},
    )


def classification(
    options: argparse.Namespace, adapter: CoSettleAdapter, advance: Advance
) -> VideoResult:
    """KNN and a linear probe on a folder per class."""
    from cosettle_adapter.evaluation.classification import classify

    seed = options.seed or 0
    ks = tuple(options.ks or (1, 5, 10, 20))
    found = classify(_pooled(options, adapter, advance), ks=ks, seed=seed)
    total = {
        kind: {method: each.accuracy for method, each in row.items()}
        for kind, row in found.results.items()
    }
    judged = next(iter(next(iter(found.results.values())).values())).videos
    return VideoResult(
        table=_by_measure(total, _percent),
        total=total,
        settings={"ks": ks, "seed": seed, "frames": options.frames or 16},
        notes=[f"accuracy in percent on {len(judged)} videos, learnt from {len(found.train)}"],
        skipped=found.skipped,
        details={
            kind: {method: each.classes for method, each in row.items()}
            for kind, row in found.results.items()
        },
    )


def retrieval(
    options: argparse.Namespace, adapter: CoSettleAdapter, advance: Advance
) -> VideoResult:
    """Video-to-video retrieval on a folder per class."""
    from cosettle_adapter.evaluation.retrieval import retrieve

    ks = tuple(options.ks or (1, 5, 10))
    found = retrieve(_pooled(options, adapter, advance), ks=ks)
    total = {
        kind: {f"R@{k}": share for k, share in each.recall.items()}
        | {"mAP": each.mean_average_precision}
        for kind, each in found.results.items()
    }
    queries = len(next(iter(found.results.values())).queries)
    return VideoResult(
        table=_by_measure(total, _percent),
        total=total,
        settings={"ks": ks, "frames": options.frames or 16},
        notes=[f"in percent; {queries} queries over {found.gallery} videos"],
        skipped=found.skipped,
        details={kind: each.per_class for kind, each in found.results.items()},
    )


def localisation(
    options: argparse.Namespace, adapter: CoSettleAdapter, advance: Advance
) -> VideoResult:
    """Frame-level action localisation by neighbouring segments of other videos."""
    from cosettle_adapter.evaluation.frame_features import encode_videos
    from cosettle_adapter.evaluation.localisation import localise
    from cosettle_adapter.evaluation.segments import read_segments

    segments = read_segments(options.segments or options.data / "segments.csv")
    ks, rate = tuple(options.ks or (1, 5)), options.rate or 4.0
    videos, skipped = encode_videos(
        adapter,
        options.data,
        segments,
        rate=rate,
        size=options.size or 224,
        batch_size=options.batch_size,
        kinds=_kinds(options, adapter),
        on_video=advance,
    )
    found = localise(videos, segments, ks=ks, skipped=skipped)
    total = {
        kind: {
            f"{name}, {k} neighbours": value
            for k, each in row.items()
            for name, value in (("frames", each.accuracy), ("mean per class", each.mean_per_class))
        }
        for kind, row in found.results.items()
    }
    return VideoResult(
        table=_by_measure(total, _percent),
        total=total,
        settings={"ks": ks, "rate": rate},
        notes=[f"accuracy in percent; {found.segments} segments of {len(videos)} videos"],
        skipped=found.skipped,
        details={
            kind: {k: each.per_class for k, each in row.items()}
            for kind, row in found.results.items()
        },
    )


def find_videos(data: Path, *, wanted: Sequence[str] | None = None) -> list[Path]:
    """Return the videos in a folder and the folders of images in it (DAVIS's too), by name.

    Raises:
        FrameError: neither, or a wanted one that is not there.
    """
    from cosettle_adapter.errors import FrameError, did_you_mean
    from cosettle_adapter.training.clips import find_clips

    frames = data / "JPEGImages" / "480p"
    root = frames if frames.is_dir() else data
    folders = [
        folder
        for folder in (sorted(root.iterdir()) if root.is_dir() else ())
        if folder.is_dir() and any(folder.glob("*.[jp][pn]g"))
    ]
    found = folders or list(find_clips(root))
    if wanted is None:
        return found
    by_name = {path.name: path for path in found} | {path.stem: path for path in found}
    for name in wanted:
        if name not in by_name:
            raise FrameError(f"no video {name!r} in {root}.{did_you_mean(name, by_name)}")
    return [by_name[name] for name in wanted]


def _kinds(options: argparse.Namespace, adapter: CoSettleAdapter) -> Any:
    from cosettle_adapter.analysis import feature_kinds

    return feature_kinds(adapter, beside=projections_beside(options))


def _pooled(options: argparse.Namespace, adapter: CoSettleAdapter, advance: Advance) -> Any:
    from cosettle_adapter.evaluation.labelled_videos import labelled_videos
    from cosettle_adapter.evaluation.pooling import pool_videos

    return pool_videos(
        adapter,
        labelled_videos(options.data),
        frames=options.frames or 16,
        size=options.size or 224,
        batch_size=options.batch_size,
        kinds=_kinds(options, adapter),
        on_video=advance,
    )


def _check(options: argparse.Namespace) -> None:
    known = {
        "representation": {"frames", "rate", "seed", "report", "results", "clips"},
        "classification": {"frames", "ks", "seed"},
        "retrieval": {"frames", "ks"},
        "localisation": {"rate", "ks", "segments"},
    }[options.task]
    others = (
        *("protocol", "topk", "context", "radius", "year", "max_frames", "mode", "davis"),
        "late_labels",
        *("save_predictions", "frames", "rate", "ks", "segments", "seed", "report", "results"),
        "clips",
    )
    wrong = [name for name in others if getattr(options, name) is not None and name not in known]
    wrong += ["every"] if options.every is not None else []
    wrong += ["settle"] if options.settle else []
    if wrong:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise ValueError(f"{options.task} has no {names}; leave it away")
    if options.task == "representation" and isinstance(options.size, tuple):
        raise ValueError("representation encodes squares: give --size one side")


def _given(options: argparse.Namespace, names: Mapping[str, str]) -> dict[str, Any]:
    chosen = {field: getattr(options, option) for option, field in names.items()}
    return {field: value for field, value in chosen.items() if value is not None}


def _by_measure(
    total: Mapping[str, Mapping[str, float]], text: Callable[[str, float], str]
) -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = {}
    for kind, figures in total.items():
        for measure, value in figures.items():
            table.setdefault(measure, {})[kind] = text(measure, value)
    return table


def _percent(measure: str, value: float) -> str:
    del measure
    return f"{100 * value:.1f}"


def _model_settings(options: argparse.Namespace, adapter: CoSettleAdapter) -> dict[str, Any]:
    import torch

    from cosettle_adapter.version import __version__

    return {
        "model": str(options.model),
        "backbone": adapter.config.backbone,
        "fingerprint": adapter.backbone.fingerprint,
        "layers": adapter.config.layers,
        "cosettle_adapter": __version__,
        "torch": torch.__version__,
    }


def _write_report(options: argparse.Namespace, found: Any) -> None:
    from cosettle_adapter.evaluation.report import (
        ModelReport,
        distance_charts,
        lost_cells_frame,
        write_model_report,
    )

    charts = list(distance_charts(found.results))
    charts += [_chart(path) for path in options.results or ()]
    facts = {key: str(value) for key, value in dataclasses.asdict(found.settings).items()}
    write_model_report(
        options.report,
        ModelReport(
            title=f"What the projection of {options.model} changed",
            representation=found.results,
            spectrum=found.spectrum,
            charts=charts,
            failures=[lost_cells_frame(moment) for moment in found.failures],
            facts={"model": str(options.model), "videos": str(options.data.name), **facts},
        ),
    )


def _chart(path: Path) -> Any:
    """A benchmark's first figure by clip, from a results file of ``evaluate``."""
    from cosettle_adapter.evaluation.figures import SequenceChart

    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        measure = stored["measures"][0]
        values = {
            name: {
                kind: 100 * scores["values"][measure]
                for kind, scores in row.items()
                if scores["values"][measure] is not None
            }
            for name, row in stored["clips"].items()
        }
        title = f"{measure} on {stored['task']} by clip"
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a results file of a benchmark on clips ({error}); write one with "
            "cosettle-adapter evaluate ... -o FILE"
        ) from error
    return SequenceChart(title, "percent", values, form="{:.1f}")
