"""Tables of results: the gains of each variant over others, with intervals, and figures by clip."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from cosettle_adapter.evaluation.drift import GAPS
from cosettle_adapter.evaluation.report import Table
from cosettle_adapter.evaluation.run import DRIFTS, Evaluation, mean
from cosettle_adapter.evaluation.variants import CENTRED, RAW_LAST

_RESAMPLES = 10_000
_SHOWN = (
    *("protocol", "joints", "query_frames", "dense", "upsampler", "every", "max_frames", "mode"),
    *("layers", "patch", "stride"),
)
_COMPARED = {  # measure: heading, function that selects the best value, explanation
    "drift": (
        "drift",
        min,
        "Drift: cosine distance of patches that show the same thing, over that of any two patches. "
        "Pairs come from the true motion, or from matches of a layer that the projection does not "
        "read.",
    ),
    "matches": (
        "right matches",
        max,
        "Right matches: patches whose nearest neighbour in the other frame is within one patch of "
        "the truth.",
    ),
}


class Gain(NamedTuple):
    """Mean of the clips' differences with its 95 % interval, and the clip with the smallest.

    The ends of the interval are NaN for fewer than two clips.
    """

    mean: float
    low: float
    high: float
    clip: str
    worst: float

    def __str__(self) -> str:
        interval = f" [{_percent(self.low)}, {_percent(self.high)}]"
        return _percent(self.mean, "+.1f") + (interval if self.low == self.low else "")


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile interval of a mean by the bootstrap (Efron, 1979).

    It resamples the differences with replacement 10,000 times, with a fixed seed. Fewer than two
    differences have no interval: NaN.
    """
    if len(differences) < 2:
        return math.nan, math.nan
    values = torch.tensor(differences, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (_RESAMPLES, len(values)), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(values[drawn].mean(1), ends).tolist()
    return low, high


def gain(result: Evaluation, variant: str, against: Mapping[str, str]) -> Gain:
    """Return the gain of a variant in the first measure over the variant ``against[clip]``."""
    scores = {other: result.first(other) for other in {*against.values()}}
    differences = {
        clip: value - scores[against[clip]][clip]
        for clip, value in result.first(variant).items()
        if clip in against and clip in scores[against[clip]]
    }
    values = list(differences.values())
    clip, worst = min(differences.items(), key=lambda item: item[1], default=("", math.nan))
    return Gain(mean(values), *paired_interval(values), clip, worst)


def best_layers(result: Evaluation) -> dict[str, str]:
    """Choose the best centred single layer to compare each clip with, if any was scored.

    It has the highest mean of the first measure over the clips of the other parts of the data, so
    that a clip does not influence its own baseline; over all clips if the data has a single part.
    """
    single = CENTRED if len(result.settings["layers"]) == 1 else None
    scores = {
        variant: result.first(variant)
        for variant in result.total
        if variant == single or re.fullmatch(r"centred layer \d+", variant)
    }
    chosen: dict[str, str] = {}
    for part in {_part(result, clip) for clip in result.clips}:
        own = {clip for clip in result.clips if _part(result, clip) == part}
        others = set(result.clips) - own or own
        means = {
            layer: mean(value for clip, value in values.items() if clip in others)
            for layer, values in scores.items()
        }
        known = {layer: value for layer, value in means.items() if value == value}
        if known:
            chosen |= dict.fromkeys(own, max(known, key=lambda layer: known[layer]))
    return chosen


def result_tables(result: Evaluation) -> list[Table]:
    """Return a table by variant of features, and one by clip and measure."""
    first, best = result.measures[0], best_layers(result)
    raw = dict.fromkeys(result.clips, RAW_LAST)
    rows = []
    for number, (variant, total) in enumerate(result.total.items(), 1):
        row = [str(number), variant, _percent(total[first])]
        for over in (gain(result, variant, raw), gain(result, variant, best)):
            row += [str(over), _percent(over.worst, "+.1f")]
        rows.append([*row, "/".join(_percent(total[drift]) for drift in DRIFTS)])
    by_variant = Table(
        f"{result.task}: {len(result.clips)} clips, in percent",
        ("", "features", first, "over raw last", "worst", "over best layer", "worst", "drift"),
        rows,
    )
    values = [result.first(variant) for variant in result.total]
    clips = [[clip, *(_percent(column.get(clip)) for column in values)] for clip in result.clips]
    totals = [
        [f"all: {measure}", *(_percent(total[measure]) for total in result.total.values())]
        for measure in result.measures
    ]
    by_clip = Table(
        f"{first} by clip, then over all clips; columns are the numbers of the features",
        ("", *(str(number) for number in range(1, len(values) + 1))),
        [*clips, *totals],
        rule=len(clips),
    )
    return [by_variant, by_clip]


def result_notes(result: Evaluation) -> Iterator[str]:
    """Explain the tables, and list the settings."""
    best, settings = best_layers(result), result.settings
    raw = dict.fromkeys(result.clips, RAW_LAST)
    interval = " and its 95 % interval by the paired bootstrap" if len(result.clips) > 1 else ""
    yield f"over ...: mean difference over clips{interval}"
    if best:
        by_part = {_part(result, clip): layer for clip, layer in best.items()}
        chosen = ", ".join(f"{layer} for {part}" for part, layer in sorted(by_part.items()))
        if len(by_part) > 1:
            yield f"best layer: {chosen}; chosen on the clips of the other parts"
        else:
            yield f"best layer: {next(iter(best.values()))}; chosen on these clips"
    gaps = " / ".join(map(str, GAPS))
    by = settings["drift"]
    yield f"drift: distance of corresponding over all patches, {gaps} frames apart, by {by}"
    for variant in result.total:
        if variant.startswith(("raw ", "centred")) and "fused" not in variant:
            continue  # a baseline
        last, layer = gain(result, variant, raw), gain(result, variant, best)
        worst = f"over raw last: {last.clip}; over best layer: {layer.clip or '-'}"
        yield f"{variant}: worst clip {worst}"
    sizes = sorted({" x ".join(map(str, clip.size)) for clip in result.clips.values()})
    yield f"frames encoded at {', '.join(sizes)}"
    yield ", ".join(f"{key} {settings[key]}" for key in _SHOWN if settings.get(key) is not None)


def comparison(
    title: str, figures: Mapping[str, Mapping[str, float]], *, emphasis: str = ""
) -> Table:
    """Tabulate drift and matches of several variants of features; the best figures are marked.

    ``figures`` are shares by variant, then by measure (``drift@1``, ``matches@4``, ...); measures
    that a variant lacks are left out. ``emphasis`` is the variant that the table is about.
    """
    names, columns, notes = list(figures), ["features"], []
    rows = [[name] for name in names]
    best: dict[int, list[int]] = {row: [] for row in range(len(rows))}
    for measure, (heading, better, meaning) in _COMPARED.items():
        keys = [f"{measure}@{gap}" for gap in GAPS]
        known = [key for key in keys if all(key in row for row in figures.values())]
        notes += [meaning] if known else []
        for key in known:
            gap = key.partition("@")[2]
            columns.append(f"{heading}, next frame" if gap == "1" else f"{gap} frames apart")
            winner = f"{better(row[key] for row in figures.values()):.1%}"
            for number, row in enumerate(figures.values()):
                rows[number].append(f"{row[key]:.1%}")
                if rows[number][-1] == winner:  # equal after rounding
                    best[number].append(len(rows[number]) - 1)
    about = names.index(emphasis) if emphasis in names else None
    return Table(title, columns, rows, note=" ".join(notes), best=best, emphasis=about)


def _part(result: Evaluation, clip: str) -> str:
    """Return the part of the data that a clip belongs to; empty if there are no parts."""
    return clip.split("/")[0] if result.settings.get("parts") else ""


def _percent(share: float | None, form: str = ".1f") -> str:
    if share is None or share != share:
        return "-"
    return format(round(100 * share, 1) + 0.0, form)  # + 0.0 turns -0.0 into 0.0
