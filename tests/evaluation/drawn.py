"""Frames and masks that tests of data sets write, and features of a scene that moves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import Clip

CELL = 8


def save(path: Path, pixels: NDArray[np.uint8], mode: str = "RGB") -> None:
    """Write a picture; in mode P with a palette of other colours than the labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.fromarray(pixels, mode="P")
        image.putpalette([value // 3 for value in range(768)])
    image.convert(mode).save(path, quality=100)


def save_frames(
    folder: Path, numbers: Iterable[int], size: tuple[int, ...], name: str = "{}.png"
) -> None:
    """Grey frames whose value is ten times their number."""
    for number in numbers:
        save(folder / name.format(number), np.full((*size, 3), 10 * number, dtype=np.uint8))


def grey(clip: Clip[object], index: int) -> float:
    """The number that a frame was written with."""
    return round(float(clip.read_frame(index).mean()) / 10, 1)


def problem_of(clip: Clip[object]) -> str:
    """Why a clip cannot be used: reading its frames and its annotations says the same."""
    with pytest.raises(FrameError) as annotations:
        clip.read_annotations()
    with pytest.raises(FrameError) as frame:
        clip.read_frame(0)
    assert str(annotations.value) == str(frame.value) == clip.problem
    return str(clip.problem)


def moving_squares(frames: int = 5, h: int = 6, w: int = 10) -> tuple[Tensor, NDArray[np.uint8]]:
    """Two objects that move one cell a frame, and features that know which cell is which."""
    generator = torch.Generator().manual_seed(0)
    ground = torch.randn(32, h, w, generator=generator)
    objects = torch.randn(2, 32, 2, 2, generator=generator)
    features = ground.repeat(frames, 1, 1, 1)
    masks = np.zeros((frames, h * CELL, w * CELL), dtype=np.uint8)
    for t in range(frames):
        for index, (row, column) in enumerate([(0, t), (4, w - 2 - t)]):
            features[t, :, row : row + 2, column : column + 2] = objects[index]
            rows = slice(row * CELL, (row + 2) * CELL)
            columns = slice(column * CELL, (column + 2) * CELL)
            masks[t, rows, columns] = index + 1
    return features, masks


def write_davis(root: Path, clips: dict[str, NDArray[np.uint8]], *, year: str = "2017") -> Path:
    for name, masks in clips.items():
        save_frames(
            root / "JPEGImages/480p" / name, range(len(masks)), masks[0].shape, "{:05d}.jpg"
        )
        for t, mask in enumerate(masks):
            save(root / "Annotations/480p" / name / f"{t:05d}.png", mask, "P")
    (root / "ImageSets" / year).mkdir(parents=True)
    (root / "ImageSets" / year / "val.txt").write_text("\n".join(clips) + "\n")
    return root
