"""The ``cosettle-adapter`` command: one function a sub-command; parse, call, draw progress."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cosettle_adapter.errors import CosettleError, MissingExtraError
from cosettle_adapter.imports import require
from cosettle_adapter.version import __version__

if TYPE_CHECKING:
    from cyclopts import App
    from rich.console import Console

# name, function (loaded when the command is called), help
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo:demo", "Write PCA films and a report that compare features."),
    "list": ("models:list_models", "Show models and backbones."),
    "download": ("models:download", "Download and verify models' weights."),
    "extract": ("extract:extract", "Write the features of videos to files."),
    "evaluate": ("evaluate:app", "Measure a model on a benchmark."),
    "fit": ("fit:fit", "Fit a projection on a folder of videos."),
    "train": ("train:train", "Train a projection on a folder of videos."),
    "prepare": ("train:prepare", "Extract the frames of a corpus for training."),
    "export": ("export:export", "Write a model as an ONNX or torch.export file."),
    "view": ("view:view", "Click a patch and see what it is similar to, in a local page."),
    "convert": ("models:convert", "Convert a checkpoint of the official code."),
    "push": ("models:push", "Upload a projection to the Hugging Face Hub, with a card."),
}

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on ``arguments``, by default those of the process.

    Returns:
        The exit status: 0, 1 after an error (told in a sentence), 2 for options that do not
        exist, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    verbose = any(flag in words for flag in ("-v", "--verbose"))
    words = [word for word in words if word not in ("-v", "--verbose")]
    try:
        require("cyclopts", extra="cli", purpose="the command line")
    except MissingExtraError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_ERROR
    from cosettle_adapter.cli.common import command_line, console

    command_line.set(tuple(words))
    errors = console(stderr=True)
    _configure_logging(errors, verbose=verbose)
    try:
        status = application()(words, exit_on_error=False, result_action="return_value")
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt as interruption:
        said = str(interruption) or "no half-written file was left behind"
        errors.print(f"interrupted; {said}", markup=False, highlight=False, soft_wrap=True)
        return EXIT_INTERRUPTED
    except (CosettleError, OSError, ValueError) as error:
        if verbose:
            errors.print_exception()
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        if not isinstance(error, CosettleError) and not verbose:
            errors.print("for the full traceback, add -v", highlight=False)
        return EXIT_ERROR
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "cyclopts":
            raise
        return EXIT_USAGE  # cyclopts has told it


def application() -> App:
    """Return the application; each command's module loads when the command is called."""
    from cyclopts import App, Parameter

    app = App(
        name="cosettle-adapter",
        help="Temporally consistent patch features. Add -v to log every step.",
        version=__version__,
        default_parameter=Parameter(negative=(), consume_multiple=True),
        suppress_keyboard_interrupt=False,  # main says what is kept
    )
    for name, (function, text) in COMMANDS.items():
        app.command(f"cosettle_adapter.cli.{function}", name=name, help=text)
    return app


def _configure_logging(errors: Console, *, verbose: bool) -> None:
    """Show our own log; the Hub client's retries only when asked for."""
    from rich.logging import RichHandler

    ours = logging.getLogger("cosettle_adapter")
    ours.handlers = [RichHandler(console=errors, show_path=False, show_time=verbose)]
    ours.setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
