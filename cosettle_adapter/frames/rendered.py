"""Clips with exactly known motion, rendered by moving a camera over a photograph.

The camera is a similarity: it shifts, turns and zooms. A second photograph, cut out as an ellipse
with a soft edge, may move over the first on a path of its own. Where every pixel went is known in
closed form, so tracks need no annotation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.frames.arrays import validate_frames
from cosettle_adapter.frames.resampling import resize
from cosettle_adapter.frames.sides import as_sides, check_side

Motion = Literal["pan", "zoom", "rotate", "mixed"]

_MOTIONS = ("pan", "zoom", "rotate", "mixed")
_MOST = 2.0
# bicubic interpolation reads two pixels beyond the sampled one
_MARGIN = 3.0
_SOFT_EDGE = 1.5
_OBJECT_SIZE = 0.45


@dataclass(frozen=True, eq=False)
class RenderedClip:
    """A rendered clip and where its pixels went.

    Pixel coordinates are (x, y) and continuous: pixel (0, 0) has its centre at (0.5, 0.5).

    Attributes:
        frames: (T, 3, H, W) uint8.
        homographies: (T, 3, 3) float64; matrix t maps background pixels (x, y, 1) of frame 0 to
            frame t.
        object_mask: (T, H, W) bool, where the moving object is; None without one.
        object_homographies: (T, 3, 3) float64, like ``homographies`` for the object's pixels.
    """

    frames: Tensor
    homographies: Tensor
    object_mask: Tensor | None = None
    object_homographies: Tensor | None = None

    def track(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Follow points of frame 0 through the clip.

        Points on the object in frame 0 move with the object, all others with the background.

        Args:
            points: (N, 2) of (x, y) pixels of frame 0.

        Returns:
            positions, (T, N, 2) float64 pixels, also where a point cannot be seen; and visible,
            (T, N) bool: false outside the frame, and for the background behind the object.

        Raises:
            FrameError: ``points`` is not (N, 2).
        """
        if points.ndim != 2 or points.shape[-1] != 2:
            raise FrameError(f"got points of shape {tuple(points.shape)}, expected (N, 2) of (x, y)")
        points = points.to(torch.float64)
        positions = _project(self.homographies, points)
        height, width = self.frames.shape[-2:]
        if self.object_mask is None or self.object_homographies is None:
            return positions, _inside(positions, height, width)
        on_object = _lookup(self.object_mask[:1], points[None])
        riding = _project(self.object_homographies, points)
        covered = _lookup(self.object_mask, positions) & ~on_object
        positions = torch.where(rearrange(on_object, "1 n -> 1 n 1"), riding, positions)
        return positions, _inside(positions, height, width) & ~covered


def render_clip(
    photo: Tensor,
    *,
    frames: int,
    size: tuple[int, int] = (240, 320),
    motion: Motion = "mixed",
    amount: float = 0.3,
    seed: int = 0,
    cutout: Tensor | None = None,
    photometric: float = 0.0,
) -> RenderedClip:
    """Render a clip by moving a camera smoothly over a photograph.

    The photograph is first scaled, with antialiasing, to the smallest size at which the camera's
    whole path lies inside it, so there are no borders and no aliasing at any time. A photograph
    that is small for ``size`` is enlarged, which blurs the frames and leaves the motion exact.

    Args:
        photo: (3, h, w) uint8.
        frames: number of frames, at least 1.
        size: (H, W) of the frames.
        motion: ``"pan"``, ``"zoom"``, ``"rotate"``, or ``"mixed"`` for all three at once.
        amount: how far, from 0 to 2, over the whole clip: a pan goes ``amount`` times the short
            side, a zoom magnifies or reduces by ``1 + amount``, a rotation turns by ``amount``
            radians.
        seed: decides directions, centres and paths. Equal arguments give equal clips.
        cutout: (3, h', w') uint8 photograph to cut an ellipse from, which then moves over the
            background; as wide as about half of the short side.
        photometric: strength, 0 for none, 1 for strong, of a slow drift in gain, brightness and
            sharpness and of noise, which real clips have.

    Raises:
        FrameError: an argument is outside its range, or a photograph is not (3, h, w) uint8.

    Example:
        >>> clip = render_clip(photographs()["chelsea"], frames=16, motion="pan")
        >>> positions, visible = clip.track(torch.tensor([[160.5, 120.5]]))
    """
    photo = _as_photo("photo", photo)
    count = _check_arguments(frames, motion, amount, photometric)
    height, width = as_sides("size", size)
    generator = torch.Generator().manual_seed(seed)
    camera = _camera_path(count, height, width, motion, amount, generator)
    photo, camera = _fit_photo(photo, camera, height, width, generator)
    homographies = torch.linalg.inv(camera) @ camera[0]
    pose = None
    if cutout is not None:
        cutout = _as_photo("cutout", cutout)
        cutout, pose = _object_path(cutout, count, height, width, amount, generator)
    drift = _Drift(count, photometric, generator)

    rendered = torch.empty((count, 3, height, width), dtype=torch.uint8)
    mask = torch.empty((count, height, width), dtype=torch.bool)
    for t in range(count):
        frame = _sample(photo, camera[t], height, width)
        if cutout is not None and pose is not None:
            to_cutout = torch.linalg.inv(pose[t])
            alpha = _ellipse(cutout, to_cutout, height, width)
            frame = torch.lerp(frame, _sample(cutout, to_cutout, height, width), alpha)
            mask[t] = alpha > 0.5
        rendered[t] = drift.apply(frame, t).round_().clamp_(0, 255).to(torch.uint8)
    if pose is None:
        return RenderedClip(rendered, homographies)
    return RenderedClip(rendered, homographies, mask, pose @ torch.linalg.inv(pose[0]))
