"""Write the features of one video, or of many, to files.

A killed run goes on where it was when the same command is given again; what is finished already is
left as it is.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_adapter.cli.options import (
    DTYPES,
    add_fusion_argument,
    add_model_arguments,
    load_adapter,
    size,
    torch_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from rich.console import Console

    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.cli.extraction_progress import ExtractionProgress
    from cosettle_adapter.extraction import Job, Outcome, Shard, Source

HELP = "write the features of videos to files"

_FORMATS = ("safetensors", "zarr", "npy-memmap", "dino-tracker")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="video file, folder of images or pattern of images; or several of these, or folders "
        "of videos",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="the file, whose suffix tells its format; without a suffix, and for several sources, "
        "a folder",
    )
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        help="of the files in a folder; safetensors by default",
    )
    add_model_arguments(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--raw", action="store_true", help="the frozen tokens the projection reads, without it"
    )
    kind.add_argument(
        "--layer", type=int, help="this block's own tokens, without the projection; any backbone"
    )
    parser.add_argument(
        "--settle",
        action="store_true",
        help="settle each frame by the statistics of those before it",
    )
    add_fusion_argument(parser)
    parser.add_argument("--size", type=size, help="shorter side, or HEIGHTxWIDTH")
    parser.add_argument("--fit", choices=("resize", "pad"), default="resize")
    parser.add_argument("--stride", type=int, help="step between patches, for overlapping ones")
    parser.add_argument("--batch-size", type=int, default=8, help="frames a forward pass")
    parser.add_argument("--storage", choices=DTYPES, help="dtype on disk; --dtype's by default")
    parser.add_argument("--start", type=float, help="first second")
    parser.add_argument("--end", type=float, help="second to stop before")
    parser.add_argument("--every", type=int, default=1, help="keep every n-th frame")
    parser.add_argument("--max-frames", type=int, help="keep at most this many")
    parser.add_argument("--fps", type=float, help="of images, for their timestamps")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="redo what is there already, and what was started with other options",
    )
    spread = parser.add_argument_group("many videos on many machines")
    spread.add_argument(
        "--shard",
        metavar="I/N",
        help="do the I-th of N shares, from 0; by default as torchrun or srun say (RANK and "
        "WORLD_SIZE, or SLURM_PROCID and SLURM_NTASKS)",
    )
    spread.add_argument("--engine", choices=("local", "ray"), default="local")
    spread.add_argument("--workers", type=int, default=1, help="with ray: models at work at once")
    spread.add_argument(
        "--gpus-per-worker", type=float, help="with ray: 1 on --device cuda; a fraction shares"
    )
    spread.add_argument("--retries", type=int, default=1, help="with ray: of videos that failed")


def run(options: argparse.Namespace, console: Console) -> int:
    """Extract, with progress bars."""
    from cosettle_adapter.cli.extraction_progress import ExtractionProgress, summarize
    from cosettle_adapter.extraction import find_sources

    if options.engine == "ray":
        from cosettle_adapter.extraction.ray_engine import require_ray

        require_ray()
    shard = _shard(options)
    options.device = shard.device(options.device)
    # with ray, to fill the cache once and to fail at once: the workers load it for themselves
    device = options.device if options.engine == "local" else "cpu"
    with console.status(f"loading {options.model}"):
        adapter: CoSettleAdapter | None = _load(
            argparse.Namespace(**{**vars(options), "device": device})
        )
    if options.engine == "ray":
        adapter = None
    sources = find_sources(options.sources)
    jobs = shard.of(_plan(options, sources))
    _tell_plan(console, sources, jobs, shard)
    outcomes: list[Outcome] = []
    try:
        with ExtractionProgress(console, jobs, options) as progress:
            for outcome in _outcomes(options, adapter, jobs, progress):
                outcomes.append(outcome)
                progress.finished(outcome)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "what is written is kept: the same command goes on from there"
        ) from None
    status = summarize(console, outcomes)
    if status and shard.ends_together:
        console.print(
            "exit status 0 all the same: torchrun would end the other shards", highlight=False
        )
        return 0
    return status


def _outcomes(
    options: argparse.Namespace,
    adapter: CoSettleAdapter | None,
    jobs: list[Job],
    progress: ExtractionProgress,
) -> Iterator[Outcome]:
    from cosettle_adapter.extraction import extract_many

    how = _extract_options(options)
    if adapter is not None:
        yield from extract_many(
            adapter, jobs, on_job=progress.started, on_chunk=progress.advanced, **how
        )
        return
    from cosettle_adapter.extraction.ray_engine import RayOptions, extract_with_ray

    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1 if options.device.startswith("cuda") else 0
    spread = RayOptions(workers=options.workers, gpus=gpus, retries=options.retries)
    load = functools.partial(_load, options)
    yield from extract_with_ray(load, jobs, how=spread, on_retry=progress.retried, **how)


def _load(options: argparse.Namespace) -> CoSettleAdapter:
    """Load what computes the features that were asked for."""
    if options.layer is not None:
        return load_adapter(options, layer=options.layer, stride=options.stride)
    if options.raw and options.projection is None:
        from cosettle_adapter.published import is_published

        if not is_published(options.model):  # nothing is fitted to be left out
            return load_adapter(options, raw=True, stride=options.stride)
    adapter = load_adapter(options, stride=options.stride)
    return adapter.without_projection() if options.raw else adapter


def _plan(options: argparse.Namespace, sources: list[Source]) -> list[Job]:
    from cosettle_adapter.extraction import Job, plan_jobs
    from cosettle_adapter.extraction.formats import DEFAULT_FORMAT, find_format, format_of

    told = format_of(options.output)
    if told is None:
        return plan_jobs(sources, options.output, find_format(options.format or DEFAULT_FORMAT))
    if len(sources) > 1:
        raise ValueError(
            f"{len(sources)} sources need a folder to write to, and -o {options.output} is one "
            f"{told.name} file: give -o {options.output.with_suffix('')} --format {told.name}"
        )
    return [Job(sources[0].path, options.output)]


def _extract_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "format": options.format,
        "batch_size": options.batch_size,
        "size": options.size,
        "fit": options.fit,
        "start": options.start,
        "end": options.end,
        "every": options.every,
        "max_frames": options.max_frames,
        "fps": options.fps,
        "settle": True if options.settle else None,
        "temporal_fusion": options.temporal_fusion,
        "storage": torch_dtype(options.storage) if options.storage else None,
        "overwrite": options.overwrite,
    }


def _shard(options: argparse.Namespace) -> Shard:
    from cosettle_adapter.extraction import Shard

    if options.shard is not None:
        return Shard.parse(options.shard)
    # Ray spreads the work by itself
    return Shard() if options.engine == "ray" else Shard.from_environment()


def _tell_plan(console: Console, sources: list[Source], jobs: list[Job], shard: Shard) -> None:
    from cosettle_adapter.extraction.sources import understood

    if len(sources) > 1 or shard.count > 1:
        share = ""
        if shard.count > 1:
            share = f"; {len(jobs)} in shard {shard.index}/{shard.count} ({shard.told_by})"
        console.print(f"{understood(sources)}{share}", markup=False, highlight=False)
