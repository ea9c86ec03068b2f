"""The figures of a model's page: distances, spectra, bars by sequence, and where it fails."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.evaluation.report import Figure, Section, Table, picture
from cosettle_adapter.evaluation.variants import ADAPTED, CENTRED, RAW_LAST, RAW_SAME
from cosettle_adapter.imports import require

if TYPE_CHECKING:
    from cosettle_adapter.evaluation.representation import RepresentationReport, WorstMoment
    from cosettle_adapter.evaluation.spectra import Spectrum

Values = Mapping[str, Mapping[str, float]]  # sequence, variant of features

_COLOURS = ("#8b9099", "#b0578f", "#c07a12", "#3f7fdf", "#2b8a5f", "#8a70e0")
_FIXED = (RAW_LAST, RAW_SAME, CENTRED, ADAPTED)  # variants that have the same colour everywhere
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
_MOST_LINKS = 300  # videos whose way from before to after is drawn
_LOST = (226.0, 63.0, 45.0)  # red over patches that are not cycle-consistent


def representation_sections(
    found: RepresentationReport, *, percentile: float = 95.0, gamma: float = 1.0
) -> list[Section]:
    """Return what :func:`evaluate_representation` measured as sections of a page.

    Args:
        found: what was measured.
        percentile: percentile of the diameters that distances are shares of.
        gamma: weight of D_intra in the margin.

    Raises:
        ValueError: a percentile that was not measured.
    """
    intra: dict[str, dict[str, float]] = {}
    cycle: dict[str, dict[str, float]] = {}
    for variant, result in found.results.items():
        for video in result.videos:
            intra.setdefault(video.name, {})[variant] = video.d_intra[percentile]
            cycle.setdefault(video.name, {})[variant] = 100 * video.cycle_accuracy
    steady = "Low for steady features, but also for those that tell little apart."
    return [
        Section("Within and between videos", _distances(found, percentile, gamma)),
        Section("What the projection does to each direction", _spectra(found.spectrum)),
        bar_section("Cycle accuracy by video", "cycle-consistent patches, %", cycle, form="{:.1f}"),
        bar_section(
            "Distance to the next frame by video",
            "D_intra, diameters of the video",
            intra,
            note=steady,
            form="{:.4f}",
        ),
        Section("Where it fails", [_failure(moment) for moment in found.failures]),
    ]


def bar_section(
    title: str, label: str, values: Values, *, note: str = "", form: str = "{:.3g}"
) -> Section:
    """Return bars by sequence, in the order of what the projection changes.

    Args:
        title: heading.
        label: what is measured, with the unit.
        values: sequence to variant of features to value; a variant may be missing here and there.
        note: a sentence below.
        form: format string of the values.
    """
    variants = list(dict.fromkeys(variant for row in values.values() for variant in row))
    if not variants:
        return Section(title, ())
    names, order = _chosen(values, variants)
    height = 0.14 * len(variants)
    figure, axes = _axes(9.6, 0.9 + len(names) * (height + 0.12))
    for index, (variant, colour) in enumerate(_colours(variants).items()):
        numbers = [values[name].get(variant, math.nan) for name in names]
        places = [
            row + (index - (len(variants) - 1) / 2) * 0.8 / len(variants)
            for row in range(len(names))
        ]
        drawn = [number if math.isfinite(number) else 0.0 for number in numbers]
        bars = axes.barh(places, drawn, 0.75 / len(variants), color=colour, label=variant)
        texts = [form.format(number) if math.isfinite(number) else "none" for number in numbers]
        axes.bar_label(bars, texts, padding=2, fontsize=7, color=_INK)
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
    return Section(title, [Figure(_svg(figure, title), " ".join(filter(None, (note, order))))])


def _distances(
    found: RepresentationReport, percentile: float, gamma: float
) -> list[Table | Figure | str]:
    """D_intra against D_inter before and after, and the means as a table."""
    results = found.results
    if not results:
        return []
    rows = [
        (
            variant,
            _number(result.d_intra[percentile]),
            _number(result.d_inter[percentile]),
            _number(result.margin(gamma=gamma, percentile=percentile)),
            _number(result.effective_rank),
            _number(result.cycle_accuracy),
        )
        for variant, result in results.items()
    ]
    variants = list(results)
    table = Table(
        "",
        ("features", "D_intra", "D_inter", "margin", "effective rank", "cycle accuracy"),
        rows,
        note=f"Means over {len(results[variants[0]].videos)} videos. D_intra: distance from a "
        "patch to its nearest in the next frame, the closer half, in diameters of the video. "
        "D_inter: distance between videos at equal positions, in diameters of all. Margin: "
        f"D_inter - {gamma:g} D_intra. Diameters are twice the {percentile:g}th percentile of the "
        "distance from the mean patch.",
        emphasis=variants.index(ADAPTED) if ADAPTED in variants else None,
    )
    return [Figure(_scatter(found, percentile), _DISTANCES), table]


def _scatter(found: RepresentationReport, percentile: float) -> str:
    results, colours = found.results, _colours(found.results)
    before = _before(results)
    figure, axes = _axes(9.6, 4.6)
    clouds = {
        variant: {
            video.name: (video.d_intra[percentile], video.d_inter[percentile])
            for video in results[variant].videos
        }
        for variant in results
        if variant in (before, ADAPTED)
    }
    after = clouds.get(ADAPTED, {})
    for name, start in clouds.get(before or "", {}).items():
        if before != ADAPTED and name in after and len(after) <= _MOST_LINKS:
            axes.plot(*zip(start, after[name], strict=True), color=_INK, lw=0.7, alpha=0.35)
    titles: list[str] = []
    for variant, cloud in clouds.items():
        for name, (x, y) in cloud.items():
            (dot,) = axes.plot([x], [y], "o", color=colours[variant], ms=4, alpha=0.45)
            dot.set_gid(f"dot{len(titles)}")
            titles.append(f"{name}, {variant}")
    for variant, result in results.items():
        x, y = result.d_intra[percentile], result.d_inter[percentile]
        axes.plot([x], [y], "o", color=colours[variant], ms=10, label=variant)
    axes.set_xlabel("D_intra, diameters of the video")
    axes.set_ylabel("D_inter, diameters of all videos")
    return _svg(figure, "D_intra against D_inter before and after the projection", titles)


def _spectra(spectrum: Spectrum | None) -> list[Table | Figure | str]:
    """The eigenvalues, and the gain of every direction against its variance."""
    if spectrum is None:
        return []
    left, axes = _axes(5.2, 3.6)
    ranks = range(1, len(spectrum.intra) + 1)
    axes.plot(ranks, spectrum.inter.tolist(), color=_COLOURS[4], label="between videos")
    axes.plot(ranks, spectrum.intra.tolist(), color=_COLOURS[3], label="within videos")
    axes.set_yscale("log", nonpositive="mask")
    axes.set_xlabel("rank of the eigenvalue")
    axes.set_ylabel("variance")
    right, axes = _axes(5.2, 3.6)
    gains = spectrum.relative_gain.tolist()
    label = "directions of the variance within videos"
    axes.plot(spectrum.intra.tolist(), gains, "o", color=_COLOURS[3], ms=4, alpha=0.45, label=label)
    axes.axhline(1.0, color=_INK, lw=1, ls="--")
    axes.set_xscale("log", nonpositive="mask")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("variance within videos")
    axes.set_ylabel("gain over its root mean square")
    eigenvalues = _svg(left, "Eigenvalues of the covariance within and between videos")
    gain = _svg(right, "Gain of the projection against the variance within videos")
    return [
        Figure(eigenvalues, _SPECTRA, "half"),
        Figure(gain, _GAINS, "half"),
        _prediction(spectrum),
    ]


def _prediction(spectrum: Spectrum) -> str:
    found = spectrum.prediction
    if math.isnan(found.spearman):
        return "The projection treats all directions alike: there is nothing to compare."
    return (
        f"The paper's prediction {'holds' if found.holds else 'does not hold'} here. Variance "
        f"within videos and gain have a rank correlation of {found.spearman:+.3f}; -1 would be "
        "shrinking exactly in the order of the variance. Against the variance within as a share "
        f"of that between videos it is {found.spearman_share:+.3f}. The quarter of directions "
        f"with the most variance within videos has {found.gain_high:.2f} of the root mean square "
        f"gain, the quarter with the least {found.gain_low:.2f}. From {spectrum.videos} videos "
        f"and {spectrum.pairs:,} corresponding patches."
    )


def _failure(moment: WorstMoment) -> Figure:
    """The first frame with its inconsistent patches in red, the second one beside it."""
    return picture(
        _marked(moment.frames.float(), moment.consistent),
        f"{moment.video}, {moment.when}: {100 * moment.cycle_accuracy:.0f} % of the patches are "
        "cycle-consistent, those in red are not.",
    )


def _marked(frames: Tensor, consistent: Tensor) -> Tensor:
    first, second = frames
    height, width = first.shape[1:]
    lost = rearrange((~consistent).float(), "h w -> 1 1 h w")
    lost = rearrange(F.interpolate(lost, size=(height, width)), "1 1 h w -> 1 h w").cpu()
    red = rearrange(torch.tensor(_LOST), "c -> c 1 1").expand_as(first)
    gap = torch.full((3, height, max(2, width // 64)), 255.0)
    image = torch.cat([torch.lerp(first, red, 0.55 * lost), gap, second], dim=2)
    return image.round().to(torch.uint8)


def _chosen(values: Values, variants: Sequence[str]) -> tuple[list[str], str]:
    """Sequences by what the projection changes, both ends of many; and a sentence about it."""
    before, names, order = _before(variants), list(values), ""
    if before is not None and ADAPTED in variants:

        def change(name: str) -> float:
            value = values[name].get(ADAPTED, math.nan) - values[name].get(before, math.nan)
            return -math.inf if math.isnan(value) else value

        names.sort(key=change, reverse=True)
        order = f"In the order of {ADAPTED} minus {before}."
    if len(names) > _MOST_BARS:
        half = _MOST_BARS // 2
        order = f"{order} The first and the last {half} of {len(names)}.".strip()
        names = names[:half] + names[-half:]
    return names, order


def _before(variants: Iterable[str]) -> str | None:
    return next((variant for variant in (RAW_SAME, RAW_LAST) if variant in variants), None)


def _colours(variants: Iterable[str]) -> dict[str, str]:
    """The four variants always have the same colours; others share what is left."""
    variants = list(variants)
    others = [variant for variant in variants if variant not in _FIXED]
    left = _COLOURS[len(_FIXED) :]
    more = {variant: left[index % len(left)] for index, variant in enumerate(others)}
    known = dict(zip(_FIXED, _COLOURS, strict=False)) | more
    return {variant: known[variant] for variant in variants}


def _axes(width: float, height: float) -> tuple[Any, Any]:
    matplotlib: Any = require("matplotlib", extra="report", purpose="drawing figures")
    figures: Any = require("matplotlib.figure", extra="report", purpose="drawing figures")
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def _svg(figure: Any, title: str, titles: Sequence[str] = ()) -> str:
    """An ``<svg>`` element with a legend above; ``titles`` show over the dots of their number."""
    matplotlib: Any = require("matplotlib", extra="report", purpose="drawing figures")
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        if figure.axes[0].get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper left", ncols=6)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    for number, words in enumerate(titles):
        group = f'<g id="dot{number}">'
        text = text.replace(group, f"{group}<title>{escape(words)}</title>")
    opening = f'<svg role="img" aria-label="{escape(title)}" '
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S).replace(
        "<svg ", opening, 1
    )


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.4f}"


def _short(name: str, longest: int = 28) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


_DISTANCES = (
    "Small dots are videos, before and after; large ones the means. Up and to the left is the "
    "paper's aim: patches stay close within a video, and videos stay apart."
)
_SPECTRA = (
    "How tokens vary before the projection: corresponding patches of neighbouring frames (within "
    "videos), and the same position of different videos (between)."
)
_GAINS = (
    "A dot is an eigen-direction of the variance within videos; its height is how much longer a "
    "small step along it is after the projection. The paper predicts a fall from left to right, "
    "across the dashed line."
)
