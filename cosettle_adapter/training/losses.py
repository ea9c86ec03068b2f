"""The paper's objective: cycle consistency, and tokens that stay close to the backbone's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.settings import TrainSettings

_EPSILON = 1e-6


class Losses(NamedTuple):
    """Scalars of one batch."""

    total: Tensor
    cycle: Tensor
    separability: Tensor  # not weighted
    accuracy: Tensor  # fraction of cycles that end where they started, in [0, 1]


def objective(
    project: Callable[[Tensor], Tensor],
    tokens: Tensor,
    grid: tuple[int, int],
    settings: TrainSettings,
) -> Losses:
    """Compute the losses of a head on views ``(B, I, N, C)`` returned by ``encode``, in float32."""
    with torch.autocast(tokens.device.type, enabled=False):
        if settings.pea == "off":
            tokens = torch.cat([tokens, tokens[:, : settings.frames - 1]], dim=1)
        # Tensors made in inference mode cannot be used in a backward pass.
        tokens = (tokens.clone() if tokens.is_inference() else tokens.detach()).float()
        projected = F.normalize(project(tokens).float(), dim=-1)  # DDP allows only one call
        views = projected[:, : settings.frames], projected[:, settings.frames :]
        cycles = [
            cycle_consistency_loss(*views, grid, temperature, settings.pool)
            for temperature in settings.temperatures
        ]
        cycle, accuracy = (torch.stack(values).mean() for values in zip(*cycles, strict=True))
        regularise = semantic_separability_loss if settings.reg_loss == "kl" else F.mse_loss
        separability = regularise(F.normalize(tokens, dim=-1), projected)
        total = cycle + settings.separability_weight * separability
    return Losses(total, cycle, separability, accuracy)


def cycle_consistency_loss(
    forward: Tensor,
    backward: Tensor,
    grid: tuple[int, int],
    temperature: float = 0.03,
    pool: int = 2,
) -> tuple[Tensor, Tensor]:
    """Cycle-consistency loss of walks from each position of frame 1 through the clip and back.

    Section 3.3 of the paper; ``forward_asy_cycle_loss`` in the official code. Unit vectors are
    averaged over windows of ``pool x pool`` patches without renormalising. For two frames, with
    ``A12 = softmax(x1 x2^T / t)`` and ``A21' = softmax(x2 x1'^T / t)``, the loss is the
    cross-entropy between the logits ``log(A12 A21' + 1e-6)`` and the identity. With more frames,
    cycle ``k`` goes through plain views to frame ``k`` and back through perturbed ones; loss and
    accuracy are means over ``k`` from 2 to ``T``.

    ``forward`` are ``(B, T, N, C)`` unit vectors of the plain views, ``backward``
    ``(B, T - 1, N, C)`` of the perturbed views of all frames but the last. Returns the loss and the
    fraction of positions whose likeliest walk returns, in [0, 1].
    """
    if pool > min(grid):
        raise TrainingError(
            f"pool must be at most {min(grid)} on a grid of {grid[0]} x {grid[1]} patches, got "
            f"{pool}"
        )
    out, back = _pool(forward, grid, pool), _pool(backward, grid, pool)
    start = torch.arange(out.shape[2], device=out.device).repeat(len(out))
    losses: list[Tensor] = []
    accuracies: list[Tensor] = []
    outward = _transition(out[:, 0], out[:, 1], temperature)  # 1 -> ... -> k
    homeward: Tensor | None = None  # k - 1 -> ... -> 1, perturbed
    for k in range(1, out.shape[1]):
        if k > 1:
            outward = outward @ _transition(out[:, k - 1], out[:, k], temperature)
            step = _transition(back[:, k - 1], back[:, k - 2], temperature)
            homeward = step if homeward is None else step @ homeward
        round_trip = outward @ _transition(out[:, k], back[:, k - 1], temperature)
        if homeward is not None:
            round_trip = round_trip @ homeward
        logits = rearrange(torch.log(round_trip + _EPSILON), "b start end -> (b start) end")
        losses.append(F.cross_entropy(logits, start))
        accuracies.append((logits.argmax(dim=1) == start).to(logits.dtype).mean())
    return torch.stack(losses).mean(), torch.stack(accuracies).mean()


def semantic_separability_loss(original: Tensor, projected: Tensor) -> Tensor:
    """KL divergence of the projected tokens from the backbone's, as distributions over channels.

    The paper's semantic separability regularisation (section 3.3; ``forward_kl_loss`` in the
    official code): ``KL(softmax(original) || softmax(projected))`` of unit vectors ``(B, ..., C)``,
    summed over all tokens and divided by ``B``. Softmaxes of unit vectors are nearly uniform, so a
    token contributes about ``(1 - cos) / C``.
    """
    return F.kl_div(
        F.log_softmax(projected, dim=-1), F.softmax(original, dim=-1), reduction="batchmean"
    )


def _transition(here: Tensor, there: Tensor, temperature: float) -> Tensor:
    """Transition probabilities ``(B, n, n)`` from positions of one frame to those of another."""
    return F.softmax(here @ rearrange(there, "b n c -> b c n") / temperature, dim=-1)


def _pool(vectors: Tensor, grid: tuple[int, int], pool: int) -> Tensor:
    patches = rearrange(vectors, "b t (h w) c -> b t h w c", h=grid[0])
    h, w = (side // pool for side in grid)
    whole = patches[:, :, : h * pool, : w * pool]
    return reduce(whole, "b t (h p) (w q) c -> b t (h w) c", "mean", p=pool, q=pool)
