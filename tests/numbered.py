"""Videos whose frames tell their own number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch


def numbered(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Grey frames of level 3 t before a still texture, so that frames tell their number."""
    texture = np.random.default_rng(0).integers(0, 256, (height // 3, width, 3), dtype=np.uint8)
    frames = []
    for number in range(count):
        frame = np.full((height, width, 3), 3 * number, dtype=np.uint8)
        frame[2 * height // 3 :] = np.roll(texture, 3 * number, axis=1)
        frames.append(frame)
    return frames


def encode(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    muxing: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    rate: int = 10,
    coding_order: bool = False,
    audio_seconds: int = 0,
) -> Path:
    """Write a video.

    ``times`` are in milliseconds; ``coding_order`` gives frames the times at which they are coded,
    as some writers do.
    """
    with av.open(str(path), "w", options=muxing or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("pcm_s16le", rate=8000) if audio_seconds else None
        for second in range(audio_seconds):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
            silence.sample_rate, silence.pts = 8000, 8000 * second
            container.mux(sound.encode(silence))
        kind = "rgba" if frames[0].shape[-1] == 4 else "rgb24"
        for index, pixels in enumerate([*frames, None]):
            frame = None
            if pixels is not None:
                frame = av.VideoFrame.from_ndarray(pixels, format=kind)
                if times is not None:
                    frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            for packet in stream.encode(frame):
                if coding_order and packet.dts is not None:
                    packet.dts += round(2 / (rate * packet.time_base))  # the first are negative
                    packet.pts = packet.dts
                container.mux(packet)
    return path


def encode_numbered(
    path: Path, count: int, height: int = 48, width: int = 64, **options: Any
) -> Path:
    """Write :func:`numbered` frames with the options of :func:`encode`."""
    return encode(path, numbered(count, height, width), **options)


def numbers(frames: torch.Tensor) -> list[int]:
    """The numbers of decoded :func:`numbered` frames."""
    return [round(float(frame[:, : frame.shape[1] // 2].float().mean()) / 3) for frame in frames]
