"""Frames in memory - tensors, arrays, PIL images - as one channel-first tensor, checked."""

from __future__ import annotations

import sys
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from cosettle_adapter import imports
from cosettle_adapter.errors import FrameError

_AXES = {3: "(3, H, W)", 4: "(T, 3, H, W)", 5: "(B, T, 3, H, W)"}
_ACCEPTED = (
    f"a torch tensor {', '.join(_AXES.values())}; a numpy array (H, W, 3) or (T, H, W, 3); "
    "a PIL image; or a list of images of one size"
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROUNDING = 1e-5  # a resize or a division in float32 may end this far outside [0, 1]


def as_frames(frames: Any) -> Tensor:
    """Turn frames of any kind into one channel-first tensor.

    A tensor comes back as it is once it is checked; a numpy array shares its memory with the
    tensor where torch allows it. Values are never rescaled.

    Args:
        frames: a tensor (3, H, W), (T, 3, H, W) or (B, T, 3, H, W); a numpy array with channels
            last, (H, W, 3) or (T, H, W, 3), or first where only that reading gives 3 channels; a
            PIL image of any mode; or a list of such single images, all of one size. uint8 in
            [0, 255], or float in [0, 1].

    Returns:
        uint8 or float tensor (3, H, W), (T, 3, H, W) or (B, T, 3, H, W), as many axes as given.

    Raises:
        FrameError: the frames are of another kind, shape, dtype or range.
    """
    tensor = _to_tensor(frames)
    validate_frames(tensor)
    return tensor


def validate_frames(frames: Tensor) -> None:
    """Check that a tensor holds RGB frames as this package takes them.

    Under ``torch.compile`` the range of floats is not checked.

    Args:
        frames: (3, H, W), (T, 3, H, W) or (B, T, 3, H, W), uint8 or float in [0, 1].

    Raises:
        FrameError: the shape, dtype or range is another; the message says what to call.
    """
    _check_shape(tuple(frames.shape))
    if frames.dtype == torch.uint8:
        return
    if frames.dtype not in _FLOATS:
        hint = {
            torch.bool: "masks are not frames",
            torch.uint16: "16-bit: (frames.to(torch.int32) // 257).to(torch.uint8)",
        }.get(frames.dtype, "if the values are in [0, 255], use .to(torch.uint8)")
        raise FrameError(
            f"got dtype {frames.dtype}, expected uint8 in [0, 255] or float in [0, 1]; {hint}"
        )
    if torch.compiler.is_compiling():  # looking at values would break the graph
        return
    low, high = (bound.item() for bound in torch.aminmax(frames.detach()))
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise FrameError(_wrong_range(low, high))


def is_array(candidate: Any) -> bool:
    """Tell whether something is a numpy array, without importing numpy."""
    return _is_a(candidate, "numpy", "ndarray")


def is_pil(candidate: Any) -> bool:
    """Tell whether something is a PIL image, without importing PIL."""
    return _is_a(candidate, "PIL.Image", "Image")


def image_to_frame(image: Any) -> Tensor:
    """Convert a PIL image to (3, H, W) uint8 RGB; transparency is dropped.

    Raises:
        FrameError: a mode without a known range of values (32-bit float).
    """
    numpy = imports.require("numpy", extra="video", purpose="reading PIL images")
    if image.mode == "F":
        raise FrameError("got a 32-bit float PIL image; pass it as a float array in [0, 1] instead")
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip rather than scale
        grey = torch.from_numpy(numpy.array(image, dtype=numpy.int64))
        return repeat((grey // 257).clamp(0, 255).to(torch.uint8), "h w -> c h w", c=3)
    return rearrange(torch.from_numpy(numpy.array(image.convert("RGB"))), "h w c -> c h w")


def _is_a(candidate: Any, module: str, name: str) -> bool:
    # an object of a class exists only once its module is imported
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(candidate, getattr(loaded, name))


def _to_tensor(frames: Any) -> Tensor:
    if isinstance(frames, Tensor):
        return frames
    if is_array(frames):
        return _array_to_tensor(frames)
    if is_pil(frames):
        return image_to_frame(frames)
    if not isinstance(frames, (list, tuple)):
        kind = f"an object of type {type(frames).__name__}"
        if isinstance(frames, (str, bytes)) or hasattr(frames, "__fspath__"):
            kind = f"the path {frames!r} (open_frames reads files)"
        raise FrameError(f"cannot read frames from {kind}; expected {_ACCEPTED}")
    if not frames:
        raise FrameError(f"got zero frames: an empty list; expected {_ACCEPTED}")
    images = [_to_tensor(image) for image in frames]
    first = images[0]
    for index, image in enumerate(images):
        if image.ndim != 3:
            raise FrameError(
                f"item {index} of the list has shape {tuple(image.shape)}, expected one image, "
                "(3, H, W) or (H, W, 3); concatenate clips before passing them"
            )
        if (image.shape, image.dtype) != (first.shape, first.dtype):
            raise FrameError(
                f"item {index} of the list is {tuple(image.shape)} {image.dtype}, but item 0 is "
                f"{tuple(first.shape)} {first.dtype}; give all frames one size and dtype"
            )
    return torch.stack(images)


def _array_to_tensor(array: Any) -> Tensor:
    if not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.copy()  # torch takes neither
    try:
        tensor = torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise FrameError(
            f"got a numpy array of dtype {array.dtype}, expected uint8 in [0, 255] or float in "
            "[0, 1]; use .astype(numpy.uint8)"
        ) from error
    if tensor.ndim in _AXES:
        first, last = tensor.shape[-3], tensor.shape[-1]
        if last == 3 or (first != 3 and last in (1, 2, 4)):
            return rearrange(tensor, "... h w c -> ... c h w")
    return tensor


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) not in _AXES:
        hint = "; a grayscale image: repeat it to 3 channels, (3, H, W)" if len(shape) == 2 else ""
        raise FrameError(
            f"got shape {shape} with {len(shape)} axes, expected {', '.join(_AXES.values())}{hint}"
        )
    if 0 in shape:
        raise FrameError(f"got zero frames or pixels: shape {shape}; expected {_AXES[len(shape)]}")
    channels, last = shape[-3], shape[-1]
    if channels == 3:
        return
    hint = "frames are RGB: pick 3 channels"
    if last in (1, 3, 4):
        order = {3: "2, 0, 1", 4: "0, 3, 1, 2", 5: "0, 1, 4, 2, 3"}[len(shape)]
        then = {1: ", and repeat 1 channel to 3", 3: "", 4: ", and drop alpha"}[last]
        hint = f"channels look to be last: pass the numpy array, or frames.permute({order}){then}"
    elif channels == 1:
        hint = (
            "grayscale: repeat to 3 with frames.repeat_interleave(3, dim=-3), "
            "or numpy.repeat(frames, 3, axis=-1) for an array with channels last"
        )
    elif channels == 4:
        hint = (
            "4 channels: drop alpha with frames[..., :3, :, :], "
            "or frames[..., :3] for an array with channels last"
        )
    elif len(shape) == 3:
        hint = "a grayscale clip (T, H, W): frames.unsqueeze(1).expand(-1, 3, -1, -1)"
    amount = "1 channel" if channels == 1 else f"{channels} channels"
    raise FrameError(f"got {amount} in shape {shape}, expected {_AXES[len(shape)]}; {hint}")


def _wrong_range(low: float, high: float) -> str:
    if low != low or high != high:
        return "float frames hold NaN; expected finite values in [0, 1]"
    if low == -torch.inf or high == torch.inf:
        return "float frames hold infinite values; expected finite values in [0, 1]"
    negative = low < -_ROUNDING
    hints = ["these look normalised: do not normalise, the adapter does"] if negative else []
    if low > -0.25 and high < 1.25:
        hints.append("if a resize overshot, frames.clamp(0, 1)")
    elif not negative:
        hints.append(
            "divide by 255, or use .to(torch.uint8)"
            if high <= 255
            else f"divide by the largest value the format allows ({high:g} was met)"
        )
    hint = "; ".join(hints)
    return f"float frames must lie in [0, 1], got min {low:g} and max {high:g}; {hint}"
