"""One page a model: spectra, distances before and after, bars by sequence, where it fails."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.analysis import Representation, Spectrum
from cosettle_adapter.evaluation import html, plots
from cosettle_adapter.evaluation.figures import (
    SequenceChart,
    distance_figure,
    sequence_figure,
    spectrum_figure,
)
from cosettle_adapter.evaluation.html import Table
from cosettle_adapter.evaluation.representation import LostCells
from cosettle_adapter.files import atomic_path

_LOST = (226.0, 63.0, 45.0)  # red over cells that do not come home


@dataclass(frozen=True, eq=False)
class FailureFrame:
    """A picture of something that went wrong.

    Attributes:
        image: ``(3, H, W)`` uint8.
        caption: what went wrong.
    """

    image: Tensor
    caption: str


@dataclass(frozen=True)
class ModelReport:
    """All that a page may show; every part but the title may be missing.

    Attributes:
        title: heading and window title.
        lead: the paragraph below it.
        representation: kind of features to figures.
        spectrum: of the tokens the projection reads.
        charts: figures by sequence.
        failures: pictures, in order.
        tables: any others.
        facts: what was run with what, as name and value.
        percentile: percentile of the diameters that distances are shares of.
        gamma: weight of D_intra in the margin.
    """

    title: str
    lead: str = ""
    representation: Mapping[str, Representation] = field(default_factory=dict)
    spectrum: Spectrum | None = None
    charts: Sequence[SequenceChart] = ()
    failures: Sequence[FailureFrame] = ()
    tables: Sequence[Table] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    percentile: float = 95.0
    gamma: float = 1.0


def write_model_report(path: str | os.PathLike[str], report: ModelReport) -> Path:
    """Write the page; it needs no other file and no network, and is written whole or not at all.

    Args:
        path: where to; missing folders are created.
        report: what to show.

    Returns:
        The path written.

    Raises:
        ValueError: a percentile that was not measured.
        FrameError: a failure whose image is not ``(3, H, W)`` uint8.
        MissingExtraError: there are failures to show and Pillow is not installed.
    """
    distances = distance_figure(
        report.representation, percentile=report.percentile, gamma=report.gamma
    )
    pictures = "".join(
        html.figure(html.picture(failure.image, failure.caption), failure.caption)
        for failure in report.failures
    )
    sections = [
        html.section("Within and between videos", distances),
        html.section(
            "What the projection does to each direction", spectrum_figure(report.spectrum)
        ),
        *(html.section(chart.title, sequence_figure(chart)) for chart in report.charts),
        html.section("Where it fails", pictures and f"<div class=pictures>{pictures}</div>"),
        *(html.section(table.title, html.table(table)) for table in report.tables),
        html.section("What was run", html.facts(report.facts)),
    ]
    text = html.page(report.title, report.lead, sections, style=plots.STYLE)
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def distance_charts(
    results: Mapping[str, Representation], *, percentile: float = 95.0
) -> list[SequenceChart]:
    """Return cycle accuracy and D_intra by video, ready for a :class:`ModelReport`."""
    intra: dict[str, dict[str, float]] = {}
    cycle: dict[str, dict[str, float]] = {}
    for kind, result in results.items():
        for video in result.videos:
            intra.setdefault(video.name, {})[kind] = video.d_intra[percentile]
            cycle.setdefault(video.name, {})[kind] = 100 * video.cycle_accuracy
    return [
        SequenceChart("Cycle accuracy by video", "cells that come home, %", cycle, form="{:.1f}"),
        SequenceChart(
            "Distance to the next frame by video",
            "D_intra, diameters of the video",
            intra,
            note="Low for steady features, but also for those that tell little apart.",
            form="{:.4f}",
        ),
    ]


def lost_cells_frame(moment: LostCells) -> FailureFrame:
    """Show the first frame with the cells that do not come home in red, the second beside it."""
    first, second = moment.frames.float()
    height, width = first.shape[1:]
    lost = rearrange((~moment.home).float(), "h w -> 1 1 h w")
    lost = rearrange(F.interpolate(lost, size=(height, width)), "1 1 h w -> 1 h w").cpu()
    red = rearrange(torch.tensor(_LOST), "c -> c 1 1").expand_as(first)
    gap = torch.full((3, height, max(2, width // 64)), 255.0)
    image = torch.cat([torch.lerp(first, red, 0.55 * lost), gap, second], dim=2)
    return FailureFrame(
        image.round().to(torch.uint8),
        f"{moment.video}, {moment.when}: {100 * moment.cycle_accuracy:.0f} % of the cells come "
        "home, those in red do not.",
    )
