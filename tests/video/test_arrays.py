from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video import as_frames, validate_frames


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("leading", [(), (5,), (2, 5)])
def test_tensors_come_back_as_they_are_and_arrays_channels_first(leading: tuple[int, ...]) -> None:
    for dtype in (torch.uint8, torch.float32, torch.float16, torch.float64):
        frames = torch.ones(*leading, 3, 6, 8).to(dtype)
        assert as_frames(frames) is frames
    array = pixels(*leading, 6, 8, 3)
    np.testing.assert_array_equal(as_frames(array).numpy(), np.moveaxis(array, -1, -3))


def test_arrays_with_channels_first_where_only_that_makes_sense() -> None:
    array = pixels(5, 3, 6, 8)
    np.testing.assert_array_equal(as_frames(array).numpy(), array)
    # both readings give 3 channels: numpy's convention wins
    assert as_frames(pixels(3, 6, 3)).shape == (3, 3, 6)


def test_arrays_share_memory_where_torch_can() -> None:
    array = np.linspace(0, 1, 144).reshape(6, 8, 3)
    frames = as_frames(array)
    array[3, 4, 1] = 0.25
    np.testing.assert_array_equal(frames.numpy(), np.moveaxis(array, -1, 0))
    mirrored = array[..., ::-1]
    np.testing.assert_array_equal(as_frames(mirrored).numpy(), np.moveaxis(mirrored, -1, 0))
    array.setflags(write=False)
    np.testing.assert_array_equal(as_frames(array).numpy(), np.moveaxis(array, -1, 0))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA"])
def test_images_of_any_mode(mode: str) -> None:
    image = Image.fromarray(pixels(6, 8, 3)).convert(mode)
    expected = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
    np.testing.assert_array_equal(as_frames(image).numpy(), expected)


def test_deep_grey_images_are_scaled_not_clipped() -> None:
    image = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
    assert image.mode == "I;16"
    assert as_frames(image)[:, 0].tolist() == [[0, 1, 255]] * 3
    twelve = Image.fromarray(np.array([[0, 2048, 4095]], dtype=np.uint16))
    assert as_frames(twelve)[0, 0].tolist() == [0, 127, 255]
    for dtype, values in ((np.float32, [0, 0.5, 1]), (np.float32, [0, 127.5, 255])):
        image = Image.fromarray(np.array([values], dtype=dtype))
        assert as_frames(image)[0, 0].tolist() == [0, 127, 255]
    assert as_frames(Image.fromarray(np.array([[0, 127, 255]], np.int32)))[0, 0, 2] == 255
    with pytest.raises(FrameError, match=r"grey values from -3 to 0, expected 0 to one of 1, 255"):
        as_frames(Image.fromarray(np.array([[-3, 0]], dtype=np.float32)))


def test_lists_of_images() -> None:
    arrays = [pixels(6, 8, 3) for _ in range(3)]
    expected = np.moveaxis(np.stack(arrays), -1, 1)
    for convert in (Image.fromarray, np.asarray, lambda a: torch.from_numpy(a).permute(2, 0, 1)):
        np.testing.assert_array_equal(as_frames([convert(a) for a in arrays]).numpy(), expected)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "got zero frames: an empty list"),
        (torch.zeros(0, 3, 6, 8), r"got zero frames or pixels: shape \(0, 3, 6, 8\)"),
        (torch.zeros(2, 1, 6, 8), r"got 1 channel\(s\) in .*repeat_interleave\(3, dim=-3"),
        (torch.zeros(2, 4, 6, 8), r"4 channel.*drop alpha with frames\[\.\.\., :3, :, :\]"),
        (pixels(6, 8, 4), r"4 channel.*or \[\.\.\., :3\] if channels are last"),
        (torch.zeros(2, 6, 8, 3), r"got 6 channel.*pass the numpy array, or .*movedim\(-1, -3\)"),
        (torch.zeros(9, 6, 8), r"got 9 channel.*unsqueeze\(1\)\.expand\(-1, 3, -1, -1\)"),
        (torch.zeros(2, 9, 6, 8), r"got 9 channel.*expected \(T, 3, H, W\).*pick 3 channels"),
        (torch.zeros(6, 8), r"2 axes, expected \(3, H, W\), .*a grayscale image: repeat it to 3"),
        (torch.zeros(1, 1, 1, 3, 6, 8), r"6 axes, expected \(3, H, W\), \(T, 3, H, W\), \(B, T,"),
        (torch.full((3, 4, 4), 200.0), r"min 200 and max 200; divide by .*, such as 255"),
        (torch.full((3, 4, 4), 1.1), r"max 1\.1; if a resize overshot, use frames\.clamp\(0, 1\)"),
        (torch.full((3, 4, 4), -1.5), r"min -1\.5 .*pass raw frames, the adapter normalises"),
        (torch.full((3, 4, 4), float("nan")), "float frames hold NaN or inf"),
        (torch.full((3, 4, 4), -float("inf")), "float frames hold NaN or inf"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), r"dtype torch\.int64.*use \.to\(torch\.uint8\)"),
        (np.zeros((4, 4, 3), dtype=np.uint16), r"dtype torch\.uint16.*scale the values"),
        (np.zeros((4, 4, 3), dtype=object), r"numpy array of dtype object.*astype\(numpy\.uint8\)"),
        (np.zeros((4, 4, 3), dtype=">f4"), r"numpy array of dtype >f4"),
        ("clip.mp4", r"from the path 'clip\.mp4' \(open_frames reads files\)"),
        (7, "from an object of type int; expected a torch tensor"),
        ([torch.zeros(2, 3, 4, 4)], r"item 0 of the list is \(2, 3, 4, 4\).*expected single"),
        ([pixels(4, 5, 3), pixels(4, 6, 3)], r"item 1 of the list is \(3, 4, 6\).* \(3, 4, 5\)"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_errors(frames: object, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        as_frames(frames)


def test_every_value_is_looked_at_and_rounding_errors_are_forgiven() -> None:
    frames = torch.rand(4, 3, 8, 8)
    frames[0, 0, 0, :2] = torch.tensor([-1e-7, 1 + 1e-6])
    validate_frames(frames)
    frames[2, 1, 3, 4] = float("nan")
    with pytest.raises(FrameError, match="NaN"):
        validate_frames(frames)


def test_nothing_optional_is_imported() -> None:
    code = (
        "import sys, torch, cosettle_adapter.video as frames\n"
        "frames.as_frames(torch.zeros(3, 4, 4))\n"
        "print([m for m in ('av', 'PIL', 'skimage', 'scipy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
