"""ONNX exports of encoders, read back into timm's names.

An exporter keeps the names of parameters it left alone and renames those it transposed or folded
(``onnx::MatMul_123``). The renamed ones are found through the graph: a node's own name says which
layer its constant belongs to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosettle_adapter.errors import CorruptWeightsError
from cosettle_adapter.extras import require

_PREFIX = "backbone."
_BLOCK = "encoder.layer.{}."
_QKV = ("query", "key", "value")

# timm's name inside a block: name inside the exported block
_BLOCK_VECTORS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.proj.bias": "attention.output.dense.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "ls2.gamma": "layer_scale2.lambda1",
}
_BLOCK_MATRICES = {
    "attn.proj.weight": "attention.output.dense",
    "mlp.fc1.weight": "mlp.fc1",
    "mlp.fc2.weight": "mlp.fc2",
}


def read_dinov2_onnx(path: Path, *, depth: int) -> dict[str, Tensor]:
    """Read a DINOv2 encoder, exported from ``transformers``, as a timm state dict.

    Args:
        path: the ``.onnx`` file; only its weights are read, the graph is not run.
        depth: number of transformer blocks.

    Returns:
        timm's names to float32 tensors, without the head that may follow the encoder.

    Raises:
        CorruptWeightsError: not ONNX, or a weight is missing.
        MissingExtraError: the package ``onnx`` is not installed.
    """
    onnx = require("onnx", extra="export", purpose="reading the package-index copy of a backbone")
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # protobuf's own errors have no public common base
        raise CorruptWeightsError(f"{path} is not a readable ONNX file: {error}") from error
    weights = _Weights(graph, onnx.numpy_helper, source=path)

    state = {
        "cls_token": weights.named("embeddings.cls_token"),
        "patch_embed.proj.weight": weights.named("embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": weights.named("embeddings.patch_embeddings.projection.bias"),
        "norm.weight": weights.named("layernorm.weight"),
        "norm.bias": weights.named("layernorm.bias"),
    }
    width = state["cls_token"].shape[-1]
    state["pos_embed"] = torch.cat(
        [
            weights.constant_of("Concat", shape=(1, 1, width), besides="embeddings.cls_token"),
            weights.constant_of("Reshape", shape=(1, None, width)),
        ],
        dim=1,
    )
    for index in range(depth):
        block = _BLOCK.format(index)
        for name, exported in _BLOCK_VECTORS.items():
            state[f"blocks.{index}.{name}"] = weights.named(block + exported)
        for name, exported in _BLOCK_MATRICES.items():
            state[f"blocks.{index}.{name}"] = weights.matrix(block + exported)
        attention = block + "attention.attention."
        state[f"blocks.{index}.attn.qkv.weight"] = torch.cat(
            [weights.matrix(attention + part) for part in _QKV]
        )
        state[f"blocks.{index}.attn.qkv.bias"] = torch.cat(
            [weights.named(f"{attention}{part}.bias") for part in _QKV]
        )
    return state


class _Weights:
    """The constants of an ONNX graph, by parameter name or by the node that uses them."""

    def __init__(self, graph: Any, numpy_helper: Any, *, source: Path) -> None:
        self._constants = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
            for tensor in graph.initializer
        }
        self._nodes = graph.node
        self._by_node = {node.name: list(node.input) for node in graph.node}
        self._source = source

    def named(self, name: str) -> Tensor:
        """The parameter that kept its name."""
        return self._take(_PREFIX + name)

    def matrix(self, layer: str) -> Tensor:
        """The weight ``(out, in)`` of a linear layer, stored transposed on its MatMul node."""
        head, separator, tail = layer.partition(".layer.")
        index, _, rest = tail.partition(".")
        path = [head + separator + index, *rest.split(".")]
        node = "/" + "/".join(["backbone", *path[0].split(".", 1), *path[1:]]) + "/MatMul"
        constant = next(
            (name for name in self._by_node.get(node, ()) if name in self._constants), None
        )
        if constant is None:
            raise CorruptWeightsError(f"{self._source} has no weight for {layer} (node {node})")
        return self._take(constant).T.contiguous()

    def constant_of(
        self, operator: str, *, shape: tuple[int | None, ...], besides: str = ""
    ) -> Tensor:
        """The one nameless constant of a given shape that feeds a kind of node."""
        found = {
            name
            for node in self._nodes
            if node.op_type == operator
            for name in node.input
            if name in self._constants
            and name != _PREFIX + besides
            and _matches(tuple(self._constants[name].shape), shape)
        }
        if len(found) != 1:
            raise CorruptWeightsError(
                f"{self._source} has {len(found)} constants of shape {shape} on {operator} nodes, "
                "expected one"
            )
        return self._take(found.pop())

    def _take(self, name: str) -> Tensor:
        if name not in self._constants:
            raise CorruptWeightsError(f"{self._source} has no weight {name}")
        return self._constants[name].float()


def _matches(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        want is None or side == want for side, want in zip(shape, wanted, strict=True)
    )
