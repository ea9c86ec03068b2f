"""The head that is trained, and what it starts from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from cosettle_adapter.projection import Projection, ProjectionConfig
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.seeds import seed_of

INITS = ("random", "identity")

_LINEAR_RANGE = 0.1
"""Scale at which tanh is a straight line to 0.3 %; LayerNorm undoes it."""


class Head(nn.Module):
    """A projection over tokens ``(..., C)``, as the objective calls it and DDP wraps it."""

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens ``(..., C)`` to ``(..., C')`` in float32."""
        return self.projection.project(tokens)


def new_head(config: ProjectionConfig, *, init: str, seed: int) -> Projection:
    """Make the projection that training starts from.

    An affine map ``y = W x + b`` (the identity, or a closed-form projection) becomes a head with
    Tanh and LayerNorm approximately: the first matrix is ``0.1 W``, further ones are identities,
    so that Tanh stays where it is a straight line, and LayerNorm takes the 0.1 away again. What
    comes out is ``y`` with each token's mean over channels removed and its variance set to 1,
    for ``y`` of about unit variance, as ``cosettle-adapter fit`` scales it.

    Args:
        config: of the projection that is wanted.
        init: ``random``, ``identity``, or a folder with a projection for the same backbone,
            blocks and norm: of the same kind and activation, or affine.
        seed: of a random start.

    Raises:
        TrainingError: the folder's projection is another's; everything that differs is named.
        ProjectionFormatError: the folder holds no projection.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "head"))
        head = Projection(config)
    if init == "random":
        return head
    if init == "identity":
        eye = torch.eye(config.out_width)
        _start_from_affine(head, eye, torch.zeros(config.out_width), source="the identity")
        return head
    start = _load_start(config, init)
    if start.config.kind in ("affine", "identity") and start.config.kind != config.kind:
        state = start.state_dict()
        weight = state.get("linears.0.weight", torch.eye(config.out_width))
        bias = state.get("linears.0.bias", torch.zeros(config.out_width))
        _start_from_affine(head, weight, bias, source=init)
    else:
        head.load_state_dict(start.state_dict())
    return head


def _load_start(config: ProjectionConfig, init: str) -> Projection:
    folder = Path(init).expanduser()
    if not folder.is_dir():
        raise TrainingError(
            f"{init!r} is no start: give {', '.join(map(repr, INITS))}, or a projection folder"
        )
    start = Projection.load(folder)
    fields = ["fingerprint", "layers", "norm", "in_width", "out_width"]
    if start.config.kind not in ("affine", "identity"):
        fields += ["kind", "activation"]
    wanted, found = dataclasses.asdict(config), dataclasses.asdict(start.config)
    differing = [
        f"{field} {found[field]!r} in place of {wanted[field]!r}"
        for field in fields
        if found[field] != wanted[field]
    ]
    if differing:
        raise TrainingError(
            f"{folder} cannot be what this head starts from: {'; '.join(differing)}. Only an "
            "affine projection can start a head of another kind"
        )
    return start


@torch.no_grad()
def _start_from_affine(head: Projection, weight: Tensor, bias: Tensor, *, source: str) -> None:
    config = head.config
    if config.kind == "affine":
        scale = 1.0
    elif config.activation == "tanh":
        scale = _LINEAR_RANGE
    else:
        raise TrainingError(
            f"a head with {config.activation} cannot start from {source}: it has no range that is "
            "a straight line. Use --activation tanh, or --init random"
        )
    first, *following = head.linears
    state = {"weight": scale * weight, "bias": scale * bias}
    first.load_state_dict(state)
    for linear in following:
        linear.load_state_dict({"weight": torch.eye(len(bias)), "bias": torch.zeros(len(bias))})
