"""What a fit chooses from: sets of blocks, solvers, strengths."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.closed_form import (
    SOLVERS,
    AffineMap,
    Nuisance,
    TokenStatistics,
    solve_blocks,
)

Blocks = tuple[int, ...]  # 0-based, ascending; several are concatenated
_MOST_PAIRS = 8  # the statistics of one are three matrices of (2 C)^2 doubles


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A projection that may be chosen.

    Attributes:
        blocks: which are read.
        solver: a name of :data:`~cosettle_adapter.closed_form.SOLVERS`.
        strength: in the solver's own units.
    """

    blocks: Blocks
    solver: str
    strength: float

    def __str__(self) -> str:
        """Name it in full, as in ``7-whiten-1``."""
        return f"{'+'.join(map(str, self.blocks))}-{self.solver}-{self.strength:g}"


def block_sets(
    backbone: Backbone,
    layers: Sequence[int] | None = None,
    concatenations: Sequence[Sequence[int]] | None = None,
) -> list[Blocks]:
    """Return the sets of blocks to choose from.

    Args:
        backbone: the encoder.
        layers: single blocks, negative ones from the end; the upper two thirds by default.
        concatenations: sets of blocks to be read together; by default :func:`pairs_with_last`,
            and none where ``layers`` are given.

    Raises:
        ValueError: no such block, or nothing to choose from.
    """
    if concatenations is None:
        concatenations = pairs_with_last(backbone.depth) if layers is None else ()
    singles = range(backbone.depth // 3, backbone.depth) if layers is None else layers
    wanted = [(layer,) for layer in sorted({backbone.block(layer) for layer in singles})]
    joined = [tuple(sorted({backbone.block(layer) for layer in one})) for one in concatenations]
    found: list[Blocks] = list(dict.fromkeys([*wanted, *joined]))
    if not found or not all(found):
        raise ValueError("no blocks to choose from; name some layers or concatenations")
    return found


def pairs_with_last(depth: int) -> list[Blocks]:
    """Return the last block beside each other one of the upper two thirds, eight at most.

    Middle blocks tell places apart, the last one what they show (``weights_cards/FIT.md``).
    """
    lower = range(depth // 3, depth - 1)
    return [(block, depth - 1) for block in lower[:: -(-len(lower) // _MOST_PAIRS) or 1]]


def candidates(
    sets: Sequence[Blocks],
    solvers: Sequence[str] = ("shrink",),
    strengths: Sequence[float] | None = None,
) -> list[Candidate]:
    """Return every combination.

    Args:
        sets: of blocks.
        solvers: names of solvers.
        strengths: to be tried with each; each solver's own default by default, and all that the
            table lists for it if there are none in ``strengths``.

    Raises:
        ValueError: no solver of that name.
    """
    unknown = [name for name in solvers if name not in SOLVERS]
    if unknown or not solvers:
        raise ValueError(
            f"unknown solver {', '.join(unknown) or '(none)'}; expected {', '.join(SOLVERS)}"
        )
    found = []
    for blocks, name in itertools.product(sets, dict.fromkeys(solvers)):
        row = SOLVERS[name]
        tried = (row.strength,) if strengths is None else tuple(strengths) or row.strengths
        found += [Candidate(blocks, name, strength) for strength in dict.fromkeys(tried)]
    return list(dict.fromkeys(found))


def labels(chosen_from: Sequence[Candidate]) -> Mapping[Candidate, str]:
    """Return what tables call each candidate: its blocks, and what else tells it apart."""
    several = len({(each.solver, each.strength) for each in chosen_from}) > 1
    return {
        each: "+".join(map(str, each.blocks))
        + (f" {each.solver} {each.strength:g}" if several else "")
        for each in chosen_from
    }


def solve(
    backbone: Backbone,
    candidate: Candidate,
    statistics: TokenStatistics,
    nuisance: Nuisance = "intra",
) -> AffineMap:
    """Solve for a candidate's projection; several blocks give no more channels than one.

    Raises:
        StatisticsError: too little data.
    """
    row = SOLVERS[candidate.solver]
    widths = [backbone.widths[block] for block in candidate.blocks]
    return solve_blocks(
        statistics,
        widths,
        lambda gathered: row.solve(gathered, candidate.strength, nuisance),
        out_width=widths[0] if len(widths) == 1 else min(backbone.width, sum(widths)),
    )
