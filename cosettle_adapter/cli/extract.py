"""The command ``extract``: features of one or many videos to files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter, validators

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.cli.common import ModelOptions, Size, console, frame_progress, frames_in, rate
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.extraction import (
    ExtractSettings,
    Job,
    Outcome,
    RayOptions,
    Shard,
    Source,
    extract_many,
    extract_with_ray,
    find_sources,
    plan_jobs,
)
from cosettle_adapter.extraction.formats import SUFFIXES, choose_format, format_of
from cosettle_adapter.extraction.many import require_ray
from cosettle_adapter.extraction.settings import StorageName
from cosettle_adapter.hub import is_published
from cosettle_adapter.video import FrameSelection
from cosettle_adapter.video.sources import pyav, short_name, without_secrets

FAILED, DAMAGED = 1, 2  # exit status: a source failed, or lost frames to damage
_TOKENS = Group("Features without the projection", validator=validators.LimitedChoice())
_DISTRIBUTED = Group("Distributed extraction")


@dataclasses.dataclass(frozen=True)
class Settings(ExtractSettings):  # noqa: D101
    __doc__ = ExtractSettings.__doc__
    size: Size | None = None  # as 476 or 476x882
    storage: StorageName | None = None


def extract(
    sources: Sequence[str],
    /,
    *,
    output: Annotated[str, Parameter(name=("--output", "-o"))],  # a Path loses a final slash
    model: ModelOptions = ModelOptions(),
    settings: Annotated[Settings, Parameter(name="*")] = Settings(),
    select: Annotated[FrameSelection, Parameter(name="*")] = FrameSelection(),
    overwrite: bool = False,
    raw: Annotated[bool, Parameter(group=_TOKENS)] = False,
    layer: Annotated[int | None, Parameter(group=_TOKENS)] = None,
    shard: Annotated[str | None, Parameter(group=_DISTRIBUTED)] = None,
    engine: Annotated[Literal["local", "ray"], Parameter(group=_DISTRIBUTED)] = "local",
    ray: Annotated[RayOptions, Parameter(name="*", group=_DISTRIBUTED)] = RayOptions(),
) -> int:
    """Write the features of videos to files.

    To resume after an interruption, run the same command again: it keeps finished files.

    Args:
        sources: videos or their URLs, - for standard input, folders of images, image patterns, or
            folders of videos.
        output: file to write, whose suffix selects the format; without a suffix, with a final slash
            or with several sources, folder to write (safetensors unless ``--format`` is given).
        overwrite: replace finished files, and files begun with other options.
        raw: write the backbone tokens that the projection reads.
        layer: write the tokens of this layer, of any backbone.
        shard: I/N: process share I of N, counted from 0; by default taken from torchrun or srun.
        engine: ray distributes the videos over a Ray cluster or the cores of this machine.
    """
    out = console()
    local = engine == "local"
    say = functools.partial(out.print, markup=False, highlight=False, soft_wrap=True)
    if not local:
        require_ray()
    share = Shard.parse(shard) if shard is not None else Shard()
    if shard is None and local:  # Ray distributes the work itself
        share = Shard.from_environment()
    # errors are reported before the model is loaded, which may fit a projection
    videos = find_sources(sources)
    jobs = share.of(_plan(videos, output, settings))
    if any(source.kind == "video" for source in videos):
        pyav()
    model = dataclasses.replace(model, device=share.device(model.device))
    with out.status(f"loading {model.model}"):
        # Ray workers load their own; loading here fills the cache once and reports errors early
        loading = model if local else dataclasses.replace(model, device="cpu")
        adapter = _load(loading, raw=raw, layer=layer)
    if len(videos) > 1 or share.count > 1:
        of = f" of shard {share.index}/{share.count} ({share.given_by})" if share.count > 1 else ""
        say(f"{len(videos)} sources, {len(jobs)} to do{of}")
    options: dict[str, Any] = {"settings": settings, "select": select, "overwrite": overwrite}
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    with frame_progress(out) as progress:
        bar = progress.add_task("videos", total=len(jobs), rate="")

        def started(job: Job) -> None:
            count = None
            if not job.output.exists():
                with contextlib.suppress(CosettleError, OSError):
                    count = frames_in(job.source, select)
            total = min(filter(None, (count, select.max_frames)), default=None)
            name = short_name(job.source)
            if len(jobs) > 1:
                name += f" ({len(outcomes) + 1} of {len(jobs)})"
            progress.reset(bar, description=name, rate="")
            progress.tasks[bar].total = total  # reset() ignores an unknown total

        def advanced(done: int) -> None:
            progress.update(bar, completed=done, rate=rate(progress.tasks[bar].speed or 0, 1))

        if local:
            done = extract_many(adapter, jobs, on_job=started, on_chunk=advanced, **options)
        else:
            del adapter
            if ray.gpus_per_worker is None and model.device.startswith("cuda"):
                ray = dataclasses.replace(ray, gpus_per_worker=1)
            load = functools.partial(_load, model, raw=raw, layer=layer)
            done = extract_with_ray(load, jobs, how=ray, **options)
        try:
            for outcome in done:
                outcomes.append(outcome)
                progress.advance(bar, 0 if local else 1)
        except KeyboardInterrupt:
            message = "finished frames are kept: the same command resumes from there"
            raise KeyboardInterrupt(message) from None
    failed = _summarize(say, outcomes, time.perf_counter() - start)
    if failed and share.given_by == "RANK":
        say("exit status 0 despite errors: otherwise torchrun would end the other shards")
        return 0
    return failed


def _load(model: ModelOptions, *, raw: bool, layer: int | None) -> CoSettleAdapter:
    """Load the adapter that computes the requested features."""
    if layer is not None:
        return model.load(layer=layer)
    if raw and model.projection is None and not is_published(model.model):
        return model.load(raw=True)  # do not fit a projection that is not used
    adapter = model.load()
    return adapter.without_projection() if raw else adapter


def _plan(sources: list[Source], given: str, settings: ExtractSettings) -> list[Job]:
    output, form, kinds = Path(given), settings.format, settings.kinds
    by_suffix = format_of(output)
    if by_suffix is None:
        if output.suffix and len(sources) == 1 and not (given.endswith("/") or output.is_dir()):
            raise ValueError(
                f"the suffix of {output.name} is not that of a format: use one of {SUFFIXES}, or "
                f"give -o {output}/ to write into a folder"
            )
        return plan_jobs(sources, output, choose_format(output, form or "safetensors", kinds))
    if len(sources) > 1:
        raise ValueError(
            f"{len(sources)} sources need a folder to write to, and -o {output} is one "
            f"{by_suffix.name} file: give -o {output.with_suffix('')} --format {by_suffix.name}"
        )
    choose_format(output, form, kinds)
    return [Job(sources[0].path, output)]


def _summarize(say: Callable[..., None], outcomes: Sequence[Outcome], seconds: float) -> int:
    """Print the outcomes and the frames per second; return the exit status."""
    written = [outcome.extraction for outcome in outcomes if outcome.extraction]
    skipped = sum(outcome.skipped for outcome in outcomes)
    speed = rate(sum(result.frames - result.found for result in written), seconds)
    speed = f", {speed}" if speed else ""
    if len(outcomes) == len(written) == 1:
        (result,) = written
        shapes = (f"{name} ({', '.join(map(str, s))})" for name, s in result.arrays.items())
        state = " exists already" if skipped else ""
        resumed = f" (resumed after {result.found} frames)" if result.found and not skipped else ""
        say(f"{result.path}{state}: {', '.join(shapes)}, timestamps{speed}{resumed}")
    elif len(outcomes) != 1:
        counts = {"written": len(written) - skipped, "existing": skipped}
        counts["failed"] = len(outcomes) - len(written)
        summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        say(summary + speed if summary else "nothing to do")
    lines = [
        f"{file.path}: frames of its source were lost to damage: {len(file.lost)}"
        for file in written
        if file.lost
    ]
    for outcome in outcomes:
        if outcome.error is not None:
            source = without_secrets(outcome.job.source)
            source = "" if source in outcome.error else f"{source}: "
            lines.append(f"failed: {source}{outcome.error}")
    for line in lines:
        say(line, style="red")
    return FAILED if len(written) < len(outcomes) else DAMAGED if lines else 0
