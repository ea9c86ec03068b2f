"""The results of a task on clips as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cosettle_adapter.evaluation.gains import Gain
    from cosettle_adapter.evaluation.run import Evaluation


def print_result(result: Evaluation, console: Console) -> None:
    """Print a row a kind of features, then a row a clip and a row a measure."""
    from cosettle_adapter.analysis import RAW_LAST
    from cosettle_adapter.evaluation.gains import best_layers, gain

    best = best_layers(result)
    gains = {
        kind: (gain(result, kind, RAW_LAST), gain(result, kind, best)) for kind in result.kinds
    }
    console.print(_kinds_table(result, gains))
    console.print(_figures_table(result))
    for name, reason in result.failed.items():
        console.print(f"not scored: {name}: {reason}", markup=False, style="red", soft_wrap=True)
    for line in _notes(result, best, gains):
        console.print(line, markup=False, soft_wrap=True)


def _kinds_table(result: Evaluation, gains: Mapping[str, Sequence[Gain]]) -> Table:
    from cosettle_adapter.evaluation.run import DRIFTS

    first = result.measures[0]
    table = _table(f"{result.task}: {len(result.clips)} clips, in percent")
    table.add_column("", justify="right")
    table.add_column("features")
    for title in (first, "over raw last", "worst", "over best layer", "worst", "drift"):
        table.add_column(title, justify="right", no_wrap=True)
    for number, kind in enumerate(result.kinds, 1):
        table.add_row(
            str(number),
            kind,
            _percent(result.total[kind][first]),
            *(
                cell
                for each in gains[kind]
                for cell in (_interval(each), _percent(each.worst, "+.1f"))
            ),
            "/".join(_percent(result.total[kind].get(drift)) for drift in DRIFTS),
        )
    return table


def _figures_table(result: Evaluation) -> Table:
    table = _table(f"{result.measures[0]} by clip, then all clips; features by their numbers")
    table.add_column("", no_wrap=True)
    for number in range(len(result.kinds)):
        table.add_column(str(number + 1), justify="right")
    first = {kind: result.first(kind) for kind in result.kinds}
    for clip in result.clips:
        table.add_row(clip, *(_percent(values.get(clip)) for values in first.values()))
    table.add_section()
    for measure in result.measures:
        cells = (_percent(result.total[kind][measure]) for kind in result.kinds)
        table.add_row(f"all: {measure}", *cells)
    return table


def _notes(
    result: Evaluation, best: Mapping[str, str], gains: Mapping[str, Sequence[Gain]]
) -> Iterator[str]:
    """Say what the figures are relative to, and under which settings."""
    from cosettle_adapter.evaluation.gains import part_of
    from cosettle_adapter.evaluation.run import DRIFTS

    yield "over ...: mean difference over clips, its 95 % interval by the paired bootstrap"
    if best:
        names = {part_of(result, clip): layer for clip, layer in best.items()}
        if len(names) > 1:
            chosen = ", ".join(f"{layer} for {part}" for part, layer in names.items())
            yield f"best layer: {chosen}; chosen on the clips of the other parts"
        else:
            yield f"best layer: {next(iter(names.values()))}; chosen on these clips"
    gaps = " / ".join(drift.partition("@")[2] for drift in DRIFTS)
    by = result.settings["drift"]
    yield f"drift: corresponding patches over all patches, {gaps} frames apart, by {by}"
    for kind, (raw, layer) in gains.items():
        if kind.startswith(("raw ", "centred")) and "fused" not in kind:
            continue  # what others are compared with
        yield f"{kind}: worst over raw last: {raw.clip}; over best layer: {layer.clip or '-'}"
    kept = {key: value for key, value in result.settings.items() if value is not None}
    shown = ("protocol", "every", "max_frames", "mode", "layers", "patch", "stride")
    sizes = sorted({f"{height} x {width}" for height, width in result.sizes.values()})
    yield f"frames encoded at {', '.join(sizes)}"
    yield ", ".join(f"{key} {kept[key]}" for key in shown if key in kept)


def _interval(gain: Gain) -> str:
    low, high = _percent(gain.low), _percent(gain.high)
    return f"{_percent(gain.mean, '+.1f')} [{low}, {high}]" if gain.clip else "-"


def _percent(share: float | None, form: str = ".1f") -> str:
    if share is None or share != share:
        return "-"
    return format(round(100 * share, 1) + 0.0, form)  # no minus before a zero


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.show_edge = False
    return table
