"""Train a projection for a backbone on a folder of videos; the paper's method."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, Token, default_name_transform

from cosettle_adapter.backbones import HubOptions, load_backbone
from cosettle_adapter.cli.common import command_line, console
from cosettle_adapter.cli.training_progress import TrainingProgress, print_result
from cosettle_adapter.training import train as training
from cosettle_adapter.training.batches import open_data
from cosettle_adapter.training.checkpoint import check_folder, read_run
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.distribution import make_accelerator
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console

_NAMES = {
    "layers": "layer",
    "temperatures": "temperature",
    "separability_weight": "kl-weight",
    "warmup_epochs": "warmup",
}
_PATHS = ("data", "validation", "init", "backbone-weights", "views-folder", "output")


def _folder_or_nothing(_: Any, tokens: Sequence[Token]) -> str:
    return tokens[0].value if tokens else ""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What a run is made of, beside its settings.

    Attributes:
        backbone: registered name, timm:TAG or open_clip:ARCHITECTURE/TAG.
        backbone_weights: your own file of the backbone: safetensors or a PyTorch checkpoint.
        data: folders, lists, patterns or WebDataset shards of videos.
        output: folder to write.
        resume: continue the run in this folder (by default that of -o) with the options it began
            with; those given beside it count more.
        overwrite: remove a run that is there.
        validation: videos to measure after each epoch; the best projection by them is the result.
        stride: pixels between patches; the patch by default.
        device: auto, cpu, cuda, cuda:1, mps.
        views_folder: of --cache-views; by default views/ in the output.
        tensorboard: write TensorBoard's files as well.
        licence: licence to record; the backbone's by default.
        about_data: what the clips are, to record.
        cache_dir: cache in place of HF_HOME.
        offline: never touch the network.
    """

    backbone: str | None = None
    backbone_weights: Path | None = None
    data: tuple[str, ...] | None = None
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None
    resume: Annotated[str | None, Parameter(converter=_folder_or_nothing, n_tokens=-1)] = None
    overwrite: bool = False
    validation: tuple[str, ...] | None = None
    stride: int | None = None
    device: str = "auto"
    views_folder: Path | None = None
    tensorboard: bool = False
    licence: str | None = None
    about_data: str | None = None
    cache_dir: Path | None = None
    offline: bool = False


def train(
    *,
    options: Annotated[TrainOptions, Parameter(name="*")] = TrainOptions(),
    settings: Annotated[
        TrainSettings,
        Parameter(
            name="*",
            name_transform=lambda name: _NAMES.get(name) or default_name_transform(name),
            negative=None,
            negative_bool="no-",
            negative_iterable=(),
        ),
    ] = TrainSettings(),
) -> int:
    """Train a projection for a backbone on a folder of videos; the paper's method.

    One process trains on the CPU or a GPU; several train together under accelerate launch or
    torchrun, which are given -m cosettle_adapter.cli train ... An interrupted run continues with
    --resume DIR alone.
    """
    words = list(command_line.get())
    if options.resume is not None:
        options, settings, words = _resumed(options, words)
    if not (options.backbone and options.data and options.output):
        needed = {"--backbone": options.backbone, "--data": options.data, "-o": options.output}
        missing = ", ".join(name for name, value in needed.items() if not value)
        raise TrainingError(f"missing {missing}: a new run needs all three")
    run = functools.partial(_train, options.backbone, options.data, options.output)
    accelerator, output = make_accelerator(options.device), console()
    if not accelerator.is_main_process:
        # The first process reports what happens; the others fail with it in silence.
        logging.getLogger("cosettle_adapter").setLevel(logging.CRITICAL)
        output.quiet = True
    try:
        return run(options, settings, words, accelerator, output)
    except (OSError, ValueError, KeyboardInterrupt) as error:
        if accelerator.is_main_process:
            raise
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        accelerator.end_training()


def _train(
    name: str,
    data: tuple[str, ...],
    folder: Path,
    options: TrainOptions,
    settings: TrainSettings,
    words: Sequence[str],
    accelerator: Accelerator,
    console: Console,
) -> int:
    resume = options.resume is not None
    check_folder(folder, resume=resume, overwrite=options.overwrite)
    corpus = Corpus.open(data)
    validation = Corpus.open(options.validation) if options.validation else None
    with console.status(f"loading {name}"), accelerator.local_main_process_first():
        backbone = load_backbone(
            name,
            weights=options.backbone_weights,
            stride=options.stride,
            options=HubOptions(cache_dir=options.cache_dir, local_files_only=options.offline),
        )
    with TrainingProgress(console) as progress:
        samples = open_data(
            corpus,
            backbone,
            settings,
            accelerator=accelerator,
            views_folder=options.views_folder or folder / "views",
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
            about_data=options.about_data or ", ".join(Path(each).name for each in data),
            command=_absolute(words),
            on_start=progress.begin,
            on_step=progress.stepped,
        )
    for name, reason in corpus.problems:
        console.print(f"left out {name}: {reason}", markup=False)
    print_result(console, trained, folder)
    return 0


# --- the words of a command line: what a run began with, to be resumed from anywhere ---


def _resumed(
    options: TrainOptions, words: Sequence[str]
) -> tuple[TrainOptions, TrainSettings, list[str]]:
    """Add what a run began with to what it is resumed with, which counts more."""
    from cosettle_adapter.cli import application

    folder = Path(options.resume) if options.resume else options.output
    if folder is None or options.output not in (None, folder):
        raise TrainingError("give --resume the folder of the run, and no other to -o")
    began = read_run(folder).command or list(words)
    given = {name for name, _ in _grouped(words)}
    kept = [word for name, group in _grouped(began) if name not in given for word in group]
    _, bound, _ = application().parse_args(
        ["train", *kept, *words[1:]], exit_on_error=False, print_error=True
    )
    bound.apply_defaults()
    # a run that began by removing another does not do so again
    overwrite = options.overwrite and "--overwrite" not in began
    both: TrainOptions = bound.arguments["options"]
    both = dataclasses.replace(both, output=folder, resume="", overwrite=overwrite)
    return both, bound.arguments["settings"], began


def _absolute(words: Sequence[str]) -> list[str]:
    """Make paths absolute, so that a run resumes from any folder."""
    absolute = list(words[:1])
    for name, (option, *values) in _grouped(words):
        option, equals, value = option.partition("=")
        if name in _PATHS:
            value, *values = (_absolute_path(each, name) for each in (value, *values))
        absolute += [f"{option}{equals}{value}", *values]
    return absolute


def _absolute_path(text: str, option: str) -> str:
    path = Path(text).expanduser()
    if not text or (option == "init" and not path.is_dir()):
        return text
    return os.path.normpath(path.absolute())


def _grouped(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the options of a command line with their values, each by its plain name."""
    groups: list[tuple[str, list[str]]] = []
    for word in words[1:]:
        if re.match("-[-a-z]", word):
            name = word.partition("=")[0].lstrip("-")
            name = {"o": "output"}.get(name, name.removeprefix("no-"))
            groups.append((name, [word]))
        elif groups:
            groups[-1][1].append(word)
    return groups
