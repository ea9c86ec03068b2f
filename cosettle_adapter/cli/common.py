"""Options and progress bars shared by several commands."""

# no `from __future__ import annotations`: other modules derive from ModelOptions

import dataclasses
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, Token
from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress

    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.video import FrameSelection

DEFAULT_MODEL = "dinov2-vits14-pypi"
WIDE = 190  # columns of the widest table

command_line: ContextVar[tuple[str, ...]] = ContextVar("command_line", default=())
"""The arguments of ``main``, for commands that record them."""

Dtype = Literal["float32", "bfloat16", "float16"]


def console(*, stderr: bool = False) -> Console:
    """Return a console; output to a file or a pipe is wide enough for every table."""
    output = Console(stderr=stderr)
    if not output.is_terminal:
        output.width = max(output.width, WIDE)
    return output


def parse_size(_: Any, tokens: Sequence[Token]) -> int | tuple[int, int]:
    """Parse ``476`` (shorter side) or ``476x882`` (height x width)."""
    text = tokens[0].value
    sides = text.lower().split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(f"expected 476 or 476x882 (height x width), got {text!r}")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


Size = Annotated[
    int | tuple[int, int], Parameter(converter=parse_size, n_tokens=1, consume_multiple=False)
]
Output = Annotated[Path, Parameter(name=("--output", "-o"))]


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model to load, and how.

    Attributes:
        model: registered name, ``timm:`` or ``open_clip:`` name, Hub repository or folder.
        projection: ``published``, ``fit``, ``settle`` or a folder; by default the published
            projection or, if there is none, one that is fitted on first use.
        backbone_weights: the backbone's weights: a safetensors file, a checkpoint or a folder.
        device: torch device, such as cpu, cuda, cuda:1 or mps.
        dtype: data type of the backbone and the features.
        stride: pixels from one patch to the next; fewer than the patch size make patches overlap.
        cache_dir: cache folder in place of ``HF_HOME``.
        offline: never access the network.
    """

    model: str = DEFAULT_MODEL
    projection: str | None = None
    backbone_weights: Path | None = None
    device: str = "cpu"
    dtype: Dtype = "float32"
    stride: int | None = None
    cache_dir: Path | None = None
    offline: bool = False

    def load(self, *, raw: bool = False, layer: int | None = None) -> "CoSettleAdapter":
        """Load the adapter, or the backbone alone given ``raw`` or a ``layer``."""
        import torch  # `--help` does not need it

        from cosettle_adapter.adapter import CoSettleAdapter

        loading: dict[str, Any] = {
            "device": self.device,
            "dtype": getattr(torch, self.dtype),
            "stride": self.stride,
            "backbone_weights": self.backbone_weights,
            "cache_dir": self.cache_dir,
            "local_files_only": self.offline,
        }
        if raw or layer is not None:
            return CoSettleAdapter.raw(self.model, layer=layer, **loading)
        return CoSettleAdapter.from_pretrained(self.model, projection=self.projection, **loading)


def frames_in(source: str, select: "FrameSelection") -> int | None:
    """Return how many frames ``select`` selects without ``max_frames``; None if unknown."""
    from cosettle_adapter.video import probe

    count = probe(source).frames
    ranged = any(v is not None for v in (select.start, select.end, select.fps, select.times))
    return None if count is None or ranged else -(-count // select.every)


def frame_progress(output: Console) -> "Progress":
    """Return a progress bar with a count, a rate and the time left."""
    from rich import progress

    return progress.Progress(
        "{task.description}",
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        "{task.fields[rate]}",
        progress.TimeRemainingColumn(),
        console=output,
    )


def frame_bar(bars: "Progress", name: str, total: int | None) -> Callable[[int], None]:
    """Add a bar; return a function that sets it to a number of frames."""
    task = bars.add_task(name, total=total, rate="")

    def advance(done: int) -> None:
        bars.update(task, completed=done, rate=rate(done, bars.tasks[task].elapsed))

    return advance


def rate(count: float, seconds: float | None, unit: str = "frames") -> str:
    """Format a rate; empty while it is unknown."""
    if not seconds or not count:
        return ""
    return f"{count / seconds:.1f} {unit}/s"
