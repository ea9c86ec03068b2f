"""The paper's two losses: cycles over frames, and staying close to the backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]

_EPSILON = 1e-6
_LONGEST = 1.01  # of a unit vector; half precision rounds


def cycle_consistency_loss(
    x1: Tensor,
    x2: Tensor,
    x1_perturbed: Tensor,
    grid: Grid,
    temperature: float = 0.03,
    pool: int = 2,
) -> tuple[Tensor, Tensor]:
    """Walk from each place of frame 1 to frame 2 and back, and ask to arrive where one set out.

    The paper's cycle-consistency loss (section 3.3; ``forward_asy_cycle_loss`` in each model of
    the official code). Unit vectors are averaged over ``pool x pool`` cells and not scaled to
    unit length again; with ``A12 = softmax(x1 x2^T / t)`` and ``A21' = softmax(x2 x1'^T / t)``,
    the loss is the cross-entropy of ``log(A12 A21' + 1e-6)``, taken as logits, with the identity.

    Args:
        x1: ``(B, N, C)`` unit vectors of frame 1, row by row; ``N = h * w``.
        x2: ``(B, N, C)`` unit vectors of frame 2.
        x1_perturbed: ``(B, N, C)`` unit vectors of frame 1 seen with perturbed positions.
        grid: ``(h, w)``. Rows and columns that do not fill a ``pool x pool`` window are left out,
            at the bottom and on the right.
        temperature: ``t`` of the softmaxes.
        pool: cells averaged along each side.

    Returns:
        The loss, and the share of places from which the likeliest walk comes back to where it
        set out, in [0, 1]: two scalars, float32 (float64 for float64 vectors).

    Raises:
        TypeError: vectors that are not floating-point tensors.
        ValueError: shapes that do not fit each other or the grid, vectors longer than 1, a
            temperature that is not positive, or a window larger than the grid.
    """
    x1, x2, x1_perturbed = _unit_vectors(False, x1=x1, x2=x2, x1_perturbed=x1_perturbed)
    if x1.ndim != 3 or not x1.shape == x2.shape == x1_perturbed.shape:
        raise ValueError(
            "expected x1, x2 and x1_perturbed (B, N, C) of one shape, got "
            f"{tuple(x1.shape)}, {tuple(x2.shape)} and {tuple(x1_perturbed.shape)}"
        )
    plain = torch.stack([x1, x2], dim=1)
    return _cycles(plain, rearrange(x1_perturbed, "b n c -> b 1 n c"), grid, temperature, pool)


def multi_frame_cycle_loss(
    forward: Tensor,
    backward: Tensor,
    grid: Grid,
    temperature: float = 0.03,
    pool: int = 2,
    *,
    normalised: bool = False,
) -> tuple[Tensor, Tensor]:
    """Walk out over frames and back, for every number of frames, and average over the cycles.

    Cycle ``k`` goes from frame 1 over 2, 3, ... to frame ``k`` on plain views, and back over
    ``k - 1``, ..., 2 to 1 on perturbed ones; ``k`` from 2 to ``T``. Its transition matrix is the
    product of the softmaxes on the way; loss and accuracy of each are those of
    :func:`cycle_consistency_loss`, which this is for two frames.

    Args:
        forward: ``(B, T, N, C)`` unit vectors of the frames' plain views, ``T`` at least 2.
        backward: ``(B, T - 1, N, C)`` unit vectors of perturbed views of all frames but the last.
        grid: as in :func:`cycle_consistency_loss`.
        temperature: as in :func:`cycle_consistency_loss`.
        pool: as in :func:`cycle_consistency_loss`.
        normalised: the vectors are known to be of unit length; a look at them waits for a GPU.

    Returns:
        Loss and accuracy, each the mean over the cycles.

    Raises:
        TypeError, ValueError: as :func:`cycle_consistency_loss`.
    """
    forward, backward = _unit_vectors(normalised, forward=forward, backward=backward)
    b, t, *vectors = forward.shape
    if forward.ndim != 4 or t < 2 or tuple(backward.shape) != (b, t - 1, *vectors):
        raise ValueError(
            "expected forward (B, T, N, C) with T of 2 or more and backward (B, T - 1, N, C), "
            f"got {tuple(forward.shape)} and {tuple(backward.shape)}"
        )
    return _cycles(forward, backward, grid, temperature, pool)


def _cycles(
    forward: Tensor, backward: Tensor, grid: Grid, temperature: float, pool: int
) -> tuple[Tensor, Tensor]:
    if forward.shape[2] != math.prod(grid):
        raise ValueError(
            f"expected {math.prod(grid)} vectors for a grid of {grid[0]} x {grid[1]}, "
            f"got {forward.shape[2]}"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"the temperature must be positive, got {temperature}")
    if not isinstance(pool, int) or not 1 <= pool <= min(grid):
        raise ValueError(
            f"pool must be a whole number of cells from 1 to {min(grid)}, the shorter side of the "
            f"grid, got {pool!r}"
        )
    with torch.autocast(forward.device.type, enabled=False):
        out = _pooled(forward, grid, pool)
        back = _pooled(backward, grid, pool)
        return _mean_over_cycles(out, back, temperature)


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


def semantic_separability_loss(
    original: Tensor, projected: Tensor, *, normalised: bool = False
) -> Tensor:
    """Divergence of the projected tokens from the backbone's, as distributions over channels.

    The paper's semantic separability regularisation (section 3.3; ``forward_kl_loss`` in each
    model of the official code): ``KL(softmax(original) || softmax(projected))``, summed over all
    tokens of all views and divided by ``B``. Softmaxes of unit vectors are nearly uniform, so for
    vectors near each other each token adds ``(1 - cos) / C``: at 3 views of 196 tokens and width
    768, ``0.766 (1 - cos)``. Longer clips and larger grids weigh more, narrower backbones too.

    Args:
        original: ``(B, ..., C)`` unit vectors of the backbone.
        projected: ``(B, ..., C)`` unit vectors after the projection.
        normalised: as in :func:`multi_frame_cycle_loss`.

    Returns:
        A scalar, float32 (float64 for float64 vectors).

    Raises:
        TypeError: vectors that are not floating-point tensors.
        ValueError: another shape for each, or vectors longer than 1.
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


def _pooled(vectors: Tensor, grid: Grid, pool: int) -> Tensor:
    cells = rearrange(vectors, "b t (h w) c -> b t h w c", h=grid[0])
    h, w = (side // pool for side in grid)
    whole = cells[:, :, : h * pool, : w * pool]
    return reduce(whole, "b t (h p) (w q) c -> b t (h w) c", "mean", p=pool, q=pool)


def _transition(here: Tensor, there: Tensor, temperature: float) -> Tensor:
    """``(B, n, n)``: from each place of one frame, the chance to go to each of the other."""
    return F.softmax(here @ rearrange(there, "b n c -> b c n") / temperature, dim=-1)


def _unit_vectors(normalised: bool, **given: Tensor) -> Sequence[Tensor]:
    """The vectors in float32, or float64, if they can be unit vectors."""
    for name, vectors in given.items():
        if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
            kind = vectors.dtype if isinstance(vectors, Tensor) else type(vectors).__name__
            raise TypeError(f"expected {name} as a floating-point tensor, got {kind}")
        if vectors.ndim < 2 or not vectors.numel():
            raise ValueError(f"expected {name} (B, ..., C), got {tuple(vectors.shape)}")
        if normalised or torch.compiler.is_compiling():
            continue  # a look at the values would wait for the device, or break the graph
        longest = float(torch.linalg.vector_norm(vectors.detach(), dim=-1).max())
        if longest > _LONGEST:
            raise ValueError(
                f"expected {name} as unit vectors, got one of length {longest:.4g}: "
                "scale them with F.normalize(x, dim=-1)"
            )
    exact = any(vectors.dtype == torch.float64 for vectors in given.values())
    return [vectors.double() if exact else vectors.float() for vectors in given.values()]
