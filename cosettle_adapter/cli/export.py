"""Write a model as an ONNX or torch.export file for frames of one size."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosettle_adapter.cli.options import (
    DTYPES,
    add_cache_arguments,
    add_projection_argument,
    add_weights_argument,
    load_adapter,
)

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from cosettle_adapter.export import Exported

HELP = "write a model as an ONNX or torch.export file"

_MEGABYTE = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "model", help="registered name, Hub repository or folder; with --layer, any backbone"
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        required=True,
        metavar=("H", "W"),
        help="height and width of the frames in pixels, whole patches",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="the file: .onnx, or .pt2 (torch.export)"
    )
    parser.add_argument(
        "--no-preprocessing",
        action="store_true",
        help="take normalised float32 images in place of uint8 frames",
    )
    parser.add_argument("--normalize", action="store_true", help="features of unit length")
    parser.add_argument(
        "--layer", type=int, help="export this block's own tokens, without the projection"
    )
    parser.add_argument("--stride", type=int, help="step between patches, for overlapping ones")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument(
        "--static-batch", type=int, metavar="N", help="take exactly N frames at a time"
    )
    parser.add_argument("--opset", type=int, help="version of ONNX's operators; 18 by default")
    parser.add_argument(
        "--check-on", metavar="VIDEO", help="frames to compare with PyTorch on; else rendered ones"
    )
    parser.add_argument("--no-check", action="store_true", help="do not compare with PyTorch")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    add_projection_argument(parser)
    add_weights_argument(parser)
    parser.add_argument("--device", default="cpu", help="torch device; a .pt2 file stays on it")
    add_cache_arguments(parser)


def run(options: argparse.Namespace, console: Console) -> int:
    """Export, compare, and say what the file takes and returns."""
    _check(options)
    from cosettle_adapter.export import to_onnx, to_torch_export
    from cosettle_adapter.export.onnx_file import check_exporter

    program = options.output.suffix == ".pt2"
    if not program:
        check_exporter()
    choices: dict[str, Any] = {
        "preprocessing": not options.no_preprocessing,
        "normalize": options.normalize,
        "static_batch": options.static_batch,
        "check": not options.no_check,
        "check_on": _first_frames(options.check_on),
    }
    with console.status(f"loading {options.model}"):
        adapter = load_adapter(options, layer=options.layer, stride=options.stride)
    height, width = options.size
    with console.status(f"exporting {options.model} at {height} x {width}"):
        if program:
            exported = to_torch_export(adapter, options.output, (height, width), **choices)
        else:
            opset = {} if options.opset is None else {"opset": options.opset}
            exported = to_onnx(adapter, options.output, (height, width), **choices, **opset)
    _describe(exported, console, checked=not options.no_check)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Say so before a model is loaded, not after."""
    output: Path = options.output
    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(
            f"the output's suffix says what to write, .onnx or .pt2 (torch.export); got {output}"
        )
    if output.is_dir():
        raise IsADirectoryError(f"-o {output} is a folder; give the file another name")
    if output.exists() and not options.overwrite:
        raise FileExistsError(f"{output} is there already; give --overwrite to replace it")
    if options.opset is not None and output.suffix != ".onnx":
        raise ValueError("--opset is for .onnx files; leave it out")
    if options.no_check and options.check_on is not None:
        raise ValueError("--check-on and --no-check contradict each other; leave one out")


def _first_frames(source: str | None) -> Tensor | None:
    from cosettle_adapter.export.parity import FRAMES
    from cosettle_adapter.video import open_frames

    if source is None:
        return None
    return next(open_frames(source, max_frames=FRAMES, chunk_size=FRAMES)).frames


def _describe(exported: Exported, console: Console, *, checked: bool) -> None:
    signature, parity = exported.signature, exported.parity
    taken = "RGB, 0 to 255"
    if not signature.metadata["preprocessing"]:
        taken = f"RGB, (x - {signature.metadata['mean']}) / {signature.metadata['std']}"
    lines = [
        f"{exported.path}  {exported.size / _MEGABYTE:.1f} MB",
        f"input   {signature.input}  {taken}",
        f"output  {signature.output}",
    ]
    if parity is not None:
        lines.append(f"parity  {parity}")
    elif checked:
        lines.append("parity  not looked at: pip install onnxruntime")
    else:
        lines.append("parity  not looked at")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
