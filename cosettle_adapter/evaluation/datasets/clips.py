"""What a clip of any data set is: a name, frames read one at a time, and its annotation."""

from __future__ import annotations

import abc
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.datasets.images import read_frame, read_labels
from cosettle_adapter.extras import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@runtime_checkable
class Clip(Protocol):
    """What clips of all data sets have in common.

    Listing a data set does not fail for one bad clip: what is wrong with it is its ``problem``,
    and reading anything of it raises that.
    """

    @property
    def name(self) -> str:
        """Name within the data set, as its own lists and papers have it."""

    @property
    def problem(self) -> str | None:
        """Why the clip cannot be used, found while listing; None if nothing was found."""

    def __len__(self) -> int:
        """Number of frames."""

    def read_frame(self, index: int) -> NDArray[np.uint8]:
        """Read one frame: ``(H, W, 3)`` uint8, RGB."""


class Joints(NamedTuple):
    """Annotated joints of a clip, one row for every annotated frame.

    Attributes:
        xy: ``(A, J, 2)`` float64 (x, y) in pixels of the clip's frames; any value where not
            visible.
        visible: ``(A, J)`` boolean.
    """

    xy: NDArray[np.float64]
    visible: NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class ImageClip:
    """A clip whose frames are image files.

    Attributes:
        name: the clip's name.
        frames: paths of its frames, in order.
        problem: why it cannot be used, or None; then reading raises it.
    """

    name: str
    frames: tuple[Path, ...]
    problem: str | None = dataclasses.field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.frames)

    def check(self) -> None:
        """Raise what was found to be wrong while listing.

        Raises:
            FrameError: the clip cannot be used.
        """
        if self.problem is not None:
            raise FrameError(self.problem)

    def read_frame(self, index: int) -> NDArray[np.uint8]:
        """Read one frame: ``(H, W, 3)`` uint8, RGB.

        Raises:
            FrameError: the clip has a problem, or the file is missing or damaged.
        """
        self.check()
        return read_frame(self.frames[index])


@dataclasses.dataclass(frozen=True)
class MaskClip(ImageClip):
    """A clip with label maps, for all frames or some.

    Attributes:
        annotations: paths of its label maps, in order; each has the stem of its frame.
    """

    annotations: tuple[Path, ...]

    @property
    def annotated(self) -> tuple[int, ...]:
        """Index of the frame of every label map."""
        index = {frame.stem: i for i, frame in enumerate(self.frames)}
        return tuple(index[path.stem] for path in self.annotations if path.stem in index)

    def read_masks(self) -> NDArray[np.uint8]:
        """Read all label maps: ``(A, H, W)`` uint8, one for every frame of ``annotated``.

        Raises:
            FrameError: the clip has a problem, or a label map is damaged, neither a palette nor a
                grey image, or of another size than the first.
        """
        self.check()
        np: Any = require("numpy", extra="eval", purpose="reading masks")
        masks = [read_labels(path) for path in self.annotations]
        for path, mask in zip(self.annotations, masks, strict=True):
            if mask.shape != masks[0].shape:
                raise FrameError(
                    f"{path} is {mask.shape[0]} x {mask.shape[1]}, but the sequence's first mask "
                    f"is {masks[0].shape[0]} x {masks[0].shape[1]}; all must have one size"
                )
        stacked: NDArray[np.uint8] = np.stack(masks)
        return stacked


@dataclasses.dataclass(frozen=True)
class JointClip(ImageClip, abc.ABC):
    """A clip with joints, for all frames or some.

    Attributes:
        joints_file: where the joints are written.
        annotated: index of the frame of every row of joints.
        joint_names: J names, in the order of the joints.
    """

    joints_file: Path
    annotated: tuple[int, ...]
    joint_names: tuple[str, ...]

    @abc.abstractmethod
    def read_joints(self) -> Joints:
        """Read the joints of all annotated frames.

        Raises:
            FrameError: the clip has a problem, or the file is not what it should be.
        """
