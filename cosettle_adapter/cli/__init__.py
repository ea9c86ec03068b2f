"""The ``cosettle-adapter`` command; each sub-command is one function."""

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

# name: (function, imported when the command is called; line in the list of commands)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo:demo", "Write PCA films and a report that compare features."),
    "list": ("models:list_models", "List models and backbones."),
    "download": ("models:download", "Download and verify model weights."),
    "extract": ("extract:extract", "Write the features of videos to files."),
    "evaluate": ("evaluate:app", "Evaluate a model on a benchmark."),
    "fit": ("fit:fit", "Fit a projection on a folder of videos."),
    "train": ("train:train", "Train a projection on a folder of videos."),
    "prepare": ("train:prepare", "Extract the frames of a corpus for training."),
    "export": ("export:export", "Write a model as an ONNX or torch.export file."),
    "view": ("view:view", "Show in a browser what a clicked patch is similar to."),
    "convert": ("models:convert", "Convert a checkpoint of the official code."),
    "push": ("models:push", "Upload a projection to the Hugging Face Hub, with a card."),
}

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on ``arguments``, by default ``sys.argv[1:]``.

    Returns:
        The exit status: 0, 1 after an error, 2 after a usage error, 130 after Ctrl-C.
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
        app = application(words[0] if words else None)
        words = ["/dev/stdin" if word == "-" else word for word in words]  # "-" is not an option
        status = app(words, exit_on_error=False, result_action="return_value")
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt as interruption:
        consequence = str(interruption) or "no partial file was left behind"
        errors.print(f"interrupted; {consequence}", markup=False, highlight=False, soft_wrap=True)
        return EXIT_INTERRUPTED
    except (CosettleError, OSError, ValueError) as error:
        if verbose:
            errors.print_exception()
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        if not isinstance(error, CosettleError) and not verbose:
            errors.print("add -v for the full traceback", highlight=False)
        return EXIT_ERROR
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "cyclopts":
            raise
        return EXIT_USAGE  # cyclopts has printed the message


def application(command: str | None = None) -> App:
    """Return the application; the help of ``command`` is its docstring, which needs its module."""
    from cyclopts import App, Parameter

    app = App(
        name="cosettle-adapter",
        help="Temporally consistent patch features. Add -v to log every step.",
        version=__version__,
        default_parameter=Parameter(negative=(), consume_multiple=True),
        suppress_keyboard_interrupt=False,  # main reports what is kept
    )
    for name, (function, summary) in COMMANDS.items():
        text = None if name == command else summary
        app.command(f"cosettle_adapter.cli.{function}", name=name, help=text)
    return app


def _configure_logging(errors: Console, *, verbose: bool) -> None:
    """Print the package's log; without ``verbose`` only warnings, and not the Hub's retries."""
    from rich.logging import RichHandler

    logger = logging.getLogger("cosettle_adapter")
    logger.handlers = [RichHandler(console=errors, show_path=False, show_time=verbose)]
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
