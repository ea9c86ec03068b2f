"""Train a projection for a backbone on a folder of videos; the paper's method.

One process trains on the CPU or a GPU; several train together under `accelerate launch` or
`torchrun`, which are given `-m cosettle_adapter.cli train ...`. An interrupted run goes on with
`--resume DIR` alone.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_adapter.cli.options import DTYPES, add_cache_arguments, add_weights_argument
from cosettle_adapter.cli.training_progress import TrainingProgress, print_result

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console

    from cosettle_adapter.training.settings import TrainSettings

HELP = "train a projection on a folder of videos"

_VIEWS_FOLDER = "views"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    run = parser.add_argument_group("the run")
    run.add_argument("--backbone", help="registered name, timm:<tag> or open_clip:<arch>/<tag>")
    add_weights_argument(parser)
    run.add_argument(
        "--data", nargs="+", help="folders, lists, patterns or WebDataset shards of videos"
    )
    run.add_argument("-o", "--output", type=Path, help="folder to write")
    run.add_argument(
        "--resume", nargs="?", type=Path, const=True, metavar="DIR",
        help="go on with the run in DIR, with the options it began with",
    )  # fmt: skip
    run.add_argument("--overwrite", action="store_true", help="remove a run that is there")
    run.add_argument("--validation", nargs="+", help="videos to measure after each epoch")
    run.add_argument("--epochs", type=int, default=5)
    run.add_argument("--batch-size", type=int, default=128, help="samples a process and pass")
    run.add_argument("--accumulation", type=int, default=1, help="passes a step")
    run.add_argument("--pairs-per-clip", type=int, help="an epoch; by default about 2,000 in all")
    run.add_argument("--seed", type=int, default=0)
    _add_head_arguments(parser.add_argument_group("the head"))
    _add_objective_arguments(parser.add_argument_group("the objective"))
    _add_machine_arguments(parser.add_argument_group("the machine"))
    run.add_argument("--licence", help="licence to record; the backbone's by default")
    run.add_argument("--about-data", default="", help="what the clips are, to record")
    add_cache_arguments(parser)


def _add_head_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--head", choices=("linear", "mlp2", "mlp3", "affine"), default="linear")
    group.add_argument("--activation", choices=("tanh", "gelu", "relu"), default="tanh")
    group.add_argument(
        "--init", default="random", help="random, identity, or a projection folder to start from"
    )
    group.add_argument("--layer", type=int, nargs="+", help="blocks to read; the last by default")
    group.add_argument(
        "--norm", action=argparse.BooleanOptionalAction, help="apply the backbone's final norm"
    )
    group.add_argument("--stride", type=int, help="pixels between patches; the patch by default")
    group.add_argument(
        "--base-lr",
        type=float,
        help="for 256 samples a step; the paper's 1e-4, more on short runs",
    )
    group.add_argument("--weight-decay", type=float, default=0.05, help="of matrices")
    group.add_argument("--warmup", type=float, help="epochs; one, or a fifth of a short run")


def _add_objective_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--frames", type=int, default=2, help="of a cycle")
    group.add_argument("--size", type=int, default=224, help="side of the square frames")
    group.add_argument("--squash", action="store_true", help="to the square, before cropping")
    group.add_argument("--temperature", type=float, nargs="+", default=[0.03])
    group.add_argument("--kl-weight", type=float, default=3.0, help="0 leaves the KL term away")
    group.add_argument(
        "--pea", choices=("sample", "batch", "off"), default="sample",
        help="perturb positions for each sample, alike in a batch as the paper's code, or not",
    )  # fmt: skip
    group.add_argument("--pea-ratio", type=float, default=10.0)


def _add_machine_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--precision", choices=DTYPES, default="float32", help="of the encoder")
    group.add_argument("--compile", action="store_true", help="torch.compile the encoder")
    group.add_argument("--workers", type=int, default=0, help="processes that decode videos")
    group.add_argument(
        "--cache-views", type=int, default=0, metavar="K", help="encode K views a clip, once"
    )
    group.add_argument("--views-folder", type=Path, help="of --cache-views; views/ in the output")
    group.add_argument("--save-every", type=int, help="steps; 5 minutes and epochs in any case")
    group.add_argument("--log-every", type=int, default=1, help="steps")
    group.add_argument("--tensorboard", action="store_true", help="write its files as well")


def run(options: argparse.Namespace, console: Console) -> int:
    """Train, with a progress bar, and write the projection."""
    from cosettle_adapter.training.distribution import make_accelerator

    options, words = _complete(options)
    accelerator = make_accelerator(options.device)
    if accelerator.is_main_process:
        try:
            return _train(options, words, accelerator, console)
        finally:
            accelerator.end_training()
    # The first process tells what happens; the others fail with it in silence.
    logging.getLogger("cosettle_adapter").setLevel(logging.CRITICAL)
    console.quiet = True
    try:
        return _train(options, words, accelerator, console)
    except (OSError, ValueError):
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        accelerator.end_training()


def _complete(options: argparse.Namespace) -> tuple[argparse.Namespace, Sequence[str]]:
    """Add what a run began with to the options it is resumed with; these count more.

    Returns:
        The options, and the words of the command line that began the run.
    """
    from cosettle_adapter.training.checkpoint import Checkpoint
    from cosettle_adapter.training.errors import TrainingError

    words: Sequence[str] = options.words
    if options.resume is not None:
        folder = options.output if options.resume is True else options.resume
        if folder is None or options.output not in (None, folder):
            raise TrainingError("give --resume the folder of the run, and no other to -o")
        words = Checkpoint.load(folder).command or words
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        options = parser.parse_args([*words[1:], *options.words[1:]])
        options.resume, options.output = True, folder
        # a run that began by removing another does not do so again
        options.overwrite = options.overwrite and "--overwrite" not in words
    missing = [
        name
        for name, value in (
            ("--backbone", options.backbone), ("--data", options.data), ("-o", options.output)
        )
        if not value
    ]  # fmt: skip
    if missing:
        raise TrainingError(f"missing {', '.join(missing)}: a new run needs all three")
    return options, words


def _settings(options: argparse.Namespace) -> TrainSettings:
    from cosettle_adapter.training.objective import ObjectiveSettings
    from cosettle_adapter.training.settings import TrainSettings

    return TrainSettings(
        epochs=options.epochs,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        base_lr=options.base_lr,
        weight_decay=options.weight_decay,
        warmup_epochs=options.warmup,
        layers=tuple(options.layer) if options.layer else None,
        norm=options.norm,
        head=options.head,
        activation=options.activation,
        init=options.init,
        frames=options.frames,
        size=options.size,
        squash=options.squash,
        pairs_per_clip=options.pairs_per_clip,
        cache_views=options.cache_views,
        objective=ObjectiveSettings(
            temperatures=tuple(options.temperature),
            separability_weight=options.kl_weight,
            pea=options.pea,
            pea_ratio=options.pea_ratio,
        ),
        precision=options.precision,
        compile=options.compile,
        seed=options.seed,
        workers=options.workers,
        save_every=options.save_every,
        log_every=options.log_every,
    )


def _train(
    options: argparse.Namespace,
    words: Sequence[str],
    accelerator: Accelerator,
    console: Console,
) -> int:
    from cosettle_adapter.backbones import HubOptions, load_backbone
    from cosettle_adapter.training.corpora.corpus import Corpus
    from cosettle_adapter.training.data import open_data
    from cosettle_adapter.training.loop import train
    from cosettle_adapter.training.result import check_folder

    settings, resume = _settings(options), options.resume is not None
    check_folder(options.output, resume=resume, overwrite=options.overwrite)
    corpus = Corpus.open(options.data)
    validation = Corpus.open(options.validation) if options.validation else None
    with console.status(f"loading {options.backbone}"), accelerator.local_main_process_first():
        backbone = load_backbone(
            options.backbone,
            weights=options.backbone_weights,
            stride=options.stride,
            options=HubOptions(cache_dir=options.cache_dir, local_files_only=options.offline),
        )
    with TrainingProgress(console) as progress:
        data = open_data(
            corpus,
            backbone,
            settings,
            accelerator=accelerator,
            views_folder=options.views_folder or options.output / _VIEWS_FOLDER,
            on_sample=progress.encoded,
        )
        trained = train(
            backbone,
            data,
            options.output,
            settings,
            accelerator=accelerator,
            resume=resume,
            overwrite=options.overwrite,
            validation=validation,
            tensorboard=options.tensorboard,
            licence=options.licence or "",
            about_data=options.about_data or ", ".join(Path(place).name for place in options.data),
            command=words,
            on_start=progress.begin,
            on_step=progress.stepped,
        )
    for name, reason in corpus.problems:
        console.print(f"left out {name}: {reason}", markup=False)
    print_result(console, trained, options.output)
    return 0
