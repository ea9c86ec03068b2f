"""Masks laid over the frames they belong to."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.geometry import Geometry
from cosettle_adapter.visualization.colours import chosen_colours
from cosettle_adapter.visualization.pixels import (
    FRAMES_AT_ONCE,
    at_pixels,
    check_frames,
    check_geometry,
)

VOID = 255  # label of pixels that belong to nothing


def overlay_masks(
    frames: Tensor,
    masks: Tensor,
    *,
    geometry: Geometry | None = None,
    opacity: float = 0.45,
    contour: int = 2,
    colours: Tensor | None = None,
) -> Tensor:
    """Tint objects and draw a line along the inside of their edges.

    Args:
        frames: ``(T, 3, H, W)`` uint8.
        masks: either ids ``(T, H, W)``, integer (0 the background, 255 nothing) or bool; or one
            mask an object, ``(T, K, H, W)``, bool or floats in [0, 1], without the background.
            Soft masks tint by their value; the line follows the most likely object, the
            background having what is left to 1.
        geometry: for masks ``(T, K, h, w)`` on the grid of features, such as label propagation
            returns: how the frames became that grid.
        opacity: of the tint of a full mask, in [0, 1].
        contour: width of the line in pixels; 0 draws none.
        colours: ``(K, 3)`` uint8 RGB; by default those of
            :func:`~cosettle_adapter.visualization.distinct_colours`.

    Returns:
        ``(T, 3, H, W)`` uint8 on the CPU.

    Raises:
        FrameError: frames, masks or colours of another kind or size.
        GeometryError: a geometry of other frames or another grid.
        ValueError: an opacity outside [0, 1] or a negative width.

    Example:
        >>> frames = torch.zeros(2, 3, 32, 48, dtype=torch.uint8)
        >>> masks = torch.zeros(2, 32, 48, dtype=torch.uint8)
        >>> masks[:, 8:24, 8:24] = 1
        >>> overlay_masks(frames, masks).shape
        torch.Size([2, 3, 32, 48])
    """
    length, height, width = check_frames(frames)
    if not 0 <= opacity <= 1:
        raise ValueError(f"got opacity={opacity}, expected a share in [0, 1].")
    if contour < 0:
        raise ValueError(f"got contour={contour}, expected a width of 0 or more pixels.")
    if geometry is not None:
        check_geometry(frames, geometry)
    objects = _objects(masks, length, None if geometry else (height, width))
    palette = chosen_colours(colours, objects).float()
    painted = []
    for pictures, chunk in zip(
        torch.split(frames.cpu(), FRAMES_AT_ONCE),
        torch.split(masks.cpu(), FRAMES_AT_ONCE),
        strict=True,
    ):
        shares = _shares(chunk, objects, geometry)
        for picture, share in zip(pictures, shares, strict=True):
            painted.append(_tinted(picture, share, palette, opacity, contour))
    return torch.stack(painted)


def _tinted(
    picture: Tensor, shares: Tensor, palette: Tensor, opacity: float, contour: int
) -> Tensor:
    """One frame under its objects' ``(K, H, W)`` shares."""
    tint = opacity * shares
    tinted = picture.float() * (1 - tint.sum(0)) + einsum(tint, palette, "k h w, k c -> c h w")
    if contour:
        winner = _winner(shares)
        line = _line(winner, contour)
        tinted[:, line] = rearrange(palette[winner[line] - 1], "n c -> c n")
    return tinted.round().to(torch.uint8)


def _objects(masks: Tensor, length: int, sides: tuple[int, int] | None) -> int:
    """Return the number of objects ``K``."""
    ids = masks.ndim == 3
    right_kind = not masks.is_floating_point() if ids else _is_share(masks)
    right_sides = sides is None or tuple(masks.shape[-2:]) == sides
    if masks.ndim not in (3, 4) or len(masks) != length or not (right_kind and right_sides):
        where = "h, w" if sides is None else f"{sides[0]}, {sides[1]}"
        raise FrameError(
            f"got masks of shape {tuple(masks.shape)} and dtype {masks.dtype}, expected ids "
            f"({length}, {where}), integer or bool, or one mask an object ({length}, K, {where}), "
            "bool or floats in [0, 1]. Masks on the grid of features need geometry=."
        )
    if not ids:
        return masks.shape[1]
    known = masks[masks != VOID] if masks.dtype != torch.bool else masks
    if known.numel() and int(known.min()) < 0:
        raise FrameError(f"got the mask id {int(known.min())}, expected 0 for the background.")
    return int(known.max()) if known.numel() else 0


def _is_share(masks: Tensor) -> bool:
    if masks.dtype == torch.bool:
        return True
    slack = 1e-3  # of sums in half precision
    return masks.is_floating_point() and bool(((masks >= -slack) & (masks <= 1 + slack)).all())


def _shares(masks: Tensor, objects: int, geometry: Geometry | None) -> Tensor:
    """``(T, K, H, W)`` in [0, 1] whose sum over the objects is at most 1."""
    if masks.ndim == 3:
        ids = rearrange(torch.arange(1, objects + 1), "k -> k 1 1")
        masks = rearrange(masks, "t h w -> t 1 h w") == ids
    shares = masks.float().clamp(0, 1)
    if geometry is not None:
        shares = at_pixels(shares, geometry)
    return shares / shares.sum(1, keepdim=True).clamp_min(1)


def _winner(shares: Tensor) -> Tensor:
    """``(H, W)`` the strongest object, counted from 1; 0 where the background is stronger."""
    background = 1 - shares.sum(0, keepdim=True)
    return torch.cat([background, shares]).max(0).indices


def _line(winner: Tensor, width: int) -> Tensor:
    """``(H, W)`` bool: object pixels less than ``width`` away from another object's or none's."""
    ids = rearrange(winner, "h w -> 1 1 h w").float()
    side = 2 * width + 1
    high = F.max_pool2d(ids, side, stride=1, padding=width)
    low = -F.max_pool2d(-ids, side, stride=1, padding=width)
    return rearrange((high != ids) | (low != ids), "1 1 h w -> h w") & (winner > 0)
