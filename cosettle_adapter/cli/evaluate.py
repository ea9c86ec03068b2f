"""Measure a model on a benchmark: raw, centred and adapted features side by side in one run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosettle_adapter.cli.options import add_model_arguments, frame_progress, load_adapter, size

if TYPE_CHECKING:
    from rich.console import Console

    from cosettle_adapter.evaluation.tasks import Task
    from cosettle_adapter.projection import Projection

HELP = "measure a model on a benchmark"

CLIP_TASKS = ("davis", "folder", "vip", "jhmdb", "badja", "tapvid", "rendered")
VIDEO_TASKS = ("representation", "classification", "retrieval", "localisation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("task", choices=(*CLIP_TASKS, *VIDEO_TASKS), help="the benchmark")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="its folder. Several of DAVIS are parts: the raw layer to compare with is chosen on "
        "the other parts. rendered: photographs, by default those of scikit-image",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--raw", action="store_true", help="score the backbone alone; no projection is needed"
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        metavar="PROJECTION",
        help="other projections of the same backbone (names or folders) to score in the same run",
    )
    parser.add_argument(
        "--settle",
        action="store_true",
        help="clips: score the features settled by each clip's own statistics as well",
    )
    parser.add_argument(
        "--centre",
        action="store_true",
        help="clips: score the adapted features minus the clip's mean token as well",
    )
    parser.add_argument(
        "--baseline-layers",
        type=int,
        nargs="+",
        default=[],
        metavar="LAYER",
        help="clips: score these single layers, centred by the clip's mean token, as well",
    )
    parser.add_argument(
        "--temporal-fusion",
        choices=("symmetric", "causal"),
        help="clips: score adapted features and the layers of --baseline-layers fused as well",
    )
    parser.add_argument("--layer", type=int, help="with --raw, the block to read; the last one")
    parser.add_argument("--stride", type=int, help="step between patches")
    parser.add_argument("--size", type=size, help="HEIGHTxWIDTH in place of the protocol's")
    parser.add_argument("--clips", nargs="+", help="names of the clips; all by default")
    parser.add_argument("--protocol", choices=("crw", "dino"), help="of label propagation")
    parser.add_argument("--topk", type=int, help="in place of the protocol's")
    parser.add_argument("--context", type=int, help="preceding frames, in place of the protocol's")
    parser.add_argument("--radius", type=float, help="cells, in place of the protocol's")
    parser.add_argument("--year", choices=("2016", "2017"), help="of DAVIS")
    parser.add_argument(
        "--late-labels",
        choices=("error", "void"),
        help="of a folder: labels that the first mask does not have; an error by default",
    )
    parser.add_argument(
        "--every",
        type=int,
        nargs="+",
        help="keep every n-th frame of DAVIS; one number, or one for each folder",
    )
    parser.add_argument("--max-frames", type=int, help="keep at most this many frames of DAVIS")
    parser.add_argument("--mode", choices=("first", "strided"), help="of TAP-Vid's queries")
    parser.add_argument("--davis", type=Path, help="DAVIS folder that BADJA's frames are in")
    parser.add_argument("--batch-size", type=int, default=8, help="frames a forward pass")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="JSON of the results; a run on clips goes on",
    )
    parser.add_argument("--save-predictions", type=Path, metavar="DIR", help="write predictions")
    videos = parser.add_argument_group("representation, classification, retrieval, localisation")
    videos.add_argument("--frames", type=int, help="at most this many of a video")
    videos.add_argument("--rate", type=float, help="frames a second")
    videos.add_argument("--ks", type=int, nargs="+", help="numbers of neighbours, or ranks")
    videos.add_argument("--segments", type=Path, help="CSV for localisation: video,start,end,label")
    videos.add_argument("--seed", type=int, help="of splits and sampled positions")
    videos.add_argument("--report", type=Path, help="representation: page to write (HTML)")
    videos.add_argument(
        "--results", type=Path, nargs="+", help="JSON of other tasks to show in the report"
    )


def run(options: argparse.Namespace, console: Console) -> int:
    """Evaluate, with a progress bar, and print a table by clip and the figures."""
    folders = options.data or []
    if not folders and options.task != "rendered":
        raise ValueError(f"{options.task} needs --data, the folder of its clips")
    if len(folders) > 1 and options.task != "davis":
        raise ValueError(f"{options.task} takes one folder, got --data with {len(folders)}")
    if options.task in VIDEO_TASKS:
        options.data = folders[0]
        from cosettle_adapter.cli import evaluate_videos

        return evaluate_videos.run(options, console)
    from cosettle_adapter.cli.evaluation_tables import print_result
    from cosettle_adapter.evaluation.run import evaluate

    task = make_task(options)
    if isinstance(options.size, int):
        raise ValueError(f"--size needs both sides, got {options.size}; write HEIGHTxWIDTH")
    with console.status(f"loading {options.model}"):
        adapter = adapter_of(options)
    with frame_progress(console) as progress:
        bar = progress.add_task(task.name, total=None, rate="")

        def show(done: int, total: int, name: str) -> None:
            progress.update(bar, completed=done, total=total, rate=name)

        result = evaluate(
            task,
            adapter,
            model=str(options.model),
            output=options.output,
            predictions=options.save_predictions,
            size=options.size,
            raw_only=options.raw,
            beside=projections_beside(options),
            settle=options.settle,
            centre=options.centre,
            baseline_layers=options.baseline_layers,
            fusion=options.temporal_fusion,
            batch_size=options.batch_size,
            on_clip=show,
        )
    print_result(result, console)
    if options.output:
        console.print(f"results in {options.output}", markup=False)
    return 1 if result.failed else 0


def make_task(options: argparse.Namespace) -> Task[Any]:
    """Make the task that the options describe.

    Raises:
        ValueError: an option that the task does not have.
    """
    from cosettle_adapter.evaluation import tasks

    propagation = {"protocol", "topk", "context", "radius"}
    known: dict[str, tuple[type[Task[Any]], set[str]]] = {
        "davis": (tasks.Davis, propagation | {"year", "every", "max_frames"}),
        "folder": (tasks.Folder, propagation | {"late_labels"}),
        "vip": (tasks.Vip, propagation),
        "jhmdb": (tasks.Jhmdb, propagation),
        "badja": (tasks.Badja, {"davis"}),
        "tapvid": (tasks.TapVid, {"mode"}),
        "rendered": (tasks.Rendered, set()),
    }
    kind, accepted = known[options.task]
    video_options = {"frames", "rate", "ks", "segments", "seed", "report", "results"}
    every_option = propagation | video_options
    every_option |= {"year", "every", "max_frames", "davis", "mode", "late_labels"}
    given = {
        name: getattr(options, name) for name in every_option if getattr(options, name) is not None
    }
    wrong = sorted(given.keys() - accepted)
    if wrong:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise ValueError(f"{options.task} has no {names}; leave it away")
    make: Any = kind
    task: Task[Any] = make(*(options.data or []), clips=options.clips, **given)
    return task


def adapter_of(options: argparse.Namespace) -> Any:
    """Load the model, or the backbone alone with ``--raw``."""
    if options.layer is not None and not options.raw:
        raise ValueError("--layer goes with --raw: a projection reads the blocks it was fitted on")
    return load_adapter(options, raw=options.raw, layer=options.layer, stride=options.stride)


def projections_beside(options: argparse.Namespace) -> dict[str, Projection]:
    """Load the projections of ``--beside``, by the name of their folder.

    Raises:
        ValueError: two of one name.
    """
    from cosettle_adapter.backbones import HubOptions
    from cosettle_adapter.projection import Projection
    from cosettle_adapter.published import find_projection

    hub = HubOptions(cache_dir=options.cache_dir, local_files_only=options.offline)
    found: dict[str, Projection] = {}
    for given in options.beside:
        name = Path(given).name
        if name in found:
            raise ValueError(f"two projections beside are called {name}; rename a folder")
        found[name] = Projection.load(find_projection(given, hub).folder).to(options.device)
    return found
