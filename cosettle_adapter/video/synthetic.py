"""Render clips with exactly known motion by moving a camera over a photograph.

The camera moves by similarities: it shifts, rotates and zooms. A second photograph, cut out as an
ellipse with a soft edge, may move over the first on its own path. The motion of every pixel is
known in closed form, so tracks need no annotation.

Evaluation results and fitted projections depend on every bit of the rendered pixels: keep the
order of random draws and of floating-point operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from einops import einsum, rearrange
from torch import Generator, Tensor
from torch.nn import functional as F

from cosettle_adapter import imports
from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.arrays import validate_frames
from cosettle_adapter.video.files import read_image
from cosettle_adapter.video.geometry import as_sides, check_side, resize

Motion = Literal["pan", "zoom", "rotate", "mixed"]

_MOTIONS: tuple[str, ...] = get_args(Motion)
_MARGIN = 3.0  # bicubic interpolation reads two pixels beyond the sampled one
_SOFT_EDGE = 1.5
_OBJECT_SIZE = 0.45
_FULL_TURN = 2 * math.pi

# in the public domain, as scikit-image documents for each of them: Eileen Collins
# (NASA), a cat (Stefan van der Walt), a cup (Rachel Michetti), stars (NASA and ESA), a retina
# (Mikael Haggstrom), a launch at dusk (SpaceX)
_PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg",
    "rocket.jpg",
)  # fmt: skip


def photographs() -> dict[str, Tensor]:
    """Load the public-domain photographs of scikit-image's wheel; nothing is downloaded.

    Returns name -> (3, H, W) uint8 tensor, from 300 x 451 to 1411 x 1411 pixels.
    """
    purpose = "loading the demo photographs"
    folder = Path(imports.require("skimage.data", extra="demo", purpose=purpose).__path__[0])
    return {name.partition(".")[0]: read_image(folder / name) for name in _PHOTOGRAPHS}


@dataclass(frozen=True, eq=False)
class RenderedClip:
    """A rendered clip and the motion of its pixels (x, y); pixel (0, 0) has its centre at 0.5."""

    frames: Tensor  # (T, 3, H, W) uint8
    homographies: Tensor  # (T, 3, 3) float64, background pixels (x, y, 1) of frame 0 to t
    object_mask: Tensor | None = None  # (T, H, W) bool, pixels of the moving object
    object_homographies: Tensor | None = None  # for the object's pixels

    def track(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Follow points of frame 0, (N, 2) pixels (x, y), through all frames.

        Points on the object in frame 0 move with the object, all others with the background.

        Returns:
            positions, (T, N, 2) float64 pixels, also of points that are not visible; and visible,
            (T, N) bool: false outside the frame, and for the background behind the object.

        Raises:
            FrameError: points of another shape.
        """
        if points.ndim != 2 or points.shape[-1] != 2:
            raise FrameError(f"got points of shape {tuple(points.shape)}, expected (N, 2)")
        points = points.to(torch.float64)
        positions = _transform(self.homographies, points)
        sides = self.frames.shape[-2], self.frames.shape[-1]
        if self.object_mask is None or self.object_homographies is None:
            return positions, _inside(positions, sides)
        on_object = _lookup(self.object_mask[:1], points[None])
        moved = _transform(self.object_homographies, points)
        covered = _lookup(self.object_mask, positions) & ~on_object
        positions = torch.where(rearrange(on_object, "1 n -> 1 n 1"), moved, positions)
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

    The photograph is first scaled, with antialiasing, to the smallest size that contains the
    camera's whole path, so no frame shows borders or aliasing.

    Args:
        photo: (3, h, w) uint8.
        frames, size: number of frames, and their (H, W).
        motion: ``"pan"``, ``"zoom"``, ``"rotate"``, or ``"mixed"`` for all three at once.
        amount: motion over the whole clip, from 0 to 2: a pan covers ``amount`` times the shorter
            side, a zoom magnifies or reduces by ``1 + amount``, a rotation turns by ``amount``
            radians.
        seed: of directions, centres and paths.
        cutout: (3, h', w') uint8 photograph to cut an ellipse from, which moves over the
            background and is about half as wide as the shorter side.
        photometric: strength of camera noise from 0 to 1: slow drift of gain, brightness and
            sharpness, and pixel noise, as in real clips.

    Raises:
        FrameError: values out of range, or photographs of another shape or dtype.
    """
    count, sides = check_side("frames", frames), as_sides("size", size)
    if motion not in _MOTIONS:
        raise FrameError(f"got motion={motion!r}, expected one of {', '.join(_MOTIONS)}")
    if not 0 <= amount <= 2:
        raise FrameError(f"amount must be from 0 to 2, got {amount}")
    if not 0 <= photometric <= 1:
        raise FrameError(f"photometric must be from 0 to 1, got {photometric}")
    _check_photo("photo", photo)
    generator = torch.Generator().manual_seed(seed)
    camera = _camera_path(count, sides, motion, amount, generator)
    scene, camera = _fit_scene(photo, camera, sides, generator)
    clip = torch.stack([_sample(scene, matrix, sides) for matrix in camera])
    homographies = torch.linalg.inv(camera) @ camera[0]
    mask = object_homographies = None
    if cutout is not None:
        _check_photo("cutout", cutout)
        # the object's size where it is largest
        factor = _OBJECT_SIZE * min(sides) / max(cutout.shape[-2:])
        height, width = (max(1, round(side * factor)) for side in cutout.shape[-2:])
        sprite = resize(cutout[None], (height, width))[0]
        pose = _object_path(count, sides, (height, width), amount, generator)
        mask = torch.empty((count, *sides), dtype=torch.bool)
        for t, to_sprite in enumerate(torch.linalg.inv(pose)):
            cover = _ellipse((height, width), to_sprite, sides)
            clip[t] = torch.lerp(clip[t], _sample(sprite, to_sprite, sides), cover)
            mask[t] = cover > 0.5
        object_homographies = pose @ torch.linalg.inv(pose[0])
    if photometric > 0:
        _add_camera_noise(clip, photometric, generator)
    pixels = clip.round_().clamp_(0, 255).to(torch.uint8)
    return RenderedClip(pixels, homographies, mask, object_homographies)


def _camera_path(
    count: int, sides: tuple[int, int], motion: str, amount: float, generator: Generator
) -> Tensor:
    """(count, 3, 3) similarities from frame pixels to a plane; a pixel spans at most one unit."""
    height, width = sides
    draws = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    direction, pivot_x, pivot_y, *signs = draws
    zooms, turns = (1.0 if draw < 0.5 else -1.0 for draw in signs)
    along, sideways = _progress(count, generator)
    offset = torch.zeros(count, 2, dtype=torch.float64)
    factor, angle = torch.ones_like(along), torch.zeros_like(along)
    if motion in ("pan", "mixed"):
        offset = amount * min(sides) * _curve(along, 0.2 * sideways, _FULL_TURN * direction)
    if motion in ("zoom", "mixed"):
        factor = torch.exp(zooms * math.log1p(amount) * along)
        factor = factor / factor.max()
    if motion in ("rotate", "mixed"):
        angle = turns * amount * along
    pivot = torch.tensor([width * (0.35 + 0.3 * pivot_x), height * (0.35 + 0.3 * pivot_y)])
    return _similarities(offset, factor, angle, pivot.to(torch.float64))


def _object_path(
    count: int, sides: tuple[int, int], cutout: tuple[int, int], amount: float, generator: Generator
) -> Tensor:
    """(count, 3, 3) similarities from the cutout to each frame; its centre stays inside."""
    height, width = sides
    draws = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    direction, start_x, start_y, *signs = draws
    grows, turns = (1.0 if draw < 0.5 else -1.0 for draw in signs)
    along, sideways = _progress(count, generator)
    reach = min(0.4, amount) * min(sides)
    place = torch.tensor([width * (0.4 + 0.2 * start_x), height * (0.4 + 0.2 * start_y)])
    curve = _curve(along - 0.5, 0.2 * sideways, _FULL_TURN * direction)
    factor = torch.exp(grows * 0.3 * amount * along)
    angle = turns * 0.5 * amount * along
    centre = torch.tensor([cutout[1] / 2, cutout[0] / 2], dtype=torch.float64)
    return _similarities(place + reach * curve, factor / factor.max(), angle, centre)


def _progress(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """(count,) rise from 0 to 1 at varying speed, and (count,) full sine wave."""
    time = torch.linspace(0, 1, count, dtype=torch.float64)
    phase = _FULL_TURN * torch.rand(1, generator=generator, dtype=torch.float64).item()
    sway = (torch.sin(_FULL_TURN * time + phase) - math.sin(phase)) / _FULL_TURN
    return time + 0.5 * sway, torch.sin(_FULL_TURN * time)


def _curve(along: Tensor, across: Tensor, direction: float) -> Tensor:
    """(T, 2) offsets along and across a direction in radians."""
    cos, sin = math.cos(direction), math.sin(direction)
    return torch.stack((cos * along - sin * across, sin * along + cos * across), dim=-1)


def _similarities(offset: Tensor, factor: Tensor, angle: Tensor, pivot: Tensor) -> Tensor:
    """Matrices of ``x -> offset + factor * rotation(angle) @ (x - pivot)``."""
    matrices = torch.zeros(len(factor), 3, 3, dtype=torch.float64)
    matrices[:, 0, 0] = matrices[:, 1, 1] = factor * torch.cos(angle)
    matrices[:, 1, 0] = factor * torch.sin(angle)
    matrices[:, 0, 1] = -matrices[:, 1, 0]
    matrices[:, :2, 2] = offset - einsum(matrices[:, :2, :2], pivot, "t i j, j -> t i")
    matrices[:, 2, 2] = 1
    return matrices


def _transform(matrices: Tensor, points: Tensor) -> Tensor:
    """Map points (N, 2) by each of (T, 3, 3) homographies to (T, N, 2)."""
    homogeneous = torch.cat((points, torch.ones_like(points[:, :1])), dim=-1)
    mapped = einsum(matrices, homogeneous, "t i j, n j -> t n i")
    return mapped[..., :2] / mapped[..., 2:]


def _fit_scene(
    photo: Tensor, camera: Tensor, sides: tuple[int, int], generator: Generator
) -> tuple[Tensor, Tensor]:
    """Scale the photograph to contain the camera's path, and place the path in it."""
    height, width = sides
    corners = torch.tensor([[0, 0], [width, 0], [0, height], [width, height]], dtype=torch.float64)
    covered = rearrange(_transform(camera, corners), "t n xy -> (t n) xy")
    low, high = covered.amin(0) - _MARGIN, covered.amax(0) + _MARGIN
    photo_sides = torch.tensor([photo.shape[-1], photo.shape[-2]], dtype=torch.float64)
    factor = ((high - low) / photo_sides).max()
    scaled = torch.ceil(photo_sides * factor)
    slack = scaled - (high - low)
    place = slack * torch.rand(2, generator=generator, dtype=torch.float64)
    camera = camera.clone()
    camera[:, :2, 2] += place - low
    return resize(photo[None], (int(scaled[1]), int(scaled[0])))[0], camera


def _sample(image: Tensor, to_image: Tensor, sides: tuple[int, int]) -> Tensor:
    """Sample an image (C, h, w) at frame pixels mapped by ``to_image``: (C, H, W)."""
    height, width = image.shape[-2:]
    points = rearrange(_pixel_centres(to_image, sides), "h w xy -> 1 h w xy")
    grid = points / torch.tensor([width / 2, height / 2], dtype=torch.float64) - 1
    return F.grid_sample(
        image[None], grid.to(image.dtype), "bicubic", "border", align_corners=False
    )[0]


def _pixel_centres(matrix: Tensor, sides: tuple[int, int]) -> Tensor:
    """(H, W, 2) centres of a frame's pixels, mapped by a homography."""
    y, x = (torch.arange(side, dtype=torch.float64) + 0.5 for side in sides)
    centres = rearrange(torch.stack(torch.meshgrid(x, y, indexing="xy")), "xy h w -> (h w) xy")
    return rearrange(_transform(matrix[None], centres), "1 (h w) xy -> h w xy", h=sides[0])


def _ellipse(sprite: tuple[int, int], to_sprite: Tensor, sides: tuple[int, int]) -> Tensor:
    """(H, W) opacity of the cutout: 1 inside the ellipse, with a soft edge to 0."""
    half_sides = torch.tensor([sprite[1] / 2, sprite[0] / 2], dtype=torch.float64)
    # the soft edge must end inside the cutout
    radii = (half_sides - 2 * _SOFT_EDGE).clamp(min=0.5)
    offset = (_pixel_centres(to_sprite, sides) - half_sides) / radii
    distance: Tensor = torch.linalg.vector_norm(offset, dim=-1)
    inwards = (1 - distance) * radii.min() / _SOFT_EDGE
    cover = (0.5 + 0.5 * inwards).clamp(0, 1)
    return (cover * cover * (3 - 2 * cover)).to(torch.float32)


def _add_camera_noise(clip: Tensor, strength: float, generator: Generator) -> None:
    """Drift gain, brightness and sharpness over time and add noise, in place."""
    time = torch.linspace(0, 1, len(clip), dtype=torch.float64)
    phases = _FULL_TURN * torch.rand(3, generator=generator, dtype=torch.float64)
    gain, brightness, softness = torch.sin(
        rearrange(phases, "k -> k 1") + 1.5 * math.pi * time
    ).tolist()
    for t, frame in enumerate(clip):
        frame = _blur(frame, strength * (0.6 + 0.4 * softness[t]))
        frame = frame * (1 + 0.15 * strength * gain[t]) + 12 * strength * brightness[t]
        clip[t] = frame + 4 * strength * torch.randn(frame.shape, generator=generator)


def _blur(frame: Tensor, sigma: float) -> Tensor:
    taps = torch.exp(-0.5 * (torch.arange(-3.0, 4.0) / max(sigma, 1e-3)) ** 2)
    taps = taps / taps.sum()
    padded = F.pad(rearrange(frame, "c h w -> c 1 h w"), (3, 3, 3, 3), mode="replicate")
    blurred = F.conv2d(padded, rearrange(taps, "k -> 1 1 1 k"))
    return rearrange(F.conv2d(blurred, rearrange(taps, "k -> 1 1 k 1")), "c 1 h w -> c h w")


def _inside(positions: Tensor, sides: tuple[int, int]) -> Tensor:
    x, y = positions.unbind(-1)
    return (x >= 0) & (x < sides[1]) & (y >= 0) & (y < sides[0])


def _lookup(masks: Tensor, positions: Tensor) -> Tensor:
    """Read (T, H, W) masks at (T, N, 2) positions: (T, N) bool, False outside."""
    height, width = masks.shape[-2:]
    col = positions[..., 0].floor().clamp(0, width - 1).long()
    row = positions[..., 1].floor().clamp(0, height - 1).long()
    frame = rearrange(torch.arange(len(masks)), "t -> t 1")
    return masks[frame, row, col] & _inside(positions, (height, width))


def _check_photo(name: str, photo: Tensor) -> None:
    validate_frames(photo)
    if photo.ndim != 3 or photo.dtype != torch.uint8:
        raise FrameError(
            f"{name} must be one (3, h, w) uint8 image, got {tuple(photo.shape)} {photo.dtype}"
        )
