"""Train a projection for a backbone on a folder of videos; the paper's method."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import Parameter, Token, default_name_transform

from cosettle_adapter.backbones import HubOptions, load_backbone
from cosettle_adapter.cli.common import command_line, console
from cosettle_adapter.cli.training_progress import TrainingProgress, print_result
from cosettle_adapter.training import train as training
from cosettle_adapter.training.cached_views import open_data
from cosettle_adapter.training.checkpoint import check_folder, read_run
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.processes import make_accelerator
from cosettle_adapter.training.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console

T = TypeVar("T", "TrainOptions", TrainSettings)

_NAMES = {
    "layers": "layer",
    "temperatures": "temperature",
    "separability_weight": "kl-weight",
    "warmup_epochs": "warmup",
}


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
        folder = options.resume or options.output
        if folder is None or options.output not in (None, folder):
            raise TrainingError("give --resume the folder of the run, and no other to -o")
        began = read_run(Path(folder)).began
        options = dataclasses.replace(options, output=folder, resume="")
        options = _continued(options, began.get("options", {}))
        settings = _continued(settings, began.get("settings", {}))
    needed = {"--backbone": options.backbone, "--data": options.data, "-o": options.output}
    missing = ", ".join(name for name, value in needed.items() if not value)
    if missing:
        raise TrainingError(f"missing {missing}: a new run needs all three")
    accelerator, output = make_accelerator(options.device), console()
    if not accelerator.is_main_process:
        # The first process reports what happens; the others fail with it in silence.
        logging.getLogger("cosettle_adapter").setLevel(logging.CRITICAL)
        output.quiet = True
    try:
        _train(options, settings, words, accelerator, output)
    except (OSError, ValueError, KeyboardInterrupt) as error:
        if accelerator.is_main_process:
            raise
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        accelerator.end_training()
    return 0


def _train(
    options: TrainOptions,
    settings: TrainSettings,
    words: Sequence[str],
    accelerator: Accelerator,
    console: Console,
) -> None:
    name, data, folder = options.backbone or "", options.data or (), Path(options.output or "")
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
    began = {
        "command": list(words),
        "options": _anywhere(dataclasses.asdict(options) | {"overwrite": False}),
        "settings": _anywhere(dataclasses.asdict(settings)),
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
            about_data=options.about_data or ", ".join(Path(each).name for each in data),
            began=began,
            on_start=progress.begin,
            on_step=progress.stepped,
        )
    for place, reason in corpus.problems:
        console.print(f"left out {place}: {reason}", markup=False)
    print_result(console, trained, folder)


def _continued(given: T, began: Mapping[str, Any]) -> T:
    """Return what a run began with, and what was given anew, which counts more."""
    changed = {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(given)
        if getattr(given, field.name) != field.default
    }
    saved = {name: tuple(v) if isinstance(v, list) else v for name, v in began.items()}
    return dataclasses.replace(given, **{**saved, **changed})


def _anywhere(values: dict[str, Any]) -> dict[str, Any]:
    """Make paths absolute, so that a run resumes from any folder."""
    for name in ("data", "validation"):
        if values.get(name):
            values[name] = [_absolute(each) for each in values[name]]
    for name in ("backbone_weights", "views_folder", "cache_dir"):
        if values.get(name):
            values[name] = _absolute(values[name])
    if "init" in values and Path(values["init"]).is_dir():
        values["init"] = _absolute(values["init"])
    return values


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
