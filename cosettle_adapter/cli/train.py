"""The commands ``train`` and ``prepare``."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import Parameter, Token, default_name_transform
from rich.table import Table

from cosettle_adapter.backbones import HubOptions, load_backbone
from cosettle_adapter.cli.common import Output, command_line, console, frame_progress, rate
from cosettle_adapter.training import train as training
from cosettle_adapter.training.cached_views import open_data
from cosettle_adapter.training.checkpoint import StepReport, check_folder, read_run
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.prepare import SKIPPED_NAME, PrepareSettings
from cosettle_adapter.training.prepare import prepare as extract
from cosettle_adapter.training.processes import make_accelerator
from cosettle_adapter.training.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console
    from rich.progress import TaskID

T = TypeVar("T", "TrainOptions", TrainSettings)

_NAMES = {
    "layers": "layer",
    "temperatures": "temperature",
    "separability_weight": "kl-weight",
    "warmup_epochs": "warmup",
}
_PATHS = ("data", "validation", "backbone_weights", "views_folder", "cache_dir")
_SECONDS_PER_LINE = 30.0
_LISTED = 20
_SMOOTHING = 0.1


def _option_name(field: str) -> str:
    return _NAMES.get(field) or default_name_transform(field)


def _folder_or_nothing(_: Any, tokens: Sequence[Token]) -> str:
    if len(tokens) > 1:
        raise ValueError(f"--resume takes one folder, got {len(tokens)}")
    return tokens[0].value if tokens else ""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Inputs and outputs of a run; :class:`TrainSettings` are its other options.

    Attributes:
        backbone: registered name, timm:TAG or open_clip:ARCHITECTURE/TAG.
        backbone_weights: the backbone's weights: a safetensors file, a checkpoint or a folder.
        data: folders, lists, patterns or WebDataset shards of videos.
        output: folder to write.
        resume: continue the run in this folder (by default that of -o) with its original options;
            other options given here override them, but must not change the result.
        overwrite: delete an existing run in the output folder.
        validation: videos to measure after each epoch; the projection that scores best on them is
            kept.
        stride: pixels from one patch to the next; the patch size by default.
        device: auto, or a torch device such as cpu, cuda, cuda:1 or mps.
        views_folder: folder of --cache-views; views/ in the output folder by default.
        tensorboard: also write TensorBoard files.
        licence: licence to record; by default the backbone's.
        about_data: description of the clips to record.
        cache_dir: cache folder in place of HF_HOME.
        offline: never access the network.
    """

    backbone: str | None = None
    backbone_weights: str | None = None
    data: tuple[str, ...] | None = None
    output: Annotated[str | None, Parameter(name=("--output", "-o"))] = None
    resume: Annotated[str | None, Parameter(converter=_folder_or_nothing, n_tokens=-1)] = None
    overwrite: bool = False
    validation: tuple[str, ...] | None = None
    stride: int | None = None
    device: str = "auto"
    views_folder: str | None = None
    tensorboard: bool = False
    licence: str | None = None
    about_data: str | None = None
    cache_dir: str | None = None
    offline: bool = False


def train(
    *,
    options: Annotated[TrainOptions, Parameter(name="*")] = TrainOptions(),
    settings: Annotated[
        TrainSettings,
        Parameter(
            name="*",
            name_transform=_option_name,
            negative=None,
            negative_bool="no-",
            negative_iterable=(),
        ),
    ] = TrainSettings(),
) -> int:
    """Train a projection for a backbone on a folder of videos, with the paper's method.

    An interrupted run continues with --resume DIR alone. To train with several processes, start
    -m cosettle_adapter.cli train ... with accelerate launch or torchrun.
    """
    if options.resume is not None:
        folder = options.resume or options.output
        if not folder or options.output not in (None, folder):
            raise TrainingError("give --resume the folder of the run, and no other to -o")
        original = read_run(Path(folder)).began
        options = _continued(options, original.get("options", {}))
        options = dataclasses.replace(options, output=folder, resume=folder)
        settings = _continued(settings, original.get("settings", {}))
    if Path(settings.init).expanduser().is_dir():
        settings = dataclasses.replace(settings, init=_absolute(settings.init))
    needed = {"--backbone": options.backbone, "--data": options.data, "-o": options.output}
    if missing := ", ".join(name for name, value in needed.items() if not value):
        raise TrainingError(f"missing {missing}: a new run needs all three")
    accelerator, output = make_accelerator(options.device), console()
    if not accelerator.is_main_process:
        # only the first process reports errors
        logging.getLogger("cosettle_adapter").setLevel(logging.CRITICAL)
        output.quiet = True
    try:
        _train(options, settings, accelerator, output)
    except (OSError, ValueError, KeyboardInterrupt) as error:
        if accelerator.is_main_process:
            raise
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        accelerator.end_training()
    return 0


def _train(
    options: TrainOptions, settings: TrainSettings, accelerator: Accelerator, console: Console
) -> None:
    name, data, folder = options.backbone or "", options.data or (), Path(options.output or "")
    resume = options.resume is not None
    check_folder(folder, resume=resume, overwrite=options.overwrite)
    corpus = Corpus.open(data)
    validation = Corpus.open(options.validation) if options.validation else None
    hub = HubOptions(cache_dir=options.cache_dir, local_files_only=options.offline)
    with console.status(f"loading {name}"), accelerator.local_main_process_first():
        backbone = load_backbone(
            name, weights=options.backbone_weights, stride=options.stride, options=hub
        )
    recorded = dataclasses.asdict(options) | {"overwrite": False, "resume": None}
    for path in _PATHS:
        recorded[path] = _absolute(recorded[path])
    began: dict[str, Any] = {
        "command": list(command_line.get()),
        "options": recorded,
        "settings": dataclasses.asdict(settings),
    }
    with TrainingProgress(console) as progress:
        samples = open_data(
            corpus,
            backbone,
            settings,
            accelerator=accelerator,
            views_folder=Path(options.views_folder or folder / "views"),
            on_sample=progress.encoded,
        )
        trained = training.train(
            backbone,
            samples,
            folder,
            settings,
            accelerator=accelerator,
            resume=resume,
            overwrite=options.overwrite,
            validation=validation,
            tensorboard=options.tensorboard,
            licence=options.licence or "",
            about_data=options.about_data or ", ".join(Path(path).name for path in data),
            began=began,
            on_start=progress.begin,
            on_step=progress.stepped,
        )
    if trained.figures:
        columns = list(trained.figures["raw"])
        titles = [column.replace("_", " ") for column in columns]
        table = Table("projection", *titles, title="Validation", title_justify="left")
        for row, figures in trained.figures.items():
            cells = [figures[column] for column in columns]
            table.add_row(row, *("-" if cell is None else f"{cell:.3f}" for cell in cells))
        console.print(table)
        console.print(
            f"kept the projection of step {trained.chosen_step} of {trained.steps}, whose overlap "
            "is best"
        )
    print_skipped(console, [*corpus.problems, *sorted(trained.skipped.items())])
    print_next(console, "load it with CoSettleAdapter.from_pretrained('{}')", folder)


def _continued(options: T, original: Mapping[str, Any]) -> T:
    """Return a run's original options, overridden by those on the command line."""
    words = {word.partition("=")[0].replace("_", "-") for word in command_line.get()}
    kept: dict[str, Any] = {}
    for name in original.keys() & {field.name for field in dataclasses.fields(options)}:
        option, value = _option_name(name), original[name]
        if words.isdisjoint((f"--{option}", f"--no-{option}")):
            kept[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(options, **kept)


def _absolute(paths: Any) -> Any:
    """Make paths absolute, so that a run resumes from any folder."""
    if isinstance(paths, tuple):
        return [_absolute(path) for path in paths]
    return paths and str(Path(paths).expanduser().absolute())


def prepare(
    *,
    data: list[str],
    output: Output,
    settings: Annotated[PrepareSettings, Parameter(name="*")] = PrepareSettings(),
    workers: int = os.cpu_count() or 1,
) -> None:
    """Extract the frames of a corpus once, so that training reads small images.

    Args:
        data: folders of videos, lists of paths, patterns, or shards-{000..009}.tar.
        output: folder to write.
        workers: processes that decode videos.
    """
    out = console()
    with frame_progress(out) as progress:
        task = progress.add_task("videos", total=None, rate="")
        counts: list[int] = []  # the first counts the videos of earlier runs

        def advance(done: int, total: int) -> None:
            counts.append(done)
            speed = rate(done - counts[0], progress.tasks[task].elapsed, unit="videos")
            progress.update(task, completed=done, total=total, rate=speed)

        count, skipped = extract(data, output, settings, workers=workers, on_video=advance)
    print_skipped(out, skipped, output / SKIPPED_NAME)
    before = f", {counts[0]} of them extracted before" if counts[0] else ""
    out.print(f"{output}: the frames of {count} videos{before}", markup=False)
    print_next(out, "train on it with: cosettle-adapter train --data {}", output)


class TrainingProgress:
    """Progress of encoding and training: a bar in a terminal, or a log line every 30 seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = frame_progress(console)
        self._bar.disable = not console.is_terminal
        self._tasks: dict[str, TaskID] = {}
        self._line_at = 0.0
        self._rate: float | None = None

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def encoded(self, done: int, total: int) -> None:
        """Show how many views are encoded."""
        task = self._task("encoding", total)
        speed = rate(done, self._bar.tasks[task].elapsed, unit="views")
        self._bar.update(task, completed=done, rate=speed)
        self._say(f"encoded {done} of {total} views", last=done == total)

    def begin(self, samples: int) -> None:
        """Show that the first step has started; on a CPU it may take minutes."""
        self._task("first step")
        self._say(f"{samples} samples an epoch; the first step is under way", last=True)

    def stepped(self, report: StepReport) -> None:
        """Show the loss, cycle accuracy, separability loss and clips per second of a step."""
        task = self._task("first step")
        if self._rate is None:
            # the steps of an earlier run must not enter the estimate of the time left
            self._bar.reset(task, completed=report.step - 1, total=report.steps)
            self._rate = report.clips_per_second
        self._rate += _SMOOTHING * (report.clips_per_second - self._rate)
        figures = (
            f"loss {report.loss:.3f}  accuracy {report.accuracy:.3f}  "
            f"separability {report.separability:.3g}  {self._rate:.1f} clips/s"
        )
        epoch = f"epoch {report.epoch}"
        self._bar.update(task, description=epoch, completed=report.step, rate=figures)
        line = f"step {report.step} of {report.steps}, {epoch}: {figures}"
        self._say(line, last=report.step == report.steps)

    def _task(self, name: str, total: int | None = None) -> TaskID:
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total, rate="")
        return self._tasks[name]

    def _say(self, line: str, *, last: bool) -> None:
        now = time.monotonic()
        if not self._console.is_terminal and (last or now - self._line_at > _SECONDS_PER_LINE):
            self._console.print(line, highlight=False)
            self._line_at = now


def print_skipped(
    console: Console, skipped: Sequence[tuple[str, str]], listed_in: Path | None = None
) -> None:
    """Print which videos were skipped, and why."""
    for name, reason in skipped[:_LISTED]:
        console.print(f"skipped {name}: {reason}", style="yellow", markup=False, highlight=False)
    if len(skipped) > _LISTED:
        where = f"; all {len(skipped)} are in {listed_in}" if listed_in else ""
        console.print(f"and {len(skipped) - _LISTED} more{where}", markup=False)


def print_next(console: Console, instruction: str, folder: Path) -> None:
    """Print an instruction with the folder's path in place of its ``{}``."""
    path = folder if folder.is_absolute() else f"./{folder}"
    console.print(instruction.format(path), markup=False)
