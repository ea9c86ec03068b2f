"""Files of weights, whatever their format: the tensors, and what else convert wants to know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError
from cosettle_adapter.io import atomic_path

_SAFETENSORS_HEADER = 9  # a length of 8 bytes, then the opening brace of a JSON object


class Checkpoint(NamedTuple):
    """What a file of weights holds."""

    tensors: dict[str, Tensor]  # under the file's own names, on the CPU
    epoch: int | None = None  # after which it was written, where it says so
    arguments: Mapping[str, Any] = {}  # settings of the training run that are plain values


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a safetensors file, a PyTorch checkpoint as training codes save it, or an ONNX file.

    The content decides the format, the suffix only that it is ONNX.
    """
    if not path.is_file():
        raise WeightsUnavailableError(f"{path} does not exist")
    with path.open("rb") as file:
        head = file.read(_SAFETENSORS_HEADER)
    if path.suffix == ".safetensors" or (head[-1:] == b"{" and len(head) == _SAFETENSORS_HEADER):
        try:
            return Checkpoint(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CorruptWeightsError(
                f"{path} is truncated or not a safetensors file ({error})"
            ) from error
    from cosettle_adapter.backbones.foreign import read_onnx, read_pickle  # few files are

    return Checkpoint(read_onnx(path)) if path.suffix == ".onnx" else Checkpoint(*read_pickle(path))


def is_whole(path: Path) -> bool:
    """Whether a file is there and is safetensors to its last byte; its values are not read."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a backbone's tensors as safetensors, float32, whole or not at all."""
    stored = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(stored, temporary)
