"""An adapter at one frame size as a ``torch.export`` program: both kinds of files come from it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones.timm_features import copy_modules
from cosettle_adapter.export.errors import ExportError
from cosettle_adapter.export.parity import Parity, compare, frames_to_compare
from cosettle_adapter.export.signature import BATCH, Signature

_EXAMPLE_BATCH = 2  # a batch of one would be taken for a constant
_LARGEST_BATCH = 2**20  # torch 2.6 asks for any bound below that of its integers


class OneSize(nn.Module):
    """Frames, or normalised images, of one size to features: the function that is exported."""

    def __init__(self, adapter: CoSettleAdapter, *, preprocessing: bool, normalize: bool) -> None:
        super().__init__()
        self.adapter = adapter
        self.preprocessing = preprocessing
        self.normalize = normalize
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to ``(N, C, h, w)``, in one pass whatever ``N``."""
        adapter = self.adapter
        height, width = inputs.shape[-2:]
        if self.preprocessing:
            inputs = adapter._normalize(inputs, adapter.geometry(height, width))
        return adapter._finished(adapter._encode_images(inputs)[1], self.normalize)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced model.

    Attributes:
        model: what was traced.
        signature: what it takes and returns.
        program: the ``torch.export.ExportedProgram``.
        dynamic_shapes: what was left open, as ``torch.export`` takes it; ``None`` for nothing.
    """

    model: OneSize
    signature: Signature
    program: Any
    dynamic_shapes: Any

    @torch.no_grad()
    def compared(self, run: Callable[[Tensor], Tensor], runtime: str, check_on: Any) -> Parity:
        """Run the model and a file made of it on the same frames.

        Args:
            run: runs the file, a tensor in and a tensor out.
            runtime: what runs it, with its version.
            check_on: frames of any kind and size; ``None`` for rendered ones.

        Raises:
            ExportError: the file computes something else.
        """
        count, height, width = (self.signature.input.shape[axis] for axis in (0, -2, -1))
        static = None if count == BATCH else int(count)
        frames = frames_to_compare(check_on, (int(height), int(width)), static)
        adapter = self.model.adapter
        inputs = frames if self.model.preprocessing else adapter.preprocess(frames)
        inputs = inputs.to(adapter.device)
        return compare(runtime, run(inputs), self.model(inputs))


@torch.no_grad()
def trace(model: OneSize, signature: Signature, *, unfused: bool = False) -> Traced:
    """Trace a model; tensors that its features do not depend on are left out.

    Args:
        model: what to trace.
        signature: what it takes.
        unfused: spell attention out; the fused operator computes the same, but the exporter of
            ONNX knows it for four axes only, and Hiera's has five.

    Raises:
        ExportError: this version of torch cannot trace this encoder.
    """
    count, *sides = signature.input.shape
    dynamic = count == BATCH
    shape = (_EXAMPLE_BATCH if dynamic else count, *sides)
    example = torch.zeros(shape, dtype=getattr(torch, signature.input.dtype))  # type: ignore[arg-type]
    example = example.to(model.adapter.device)
    shapes = {"inputs": {0: torch.export.Dim(BATCH, max=_LARGEST_BATCH)}} if dynamic else None
    model(example)  # positions of this size are computed now, and stored as constants
    with _plain_attention(model) if unfused else contextlib.nullcontext():
        program = _slim(model, example, shapes)
    for node in program.graph.nodes:  # would take folders of this machine into the file
        node.meta.pop("stack_trace", None)
    return Traced(model, signature, program, shapes)


def _slim(model: OneSize, example: Tensor, shapes: Any) -> Any:
    """Trace a model without what its features do not depend on."""
    program = _trace(model, example, shapes)
    # One stays in any case: encoders look at their first parameter for their dtype.
    first = next(name for name, _ in model.named_parameters())
    unread = _unread(program) - {first}
    return _trace(_without(model, unread), example, shapes) if unread else program


@contextlib.contextmanager
def _plain_attention(model: OneSize) -> Iterator[None]:
    """Have timm's encoders multiply queries by keys themselves meanwhile."""
    # Encoders whose windows belong to one size keep copies for others, which are no submodules.
    fitted = getattr(model.adapter.backbone, "_fitted", {}).values()
    inside = itertools.chain(model.modules(), *(copy.modules() for copy in fitted))
    fused = [module for module in inside if getattr(module, "fused_attn", False) is True]
    try:
        for module in fused:
            module.fused_attn = False
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _trace(model: nn.Module, example: Tensor, shapes: Any) -> Any:
    try:
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch raises errors of its compiler's many parts
        remedy = "" if shapes is None else "; a static batch may be traced nevertheless"
        raise ExportError(
            f"torch {torch.__version__} cannot trace this model: {reason(error)}{remedy}"
        ) from error


def _unread(program: Any) -> set[str]:
    """Names of parameters and buffers that nothing in a program reads: later blocks, heads."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {
        names[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names and not node.users
    }


def _without(model: OneSize, names: set[str]) -> OneSize:
    """Copy a model without some tensors, sharing all others."""
    slim: OneSize = copy_modules(model, lambda tensor: tensor)
    for name in names:
        module, _, leaf = name.rpartition(".")
        setattr(slim.get_submodule(module), leaf, None)
    return slim


def reason(error: BaseException) -> str:
    """Return what an error began with: its type and the first line that says anything."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"
