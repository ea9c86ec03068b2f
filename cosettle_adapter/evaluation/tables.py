"""Results as tables of text: what each variant gains over others, clip by clip, and how sure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from cosettle_adapter.evaluation.protocols import mean
from cosettle_adapter.evaluation.report import Table
from cosettle_adapter.evaluation.run import DRIFTS
from cosettle_adapter.evaluation.variants import CENTRED, RAW_LAST

if TYPE_CHECKING:
    from cosettle_adapter.evaluation.run import Evaluation

RESAMPLES = 10_000
_SEED = 0
_CONFIDENCE = (0.025, 0.975)
_SHOWN = ("protocol", "every", "max_frames", "mode", "layers", "patch", "stride")


class Gain(NamedTuple):
    """Differences by clip, summed up.

    Attributes:
        mean: over the clips.
        low: lower end of its 95 % interval.
        high: upper end of it.
        clip: the clip that gains least; empty without clips.
        worst: what that clip gains; negative is a loss.
    """

    mean: float
    low: float
    high: float
    clip: str
    worst: float


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile interval of a mean by the bootstrap (Efron, 1979).

    The differences are drawn anew, as many as there are and with replacement, 10,000 times with a
    fixed seed. NaN without differences.
    """
    if not differences:
        return float("nan"), float("nan")
    values = torch.tensor(differences, dtype=torch.float64)
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = torch.quantile(values[drawn].mean(1), torch.tensor(_CONFIDENCE).double()).tolist()
    return low, high


def gain(result: Evaluation, variant: str, against: str | Mapping[str, str]) -> Gain:
    """Compare a variant of features by the first measure with another one.

    Args:
        result: scores by clip.
        variant: the one that gains or loses.
        against: the other one, or clip to the other one; clips that lack either do not count.
    """
    others = dict.fromkeys(result.clips, against) if isinstance(against, str) else against
    scores = {other: result.first(other) for other in {*others.values()}}
    differences = {
        clip: value - scores[others[clip]][clip]
        for clip, value in result.first(variant).items()
        if clip in others and clip in scores[others[clip]]
    }
    if not differences:
        nothing = float("nan")
        return Gain(nothing, nothing, nothing, "", nothing)
    worst = min(differences, key=lambda clip: differences[clip])
    values = list(differences.values())
    return Gain(mean(values), *paired_interval(values), worst, differences[worst])


def best_layers(result: Evaluation) -> dict[str, str]:
    """Choose for every clip the best raw single layer centred.

    It is the one with the highest mean of the first measure over the clips of the other parts of
    the data, so that no clip has a say in what it is compared with; over all clips where the data
    has a single part.

    Returns:
        Clip to variant of features; empty where no single layer was scored.
    """
    single = {CENTRED} if len(result.settings["layers"]) == 1 else set()
    layers = [
        variant
        for variant in result.variants
        if variant in single or re.fullmatch(r"centred layer \d+", variant)
    ]
    chosen: dict[str, str] = {}
    for part in sorted({_part_of(result, clip) for clip in result.clips}):
        own = {clip for clip in result.clips if _part_of(result, clip) == part}
        judges = set(result.clips) - own or own
        by_layer = {
            layer: mean(value for clip, value in result.first(layer).items() if clip in judges)
            for layer in layers
        }
        known = {layer: value for layer, value in by_layer.items() if value == value}
        if known:
            chosen |= dict.fromkeys(own, max(known, key=lambda layer: known[layer]))
    return chosen


def result_tables(result: Evaluation) -> list[Table]:
    """Return a table with a row a variant of features, and one with a row a clip and a measure."""
    first, best = result.measures[0], best_layers(result)
    rows = []
    for number, variant in enumerate(result.variants, 1):
        total = result.total[variant]
        row = [str(number), variant, _percent(total[first])]
        for found in (gain(result, variant, RAW_LAST), gain(result, variant, best)):
            row += [_interval(found), _percent(found.worst, "+.1f")]
        rows.append([*row, "/".join(_percent(total.get(drift)) for drift in DRIFTS)])
    by_variant = Table(
        f"{result.task}: {len(result.clips)} clips, in percent",
        ("", "features", first, "over raw last", "worst", "over best layer", "worst", "drift"),
        rows,
    )
    values = [result.first(variant) for variant in result.variants]
    clips = [[clip, *(_percent(each.get(clip)) for each in values)] for clip in result.clips]
    totals = [
        [f"all: {measure}", *(_percent(each[measure]) for each in result.total.values())]
        for measure in result.measures
    ]
    by_clip = Table(
        f"{first} by clip, then all clips; features by their numbers",
        ("", *(str(number) for number in range(1, len(values) + 1))),
        [*clips, *totals],
        rule=len(clips),
    )
    return [by_variant, by_clip]


def result_notes(result: Evaluation) -> Iterator[str]:
    """Say what the figures are relative to, and under which settings."""
    best = best_layers(result)
    yield "over ...: mean difference over clips, its 95 % interval by the paired bootstrap"
    if best:
        names = {_part_of(result, clip): layer for clip, layer in best.items()}
        if len(names) > 1:
            chosen = ", ".join(f"{layer} for {part}" for part, layer in names.items())
            yield f"best layer: {chosen}; chosen on the clips of the other parts"
        else:
            yield f"best layer: {next(iter(names.values()))}; chosen on these clips"
    gaps = " / ".join(drift.partition("@")[2] for drift in DRIFTS)
    by = result.settings["drift"]
    yield f"drift: corresponding patches over all patches, {gaps} frames apart, by {by}"
    for variant in result.variants:
        if variant.startswith(("raw ", "centred")) and "fused" not in variant:
            continue  # what others are compared with
        raw, layer = gain(result, variant, RAW_LAST), gain(result, variant, best)
        yield f"{variant}: worst over raw last: {raw.clip}; over best layer: {layer.clip or '-'}"
    sizes = sorted({f"{height} x {width}" for height, width in result.sizes.values()})
    yield f"frames encoded at {', '.join(sizes)}"
    settings = result.settings
    yield ", ".join(f"{key} {settings[key]}" for key in _SHOWN if settings.get(key) is not None)


class _Column(NamedTuple):
    title: str
    figure: str
    better: str  # the lower or the higher
    meaning: str = ""


_COLUMNS = (
    _Column(
        "drift, next frame",
        "drift@1",
        "lower",
        "Drift: cosine distance of patches that show the same thing, over that of any two patches; "
        "by the true motion, or by matches of a layer that the projection does not read.",
    ),
    _Column("4 frames on", "drift@4", "lower"),
    _Column("8 frames on", "drift@8", "lower"),
    _Column(
        "right matches, next frame",
        "matches@1",
        "higher",
        "Right matches: patches whose nearest neighbour in the other frame lies within one patch "
        "of the truth.",
    ),
    _Column("4 frames on", "matches@4", "higher"),
    _Column("8 frames on", "matches@8", "higher"),
)


def comparison(
    title: str, figures: Mapping[str, Mapping[str, float]], *, emphasis: str = ""
) -> Table:
    """Tabulate drift and matches of several variants of features.

    Args:
        title: heading.
        figures: variant to ``drift@1``, ``matches@4`` and so on, shares of 1; columns whose figure
            was not measured for all are left out.
        emphasis: the variant that the table is about.

    Returns:
        A row a variant, the best of each column marked, with what the columns mean below.
    """
    columns = [each for each in _COLUMNS if all(each.figure in row for row in figures.values())]
    rows = [[f"{row[each.figure]:.1%}" for each in columns] for row in figures.values()]
    best: dict[int, list[int]] = {row: [] for row in range(len(rows))}
    for position, column in enumerate(columns):
        values = [row[column.figure] for row in figures.values()]
        winner = f"{min(values) if column.better == 'lower' else max(values):.1%}"
        for number, row in enumerate(rows):
            if row[position] == winner:  # reads the same: as good
                best[number].append(position + 1)
    names = list(figures)
    return Table(
        title=title,
        columns=["features", *(column.title for column in columns)],
        rows=[[name, *row] for name, row in zip(names, rows, strict=True)],
        note=" ".join(column.meaning for column in columns if column.meaning),
        best=best,
        emphasis=names.index(emphasis) if emphasis in names else None,
    )


def _part_of(result: Evaluation, clip: str) -> str:
    """The part of the data that a clip belongs to; empty where it has no parts."""
    return clip.split("/")[0] if result.settings.get("parts") else ""


def _interval(gain: Gain) -> str:
    low, high = _percent(gain.low), _percent(gain.high)
    return f"{_percent(gain.mean, '+.1f')} [{low}, {high}]" if gain.clip else "-"


def _percent(share: float | None, form: str = ".1f") -> str:
    if share is None or share != share:
        return "-"
    return format(round(100 * share, 1) + 0.0, form)  # no minus before a zero
