"""The benchmarks of ``evaluate`` on whole videos, and the options of all benchmarks."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import HubOptions
from cosettle_adapter.cli.common import ModelOptions, Output, Size, console, frame_progress
from cosettle_adapter.cli.tables import terminal_table
from cosettle_adapter.evaluation.classification import classify, retrieve, split_videos
from cosettle_adapter.evaluation.clips import data_folder, images_in, pick
from cosettle_adapter.evaluation.localisation import localise, read_segments
from cosettle_adapter.evaluation.report import (
    Section,
    Table,
    bar_section,
    representation_sections,
    write_page,
)
from cosettle_adapter.evaluation.representation import (
    RepresentationSettings,
    evaluate_representation,
)
from cosettle_adapter.evaluation.run import model_settings, write_json
from cosettle_adapter.evaluation.variants import RAW_LAST, feature_variants
from cosettle_adapter.evaluation.videos import (
    PooledVideos,
    encode_videos,
    labelled_videos,
    pool_videos,
)
from cosettle_adapter.hub import find_projection
from cosettle_adapter.projection import Projection
from cosettle_adapter.video import find_videos

Result = TypeVar("Result")


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class FeatureOptions(ModelOptions):
    """The model, and which of its features to compare.

    Attributes:
        raw: score the backbone alone, without a projection.
        layer: score this layer of the backbone beside the last one, without a projection.
        baselines: further projections of the same backbone to score (names or folders).
        batch_size: frames per forward pass.
        output: JSON file for the results; benchmarks on annotated clips resume from it.
    """

    raw: bool = False
    layer: int | None = None
    baselines: Sequence[str] = ()
    batch_size: int = 8
    output: Output | None = None

    def adapter(self) -> CoSettleAdapter:
        """Load the model."""
        with console().status(f"loading {self.model}"):
            return self.load(raw=self.raw, layer=self.layer)

    def projections(self) -> dict[str, Projection]:
        """Load the baselines, by the name of their folder."""
        hub = HubOptions(cache_dir=self.cache_dir, local_files_only=self.offline)
        by_name = {Path(name).name: name for name in self.baselines}
        if len(by_name) < len(self.baselines):
            raise ValueError(
                f"got several baselines of one name in {', '.join(self.baselines)}; expected "
                "different names: rename a folder"
            )
        folders = {name: find_projection(source, hub) for name, source in by_name.items()}
        return {name: Projection.load(folder) for name, folder in folders.items()}

    def measure(
        self, measure: Callable[..., Result], *arguments: Any, **options: Any
    ) -> tuple[Result, dict[str, Any]]:
        """Return the result of ``measure(adapter, *arguments, ...)`` and the model's settings."""
        adapter = self.adapter()
        options["variants"] = feature_variants(adapter, baselines=self.projections())
        with frame_progress(console()) as progress:
            bar = progress.add_task("videos", total=None, rate="")

            def advance(done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total)

            options |= {"batch_size": self.batch_size, "on_video": advance}
            result = measure(adapter, *arguments, **options)
        return result, {"model": self.model, **model_settings(adapter)}

    def show(
        self,
        task: str,
        notes: Sequence[str],
        settings: Mapping[str, Any],
        total: Mapping[str, Mapping[str, float]],
        skipped: Mapping[str, str],
        details: Mapping[str, Any],
        form: str = "{:.1%}",
    ) -> int:
        """Print a row per measure, notes and skipped videos; write the results."""
        output = console()
        rows = [
            [measure, *(form.format(row[measure]).rstrip("%") for row in total.values())]
            for measure in total[RAW_LAST]
        ]
        output.print(terminal_table(Table(f"{task}: {self.model}", ["", *total], rows)))
        for note in notes:
            output.print(note, markup=False)
        for name, reason in skipped.items():
            output.print(f"skipped {name}: {reason}", markup=False, style="red", soft_wrap=True)
        if self.output:
            results = {"settings": settings, "total": total, "skipped": skipped, "details": details}
            write_json({"task": task, **results}, self.output)
            output.print(f"results in {self.output}", markup=False)
        return 1 if skipped else 0


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoOptions(FeatureOptions):
    """Options of the benchmarks on labelled videos.

    Attributes:
        data: folder of the videos; classification and retrieval expect one folder per class in it.
        size: size of the encoded frames: shorter side, or HEIGHTxWIDTH.
    """

    data: Path
    size: Size = 224

    def pooled(self, frames: int) -> tuple[PooledVideos, dict[str, Any]]:
        """Encode the labelled videos; also return the model's settings."""
        videos = labelled_videos(self.data)
        return self.measure(pool_videos, videos, frames=frames, size=self.size)


def representation(
    *,
    data: Path,
    clips: Sequence[str] | None = None,
    report: Path | None = None,
    results: Sequence[Path] = (),
    settings: Annotated[RepresentationSettings, Parameter(name="*")] = RepresentationSettings(),
    options: FeatureOptions = FeatureOptions(),
) -> int:
    """Distances within and between videos, as in the paper's Figure 1, and its theory.

    Args:
        data: folder of videos, folder of folders of images, or folder of DAVIS.
        clips: names of the videos; all by default.
        report: HTML page to write.
        results: results files (-o) of benchmarks on annotated clips, to show in the report.
    """
    charts = [_chart(path) for path in results]
    videos = _videos(data, clips)
    result, model = options.measure(evaluate_representation, videos, settings)
    notes = ["distances are shares of the diameter (95th percentile)"]
    if result.spectrum is not None:
        within, share = result.spectrum.correlations
        notes.append(
            f"Spearman correlation of the projection's gain with variance within videos "
            f"{within:+.2f}, with variance within over variance between videos {share:+.2f} "
            "(the paper's theory predicts negative values)"
        )
    total = {variant: row.figures for variant, row in result.results.items()}
    details = {variant: row.videos for variant, row in result.results.items()}
    used = dataclasses.asdict(settings)
    if report is not None:
        *measured, failures = representation_sections(result)
        facts = {"model": options.model, "videos": data.name, **used}
        write_page(
            report,
            title=f"Effect of the projection of {options.model}",
            sections=[*measured, *charts, failures],
            facts={name: str(value) for name, value in facts.items()},
        )
        notes.append(f"report: {report}")
    return options.show(
        "representation", notes, used | model, total, result.skipped, details, "{:.4f}"
    )


def classification(
    *, frames: int = 16, ks: Sequence[int] = (1, 5, 10, 20), seed: int = 0, options: VideoOptions
) -> int:
    """Video classification by nearest neighbours and a linear probe.

    Args:
        frames: maximum number of frames per video.
        ks: numbers of neighbours.
        seed: seed of the random splits.
    """
    split_videos(labelled_videos(options.data), seed=seed)  # a bad split fails before encoding
    pooled, model = options.pooled(frames)
    results = classify(pooled, ks=ks, seed=seed)
    tested = len(next(iter(results[RAW_LAST].values())).labels)
    notes = [f"accuracy in percent on {tested} videos, trained on {len(pooled.videos) - tested}"]
    total = {name: {how: p.accuracy for how, p in row.items()} for name, row in results.items()}
    details = {name: {how: p.counts for how, p in row.items()} for name, row in results.items()}
    used = {"ks": ks, "seed": seed, "frames": frames, **model}
    return options.show("classification", notes, used, total, pooled.skipped, details)


def retrieval(*, frames: int = 16, ks: Sequence[int] = (1, 5, 10), options: VideoOptions) -> int:
    """Retrieval of videos of the same class.

    Args:
        frames: maximum number of frames per video.
        ks: ranks k of recall R@k.
    """
    pooled, model = options.pooled(frames)
    results = retrieve(pooled, ks=ks)
    total = {variant: row.figures for variant, row in results.items()}
    details = {variant: row.per_class for variant, row in results.items()}
    raw, used = results[RAW_LAST], {"ks": ks, "frames": frames, **model}
    notes = [f"in percent; {len(raw.queries)} queries over {raw.searched} videos"]
    return options.show("retrieval", notes, used, total, pooled.skipped, details)


def localisation(
    *,
    segments: Path | None = None,
    rate: float = 4.0,
    ks: Sequence[int] = (1, 5),
    options: VideoOptions,
) -> int:
    """Action localisation: labels each frame by its nearest segments in other videos.

    Args:
        segments: CSV file with the columns video,start,end,label; segments.csv in the data folder
            by default.
        rate: frames encoded per second.
        ks: numbers of neighbours.
    """
    rows = read_segments(segments or options.data / "segments.csv")
    paths = {segment.video: options.data / segment.video for segment in rows}
    encoded, model = options.measure(encode_videos, paths, rate=rate, size=options.size)
    videos, skipped = encoded
    total: dict[str, dict[str, float]] = {}
    details: dict[str, dict[int, dict[str, float]]] = {}
    for variant, by_k in localise(videos, rows, ks=ks).items():
        details[variant] = {k: predictions.per_class for k, predictions in by_k.items()}
        total[variant] = {}
        for k, predictions in by_k.items():
            per_class = fmean(predictions.per_class.values())
            total[variant][f"frames, {k} neighbours"] = predictions.accuracy
            total[variant][f"mean per class, {k} neighbours"] = per_class
    usable = sum(segment.video not in skipped for segment in rows)
    notes = [f"accuracy in percent; {usable} segments of {len(videos)} videos"]
    used = {"ks": ks, "rate": rate, **model}
    return options.show("localisation", notes, used, total, skipped, details)


def _videos(data: Path, selected: Sequence[str] | None) -> list[Path]:
    """List the folders of images in a folder (also of DAVIS), or the video files if it has none."""
    frames = data / "JPEGImages" / "480p"
    root = data_folder(frames if frames.is_dir() else data, "a folder of videos")
    videos = [path for path in sorted(root.iterdir()) if images_in(path)]
    videos = videos or find_videos(root, recursive=True)
    by_name = {path.name: path for path in videos} | {path.stem: path for path in videos}
    names = pick(selected, by_name, f"video {{}} in {root}")
    return videos if selected is None else [by_name[name] for name in names]


def _chart(path: Path) -> Section:
    """Chart a benchmark's first measure by clip, from a results file of ``evaluate``."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        measure = stored["measures"][0]
        values: dict[str, dict[str, float]] = {}
        for name, clip in stored["clips"].items():
            scores = {variant: row["values"][measure] for variant, row in clip["scores"].items()}
            values[name] = {variant: 100 * s for variant, s in scores.items() if s is not None}
        title = f"{measure} on {stored['task']} by clip"
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a results file of a benchmark on annotated clips ({error}); write one "
            "with, for example, cosettle-adapter evaluate davis ... -o FILE"
        ) from error
    return bar_section(title, "percent", values)
