"""Processes that train together, by Hugging Face Accelerate."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from cosettle_adapter.extras import require
from cosettle_adapter.training.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

_PATIENCE = datetime.timedelta(days=1)
"""How long processes wait for the first one, which may be encoding a whole corpus."""


def make_accelerator(device: str = "auto") -> Accelerator:
    """Return the Accelerator of this process, whoever launched it.

    ``accelerate launch``, ``torchrun`` and a plain ``python`` all lead here. Mixed precision is
    left to the loop, which applies it to the encoder alone, whatever the launcher says.

    Args:
        device: ``auto`` for a GPU where there is one, ``cpu``, or a torch device; with several
            processes without a number, since each takes its own.

    Raises:
        MissingExtraError: Accelerate is not installed.
        TrainingError: no such device here, or a launcher that shards the model.
    """
    accelerate = require("accelerate", extra="train", purpose="training")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    wanted = torch.device(device) if device != "auto" else None
    if wanted is not None and wanted.index is not None:
        if several:
            raise TrainingError(
                f"--device {device} would put all processes on one device; leave the number away"
            )
        if wanted.type == "cuda" and wanted.index < torch.cuda.device_count():
            torch.cuda.set_device(wanted)
    on_cpu = wanted.type == "cpu" if wanted is not None else not _has_accelerator(several)
    patience = accelerate.InitProcessGroupKwargs(timeout=_PATIENCE)
    accelerator: Accelerator = accelerate.Accelerator(
        cpu=on_cpu, mixed_precision="no", kwargs_handlers=[patience]
    )
    if wanted is not None and accelerator.device.type != wanted.type:
        raise TrainingError(
            f"--device {device} was asked for, but there is only {accelerator.device} here"
        )
    if several and accelerator.num_processes == 1:
        raise TrainingError(
            f"{os.environ['WORLD_SIZE']} processes were launched, but they do not train together "
            f"on {accelerator.device}; give --device cpu, or launch one"
        )
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise TrainingError(
            f"the launcher asks for {kind}, which shards a model; the head is small: configure "
            "plain data-parallel training (accelerate config)"
        )
    return accelerator


def _has_accelerator(several: bool) -> bool:
    if torch.cuda.is_available():
        return True
    return not several and torch.backends.mps.is_available()


def gather(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return every process's ``value``, in order of rank."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(values, value)
    return values


def from_main(accelerator: Accelerator, value: Any) -> Any:
    """Return the main process's ``value`` in all of them."""
    if accelerator.num_processes == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T | None:
    """Do ``work`` in the main process while the others wait, and fail together if it fails.

    Returns:
        What ``work`` returned, in the main process; ``None`` elsewhere.

    Raises:
        Exception: what ``work`` raised, in the main process.
        TrainingError: the same sentence, in the others.
    """
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except Exception as raised:
            error = raised
    sentence = from_main(accelerator, None if error is None else str(error))
    if error is not None:
        raise error
    if sentence is not None:
        raise TrainingError(sentence)
    return result
