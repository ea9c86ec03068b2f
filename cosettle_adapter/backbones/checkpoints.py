"""Files of weights: safetensors, and other people's pickles and ONNX files; nothing is ever run."""

from __future__ import annotations

import argparse
import re
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError
from cosettle_adapter.imports import require

_STATE_DICTS = (  # where training codes keep the model, the first that is there
    "model",
    "state_dict",
    "teacher",
    "encoder",
    "target_encoder",
    "model_state_dict",
    "module",
)
_ONE_AT_A_TIME = threading.Lock()
_SAFETENSORS_HEADER = 9  # a length of 8 bytes, then the opening brace of a JSON object
_EXPORTED = "backbone."
_EXPORTED_LINEAR = re.compile(r"/backbone/(.+)/MatMul")
_REFUSED = re.compile(r"\bGLOBAL (\S+)")  # how the restricted unpickler names what it refuses


class Checkpoint(NamedTuple):
    """What a file of weights holds."""

    tensors: dict[str, Tensor]  # under the file's own names, on the CPU
    epoch: int | None = None  # after which it was written, where it says so
    arguments: Mapping[str, Any] = {}  # settings of the training run that are plain values


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a safetensors file, a PyTorch checkpoint as training codes save it, or an ONNX file.

    The content decides the format, the suffix only that it is ONNX. A pickle is read by PyTorch's
    restricted unpickler, which knows tensors and plain containers; ``argparse.Namespace`` is
    allowed beside them because many codes save their arguments. Anything else is refused before
    it could run. The state dict is found at the top or under one of the usual keys.

    Raises:
        WeightsUnavailableError: no such file.
        CorruptWeightsError: truncated, holding code, or holding no tensors; one line says which.
        MissingExtraError: an ONNX file, and the package ``onnx`` is not installed.
    """
    path = Path(path)
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
    if path.suffix == ".onnx":
        return Checkpoint(_read_onnx(path))
    content = _read_pickle(path)
    if not isinstance(content, Mapping):
        raise CorruptWeightsError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    nested = [content[key] for key in _STATE_DICTS if isinstance(content.get(key), Mapping)]
    for found in (*nested, content):
        if tensors := {str(key): value for key, value in found.items() if torch.is_tensor(value)}:
            break
    else:
        keys = ", ".join(map(str, list(content)[:10]))
        raise CorruptWeightsError(f"{path} holds no tensors; at its top are: {keys or 'no keys'}")
    epoch, given = content.get("epoch"), content.get("args")
    arguments = vars(given) if isinstance(given, argparse.Namespace) else {}
    return Checkpoint(
        tensors,
        epoch=epoch if isinstance(epoch, int) else None,
        arguments={
            name: value
            for name, value in arguments.items()
            if value is None or isinstance(value, (bool, int, float, str))
        },
    )


def is_whole(path: Path) -> bool:
    """Whether a file is there and is safetensors to its last byte; its values are not read."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _read_onnx(path: Path) -> dict[str, Tensor]:
    """Read the weights of a DINOv2 encoder exported from ``transformers``, under the names there.

    An exporter keeps the names of parameters it left alone and renames those it transposed or
    folded (``onnx::MatMul_123``). Those are found through the graph, which is not run: the name
    of a ``MatMul`` node says which linear layer its constant belongs to, and the nodes that use
    positions are the ones with nameless constants of that width.
    """
    onnx = require("onnx", extra="export", purpose="reading the package-index copy of a backbone")
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # protobuf's own errors have no public common base
        raise CorruptWeightsError(f"{path} is not a readable ONNX file: {error}") from error
    constants = {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()).float()
        for tensor in graph.initializer
    }
    named = {
        name.removeprefix(_EXPORTED): tensor
        for name, tensor in constants.items()
        if name.startswith(_EXPORTED)
    }
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        for name in node.input:
            if name not in constants or name.startswith(_EXPORTED):
                continue
            tensor = constants[name]
            layer = _EXPORTED_LINEAR.fullmatch(node.name)
            if layer is not None:
                named[layer[1].replace("/", ".") + ".weight"] = tensor.T.contiguous()
            elif tensor.ndim == 3:
                positions[node.op_type] = tensor
    if not positions.keys() >= {"Concat", "Reshape"}:
        raise CorruptWeightsError(f"{path} is not the export of a DINOv2 encoder: no positions")
    parts = [positions["Concat"], positions["Reshape"]]  # of the class token and of the patches
    return {**named, "embeddings.position_embeddings": torch.cat(parts, dim=1)}


def _read_pickle(path: Path) -> Any:
    try:
        # What is allowed is global to the process, so threads take turns.
        with _ONE_AT_A_TIME, torch.serialization.safe_globals([argparse.Namespace]):
            # Mapping the file skips the optimizer's moments, which nobody reads.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # anything may go wrong inside a damaged pickle
        text = " ".join(str(error).split())
        if refused := _REFUSED.search(text):
            cause = f"is a pickle that holds more than tensors ({refused[1]}); it was not run and "
            cause += "is not used"
        else:
            cause = f"is truncated or not a PyTorch checkpoint ({text.partition('. ')[0]})"
        raise CorruptWeightsError(f"{path} {cause}") from error
