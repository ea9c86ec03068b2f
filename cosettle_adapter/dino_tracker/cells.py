"""Where DINO-Tracker takes its features to be: one frame size, two strides, 14 pixels a patch."""

from __future__ import annotations

from cosettle_adapter.dino_tracker.errors import DinoTrackerError
from cosettle_adapter.video.geometry import Geometry, plan_geometry

# written into its code in several places, whatever its configs say
FRAME = (476, 854)
PATCH = 14
# the output of its DeltaDINO network, which is added to the features
CHANNELS = 1024
STRIDES = (7, 14)


def cells(stride: int, *, frame: tuple[int, int] = FRAME) -> Geometry:
    """Return its grid over a frame: 67 x 121 at stride 7, 34 x 61 at stride 14.

    Centres are at 7 + stride * k, in both axes, of the frame resized to 476 x 854.

    Args:
        stride: 7 or 14.
        frame: (H, W) before resizing.

    Raises:
        DinoTrackerError: another stride.
    """
    if stride not in STRIDES:
        raise DinoTrackerError(f"stride must be 7 or 14, got {stride}")
    return plan_geometry(*frame, patch=PATCH, stride=stride, size=FRAME)
