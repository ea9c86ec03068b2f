"""The ``cosettle-adapter`` command: one module a sub-command; parse, call, draw progress."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from cosettle_adapter import __version__
from cosettle_adapter.errors import CosettleError, MissingExtraError
from cosettle_adapter.extras import require

COMMANDS = (
    "demo",
    "list",
    "download",
    "convert",
    "extract",
    "export",
    "view",
    "fit",
    "train",
    "prepare",
    "evaluate",
    "benchmark",
    "push",
    "cards",
)

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
WIDE = 190  # columns that our widest table needs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; ``sys.argv[1:]`` by default.

    Returns:
        The exit status: 0, 1 after an error (which is told in a sentence), 130 after Ctrl-C.
    """
    try:
        console = require("rich.console", extra="cli", purpose="the command line").Console
    except MissingExtraError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_ERROR
    errors = console(stderr=True)
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    options.words = words[words.index(options.command) :]
    _configure_logging(errors, verbose=options.verbose)
    try:
        command = importlib.import_module(f"cosettle_adapter.cli.{_module(options.command)}")
        output = console()
        if not output.is_terminal:  # a file or another program: tables in full
            output.width = max(output.width, WIDE)
        status: int = command.run(options, output)
        return status
    except KeyboardInterrupt as interruption:
        said = str(interruption) or "nothing half-written was left behind"
        errors.print(f"interrupted; {said}", markup=False, highlight=False, soft_wrap=True)
        return EXIT_INTERRUPTED
    except (CosettleError, OSError, ValueError) as error:
        if options.verbose:
            errors.print_exception()
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cosettle-adapter",
        description="Patch features that hold still over time.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="log every step; full tracebacks"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"cosettle_adapter.cli.{_module(name)}")
        module.add_arguments(
            commands.add_parser(
                name,
                help=module.HELP,
                description=module.__doc__,
                formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            )
        )
    return parser


def _module(command: str) -> str:
    return {"list": "list_models"}.get(command, command)


def _configure_logging(console: object, *, verbose: bool) -> None:
    """Show our own log; the Hub client's retries only when asked for."""
    handler = require("rich.logging", extra="cli", purpose="the command line").RichHandler(
        console=console, show_path=False, show_time=verbose
    )
    ours = logging.getLogger("cosettle_adapter")
    ours.handlers = [handler]
    ours.setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
