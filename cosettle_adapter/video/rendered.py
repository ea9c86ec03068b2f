"""Clips with exactly known motion, rendered by moving a camera over a photograph.

The camera is a similarity: it shifts, turns and zooms. A second photograph, cut out as an ellipse
with a soft edge, may move over the first on a path of its own. Where every pixel went is known in
closed form, so tracks need no annotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.video.arrays import validate_frames
from cosettle_adapter.video.paths import apply_homographies, camera_path, object_path
from cosettle_adapter.video.photometry import finish_like_a_camera
from cosettle_adapter.video.resampling import resize
from cosettle_adapter.video.sides import as_sides, check_side

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
            raise FrameError(
                f"got points of shape {tuple(points.shape)}, expected (N, 2) of (x, y)"
            )
        points = points.to(torch.float64)
        positions = apply_homographies(self.homographies, points)
        sides = self.frames.shape[-2], self.frames.shape[-1]
        if self.object_mask is None or self.object_homographies is None:
            return positions, _inside(positions, sides)
        on_object = _lookup(self.object_mask[:1], points[None])
        riding = apply_homographies(self.object_homographies, points)
        covered = _lookup(self.object_mask, positions) & ~on_object
        positions = torch.where(rearrange(on_object, "1 n -> 1 n 1"), riding, positions)
        return positions, _inside(positions, sides) & ~covered


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
    count, sides = check_side("frames", frames), as_sides("size", size)
    _check_choices(motion, amount, photometric)
    _check_photo("photo", photo)
    generator = torch.Generator().manual_seed(seed)
    camera = camera_path(count, sides, motion, amount, generator)
    scene, camera = _fit_scene(photo, camera, sides, generator)
    clip = torch.stack([_sample(scene, matrix, sides) for matrix in camera])
    homographies = torch.linalg.inv(camera) @ camera[0]
    if cutout is None:
        return RenderedClip(finish_like_a_camera(clip, photometric, generator), homographies)

    _check_photo("cutout", cutout)
    sprite = _fit_sprite(cutout, sides)
    height, width = sprite.shape[-2:]
    pose = object_path(count, sides, (height, width), amount, generator)
    mask = torch.empty((count, *sides), dtype=torch.bool)
    for t, to_sprite in enumerate(torch.linalg.inv(pose)):
        cover = _ellipse((height, width), to_sprite, sides)
        clip[t] = torch.lerp(clip[t], _sample(sprite, to_sprite, sides), cover)
        mask[t] = cover > 0.5
    riding = pose @ torch.linalg.inv(pose[0])
    return RenderedClip(
        finish_like_a_camera(clip, photometric, generator), homographies, mask, riding
    )


def _fit_scene(
    photo: Tensor, camera: Tensor, sides: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scale the photograph to the camera's path, and place the path in the photograph."""
    height, width = sides
    corners = torch.tensor([[0, 0], [width, 0], [0, height], [width, height]], dtype=torch.float64)
    seen = rearrange(apply_homographies(camera, corners), "t n xy -> (t n) xy")
    low, high = seen.amin(0) - _MARGIN, seen.amax(0) + _MARGIN
    photo_sides = torch.tensor([photo.shape[-1], photo.shape[-2]], dtype=torch.float64)
    factor = ((high - low) / photo_sides).max()
    scaled = torch.ceil(photo_sides * factor)
    slack = scaled - (high - low)
    place = slack * torch.rand(2, generator=generator, dtype=torch.float64)
    camera = camera.clone()
    camera[:, :2, 2] += place - low
    return resize(photo[None], (int(scaled[1]), int(scaled[0])))[0], camera


def _fit_sprite(cutout: Tensor, sides: tuple[int, int]) -> Tensor:
    """Scale the cut-out so that at its largest it takes its share of the frame."""
    factor = _OBJECT_SIZE * min(sides) / max(cutout.shape[-2:])
    height, width = (max(1, round(side * factor)) for side in cutout.shape[-2:])
    return resize(cutout[None], (height, width))[0]


def _sample(image: Tensor, to_image: Tensor, sides: tuple[int, int]) -> Tensor:
    """Look at an image through a similarity from frame pixels to the image's pixels."""
    height, width = image.shape[-2:]
    points = rearrange(_through(to_image, sides), "h w xy -> 1 h w xy")
    grid = points / torch.tensor([width / 2, height / 2], dtype=torch.float64) - 1
    return F.grid_sample(
        image[None], grid.to(image.dtype), "bicubic", "border", align_corners=False
    )[0]


def _through(matrix: Tensor, sides: tuple[int, int]) -> Tensor:
    """(H, W, 2) images of the pixels' centres under a homography."""
    y, x = (torch.arange(side, dtype=torch.float64) + 0.5 for side in sides)
    centres = rearrange(torch.stack(torch.meshgrid(x, y, indexing="xy")), "xy h w -> (h w) xy")
    mapped = apply_homographies(matrix[None], centres)
    return rearrange(mapped, "1 (h w) xy -> h w xy", h=sides[0])


def _ellipse(sprite: tuple[int, int], to_sprite: Tensor, sides: tuple[int, int]) -> Tensor:
    """(H, W) opacity of the cut-out: 1 inside the ellipse, falling softly to 0 at its rim."""
    half_sides = torch.tensor([sprite[1] / 2, sprite[0] / 2], dtype=torch.float64)
    # the soft rim must end inside the cut-out
    radii = (half_sides - 2 * _SOFT_EDGE).clamp(min=0.5)
    offset = (_through(to_sprite, sides) - half_sides) / radii
    distance: Tensor = torch.linalg.vector_norm(offset, dim=-1)
    inwards = (1 - distance) * radii.min() / _SOFT_EDGE
    cover = (0.5 + 0.5 * inwards).clamp(0, 1)
    return (cover * cover * (3 - 2 * cover)).to(torch.float32)


def _inside(positions: Tensor, sides: tuple[int, int]) -> Tensor:
    x, y = positions.unbind(-1)
    return (x >= 0) & (x < sides[1]) & (y >= 0) & (y < sides[0])


def _lookup(masks: Tensor, positions: Tensor) -> Tensor:
    """(T, N) bool: what (T, H, W) masks say at (T, N, 2) positions; False outside."""
    height, width = masks.shape[-2:]
    col = positions[..., 0].floor().clamp(0, width - 1).long()
    row = positions[..., 1].floor().clamp(0, height - 1).long()
    frame = rearrange(torch.arange(len(masks)), "t -> t 1")
    return masks[frame, row, col] & _inside(positions, (height, width))


def _check_choices(motion: str, amount: float, photometric: float) -> None:
    if motion not in _MOTIONS:
        raise FrameError(
            f"got motion={motion!r}, expected one of {', '.join(_MOTIONS)}."
            f"{did_you_mean(str(motion), _MOTIONS)}"
        )
    if not 0 <= amount <= _MOST:
        raise FrameError(f"amount must be from 0 to {_MOST:g}, got {amount}")
    if not 0 <= photometric <= 1:
        raise FrameError(f"photometric must be from 0 to 1, got {photometric}")


def _check_photo(name: str, photo: Tensor) -> None:
    validate_frames(photo)
    if photo.ndim != 3 or photo.dtype != torch.uint8:
        raise FrameError(
            f"{name} must be one (3, h, w) uint8 image, got {tuple(photo.shape)} {photo.dtype}"
        )
