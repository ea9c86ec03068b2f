"""The paper's objective: cycles that close, on tokens that stay close to the backbone's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.training.encoding import Grid, Views
from cosettle_adapter.training.settings import ObjectiveSettings

_EPSILON = 1e-6
_LONGEST = 1.01  # of a unit vector; half precision rounds


@dataclasses.dataclass(frozen=True)
class Losses:
    """Scalars of one batch, float32.

    Attributes:
        total: what is minimised; the only one to call ``backward`` on.
        cycle: the cycle-consistency loss.
        separability: the separability loss before it is weighted.
        accuracy: the share of cycles that end where they began, in [0, 1].
    """

    total: Tensor
    cycle: Tensor
    separability: Tensor
    accuracy: Tensor


def objective(
    project: Callable[[Tensor], Tensor], views: Views, settings: ObjectiveSettings
) -> Losses:
    """Compute the losses of a head on a batch of views.

    All views are projected in one call (so that a module wrapped for data-parallel training is
    called once per pass), scaled to unit length and compared in float32, under autocast as well.
    Gradients reach what ``project`` is made of, never the tokens.

    Args:
        project: the head: tokens ``(..., C)`` to ``(..., C')``.
        views: from :func:`~cosettle_adapter.training.encoding.encode_views`.
        settings: temperatures, weight and pool.

    Returns:
        The losses; ``separability`` is 0 where its weight is 0 and the head changes the width.

    Raises:
        ValueError: a head that changes the width while the separability loss has a weight.
    """
    with torch.autocast(views.forward.device.type, enabled=False):
        tokens = torch.cat([views.forward, views.backward], dim=1)
        # Tensors made in inference mode cannot take part in a backward pass.
        tokens = (tokens.clone() if tokens.is_inference() else tokens.detach()).float()
        projected = F.normalize(project(tokens).float(), dim=-1)
        frames = views.forward.shape[1]
        forward, backward = projected[:, :frames], projected[:, frames:]
        cycles = [
            cycle_consistency_loss(
                forward, backward, views.grid, temperature, settings.pool, normalised=True
            )
            for temperature in settings.temperatures
        ]
        cycle, accuracy = (torch.stack(each).mean() for each in zip(*cycles, strict=True))
        if tokens.shape[-1] == projected.shape[-1]:
            separability = semantic_separability_loss(
                F.normalize(tokens, dim=-1), projected, normalised=True
            )
        elif settings.separability_weight:
            raise ValueError(
                "the separability loss compares channels one by one, but the head makes "
                f"{projected.shape[-1]} of {tokens.shape[-1]}: keep the width, or set "
                "separability_weight=0"
            )
        else:
            separability = projected.new_zeros(())
        total = cycle + settings.separability_weight * separability
    return Losses(total, cycle, separability, accuracy)


def cycle_consistency_loss(
    forward: Tensor,
    backward: Tensor,
    grid: Grid,
    temperature: float = 0.03,
    pool: int = 2,
    *,
    normalised: bool = False,
) -> tuple[Tensor, Tensor]:
    """Walk from each place of frame 1 over the clip and back, to arrive where the walk began.

    The paper's cycle-consistency loss (section 3.3; ``forward_asy_cycle_loss`` in the official
    code). Unit vectors are averaged over ``pool x pool`` patches and not scaled to unit length
    again. For two frames, with ``A12 = softmax(x1 x2^T / t)`` and ``A21' = softmax(x2 x1'^T / t)``,
    the loss is the cross-entropy of ``log(A12 A21' + 1e-6)``, taken as logits, with the identity.
    Of more frames, cycle ``k`` goes over plain views to frame ``k`` and back over perturbed ones;
    loss and accuracy are means over ``k`` from 2 to ``T``.

    Args:
        forward: ``(B, T, N, C)`` unit vectors of the frames' plain views, ``T`` at least 2 and
            ``N = h * w``, row by row.
        backward: ``(B, T - 1, N, C)`` unit vectors of perturbed views of all frames but the last.
        grid: ``(h, w)``. Rows and columns that do not fill a window are left out, at the bottom
            and on the right.
        temperature: ``t`` of the softmaxes.
        pool: patches averaged along each side.
        normalised: skip the check for unit length, which waits for a GPU.

    Returns:
        The loss, and the share of places from which the likeliest walk returns, in [0, 1]: two
        scalars, float32 (float64 for float64 vectors).

    Raises:
        TypeError: vectors that are not floating point.
        ValueError: shapes that do not fit each other or the grid, vectors longer than 1, a
            temperature that is not positive, or a window larger than the grid.
    """
    forward, backward = _unit_vectors(normalised, forward=forward, backward=backward)
    b, t, *vectors = forward.shape
    if forward.ndim != 4 or t < 2 or tuple(backward.shape) != (b, t - 1, *vectors):
        raise ValueError(
            "expected forward (B, T, N, C) with T of 2 or more and backward (B, T - 1, N, C), "
            f"got {tuple(forward.shape)} and {tuple(backward.shape)}"
        )
    if vectors[0] != math.prod(grid):
        raise ValueError(
            f"expected {math.prod(grid)} vectors for a grid of {grid[0]} x {grid[1]}, "
            f"got {vectors[0]}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    if not isinstance(pool, int) or not 1 <= pool <= min(grid):
        raise ValueError(f"pool must be a whole number from 1 to {min(grid)}, got {pool!r}")
    with torch.autocast(forward.device.type, enabled=False):
        out, back = _pooled(forward, grid, pool), _pooled(backward, grid, pool)
        return _mean_over_cycles(out, back, temperature)


def semantic_separability_loss(
    original: Tensor, projected: Tensor, *, normalised: bool = False
) -> Tensor:
    """Divergence of the projected tokens from the backbone's, as distributions over channels.

    The paper's semantic separability regularisation (section 3.3; ``forward_kl_loss`` in the
    official code): ``KL(softmax(original) || softmax(projected))``, summed over all tokens of all
    views and divided by ``B``. Softmaxes of unit vectors are nearly uniform, so for vectors near
    each other each token adds ``(1 - cos) / C``: at 3 views of 196 tokens and width 768,
    ``0.766 (1 - cos)``. Longer clips and larger grids weigh more, narrower backbones too.

    Args:
        original: ``(B, ..., C)`` unit vectors of the backbone.
        projected: ``(B, ..., C)`` unit vectors after the projection.
        normalised: as in :func:`cycle_consistency_loss`.

    Returns:
        A scalar, float32 (float64 for float64 vectors).

    Raises:
        TypeError, ValueError: as :func:`cycle_consistency_loss`.
    """
    original, projected = _unit_vectors(normalised, original=original, projected=projected)
    if original.ndim < 2 or original.shape != projected.shape:
        raise ValueError(
            "expected original and projected vectors (B, ..., C) of one shape, got "
            f"{tuple(original.shape)} and {tuple(projected.shape)}"
        )
    with torch.autocast(original.device.type, enabled=False):
        return F.kl_div(
            F.log_softmax(projected, dim=-1), F.softmax(original, dim=-1), reduction="batchmean"
        )


def _mean_over_cycles(out: Tensor, back: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    losses: list[Tensor] = []
    accuracies: list[Tensor] = []
    outward: Tensor | None = None  # 1 -> ... -> k
    homeward: Tensor | None = None  # k - 1 -> ... -> 1, perturbed
    for k in range(1, out.shape[1]):
        step = _transition(out[:, k - 1], out[:, k], temperature)
        outward = step if outward is None else outward @ step
        round_trip = outward @ _transition(out[:, k], back[:, k - 1], temperature)
        if k > 1:
            step = _transition(back[:, k - 1], back[:, k - 2], temperature)
            homeward = step if homeward is None else step @ homeward
            round_trip = round_trip @ homeward
        logits = rearrange(torch.log(round_trip + _EPSILON), "b start end -> (b start) end")
        start = torch.arange(logits.shape[1], device=logits.device).repeat(len(round_trip))
        losses.append(F.cross_entropy(logits, start))
        accuracies.append((logits.argmax(dim=1) == start).to(logits.dtype).mean())
    return torch.stack(losses).mean(), torch.stack(accuracies).mean()


def _transition(here: Tensor, there: Tensor, temperature: float) -> Tensor:
    """``(B, n, n)``: from each place of one frame, the chance to go to each of the other."""
    return F.softmax(here @ rearrange(there, "b n c -> b c n") / temperature, dim=-1)


def _pooled(vectors: Tensor, grid: Grid, pool: int) -> Tensor:
    patches = rearrange(vectors, "b t (h w) c -> b t h w c", h=grid[0])
    h, w = (side // pool for side in grid)
    whole = patches[:, :, : h * pool, : w * pool]
    return reduce(whole, "b t (h p) (w q) c -> b t (h w) c", "mean", p=pool, q=pool)


def _unit_vectors(normalised: bool, **given: Tensor) -> Sequence[Tensor]:
    """The vectors in float32, or float64, if they can be unit vectors."""
    for name, vectors in given.items():
        if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
            kind = vectors.dtype if isinstance(vectors, Tensor) else type(vectors).__name__
            raise TypeError(f"expected {name} as a floating-point tensor, got {kind}")
        if vectors.ndim < 2 or not vectors.numel():
            raise ValueError(f"expected {name} (B, ..., C), got {tuple(vectors.shape)}")
        if normalised or torch.compiler.is_compiling():
            continue  # reading the values would wait for the device, or break the graph
        longest = float(torch.linalg.vector_norm(vectors.detach(), dim=-1).max())
        if longest > _LONGEST:
            raise ValueError(
                f"expected {name} as unit vectors, got one of length {longest:.4g}: "
                "scale them with F.normalize(x, dim=-1)"
            )
    exact = any(vectors.dtype == torch.float64 for vectors in given.values())
    return [vectors.double() if exact else vectors.float() for vectors in given.values()]
