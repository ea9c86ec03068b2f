"""One HTML page with tables, figures and films that can be sent around as a single file.

It needs no other file and no network, follows the reader's light or dark setting, and is written
whole or not at all. All text is escaped. Below are the figures of a model's page.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange

from cosettle_adapter.evaluation.representation import RepresentationReport, WorstMoment
from cosettle_adapter.evaluation.variants import ADAPTED, CENTRED, RAW_LAST, RAW_SAME
from cosettle_adapter.imports import require
from cosettle_adapter.io import atomic_path

_MEDIA_TYPES = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png"}
# a player's controls would cover half of a flat film
_TOGGLE = "this.paused ? this.play() : this.pause()"
_COLOURS = {RAW_LAST: "#8b9099", RAW_SAME: "#b0578f", CENTRED: "#c07a12", ADAPTED: "#3f7fdf"}
_OTHERS = ("#2b8a5f", "#8a70e0")
_INK = "#85888f"  # legible on a light page and on a dark one
_STYLE = {
    "svg.fonttype": "none",
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "grid.color"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
}
_MOST_BARS = 40  # sequences a chart shows
_LOST = (0.89, 0.25, 0.18, 0.55)  # red over patches that are not cycle-consistent


@dataclass(frozen=True)
class Table:
    """A table of text, for a page or the terminal.

    The first column names the rows; ``note`` is shown below. By index: ``best`` has the columns to
    set in bold for each row, ``emphasis`` is the row that the table is about, and before ``rule``
    a line is drawn in the terminal.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    best: Mapping[int, Sequence[int]] = field(default_factory=dict)
    emphasis: int | None = None
    rule: int | None = None


class Figure(NamedTuple):
    """HTML that is inserted as it is, the text below it, and its share of the page's width."""

    content: str
    caption: str
    width: Literal["whole", "half", "third"] = "whole"


class Section(NamedTuple):
    """A section of a page, of tables, figures and notes (plain text); left out without any."""

    title: str
    parts: Sequence[Table | Figure | str]


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    lead: str = "",
    sections: Sequence[Section] = (),
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write a page and return its path; missing folders are created.

    ``lead`` is the paragraph below the heading, ``facts`` what was run with what, by name.
    """
    jinja: Any = require("jinja2", extra="report", purpose="writing a report")
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    environment = jinja.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(
        title=title, lead=lead, sections=sections, facts=facts
    )
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def film(path: Path, caption: str) -> Figure:
    """Return an ``.mp4``, ``.gif`` or ``.png`` file, whose bytes go into the page."""
    media_type = _MEDIA_TYPES.get(path.suffix.lower())
    if media_type is None:
        known = ", ".join(_MEDIA_TYPES)
        raise ValueError(f"got {path.name!r}, which a report cannot show; use one of {known}")
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    source, words = f"data:{media_type};base64,{data}", escape(caption)
    if media_type != "video/mp4":
        return Figure(f'<img src="{source}" alt="{words}">', caption)
    return Figure(
        f'<video src="{source}" aria-label="{words}" autoplay loop muted playsinline '
        f'tabindex="0" title="click to pause or play" onclick="{_TOGGLE}" '
        f"onkeydown=\"if (event.key === ' ') {{ event.preventDefault(); {_TOGGLE} }}\"></video>",
        caption,
    )


def representation_sections(found: RepresentationReport) -> list[Section]:
    """Return what :func:`evaluate_representation` measured as sections of a page."""
    intra: dict[str, dict[str, float]] = {}
    cycle: dict[str, dict[str, float]] = {}
    rows = []
    for variant, result in found.results.items():
        numbers = result.figures.values()
        rows.append([variant, *("none" if math.isnan(x) else f"{x:.4f}" for x in numbers)])
        for video in result.videos:
            intra.setdefault(video.name, {})[variant] = video.d_intra
            cycle.setdefault(video.name, {})[variant] = 100 * video.cycle_accuracy
    note = (
        "Means over videos. D_intra: distance from a patch to its nearest in the next frame, the "
        "closer half, in diameters of the video. D_inter: distance between videos at equal "
        "positions, in diameters of all. Margin: D_inter - D_intra. Diameters are twice the 95th "
        "percentile of the distance from the mean patch. D_intra is also low for features that "
        "tell little apart."
    )
    figures = next(iter(found.results.values())).figures
    table = Table("", ["features", *figures], rows, note)
    return [
        Section("Within and between videos", [_distances(found), table]),
        Section("What the projection does to each direction", _spectra(found)),
        bar_section("Cycle accuracy by video", "cycle-consistent patches, %", cycle),
        bar_section("Distance to the next frame by video", "D_intra, diameters", intra),
        Section("Where it fails", [_failure(moment) for moment in found.failures]),
    ]


def bar_section(title: str, label: str, values: Mapping[str, Mapping[str, float]]) -> Section:
    """Return bars of ``values`` by sequence and variant, in the order of what the projection gains.

    ``label`` is what is measured, with the unit. A variant may be missing here and there.
    """
    variants = list(dict.fromkeys(variant for row in values.values() for variant in row))
    if not variants:
        return Section(title, ())
    before, names, captions = _before(variants), list(values), []
    if before and ADAPTED in variants:

        def gain(name: str) -> float:
            value = values[name].get(ADAPTED, math.nan) - values[name].get(before, math.nan)
            return -math.inf if math.isnan(value) else value

        names.sort(key=gain, reverse=True)
        captions.append(f"In the order of {ADAPTED} minus {before}.")
    if len(names) > _MOST_BARS:
        half = _MOST_BARS // 2
        captions.append(f"The first and the last {half} of {len(names)}.")
        names = names[:half] + names[-half:]

    def draw(axes: Any) -> None:
        for index, (variant, colour) in enumerate(_colours(variants).items()):
            numbers = [values[name].get(variant, math.nan) for name in names]
            shift = (index - (len(variants) - 1) / 2) * 0.8 / len(variants)
            places = [row + shift for row in range(len(names))]
            drawn = [0.0 if math.isnan(number) else number for number in numbers]
            bars = axes.barh(places, drawn, 0.75 / len(variants), color=colour, label=variant)
            texts = ["none" if math.isnan(number) else f"{number:.3g}" for number in numbers]
            axes.bar_label(bars, texts, padding=2, fontsize=7, color=_INK)
        shown = [name if len(name) < 29 else f"{name[:27]}…" for name in names]
        axes.set_yticks(range(len(names)), shown)
        axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=label)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)

    size = 9.6, 0.9 + len(names) * (0.14 * len(variants) + 0.12)
    return Section(title, [_figure(draw, size, title, " ".join(captions))])


def _distances(found: RepresentationReport) -> Figure:
    """D_intra against D_inter of videos before and after, and the means of all variants."""

    def draw(axes: Any) -> None:
        for variant, colour in _colours(found.results).items():
            result = found.results[variant]
            if variant in (_before(found.results), ADAPTED):
                x, y = [v.d_intra for v in result.videos], [v.d_inter for v in result.videos]
                axes.plot(x, y, "o", color=colour, ms=4, alpha=0.45)
            axes.plot([result.d_intra], [result.d_inter], "o", color=colour, ms=10, label=variant)
        axes.set(xlabel="D_intra, diameters of the video", ylabel="D_inter, diameters of all")

    return _figure(
        draw,
        (9.6, 4.6),
        "D_intra against D_inter before and after the projection",
        "Small dots are videos, before and after; large ones the means. Up and to the left is the "
        "paper's aim: patches stay close within a video, and videos stay apart.",
    )


def _spectra(found: RepresentationReport) -> list[Table | Figure | str]:
    """The eigenvalues, and the gain of every direction against its variance."""
    spectrum = found.spectrum
    if spectrum is None:
        return []
    intra, inter = spectrum.intra.tolist(), spectrum.inter.tolist()
    gains, (within, share) = spectrum.relative_gain.tolist(), spectrum.correlations

    def eigenvalues(axes: Any) -> None:
        axes.plot(range(1, len(inter) + 1), inter, color=_OTHERS[0], label="between videos")
        axes.plot(range(1, len(intra) + 1), intra, color=_COLOURS[ADAPTED], label="within videos")
        axes.set_yscale("log", nonpositive="mask")
        axes.set(xlabel="rank of the eigenvalue", ylabel="variance")

    def gain(axes: Any) -> None:
        axes.plot(intra, gains, "o", ms=4, alpha=0.45, label="directions")
        axes.axhline(1.0, color=_INK, lw=1, ls="--")
        axes.set_xscale("log", nonpositive="mask")
        axes.set_ylim(bottom=0)
        axes.set(xlabel="variance within videos", ylabel="gain over its root mean square")

    return [
        _figure(
            eigenvalues,
            (5.2, 3.6),
            "Eigenvalues of the covariance within and between videos",
            "How tokens vary before the projection: corresponding patches of neighbouring frames "
            "(within videos), and the same position of different videos (between).",
            width="half",
        ),
        _figure(
            gain,
            (5.2, 3.6),
            "Gain of the projection against the variance within videos",
            "A dot is an eigen-direction of the variance within videos; its height is how much "
            "longer a small step along it is after the projection. The paper predicts a fall from "
            "left to right, across the dashed line.",
            width="half",
        ),
        f"Gain and variance within videos have a rank correlation of {within:+.3f}; -1 would be "
        "shrinking exactly in the order of the variance. Against the variance within as a share of "
        f"that between videos it is {share:+.3f}. From {spectrum.videos} videos and "
        f"{spectrum.pairs:,} corresponding patches.",
    ]


def _failure(moment: WorstMoment) -> Figure:
    """The first frame with its inconsistent patches in red, the second one beside it."""
    height, width = moment.frames.shape[2:]

    def draw(axes: Any) -> None:
        for side, frame in zip(axes, moment.frames, strict=True):
            side.imshow(rearrange(frame, "c h w -> h w c").numpy())
            side.set_axis_off()
        lost = torch.zeros(*moment.consistent.shape, 4)
        lost[~moment.consistent.cpu()] = torch.tensor(_LOST)
        axes[0].imshow(lost.numpy(), extent=(-0.5, width - 0.5, height - 0.5, -0.5))

    return _figure(
        draw,
        (5.2, 2.6 * height / width),
        f"{moment.video}, {moment.when}",
        f"{moment.video}, {moment.when}: {100 * moment.cycle_accuracy:.0f} % of the patches are "
        "cycle-consistent, those in red are not.",
        width="third",
        columns=2,
    )


def _before(variants: Iterable[str]) -> str | None:
    return next((variant for variant in (RAW_SAME, RAW_LAST) if variant in variants), None)


def _colours(variants: Iterable[str]) -> dict[str, str]:
    """The four variants always have the same colours; others share what is left."""
    others = itertools.cycle(_OTHERS)
    return {variant: _COLOURS.get(variant) or next(others) for variant in variants}


def _figure(
    draw: Callable[[Any], None],
    size: tuple[float, float],
    title: str,
    caption: str,
    width: Literal["whole", "half", "third"] = "whole",
    columns: int = 1,
) -> Figure:
    """An ``<svg>`` element of ``size`` inches, with a legend above if there is something for it."""
    matplotlib: Any = require("matplotlib", extra="report", purpose="drawing figures")
    figures: Any = require("matplotlib.figure", extra="report", purpose="drawing figures")
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure = figures.Figure(figsize=size, layout="constrained")
        draw(figure.subplots(1, columns))
        if columns == 1:
            figure.legend(loc="outside upper left", ncols=6)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    opening = f'<svg role="img" aria-label="{escape(title)}" '
    return Figure(svg.replace("<svg ", opening, 1), caption, width)
