"""The trained head, its initial weights and its optimiser."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from cosettle_adapter.projection import Projection, ProjectionConfig
from cosettle_adapter.training.data import seed_of
from cosettle_adapter.training.errors import TrainingError, differences
from cosettle_adapter.training.settings import TrainSettings

_LINEAR_RANGE = 0.1  # scale at which tanh is linear to within 0.3 %; LayerNorm removes the scale


class Head(nn.Module):
    """Projection of tokens ``(..., C)`` as a module that DDP can wrap."""

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens to ``(..., C')`` float32."""
        return self.projection.project(tokens)


def make_optimizer(module: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only; :class:`Stepper` sets the learning rate."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas)


def new_head(config: ProjectionConfig, *, init: str, seed: int) -> Projection:
    """Make the projection that training starts from.

    ``init`` is ``random``, ``identity``, or a folder with a projection for the same backbone,
    layers and norm: of the same kind and activation, or affine. A head with Tanh and LayerNorm that
    starts from an affine map ``y = W x + b`` computes about the LayerNorm of ``y`` if ``y`` has
    about unit variance: its first matrix is ``0.1 W`` and further ones are identities, so that
    inputs of Tanh stay in its linear range; LayerNorm removes the factor.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "head"))
        head = Projection(config)
    if init == "random":
        return head
    weight, bias = torch.eye(config.out_width), torch.zeros(config.out_width)
    if init != "identity":
        start = _load_start(config, init)
        if start.config.kind == config.kind:
            head.load_state_dict(start.state_dict())
            return head
        if start.config.kind == "affine":
            state = start.state_dict()
            weight, bias = state["linears.0.weight"], state["linears.0.bias"]
    if config.kind != "affine" and config.activation != "tanh":
        raise TrainingError(
            f"a head with {config.activation} cannot start from {init}, because this activation "
            "has no linear range; use --activation tanh or --init random"
        )
    scale = 1.0 if config.kind == "affine" else _LINEAR_RANGE
    first, *following = head.linears
    first.load_state_dict({"weight": scale * weight, "bias": scale * bias})
    for linear in following:
        linear.load_state_dict({"weight": torch.eye(len(bias)), "bias": torch.zeros(len(bias))})
    return head


def _load_start(config: ProjectionConfig, init: str) -> Projection:
    folder = Path(init).expanduser()
    if not folder.is_dir():
        raise TrainingError(
            f"init must be 'random', 'identity' or a projection folder, got {init!r}"
        )
    start = Projection.load(folder)
    names = {"fingerprint", "layers", "norm", "in_width", "out_width"}
    if start.config.kind not in ("affine", "identity"):
        names |= {"kind", "activation"}
    available, expected = (
        {name: value for name, value in dataclasses.asdict(c).items() if name in names}
        for c in (start.config, config)
    )
    if differing := differences(available, expected):
        raise TrainingError(
            f"training cannot start from {folder}: {differing}. Use a projection of the same "
            "backbone, layers and norm, of the same kind or affine"
        )
    return start
