"""Convert frames in memory (tensors, arrays, PIL images) to one valid channel-first tensor."""

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
# by PIL's mode, the values that may stand for white; an image takes the least that holds its own
_FULL_SCALES = {"F": (1, 255, 65535), "I;": (4095, 65535), "I": (255, 4095, 65535)}
_ROUNDING = 1e-5  # float32 resizing and division may exceed [0, 1] by this much


def as_frames(frames: Any) -> Tensor:
    """Convert frames of any kind to one channel-first tensor, without rescaling values.

    Tensors are returned unchanged; arrays share their memory where torch allows it.

    Args:
        frames: a tensor (3, H, W), (T, 3, H, W) or (B, T, 3, H, W); a numpy array with channels
            last, (H, W, 3) or (T, H, W, 3), or first if only that reading gives 3 channels; a PIL
            image of any mode; or a list of such single images, all of one size. uint8 in
            [0, 255], or float in [0, 1].

    Raises:
        FrameError: another type, shape, dtype or range; the message says how to convert it.
    """
    tensor = _to_tensor(frames)
    validate_frames(tensor)
    return tensor


def validate_frames(frames: Tensor) -> None:
    """Raise :class:`FrameError` unless a tensor is what :func:`as_frames` returns."""
    _check_shape(tuple(frames.shape))
    if frames.dtype == torch.uint8:
        return
    if frames.dtype not in _FLOATS:
        raise FrameError(
            f"got dtype {frames.dtype}, expected uint8 in [0, 255] or float in [0, 1]; scale the "
            "values to one of these, then use .to(torch.uint8) or .float()"
        )
    if torch.compiler.is_compiling():  # reading values would break the graph
        return
    low, high = (bound.item() for bound in torch.aminmax(frames.detach()))
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise FrameError(_wrong_range(low, high))


def holds_pixels(candidate: Any) -> bool:
    """Return whether an object is a tensor, NumPy array or PIL image; imports neither library."""
    return (
        isinstance(candidate, Tensor)
        or _is_a(candidate, "numpy", "ndarray")
        or _is_a(candidate, "PIL.Image", "Image")
    )


def image_to_frame(image: Any) -> Tensor:
    """Convert a PIL image to (3, H, W) uint8 RGB; transparency is dropped."""
    numpy = imports.require("numpy", extra="video", purpose="reading PIL images")
    scales = next(
        (tops for mode, tops in _FULL_SCALES.items() if image.mode.startswith(mode)), None
    )
    if scales is not None:  # grey of more than 8 bits, which PIL would clip rather than scale
        grey = torch.from_numpy(numpy.array(image, dtype=numpy.float64))
        low, high = float(grey.min()), float(grey.max())
        full = next((top for top in scales if low >= 0 and high <= top), None)
        if full is None:
            raise FrameError(
                f"got grey values from {low:g} to {high:g}, expected 0 to one of "
                f"{', '.join(map(str, scales))}; scale them to [0, 255] and store them as uint8"
            )
        return repeat((grey * 255 / full + 1e-9).to(torch.uint8), "h w -> c h w", c=3)
    return rearrange(torch.from_numpy(numpy.array(image.convert("RGB"))), "h w c -> c h w")


def _is_a(candidate: Any, module: str, kind: str) -> bool:
    # if its module is not imported, no object of the class exists
    return module in sys.modules and isinstance(candidate, getattr(sys.modules[module], kind))


def _to_tensor(frames: Any) -> Tensor:
    if isinstance(frames, Tensor):
        return frames
    if _is_a(frames, "numpy", "ndarray"):
        return _array_to_tensor(frames)
    if _is_a(frames, "PIL.Image", "Image"):
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
        if image.ndim != 3 or (image.shape, image.dtype) != (first.shape, first.dtype):
            raise FrameError(
                f"item {index} of the list is {tuple(image.shape)} {image.dtype}, and item 0 is "
                f"{tuple(first.shape)} {first.dtype}; expected single images of one size and dtype"
            )
    return torch.stack(images)


def _array_to_tensor(array: Any) -> Tensor:
    if not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.copy()  # torch accepts neither
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
    axes = _AXES.get(len(shape))
    if axes is None:
        hint = "; a grayscale image: repeat it to 3 channels, (3, H, W)" if len(shape) == 2 else ""
        expected = ", ".join(_AXES.values())
        raise FrameError(f"got shape {shape} with {len(shape)} axes, expected {expected}{hint}")
    if 0 in shape:
        raise FrameError(f"got zero frames or pixels: shape {shape}; expected {axes}")
    channels, last = shape[-3], shape[-1]
    if channels == 3:
        return
    hint = "frames are RGB: pick 3 channels"
    if last in (1, 3, 4):
        hint = "channels seem to be last: pass the numpy array, or frames.movedim(-1, -3)"
    elif channels == 1:
        hint = "a grayscale image: frames.repeat_interleave(3, dim=-3)"
    elif channels == 4:
        hint = "drop alpha with frames[..., :3, :, :], or [..., :3] if channels are last"
    elif len(shape) == 3:
        hint = "a grayscale clip (T, H, W): frames.unsqueeze(1).expand(-1, 3, -1, -1)"
    raise FrameError(f"got {channels} channel(s) in shape {shape}, expected {axes}; {hint}")


def _wrong_range(low: float, high: float) -> str:
    if not (-torch.inf < low and high < torch.inf):
        return "float frames hold NaN or infinite values; expected finite values in [0, 1]"
    if low > -0.25 and high < 1.25:
        hint = "if a resize overshot, use frames.clamp(0, 1); if they are normalised, undo it"
    elif low < -_ROUNDING:
        hint = "these look normalised: pass raw frames, the adapter normalises them"
    else:
        hint = "divide by the largest value of the format, such as 255"
    return f"float frames must lie in [0, 1], got min {low:g} and max {high:g}; {hint}"
