"""Fit a projection for a backbone on a folder of your own videos; no labels, no GPU needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_adapter.cli.options import (
    add_cache_arguments,
    add_weights_argument,
    frame_progress,
    rate,
)

if TYPE_CHECKING:
    from rich.console import Console

HELP = "fit a projection on a folder of videos"

# spelled out, so that --help needs no torch; a test compares them with the table
SOLVER_NAMES = (
    "centre",
    "shrink",
    "whiten",
    "whiten-quarter",
    "whiten-total",
    "whiten-total-quarter",
    "soft-threshold",
    "surrogate",
)


def blocks(text: str) -> tuple[int, ...]:
    """Parse one set of ``--concatenate``: ``5+7+9+11``."""
    numbers = text.split("+")
    if len(numbers) < 2 or not all(number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"expected blocks such as 7+11, got {text!r}")
    return tuple(map(int, numbers))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--backbone", required=True, help="registered name, timm:<tag> or open_clip:<arch>/<tag>"
    )
    add_weights_argument(parser)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of videos")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--candidates",
        type=Path,
        metavar="DIR",
        help="write each projection that it chooses from here, for evaluate --beside",
    )
    parser.add_argument("--device", default="cpu", help="torch device of the encoder")
    parser.add_argument(
        "--layers", type=int, nargs="*", help="single blocks to choose from; none if empty"
    )
    parser.add_argument(
        "--concatenate",
        type=blocks,
        nargs="*",
        metavar="N+N",
        help="blocks to be read together, to choose from as well; none if empty. By default the "
        "last beside each earlier one, and none beside --layers",
    )
    parser.add_argument(
        "--solver", nargs="+", default=["shrink"], metavar="NAME", help=", ".join(SOLVER_NAMES)
    )
    parser.add_argument(
        "--strengths",
        "--ridge",
        type=float,
        nargs="*",
        help="of the solvers, to choose from; all that are listed for a solver if empty",
    )
    parser.add_argument(
        "--nuisance",
        choices=("intra", "intra+clips", "intra+positions"),
        default="intra",
        help="what to damp besides the change within videos",
    )
    parser.add_argument("--size", type=int, default=280, help="shorter side of the frames")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a clip, at each gap")
    parser.add_argument(
        "--gap", type=int, nargs="+", default=[3], help="frames between the two of a pair"
    )
    parser.add_argument(
        "--correspondences",
        choices=("hard", "soft"),
        default="hard",
        help="mutual nearest neighbours, or all pairs of patches by weight",
    )
    parser.add_argument("--rendered", type=int, default=12, help="rendered clips to choose by")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--licence", help="licence to record; the backbone's by default")
    parser.add_argument("--about-data", default="", help="what the clips are, to record")
    add_cache_arguments(parser)


def run(options: argparse.Namespace, console: Console) -> int:
    """Fit, with a progress bar, and write the projection."""
    from rich.table import Table

    from cosettle_adapter.backbones import HubOptions, load_backbone
    from cosettle_adapter.training.candidates import labels
    from cosettle_adapter.training.clips import find_clips
    from cosettle_adapter.training.fit import FitSettings, fit_projection

    clips = [clip for folder in options.data for clip in find_clips(folder)]
    hub = HubOptions(cache_dir=options.cache_dir, local_files_only=options.offline)
    with console.status(f"loading {options.backbone}"):
        backbone = load_backbone(
            options.backbone,
            weights=options.backbone_weights,
            device=options.device,
            options=hub,
        )
    settings = FitSettings(
        layers=None if options.layers is None else tuple(options.layers),
        concatenations=None if options.concatenate is None else tuple(options.concatenate),
        solvers=tuple(options.solver),
        strengths=None if options.strengths is None else tuple(options.strengths),
        nuisance=options.nuisance,
        size=options.size,
        pairs=options.pairs,
        gaps=tuple(options.gap),
        correspondences=options.correspondences,
        rendered=options.rendered,
        seed=options.seed,
    )
    with frame_progress(console) as progress:
        task = progress.add_task("clips", total=len(clips), rate="")

        def advance(done: int, total: int) -> None:
            elapsed = progress.tasks[task].elapsed
            progress.update(
                task, completed=done, total=total, rate=rate(done, elapsed, unit="clips")
            )

        result = fit_projection(
            backbone,
            clips,
            settings,
            licence=options.licence or backbone.row.licence,
            data=options.about_data or ", ".join(folder.name for folder in options.data),
            workers=options.workers,
            on_clip=advance,
        )
    if options.candidates is not None:
        for candidate, projection in result.projections.items():
            projection.save(options.candidates / str(candidate))
    result.projection.save(options.output)
    names = labels([result.chosen, *result.scores])
    if result.scores:
        table = Table(title="Overlap on rendered clips", title_justify="left")
        table.add_column("block", justify="right")
        table.add_column("overlap", justify="right")
        for each, score in result.scores.items():
            table.add_row(names[each], f"{score:.3f}")
        console.print(table)
    console.print(f"block {names[result.chosen]}", markup=False)
    for clip, reason in result.skipped.items():
        console.print(f"skipped {clip.name}: {reason}", markup=False)
    name = options.output if options.output.is_absolute() else f"./{options.output}"
    console.print(f"load it with CoSettleAdapter.from_pretrained('{name}')", markup=False)
    return 0
