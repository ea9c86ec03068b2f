"""The command that writes the features of one video, or of many, to files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter, validators
from rich.console import Console

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.cli.common import ModelOptions, Output, Size, console, frame_progress, rate
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.extraction import (
    ExtractSettings,
    Job,
    Outcome,
    Shard,
    Source,
    extract_many,
    find_sources,
    plan_jobs,
)
from cosettle_adapter.extraction.formats import FORMATS, format_of
from cosettle_adapter.extraction.ray import RayOptions, extract_with_ray, require_ray
from cosettle_adapter.extraction.settings import StorageName
from cosettle_adapter.hub import is_published
from cosettle_adapter.video import FrameSelection, probe

_LISTED = 50
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
    if engine == "ray":
        require_ray()
    if shard is not None:
        share = Shard.parse(shard)
    else:  # Ray spreads the work by itself
        share = Shard() if engine == "ray" else Shard.from_environment()
    model = dataclasses.replace(model, device=share.device(model.device))
    with out.status(f"loading {model.model}"):
        # workers load it for themselves; here, to fill the cache once and to fail at once
        here = model if engine == "local" else dataclasses.replace(model, device="cpu")
        adapter = _load(here, raw=raw, layer=layer)
    found = find_sources(sources)
    jobs = share.of(_plan(found, output, settings.format))
    if len(found) > 1 or share.count > 1:
        out.print(_understood(found, jobs, share), markup=False, highlight=False)
    outcomes: list[Outcome] = []
    options: dict[str, Any] = {"settings": settings, "select": select, "overwrite": overwrite}
    try:
        with _Bars(out, jobs, settings, select, many=len(jobs) != 1 or engine == "ray") as bars:
            if engine == "local":
                done = extract_many(
                    adapter, jobs, on_job=bars.started, on_chunk=bars.advanced, **options
                )
            else:
                del adapter
                if spread.gpus_per_worker is None and model.device.startswith("cuda"):
                    spread = dataclasses.replace(spread, gpus_per_worker=1)
                load = functools.partial(_load, model, raw=raw, layer=layer)
                done = extract_with_ray(load, jobs, how=spread, on_retry=bars.retried, **options)
            for outcome in done:
                outcomes.append(outcome)
                bars.finished(outcome)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "what is written is kept: the same command resumes from there"
        ) from None
    status = _summarize(out, outcomes)
    if status and share.ends_together:
        out.print("exit status 0 all the same: torchrun would end the other shards")
        return 0
    return status


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
        return plan_jobs(sources, output, FORMATS[form or "safetensors"])
    if len(sources) > 1:
        raise ValueError(
            f"{len(sources)} sources need a folder to write to, and -o {output} is one "
            f"{by_suffix.name} file: give -o {output.with_suffix('')} --format {by_suffix.name}"
        )
    return [Job(sources[0].path, output)]


def _understood(sources: list[Source], jobs: list[Job], share: Shard) -> str:
    """Say what was found: ``3 videos and 1 sequence of images; 2 in shard 0/2 (--shard)``."""
    videos = sum(source.kind == "video" for source in sources)
    images = len(sources) - videos
    found = [f"{videos} video{'s' * (videos != 1)}"] if videos else []
    if images:
        found.append(f"{images} sequence{'s' * (images != 1)} of images")
    told = " and ".join(found)
    if share.count > 1:
        told += f"; {len(jobs)} in shard {share.index}/{share.count} ({share.given_by})"
    return told


class _Bars:
    """Bars over the frames of the current video and, where there are several, over videos."""

    def __init__(
        self,
        out: Console,
        jobs: list[Job],
        settings: ExtractSettings,
        select: FrameSelection,
        *,
        many: bool,
    ) -> None:
        self._out, self._settings, self._select = out, settings, select
        self._bars = frame_progress(out)
        self._videos = self._bars.add_task("videos", total=len(jobs), rate="", visible=many)
        self._frames = self._bars.add_task("", total=None, rate="", visible=False)
        self._found: int | None = None

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def started(self, job: Job) -> None:
        self._found = None
        self._bars.reset(
            self._frames, description=Path(job.source).name, total=None, visible=True, rate=""
        )
        self._bars.update(self._frames, total=self._expected(job))

    def advanced(self, frames: int) -> None:
        if self._found is None:  # frames of an earlier run say nothing of this one's rate
            self._found = max(0, frames - self._settings.batch_size)
        elapsed = self._bars.tasks[-1].elapsed
        self._bars.update(self._frames, completed=frames, rate=rate(frames - self._found, elapsed))

    def retried(self, failed: Sequence[Outcome]) -> None:
        self._out.print(f"trying {len(failed)} that failed again", markup=False)

    def finished(self, outcome: Outcome) -> None:
        if outcome.extraction is not None:
            frames = outcome.extraction.frames
            self._bars.update(self._frames, total=frames, completed=frames)
        self._bars.advance(self._videos)

    def _expected(self, job: Job) -> int | None:
        """The number of frames, as far as it is known before reading them."""
        select, total = self._select, None
        if select.start is None and select.end is None and not job.output.exists():
            with contextlib.suppress(CosettleError, OSError):
                count = probe(job.source).frames
                total = None if count is None else -(-count // select.every)
        if select.max_frames is not None:
            total = select.max_frames if total is None else min(total, select.max_frames)
        return total


def _summarize(out: Console, outcomes: Sequence[Outcome]) -> int:
    """Say what became of every source; return the exit status."""
    say = functools.partial(out.print, markup=False, highlight=False, soft_wrap=True)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    early = [each.extraction for each in outcomes if each.extraction and each.extraction.truncated]
    result = outcomes[0].extraction if len(outcomes) == 1 else None
    if result is not None:
        shape = ", ".join(map(str, (result.frames, *result.shape)))
        state = ": " if not outcomes[0].skipped else " exists already: "
        found = (
            f" (resumed after {result.found} frames)" if 0 < result.found < result.frames else ""
        )
        say(f"{result.path}{state}features ({shape}), timestamps{found}")
    elif len(outcomes) != 1:
        skipped = sum(outcome.skipped for outcome in outcomes)
        written = len(outcomes) - skipped - len(failed)
        counts = {"written": written, "there already": skipped, "failed": len(failed)}
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        say(told or "nothing to do")
    lines = [(f"the source ended early: {each.truncated}", "yellow") for each in early]
    for outcome in failed:
        source = "" if outcome.job.source in str(outcome.error) else f"{outcome.job.source}: "
        lines.append((f"failed: {source}{outcome.error}", "red"))
    for line, style in lines[:_LISTED]:
        say(line, style=style)
    if len(lines) > _LISTED:
        say(f"and {len(lines) - _LISTED} more like these")
    return 1 if lines else 0
