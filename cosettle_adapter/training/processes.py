"""Processes that train together, by Hugging Face Accelerate."""

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

# how long processes wait for the first one, which may be encoding a whole corpus
_PATIENCE = datetime.timedelta(days=1)


def make_accelerator(device: str = "auto") -> Accelerator:
    """Return the Accelerator of this process, launched by accelerate, torchrun or plain python.

    Args:
        device: ``auto`` for a GPU where there is one, ``cpu``, or a torch device; with several
            processes without a number, since each takes its own.

    Raises:
        TrainingError: no such device here, or a launcher that shards the model.
    """
    accelerate = require("accelerate", extra="train", purpose="training")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = torch.device(device) if device != "auto" else None
    if wanted is not None and wanted.index is not None:
        if processes > 1:
            raise TrainingError(
                f"--device {device} would put all processes on one device; leave the number away"
            )
        if wanted.type == "cuda" and wanted.index < torch.cuda.device_count():
            torch.cuda.set_device(wanted)
    on_gpu = torch.cuda.is_available() or (processes == 1 and torch.backends.mps.is_available())
    accelerator: Accelerator = accelerate.Accelerator(
        cpu=wanted.type == "cpu" if wanted is not None else not on_gpu,
        mixed_precision="no",
        kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    if wanted is not None and accelerator.device.type != wanted.type:
        raise TrainingError(
            f"--device {device} was asked for, but there is only {accelerator.device} here"
        )
    if accelerator.num_processes != processes:
        raise TrainingError(
            f"{processes} processes were launched, but they do not train together on "
            f"{accelerator.device}; give --device cpu, or launch one"
        )
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise TrainingError(
            f"the launcher asks for {kind}, which shards a model; the head is small: configure "
            "plain data-parallel training (accelerate config)"
        )
    return accelerator


def gather(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return every process's ``value``, in order of rank."""
    values: list[Any] = [value] * accelerator.num_processes
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def everywhere(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do ``work`` in all processes, and fail with the same message in all if it fails in one."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    messages = gather(accelerator, None if failure is None else str(failure))
    if any(message is not None for message in messages):
        raise failure or TrainingError(next(each for each in messages if each is not None))
    return result  # type: ignore[return-value]  # without a failure there is one


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T | None:
    """Do ``work`` in the main process while the others wait for ``None``; all fail if it fails."""
    return everywhere(accelerator, lambda: work() if accelerator.is_main_process else None)


def from_main(accelerator: Accelerator, value: T) -> T:
    """Return the main process's ``value`` in all of them."""
    main: T = gather(accelerator, value if accelerator.is_main_process else None)[0]
    return main
