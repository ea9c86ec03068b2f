"""An HTML page with tables, figures and films in a single file, and the figures of a model's page.

The page needs no other file and no network, follows the reader's light or dark setting, and is
written atomically. All text is escaped.
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
# the player's controls would cover half of a low film
_TOGGLE = "this.paused ? this.play() : this.pause()"
_COLOURS = {RAW_LAST: "#8b9099", RAW_SAME: "#b0578f", CENTRED: "#c07a12", ADAPTED: "#3f7fdf"}
_OTHERS = ("#2b8a5f", "#8a70e0")
_INK = "#85888f"  # legible on light and dark pages
_STYLE = {
    "svg.fonttype": "none",
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "grid.color"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
}
_MAX_BARS = 40  # clips in a chart
_LOST = (0.89, 0.25, 0.18, 0.55)  # red over patches that are not cycle-consistent


@dataclass(frozen=True)
class Table:
    """A table of text, for a page or the terminal.

    The first column names the rows; ``note`` is shown below. ``best`` gives the columns to
    set in bold for each row, ``emphasis`` is the row that the table is about, and the terminal
    draws a line before the row ``rule``; all are indices.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    best: Mapping[int, Sequence[int]] = field(default_factory=dict)
    emphasis: int | None = None
    rule: int | None = None


class Figure(NamedTuple):
    """Unescaped HTML, its caption, and its share of the page's width."""

    content: str
    caption: str
    width: Literal["whole", "half", "third"] = "whole"


class Section(NamedTuple):
    """A section of tables, figures and notes (plain text); omitted if it has none."""

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

    ``lead`` is the paragraph below the heading, ``facts`` are settings and versions by name.
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
    """Embed an ``.mp4``, ``.gif`` or ``.png`` file."""
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
    """Return the results of :func:`evaluate_representation` as sections of a page."""
    intra: dict[str, dict[str, float]] = {}
    cycle: dict[str, dict[str, float]] = {}
    rows = []
    for variant, result in found.results.items():
        numbers = result.figures.values()
        rows.append([variant, *("none" if math.isnan(x) else f"{x:.4f}" for x in numbers)])
        for video in result.videos:
            intra.setdefault(video.name, {})[variant] = video.d_intra
            cycle.setdefault(video.name, {})[variant] = 100 * video.cycle_consistency
    note = (
        "Means over videos. D_intra: distance from a patch to the nearest patch in the next frame, "
        "over the closest half, in diameters of the video. D_inter: distance between videos at "
        "equal positions, in diameters of all videos. Margin: D_inter - D_intra. A diameter is "
        "twice the 95th percentile of the distance from the mean patch. D_intra is also low for "
        "features that hardly distinguish anything."
    )
    figures = next(iter(found.results.values())).figures
    table = Table("", ["features", *figures], rows, note)
    return [
        Section("Within and between videos", [_distances(found), table]),
        Section("Effect of the projection on each direction", _spectra(found)),
        bar_section("Cycle consistency by video", "cycle-consistent patches, %", cycle),
        bar_section("Distance to the next frame by video", "D_intra, diameters", intra),
        Section("Failures", [_failure(moment) for moment in found.failures]),
    ]


def bar_section(title: str, label: str, values: Mapping[str, Mapping[str, float]]) -> Section:
    """Return a bar chart of ``values`` by clip and variant, sorted by the projection's gain."""
    variants = list(dict.fromkeys(variant for row in values.values() for variant in row))
    if not variants:
        return Section(title, ())
    before, names, captions = _before(variants), list(values), []
    if before and ADAPTED in variants:

        def gain(name: str) -> float:
            value = values[name].get(ADAPTED, math.nan) - values[name].get(before, math.nan)
            return -math.inf if math.isnan(value) else value

        names.sort(key=gain, reverse=True)
        captions.append(f"Sorted by {ADAPTED} minus {before}.")
    if len(names) > _MAX_BARS:
        half = _MAX_BARS // 2
        captions.append(f"The first and the last {half} of {len(names)} clips.")
        names = names[:half] + names[-half:]

    def draw(axes: Any) -> None:
        for index, (variant, colour) in enumerate(_colours(variants).items()):
            numbers = [values[name].get(variant, math.nan) for name in names]
            shift = (index - (len(variants) - 1) / 2) * 0.8 / len(variants)
            positions = [row + shift for row in range(len(names))]
            widths = [0.0 if math.isnan(number) else number for number in numbers]
            bars = axes.barh(positions, widths, 0.75 / len(variants), color=colour, label=variant)
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
    """Plot D_intra against D_inter: videos before and after, and the means of all variants."""

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
        "Small dots are videos before and after the projection, large dots are means. The paper "
        "aims up and to the left: patches stay close within a video, and videos stay apart.",
    )


def _spectra(found: RepresentationReport) -> list[Table | Figure | str]:
    """Plot the eigenvalues, and the gain of every direction against its variance."""
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
            "Variance of the tokens before the projection: of corresponding patches in "
            "neighbouring frames (within videos), and of one position in different videos "
            "(between videos).",
            width="half",
        ),
        _figure(
            gain,
            (5.2, 3.6),
            "Gain of the projection against the variance within videos",
            "A dot is an eigenvector of the covariance within videos; its height is the factor by "
            "which the projection lengthens a small step along it. The paper predicts that the "
            "gain falls from left to right, across the dashed line.",
            width="half",
        ),
        f"The rank correlation of gain and variance within videos is {within:+.3f}; at -1 the "
        "projection would shrink directions exactly in the order of their variance. The rank "
        "correlation of gain and variance within over variance between videos is "
        f"{share:+.3f}. Measured on {spectrum.videos} videos and {spectrum.pairs:,} pairs of "
        "corresponding patches.",
    ]


def _failure(moment: WorstMoment) -> Figure:
    """Show the first frame with its inconsistent patches in red, beside the second frame."""
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
        f"{moment.video}, {moment.when}: {100 * moment.cycle_consistency:.0f} % of the patches are "
        "cycle-consistent, those in red are not.",
        width="third",
        columns=2,
    )


def _before(variants: Iterable[str]) -> str | None:
    return next((variant for variant in (RAW_SAME, RAW_LAST) if variant in variants), None)


def _colours(variants: Iterable[str]) -> dict[str, str]:
    """Return fixed colours for the four standard variants; the others share the rest."""
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
    """Draw an ``<svg>`` element of ``size`` inches; a single plot has a legend above."""
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
