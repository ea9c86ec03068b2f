"""The command that writes the features of one video, or of many, to files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter, validators
from rich.console import Console

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.cli.common import (
    ModelOptions,
    Output,
    Size,
    console,
    frame_progress,
    frames_in,
    rate,
)
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
from cosettle_adapter.extraction.formats import choose_format, format_of
from cosettle_adapter.extraction.many import require_ray
from cosettle_adapter.extraction.settings import StorageName
from cosettle_adapter.hub import is_published
from cosettle_adapter.video import FrameSelection
from cosettle_adapter.video.decoder import pyav

_TOKENS = Group("Features without the projection", validator=validators.LimitedChoice())
_SPREAD = Group("Many videos on many machines")


@dataclasses.dataclass(frozen=True)
class Settings(ExtractSettings):  # noqa: D101
    __doc__ = ExtractSettings.__doc__
    size: Size | None = None  # as 476 or 476x882
    storage: StorageName | None = None


def extract(
    sources: Sequence[str],
    /,
    *,
    output: Output,
    model: ModelOptions = ModelOptions(),
    settings: Annotated[Settings, Parameter(name="*")] = Settings(),
    select: Annotated[FrameSelection, Parameter(name="*")] = FrameSelection(),
    overwrite: bool = False,
    raw: Annotated[bool, Parameter(group=_TOKENS)] = False,
    layer: Annotated[int | None, Parameter(group=_TOKENS)] = None,
    shard: Annotated[str | None, Parameter(group=_SPREAD)] = None,
    engine: Annotated[Literal["local", "ray"], Parameter(group=_SPREAD)] = "local",
    spread: Annotated[RayOptions, Parameter(name="*", group=_SPREAD)] = RayOptions(),
) -> int:
    """Write the features of videos to files.

    An interrupted command resumes where it was when it is given again; what is finished already
    is left as it is.

    Args:
        sources: a video, a folder of images or a pattern of images; or several of these, or
            folders of videos.
        output: the file, whose suffix tells its format; without a suffix, and for several
            sources, a folder (of safetensors, unless ``--format`` says otherwise).
        overwrite: redo what exists already, and what was started with other options.
        raw: the frozen tokens that the projection reads.
        layer: the tokens of this block or stage, of any backbone.
        shard: I/N: do the I-th of N shares, from 0; by default as torchrun or srun say.
        engine: ray spreads videos over a Ray cluster, or the processors of this machine.
    """
    out = console()
    local = engine == "local"
    say = functools.partial(out.print, markup=False, highlight=False, soft_wrap=True)
    if not local:
        require_ray()
    share = Shard.parse(shard) if shard is not None else Shard()
    if shard is None and local:  # Ray spreads the work by itself
        share = Shard.from_environment()
    # before the model is loaded, which may fit a projection: what is missing is reported at once
    found = find_sources(sources)
    jobs = share.of(_plan(found, output, settings.format))
    if any(source.kind == "video" for source in found):
        pyav()
    model = dataclasses.replace(model, device=share.device(model.device))
    with out.status(f"loading {model.model}"):
        # workers load it for themselves; here, to fill the cache once and to fail at once
        here = model if local else dataclasses.replace(model, device="cpu")
        adapter = _load(here, raw=raw, layer=layer)
    if len(found) > 1 or share.count > 1:
        of = f" of shard {share.index}/{share.count} ({share.given_by})" if share.count > 1 else ""
        say(f"{len(found)} sources, {len(jobs)} to do{of}")
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
            name = Path(job.source).name
            if len(jobs) > 1:
                name += f" ({len(outcomes) + 1} of {len(jobs)})"
            progress.reset(bar, description=name, rate="")
            progress.tasks[bar].total = total  # reset() would leave the last one if it is unknown

        def advanced(done: int) -> None:
            progress.update(bar, completed=done, rate=rate(progress.tasks[bar].speed or 0, 1))

        if local:
            done = extract_many(adapter, jobs, on_job=started, on_chunk=advanced, **options)
        else:
            del adapter
            if spread.gpus_per_worker is None and model.device.startswith("cuda"):
                spread = dataclasses.replace(spread, gpus_per_worker=1)
            load = functools.partial(_load, model, raw=raw, layer=layer)
            done = extract_with_ray(load, jobs, how=spread, **options)
        try:
            for outcome in done:
                outcomes.append(outcome)
                progress.advance(bar, 0 if local else 1)
        except KeyboardInterrupt:
            kept = "what is written is kept: the same command resumes from there"
            raise KeyboardInterrupt(kept) from None
    failed = _summarize(out, outcomes, time.perf_counter() - start)
    if failed and share.given_by == "RANK":
        say("exit status 0 all the same: torchrun would end the other shards")
        return 0
    return int(failed)


def _load(model: ModelOptions, *, raw: bool, layer: int | None) -> CoSettleAdapter:
    """Load what computes the features that were asked for."""
    if layer is not None:
        return model.load(layer=layer)
    if raw and model.projection is None and not is_published(model.model):
        return model.load(raw=True)  # nothing is fitted to be left out
    adapter = model.load()
    return adapter.without_projection() if raw else adapter


def _plan(sources: list[Source], output: Path, form: str | None) -> list[Job]:
    by_suffix = format_of(output)
    if by_suffix is None:
        return plan_jobs(sources, output, choose_format(output, form or "safetensors"))
    if len(sources) > 1:
        raise ValueError(
            f"{len(sources)} sources need a folder to write to, and -o {output} is one "
            f"{by_suffix.name} file: give -o {output.with_suffix('')} --format {by_suffix.name}"
        )
    choose_format(output, form)
    return [Job(sources[0].path, output)]


def _summarize(out: Console, outcomes: Sequence[Outcome], seconds: float) -> bool:
    """Print the outcomes and the frames per second; return whether any source failed."""
    say = functools.partial(out.print, markup=False, highlight=False, soft_wrap=True)
    written = [outcome.extraction for outcome in outcomes if outcome.extraction]
    skipped = sum(outcome.skipped for outcome in outcomes)
    speed = rate(sum(result.frames - result.found for result in written), seconds)
    speed = f", {speed}" if speed else ""
    if len(outcomes) == len(written) == 1:
        (result,) = written
        shape = ", ".join(map(str, (result.frames, *result.shape)))
        state = " exists already" if skipped else ""
        resumed = f" (resumed after {result.found} frames)" if result.found and not skipped else ""
        say(f"{result.path}{state}: features ({shape}), timestamps{speed}{resumed}")
    elif len(outcomes) != 1:
        counts = {"written": len(written) - skipped, "there already": skipped}
        counts["failed"] = len(outcomes) - len(written)
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        say(told + speed if told else "nothing to do")
    lines = [f"the source ended early: {each.truncated}" for each in written if each.truncated]
    for outcome in outcomes:
        if outcome.error is not None:
            source = "" if outcome.job.source in outcome.error else f"{outcome.job.source}: "
            lines.append(f"failed: {source}{outcome.error}")
    for line in lines:
        say(line, style="red")
    return bool(lines)
