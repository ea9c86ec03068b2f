"""Training in several processes with Hugging Face Accelerate."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from cosettle_adapter.imports import require
from cosettle_adapter.training.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

# Processes wait for the first one, which may encode a whole corpus.
_TIMEOUT = datetime.timedelta(days=1)


def make_accelerator(device: str = "auto") -> Accelerator:
    """Return the Accelerator of this process, started by accelerate, torchrun or plain python.

    ``device`` is ``auto`` (a GPU if available) or a torch device.
    """
    accelerate = require("accelerate", extra="train", purpose="training")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    requested = torch.device(device) if device != "auto" else None
    if requested is not None and requested.index is not None:
        if processes > 1:
            raise TrainingError(
                f"--device {device} would put all {processes} processes on one device; give "
                f"--device {requested.type}"
            )
        if requested.type == "cuda" and requested.index < torch.cuda.device_count():
            torch.cuda.set_device(requested)
    on_gpu = torch.cuda.is_available() or (processes == 1 and torch.backends.mps.is_available())
    accelerator: Accelerator = accelerate.Accelerator(
        cpu=requested.type == "cpu" if requested is not None else not on_gpu,
        mixed_precision="no",
        kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=_TIMEOUT)],
    )
    if requested is not None and accelerator.device.type != requested.type:
        raise TrainingError(
            f"--device {device} is not available; use --device {accelerator.device.type}"
        )
    if accelerator.num_processes != processes:
        raise TrainingError(
            f"{processes} processes were launched, but Accelerate connects only "
            f"{accelerator.num_processes} on {accelerator.device}; use --device cpu, or launch one"
        )
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise TrainingError(
            f"the launcher requests {kind}, which shards the model; the head is too small for "
            "that, so configure plain data-parallel training (accelerate config)"
        )
    return accelerator


def gather(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return the ``value`` of every process, ordered by rank."""
    values: list[Any] = [value] * accelerator.num_processes
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def everywhere(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run ``work`` in all processes; if it fails in one, all fail with the same message."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    messages = gather(accelerator, None if failure is None else str(failure))
    if any(message is not None for message in messages):
        raise failure or TrainingError(next(m for m in messages if m is not None))
    return result  # type: ignore[return-value]  # set, since nothing failed


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T | None:
    """Run ``work`` in the main process, the others return ``None``; all fail if it fails."""
    return everywhere(accelerator, lambda: work() if accelerator.is_main_process else None)


def from_main(accelerator: Accelerator, value: T) -> T:
    """Return the ``value`` of the main process in every process."""
    main: T = gather(accelerator, value if accelerator.is_main_process else None)[0]
    return main
