"""Export adapters to ONNX files."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.export.program import (
    Exported,
    ExportError,
    Parity,
    Traced,
    check_suffix,
    reason,
)
from cosettle_adapter.imports import require

logger = logging.getLogger(__name__)

OPSET = 18  # the target of torch's exporter
_FIRST_TORCH = (2, 6)  # the first whose exporter accepts torch.export programs
_LARGEST_FILE = 2**31 - 2**24  # protobuf's limit of 2 GB, less space for the graph


def to_onnx(
    adapter: CoSettleAdapter,
    path: str | Path,
    size: tuple[int, int] | None = None,
    *,
    preprocessing: bool = True,
    normalize: bool = False,
    static_batch: int | None = None,
    check: bool = True,
    check_on: Any = None,
) -> Exported:
    """Write an adapter, float32 or float16, as an ONNX model with metadata.

    Arguments and errors are those of :func:`to_torch_export`; the file is checked in ONNX Runtime
    if that is installed. Weights of more than 2 GB, the limit of an ONNX file, go into a second
    file ``<name>.onnx.data``, which must stay beside it.

    Raises:
        MissingExtraError: the exporter's packages are not installed.
    """
    path = check_suffix(path, ".onnx")
    check_exporter()
    if adapter.dtype not in (torch.float32, torch.float16):
        raise ExportError(
            f"ONNX runtimes have few kernels for {adapter.dtype}; load the adapter with "
            "dtype=torch.float16 or torch.float32, or export a .pt2 file"
        )
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # messages of the exporter about its internals
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = Traced(adapter, size, preprocessing, normalize, static_batch, unfused=True)
            onnx_program = _translate(traced)
    finally:
        logging.disable(disabled)
    tensors = (*traced.program.state_dict.values(), *traced.program.constants.values())
    weights = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
    path.parent.mkdir(parents=True, exist_ok=True)
    # under the final names in a temporary folder: a model stores the name of its data file
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        model = Path(folder) / path.name
        onnx_program.save(model, external_data=weights > _LARGEST_FILE)
        parity = _check(model, traced, check_on) if check else None
        data = [file for file in Path(folder).iterdir() if file != model]
        size_written = sum(file.stat().st_size for file in (*data, model))
        for file in (*data, model):
            with file.open("rb") as content:
                os.fsync(content.fileno())
        if data:  # an earlier model must not be read with the weights of this one
            path.unlink(missing_ok=True)
        for file in (*data, model):
            file.replace(path.parent / file.name)
    return traced.exported(path, size_written, parity)


def check_exporter() -> None:
    """Raise :class:`MissingExtraError` or :class:`ExportError` if ONNX files cannot be written."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _FIRST_TORCH:
        raise ExportError(
            f"exporting ONNX needs torch {'.'.join(map(str, _FIRST_TORCH))} or newer, this is "
            f"{torch.__version__}: upgrade with pip install -U torch, or export a .pt2 file"
        )
    for package in ("onnx", "onnxscript"):
        require(package, extra="export", purpose="exporting ONNX models")


def _translate(traced: Traced) -> Any:
    try:
        program: Any = torch.onnx.export(
            traced.program,
            (),
            dynamo=True,
            input_names=[traced.name],
            output_names=["features"],
            dynamic_shapes=traced.dynamic_shapes,
            opset_version=OPSET,
            verbose=False,
        )
    except Exception as error:  # the exporter raises errors of many types
        raise ExportError(
            f"torch {torch.__version__} cannot export {traced.metadata['backbone']} to ONNX: "
            f"{reason(error)}. Try a newer torch, or export a .pt2 file"
        ) from error
    for name, value in traced.metadata.items():  # strings unchanged, other values as JSON
        text = value if isinstance(value, str) else json.dumps(value)
        program.model.metadata_props[name] = text
    graph = program.model.graph
    names = dict(zip(map(str, graph.outputs[0].shape[2:]), "hw", strict=True))
    for node in graph:
        node.metadata_props.clear()  # names of Python functions, larger than the graph
        for shape in (value.shape for value in node.outputs if value.shape is not None):
            for axis, side in enumerate(shape):
                if not isinstance(side, int):  # a symbol such as s39
                    shape[axis] = re.sub(r"s\d+", lambda s: names.get(s[0], s[0]), str(side))
    return program


def _check(path: Path, traced: Traced, check_on: Any) -> Parity | None:
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        logger.warning("not compared with PyTorch: pip install onnxruntime to compare")
        return None
    version = f"ONNX Runtime {runtime.__version__}"
    try:
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a type per error code
        raise ExportError(
            f"{version} cannot load {path.name}, which was not kept: {reason(error)}. Upgrade it "
            "with pip install -U onnxruntime, or keep the file with check=False (--no-check)"
        ) from error

    def run(inputs: Tensor) -> Tensor:
        (features,) = session.run(None, {traced.name: inputs.cpu().numpy()})
        return torch.from_numpy(features)

    return traced.compare(run, version, check_on)
