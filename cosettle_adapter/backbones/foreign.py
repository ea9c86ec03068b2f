"""Other people's pickles and ONNX files: their tensors are read, and nothing in them is run."""

from __future__ import annotations

import argparse
import re
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosettle_adapter.errors import CorruptWeightsError
from cosettle_adapter.imports import require

_STATE_DICTS = (  # where training codes keep the model, the first that is there
    *("model", "state_dict", "teacher", "encoder", "target_encoder", "model_state_dict", "module"),
)
_ONE_AT_A_TIME = threading.Lock()
_EXPORTED = "backbone."
_EXPORTED_LINEAR = re.compile(r"/backbone/(.+)/MatMul")
_REFUSED = re.compile(r"\bGLOBAL (\S+)")  # how the restricted unpickler names what it refuses


def read_pickle(path: Path) -> tuple[dict[str, Tensor], int | None, dict[str, Any]]:
    """Return a PyTorch checkpoint's tensors, epoch and the plain ones of its settings.

    It is read by PyTorch's restricted unpickler, which knows tensors and plain containers;
    ``argparse.Namespace`` is allowed beside them because many codes save their arguments.
    The state dict is found at the top or under one of the usual keys.
    """
    content = _unpickle(path)
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
    settings = {
        name: value
        for name, value in (vars(given) if isinstance(given, argparse.Namespace) else {}).items()
        if value is None or isinstance(value, (bool, int, float, str))
    }
    return tensors, epoch if isinstance(epoch, int) else None, settings


def read_onnx(path: Path) -> dict[str, Tensor]:
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


def _unpickle(path: Path) -> Any:
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
