"""Reading weight files of all supported formats without executing code in them."""

from __future__ import annotations

import argparse
import json
import re
import tarfile
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError
from cosettle_adapter.imports import require
from cosettle_adapter.io import atomic_path

_STATE_DICTS = (  # keys of the model in training checkpoints, in order of preference
    "model", "state_dict", "teacher", "encoder", "target_encoder", "model_state_dict", "module",
)  # fmt: skip
_LOADING = threading.Lock()
_EXPORTED = "backbone."
_EXPORTED_LINEAR = re.compile(r"/backbone/(.+)/MatMul")
_REFUSED = re.compile(r"\bGLOBAL (\S+)")  # in errors of the restricted unpickler


class Checkpoint(NamedTuple):
    """Content of a weight file."""

    tensors: dict[str, Tensor]  # under the file's own names, on the CPU
    epoch: int | None = None  # epoch after which it was written, if recorded
    arguments: Mapping[str, Any] = {}  # training settings that are plain values


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a safetensors or ONNX file, PyTorch checkpoint or a folder saved by transformers."""
    if path.is_dir():
        return Checkpoint(_read_folder(path))
    if not path.is_file():
        raise WeightsUnavailableError(f"{path} does not exist")
    if path.suffix == ".onnx":
        return Checkpoint(_read_onnx(path))
    with path.open("rb") as file:
        head = file.read(9)  # safetensors: a length of 8 bytes, then a JSON object
    if path.suffix != ".safetensors" and head[8:] != b"{":
        return _read_pickle(path)
    try:
        return Checkpoint(load_file(path))
    except (SafetensorError, OSError) as error:
        message = f"{path} is truncated or not a safetensors file ({error})"
        raise CorruptWeightsError(message) from error


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """Read the weights in a folder saved by transformers, from one file or from shards."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_checkpoint(folder / name).tensors
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        try:
            places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            shards = sorted({folder / Path(file).name for file in places.values()})
        except (LookupError, TypeError, ValueError) as error:
            raise CorruptWeightsError(f"{index} is not an index of weights: {error!r}") from error
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            tensors |= read_checkpoint(shard).tensors
        if missing := sorted(places.keys() - tensors.keys()):
            raise CorruptWeightsError(f"{index} lists tensors that no shard has: {missing[:8]}")
        return tensors
    raise WeightsUnavailableError(
        f"{folder} has no weights; expected model.safetensors or pytorch_model.bin, or their "
        "shards with an index"
    )


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a backbone's tensors atomically as safetensors in float32."""
    stored = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(stored, temporary)


def _read_pickle(path: Path) -> Checkpoint:
    """Read a PyTorch checkpoint with the restricted unpickler, which executes no code."""
    try:
        mapped = zipfile.is_zipfile(path)
        if tarfile.is_tarfile(path):
            raise RuntimeError("it is a tar archive, which may execute code")
        if mapped and _is_torchscript(path):
            from cosettle_adapter.backbones.torchscript import read_torchscript  # rarely needed

            content: Any = read_torchscript(path)
        else:
            # Many training codes save their arguments as a Namespace. Safe globals are shared by
            # all threads, so only one thread loads at a time.
            with _LOADING, torch.serialization.safe_globals([argparse.Namespace]):
                # Memory mapping avoids reading the optimizer's state.
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise anything
        text = " ".join(str(error).split())
        cause = f"is truncated or not a PyTorch checkpoint ({text.partition('. ')[0]})"
        if refused := _REFUSED.search(text):
            cause = f"is a pickle that holds more than tensors ({refused[1]}); it was not executed"
        raise CorruptWeightsError(f"{path} {cause}") from error
    if not isinstance(content, Mapping):
        raise CorruptWeightsError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    nested = [content[key] for key in _STATE_DICTS if isinstance(content.get(key), Mapping)]
    for state in (*nested, content):
        if tensors := {str(key): value for key, value in state.items() if torch.is_tensor(value)}:
            break
    else:
        keys = ", ".join(map(str, list(content)[:10]))
        raise CorruptWeightsError(
            f"{path} holds no tensors; its top-level keys are: {keys or 'none'}"
        )
    epoch, arguments = content.get("epoch"), content.get("args")
    settings = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    plain = {
        name: value
        for name, value in settings.items()
        if value is None or isinstance(value, (bool, int, float, str))
    }
    return Checkpoint(tensors, epoch if isinstance(epoch, int) else None, plain)


def _is_torchscript(path: Path) -> bool:
    """Whether a zip file is TorchScript, which ``torch.load`` refuses or executes."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_onnx(path: Path) -> dict[str, Tensor]:
    """Read the weights of a DINOv2 encoder exported from ``transformers``, under those names."""
    onnx = require("onnx", extra="export", purpose="reading the package-index copy of a backbone")
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # protobuf's errors have no public base class
        raise CorruptWeightsError(f"{path} is not a readable ONNX file: {error}") from error
    constants = {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()).float()
        for tensor in graph.initializer
    }
    named: dict[str, Tensor] = {}
    positions: dict[str, Tensor] = {}
    for name in [name for name in constants if name.startswith(_EXPORTED)]:
        named[name.removeprefix(_EXPORTED)] = constants.pop(name)
    # Parameters that the exporter transposed or folded have new names (``onnx::MatMul_123``): a
    # MatMul node contains the linear layer's name, and constants of three dimensions are positions.
    for node in graph.node:
        for name in constants.keys() & set(node.input):
            if layer := _EXPORTED_LINEAR.fullmatch(node.name):
                named[layer[1].replace("/", ".") + ".weight"] = constants[name].T.contiguous()
            elif constants[name].ndim == 3:
                positions[node.op_type] = constants[name]
    if not positions.keys() >= {"Concat", "Reshape"}:
        raise CorruptWeightsError(f"{path} is not an exported DINOv2 encoder: it has no positions")
    parts = [positions["Concat"], positions["Reshape"]]  # class token, patches
    return {**named, "embeddings.position_embeddings": torch.cat(parts, dim=1)}
