"""Options and progress bars that several commands share."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from cosettle_adapter.adapter import CoSettleAdapter

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_MODEL = "dinov2-vits14-pypi"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model, from where, on what device."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="registered name, Hub repository or folder; with --layer, any backbone",
    )
    add_projection_argument(parser)
    add_weights_argument(parser)
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the backbone")
    add_cache_arguments(parser)


def add_projection_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--projection``."""
    parser.add_argument(
        "--projection",
        help="published, fit, settle or a folder; by default the published one, else one is "
        "fitted on first use",
    )


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--backbone-weights``."""
    parser.add_argument(
        "--backbone-weights",
        type=Path,
        default=None,
        help="your own file of the backbone: safetensors or a PyTorch checkpoint",
    )


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--offline`` and ``--cache-dir``."""
    parser.add_argument("--offline", action="store_true", help="never touch the network")
    parser.add_argument("--cache-dir", default=None, help="cache in place of HF_HOME")


def add_fusion_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--temporal-fusion``."""
    parser.add_argument(
        "--temporal-fusion",
        choices=("symmetric", "causal"),
        help="average patches with their matches in neighbouring frames: on both sides, or in past "
        "ones alone",
    )


def size(text: str) -> int | tuple[int, int]:
    """Parse ``--size``: ``476`` for the shorter side, ``476x882`` for height x width."""
    sides = text.lower().split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdigit() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"expected 476 or 476x882 (height x width), got {text!r}")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called ``name``."""
    dtype: torch.dtype = getattr(importlib.import_module("torch"), name)
    return dtype


def load_adapter(
    options: argparse.Namespace,
    *,
    raw: bool = False,
    layer: int | None = None,
    stride: int | None = None,
) -> CoSettleAdapter:
    """Load what ``add_model_arguments`` describes; the bare backbone if ``raw`` or a ``layer``."""
    from cosettle_adapter.adapter import CoSettleAdapter

    loading: dict[str, Any] = {
        "device": options.device,
        "dtype": torch_dtype(options.dtype),
        "stride": stride,
        "backbone_weights": options.backbone_weights,
        "cache_dir": options.cache_dir,
        "local_files_only": options.offline,
    }
    if raw or layer is not None:
        return CoSettleAdapter.raw(options.model, layer=layer, **loading)
    return CoSettleAdapter.from_pretrained(options.model, projection=options.projection, **loading)


def frame_progress(console: Console) -> Progress:
    """Return a progress bar that shows frames, frames per second and the time left."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
        console=console,
        transient=False,
    )


def rate(frames: float, seconds: float | None, unit: str = "frames") -> str:
    """Return a rate as text, or nothing before it can be told."""
    if not seconds or not frames:
        return ""
    return f"{frames / seconds:.1f} {unit}/s"
