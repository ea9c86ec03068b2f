"""What a benchmark finds: rows with both sides, what they are held to, and plain tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cosettle_adapter.benchmark.spread import Ratio, Spread
from cosettle_adapter.benchmark.timing import Timed


@dataclasses.dataclass(frozen=True)
class Target:
    """What a figure is held to.

    Attributes:
        value: the bound.
        at_least: whether the figure is to be no less than it; no more, otherwise.
    """

    value: float
    at_least: bool

    def met_by(self, figure: float) -> bool:
        """Whether a figure keeps to it."""
        return figure >= self.value if self.at_least else figure <= self.value


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        benchmark: the sub-command it belongs to.
        title: both sides in a few words; rows that share one are a row of the summary together.
        what: what was measured, with its sizes.
        beside: what it was compared with.
        figure: the ratio, or the measured value, that the target speaks of, with its interval.
        form: format string of the figure, such as ``{:.2f} x``.
        unit: of ``ours`` and ``other``.
        ours: our measurements.
        other: the other side's; ``None`` where the figure is no comparison.
        target: what the figure is held to, if it is.
        check: how it was made sure that both sides do the same, and how closely they do.
        note: what a reader should know.
        details: further figures.
        samples: every measurement, in seconds, bytes, or ``unit``.
    """

    benchmark: str
    title: str
    what: str
    beside: str
    figure: Ratio
    form: str
    unit: str
    ours: Spread
    other: Spread | None = None
    target: Target | None = None
    check: str = ""
    note: str = ""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    samples: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; ``None`` without one."""
        return None if self.target is None else self.target.met_by(self.figure.value)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON has it."""
        return {**dataclasses.asdict(self), "met": self.met}


@dataclasses.dataclass(frozen=True)
class Table:
    """Figures that are no comparison of two sides.

    Attributes:
        benchmark: the sub-command it belongs to.
        title: heading.
        columns: headers.
        rows: cells, numbers or words.
        note: what a reader should know.
    """

    benchmark: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON has it."""
        return dataclasses.asdict(self)


def faster(timed: Timed, items: float, *, unit: str, **about: Any) -> Row:
    """Make a row whose figure is our rate over the other side's.

    Args:
        timed: seconds of both.
        items: what one run works through, in the unit's own measure (frames for ``frames/s``).
        unit: of the rates.
        **about: the other fields of :class:`Row`.
    """
    return Row(
        figure=Ratio.of(timed.other, timed.ours),
        form="{:.3f} x",
        unit=unit,
        ours=Spread.of([items / second for second in timed.ours]),
        other=Spread.of([items / second for second in timed.other]),
        samples={"ours_seconds": timed.ours, "other_seconds": timed.other},
        **about,
    )


def longer(timed: Timed, *, scale: float = 1.0, unit: str = "s", **about: Any) -> Row:
    """Make a row whose figure is our time over the other side's."""
    return Row(
        figure=Ratio.of(timed.ours, timed.other),
        form="{:.3f} x",
        unit=unit,
        ours=Spread.of([scale * second for second in timed.ours]),
        other=Spread.of([scale * second for second in timed.other]),
        samples={"ours_seconds": timed.ours, "other_seconds": timed.other},
        **about,
    )


def value(measured: Sequence[float], *, unit: str, form: str, **about: Any) -> Row:
    """Make a row of one side's own measurements."""
    spread = Spread.of(measured)
    return Row(
        figure=Ratio(spread.median, spread.low, spread.high),
        form=form,
        unit=unit,
        ours=spread,
        samples={"ours": list(measured)},
        **about,
    )
