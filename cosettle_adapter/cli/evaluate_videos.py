"""The benchmarks of ``evaluate`` on whole videos, and which features of which model it compares."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import HubOptions
from cosettle_adapter.cli.common import (
    ModelOptions,
    Output,
    Size,
    console,
    frame_progress,
)
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

Found = TypeVar("Found")


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class FeatureOptions(ModelOptions):
    """Which features of which model are compared.

    Attributes:
        raw: score the backbone alone; no projection is needed.
        layer: score this layer of the backbone alone, beside the last one; implies --raw.
        baselines: other projections of the same backbone (names or folders) to score as well.
        batch_size: frames a forward pass.
        output: JSON file of the results; an interrupted run on clips resumes from it.
    """

    raw: bool = False
    layer: int | None = None
    baselines: Sequence[str] = ()
    batch_size: int = 8
    output: Output | None = None

    def adapter(self) -> CoSettleAdapter:
        """Load the model, or the backbone alone."""
        with console().status(f"loading {self.model}"):
            return self.load(raw=self.raw, layer=self.layer)

    def projections(self) -> dict[str, Projection]:
        """Load the baselines, by the name of their folder."""
        hub = HubOptions(cache_dir=self.cache_dir, local_files_only=self.offline)
        given = {Path(name).name: name for name in self.baselines}
        if len(given) < len(self.baselines):
            raise ValueError("two baselines have one name; rename a folder")
        found = {name: find_projection(place, hub) for name, place in given.items()}
        return {name: Projection.load(folder).to(self.device) for name, folder in found.items()}

    def measure(
        self, measure: Callable[..., Found], *what: Any, **more: Any
    ) -> tuple[Found, dict[str, Any]]:
        """What ``measure(adapter, *what, ...)`` found; the settings of the model."""
        adapter = self.adapter()
        more["variants"] = feature_variants(adapter, baselines=self.projections())
        with frame_progress(console()) as progress:
            bar = progress.add_task("videos", total=None, rate="")

            def advance(done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total)

            found = measure(adapter, *what, batch_size=self.batch_size, on_video=advance, **more)
        return found, {"model": self.model, **model_settings(adapter)}

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
        """Print a row a measure, then notes and what was skipped; write the results."""
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
            found = {"settings": settings, "total": total, "skipped": skipped, "details": details}
            write_json({"task": task, **found}, self.output)
            output.print(f"results in {self.output}", markup=False)
        return 1 if skipped else 0


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoOptions(FeatureOptions):
    """What the benchmarks on labelled videos have in common.

    Attributes:
        data: folder of the videos; for classification and retrieval with a folder per class.
        size: shorter side, or HEIGHTxWIDTH, of the encoded frames.
    """

    data: Path
    size: Size = 224

    def pooled(self, frames: int) -> tuple[PooledVideos, dict[str, Any]]:
        """Encode the labelled videos; also the model's settings."""
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
    """What stays together within videos and apart between them: the paper's Figure 1 and theory.

    Args:
        data: folder of videos, of folders of images, or of DAVIS.
        clips: names of the videos; all by default.
        report: HTML page to write.
        results: JSON files of benchmarks on clips to show in the report.
    """
    charts = [_chart(path) for path in results]
    videos = _videos(data, clips)
    found, model = options.measure(evaluate_representation, videos, settings)
    notes = ["distances are shares of the diameter (95th percentile)"]
    if found.spectrum is not None:
        within, share = found.spectrum.correlations
        notes.append(
            f"the projection's gain against variance over time: Spearman {within:+.2f}; against "
            f"its share of all variance {share:+.2f} (the paper's theory predicts negative)"
        )
    total = {variant: each.figures for variant, each in found.results.items()}
    details = {variant: each.videos for variant, each in found.results.items()}
    used = dataclasses.asdict(settings)
    if report is not None:
        *measured, failures = representation_sections(found)
        facts = {"model": options.model, "videos": data.name, **used}
        write_page(
            report,
            title=f"What the projection of {options.model} changed",
            sections=[*measured, *charts, failures],
            facts={name: str(value) for name, value in facts.items()},
        )
        notes.append(f"report: {report}")
    return options.show(
        "representation", notes, used | model, total, found.skipped, details, "{:.4f}"
    )


def classification(
    *, frames: int = 16, ks: Sequence[int] = (1, 5, 10, 20), seed: int = 0, options: VideoOptions
) -> int:
    """KNN and a linear probe on videos in a folder per class.

    Args:
        frames: at most this many of a video.
        ks: numbers of neighbours.
        seed: of the splits.
    """
    split_videos(labelled_videos(options.data), seed=seed)  # a lonely class is told at once
    pooled, model = options.pooled(frames)
    found = classify(pooled, ks=ks, seed=seed)
    judged = len(next(iter(found[RAW_LAST].values())).labels)
    notes = [f"accuracy in percent on {judged} videos, learnt from {len(pooled.videos) - judged}"]
    total = {kind: {how: p.accuracy for how, p in row.items()} for kind, row in found.items()}
    details = {kind: {how: p.counts for how, p in row.items()} for kind, row in found.items()}
    used = {"ks": ks, "seed": seed, "frames": frames, **model}
    return options.show("classification", notes, used, total, pooled.skipped, details)


def retrieval(*, frames: int = 16, ks: Sequence[int] = (1, 5, 10), options: VideoOptions) -> int:
    """Video-to-video retrieval on a folder per class.

    Args:
        frames: at most this many of a video.
        ks: ranks.
    """
    pooled, model = options.pooled(frames)
    found = retrieve(pooled, ks=ks)
    total = {kind: each.figures for kind, each in found.items()}
    details = {kind: each.per_class for kind, each in found.items()}
    raw, used = found[RAW_LAST], {"ks": ks, "frames": frames, **model}
    notes = [f"in percent; {len(raw.queries)} queries over {raw.searched} videos"]
    return options.show("retrieval", notes, used, total, pooled.skipped, details)


def localisation(
    *,
    segments: Path | None = None,
    rate: float = 4.0,
    ks: Sequence[int] = (1, 5),
    options: VideoOptions,
) -> int:
    """Frame-level action localisation by neighbouring segments of other videos.

    Args:
        segments: CSV with video,start,end,label; segments.csv in the folder by default.
        rate: frames a second.
        ks: numbers of neighbours.
    """
    stretches = read_segments(segments or options.data / "segments.csv")
    paths = {stretch.video: options.data / stretch.video for stretch in stretches}
    read, model = options.measure(encode_videos, paths, rate=rate, size=options.size)
    videos, skipped = read
    total: dict[str, dict[str, float]] = {}
    details: dict[str, dict[int, dict[str, float]]] = {}
    for kind, row in localise(videos, stretches, ks=ks).items():
        details[kind] = {k: each.per_class for k, each in row.items()}
        total[kind] = {}
        for k, each in row.items():
            total[kind][f"frames, {k} neighbours"] = each.accuracy
            total[kind][f"mean per class, {k} neighbours"] = fmean(each.per_class.values())
    known = sum(stretch.video not in skipped for stretch in stretches)
    notes = [f"accuracy in percent; {known} segments of {len(videos)} videos"]
    used = {"ks": ks, "rate": rate, **model}
    return options.show("localisation", notes, used, total, skipped, details)


def _videos(data: Path, wanted: Sequence[str] | None) -> list[Path]:
    """The folders of images in a folder (DAVIS's too), or else the videos in it."""
    frames = data / "JPEGImages" / "480p"
    root = data_folder(frames if frames.is_dir() else data, "a folder of videos")
    found = [path for path in sorted(root.iterdir()) if images_in(path)]
    found = found or find_videos(root, recursive=True)
    by_name = {path.name: path for path in found} | {path.stem: path for path in found}
    names = pick(wanted, by_name, f"video {{}} in {root}")
    return found if wanted is None else [by_name[name] for name in names]


def _chart(path: Path) -> Section:
    """A benchmark's first figure by clip, from a results file of ``evaluate``."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        measure = stored["measures"][0]
        values: dict[str, dict[str, float]] = {}
        for name, clip in stored["clips"].items():
            scores = {kind: each["values"][measure] for kind, each in clip["scores"].items()}
            values[name] = {kind: 100 * s for kind, s in scores.items() if s is not None}
        title = f"{measure} on {stored['task']} by clip"
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a results file of a benchmark on clips ({error}); write one with "
            "cosettle-adapter evaluate ... -o FILE"
        ) from error
    return bar_section(title, "percent", values)
