"""The figures of a model's page, as HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cosettle_adapter.analysis import ADAPTED, CENTRED, RAW_LAST, RAW_SAME, Representation, Spectrum
from cosettle_adapter.evaluation import html
from cosettle_adapter.evaluation.axes import Axis
from cosettle_adapter.evaluation.bars import bars
from cosettle_adapter.evaluation.plots import COLOURS, Mark, legend, plot

_COLOUR = {RAW_LAST: 0, RAW_SAME: 1, CENTRED: 2, ADAPTED: 3}
_MOST_BARS = 40  # sequences a chart shows
_MOST_LINKS = 300  # videos whose way from before to after is drawn


@dataclass(frozen=True)
class SequenceChart:
    """A figure by sequence, to be drawn as bars.

    Attributes:
        title: heading.
        label: what is measured, with the unit.
        values: sequence to kind of features to value; a kind may be missing here and there.
        note: a sentence below it.
        form: format string of the values.
    """

    title: str
    label: str
    values: Mapping[str, Mapping[str, float]]
    note: str = ""
    form: str = "{:.3g}"


def distance_figure(
    results: Mapping[str, Representation], *, percentile: float, gamma: float
) -> str:
    """Scatter D_intra against D_inter before and after, and tabulate the means.

    Raises:
        ValueError: a percentile that was not measured.
    """
    if not results:
        return ""
    margins = {k: r.margin(gamma=gamma, percentile=percentile) for k, r in results.items()}
    kinds = list(results)
    table = html.Table(
        "",
        ("features", "D_intra", "D_inter", "margin", "effective rank", "cycle accuracy"),
        [
            (
                kind,
                _number(result.d_intra[percentile]),
                _number(result.d_inter[percentile]),
                _number(margins[kind]),
                _number(result.effective_rank),
                _number(result.cycle_accuracy),
            )
            for kind, result in results.items()
        ],
        note=f"Means over {len(results[kinds[0]].videos)} videos. D_intra: distance from a patch "
        "to its nearest in the next frame, the closer half, in diameters of the video. D_inter: "
        "distance between videos at equal positions, in diameters of all. Margin: D_inter - "
        f"{gamma:g} D_intra. Diameters are twice the {percentile:g}th percentile of the distance "
        "from the mean patch.",
        emphasis=kinds.index(ADAPTED) if ADAPTED in kinds else None,
    )
    return html.figure(_scatter(results, percentile), _DISTANCES) + html.table(table)


def spectrum_figure(spectrum: Spectrum | None) -> str:
    """Draw the eigenvalues, and the gain of every direction against its variance."""
    if spectrum is None:
        return ""
    ranks = [float(rank) for rank in range(1, len(spectrum.intra) + 1)]
    eigenvalues = plot(
        [
            Mark(ranks, spectrum.inter.tolist(), "line", 4),
            Mark(ranks, spectrum.intra.tolist(), "line", 3),
        ],
        title="Eigenvalues of the covariance within and between videos",
        x=Axis("rank of the eigenvalue"),
        y=Axis("variance", log=True),
        width=520,
        height=360,
    )
    gains = plot(
        [Mark(spectrum.intra.tolist(), spectrum.relative_gain.tolist(), "cloud", 3)],
        title="Gain of the projection against the variance within videos",
        x=Axis("variance within videos", log=True),
        y=Axis("gain over its root mean square", include=(0.0,)),
        level=1.0,
        width=520,
        height=360,
    )
    left = html.figure(legend({"between videos": 4, "within videos": 3}) + eigenvalues, _SPECTRA)
    right = html.figure(legend({"directions of the variance within videos": 3}) + gains, _GAINS)
    return f"<div class=pair>{left}{right}</div>{html.paragraph(_prediction(spectrum))}"


def sequence_figure(chart: SequenceChart) -> str:
    """Draw a chart's bars, in the order of what the projection changes."""
    kinds = list(dict.fromkeys(kind for row in chart.values.values() for kind in row))
    if not kinds:
        return ""
    names, order = _chosen(chart.values, kinds)
    values = {kind: [chart.values[name].get(kind, math.nan) for name in names] for kind in kinds}
    colours = _colours(kinds)
    picture = bars(
        names,
        values,
        title=chart.title,
        label=chart.label,
        colours=list(colours.values()),
        form=chart.form,
        width=960,
    )
    return html.figure(legend(colours) + picture, " ".join(filter(None, (chart.note, order))))


def _scatter(results: Mapping[str, Representation], percentile: float) -> str:
    colours = _colours(results)
    before = _before(results)
    marks = []
    clouds = {kind: r.videos for kind, r in results.items() if kind in (before, ADAPTED)}
    after = {video.name: video for video in clouds.get(ADAPTED, ())}
    if before is not None and len(after) <= _MOST_LINKS:
        pairs = [v for b in clouds[before] if b.name in after for v in (b, after[b.name])]
        x, y = [v.d_intra[percentile] for v in pairs], [v.d_inter[percentile] for v in pairs]
        marks.append(Mark(x, y, "links"))
    for kind, videos in clouds.items():
        x, y = [v.d_intra[percentile] for v in videos], [v.d_inter[percentile] for v in videos]
        marks.append(Mark(x, y, "cloud", colours[kind], [f"{v.name}, {kind}" for v in videos]))
    for kind, result in results.items():
        x, y = [result.d_intra[percentile]], [result.d_inter[percentile]]
        marks.append(Mark(x, y, "dots", colours[kind], [f"{kind}, mean"], radius=7))
    picture = plot(
        marks,
        title="D_intra against D_inter before and after the projection",
        x=Axis("D_intra, diameters of the video"),
        y=Axis("D_inter, diameters of all videos"),
        width=960,
        height=460,
    )
    return legend(colours) + picture


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


def _chosen(
    values: Mapping[str, Mapping[str, float]], kinds: Iterable[str]
) -> tuple[list[str], str]:
    """Sequences by what the projection changes, both ends of many; and a sentence about it."""
    before = _before(kinds)
    names, order = list(values), ""
    if before is not None and ADAPTED in kinds:

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


def _before(kinds: Iterable[str]) -> str | None:
    return next((kind for kind in (RAW_SAME, RAW_LAST) if kind in kinds), None)


def _colours(kinds: Iterable[str]) -> dict[str, int]:
    """The four kinds always have the same colours; others share what is left."""
    kinds = list(kinds)
    others = [kind for kind in kinds if kind not in _COLOUR]
    left = COLOURS - len(_COLOUR)
    more = {kind: len(_COLOUR) + index % left for index, kind in enumerate(others)}
    return {kind: (_COLOUR | more)[kind] for kind in kinds}


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.4f}"


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
