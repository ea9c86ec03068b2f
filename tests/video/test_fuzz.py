"""Damaged in any way, a video loses frames, never their order, and says which."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered import encode_numbered, numbers

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video import count_frames, open_frames, read_frames

COUNT, RATE = 40, 10
INTRA: dict[str, dict[str, Any]] = {  # every frame by itself: what is delivered must be right
    "intra.mp4": {"options": {"g": "1"}, "muxing": {"movflags": "faststart"}},
    "intra.mkv": {"options": {"g": "1"}},
    "intra.ts": {"options": {"g": "1"}},
    "motion.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "lossless.mov": {"codec": "png", "pixel_format": "rgb24"},
}
INTER: dict[str, dict[str, Any]] = {  # a frame may be drawn from a damaged one
    "b-frames.mp4": {"options": {"g": "8", "bf": "2"}, "muxing": {"movflags": "faststart"}},
    "b-frames.ts": {"options": {"g": "8", "bf": "2"}},
    "web.webm": {"codec": "libvpx-vp9", "options": {"speed": "8", "g": "8"}},
    "old.avi": {"codec": "mpeg4", "options": {"g": "8"}},
    "old.mpg": {"codec": "mpeg2video", "options": {"g": "8", "bf": "2"}, "rate": 25},
}
SECONDS = 20


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    whole = {**INTRA, **INTER}
    return {name: encode_numbered(folder / name, COUNT, **how) for name, how in whole.items()}


@pytest.fixture(autouse=True)
def not_for_ever() -> Iterator[None]:
    def hang(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def mutate(content: bytes, seed: int) -> bytes:
    """Flip bytes, cut the end, or swap or blank stretches, behind the header."""
    draw = random.Random(seed)
    data = bytearray(content)
    start, end = len(data) // 4, len(data) - len(data) // 20
    kind = seed % 4
    if kind == 0:
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(start, end)] ^= draw.randint(1, 255)
    elif kind == 1:
        del data[draw.randrange(start, end) :]
    elif kind == 2:
        length = draw.randint(16, 400)
        first, second = sorted(draw.randrange(start, end - length) for _ in range(2))
        data[first : first + length], data[second : second + length] = (
            data[second : second + length],
            data[first : first + length],
        )
    else:
        length = draw.randint(4, 300)
        place = draw.randrange(start, end - length)
        data[place : place + length] = bytes(length)
    return bytes(data)


def check(path: Path, rate: int, *, right: bool) -> None:
    try:
        chunks = list(open_frames(path))
    except FrameError:
        return  # nothing in it can be read
    frames = torch.cat([chunk.frames for chunk in chunks])
    times = torch.cat([chunk.timestamps for chunk in chunks]).tolist()
    places = [round(time * rate) for time in times]
    lost = [round(time * rate) for chunk in chunks for time in chunk.lost]
    assert places == sorted(set(places)), "in order, each once"
    assert not set(places) & set(lost), "delivered is not lost"
    if path.suffix in (".ts", ".mpg"):  # nothing tells how long a cut one was
        known = max(places) + 1
        assert sorted([*places, *(place for place in lost if place < known)]) == [*range(known)]
    else:
        assert sorted([*places, *lost]) == [*range(COUNT)], "they make up the whole"
    if right:
        wrong = [place for place, number in zip(places, numbers(frames), strict=True)
                 if abs(place - number) > 1]  # fmt: skip
        assert len(wrong) <= 2, "but for what the decoder conceals, frames are in their place"
    assert count_frames(path) == len(frames)
    some = sorted({0, len(frames) // 2, len(frames) - 1})
    assert torch.equal(read_frames(path, some), frames[some])


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(s, marks=pytest.mark.slow) for s in range(3, 30))]
)
@pytest.mark.parametrize("name", [*INTRA, *INTER])
def test_a_damaged_video_loses_frames_but_never_their_order(
    videos: dict[str, Path], tmp_path: Path, name: str, seed: int
) -> None:
    path = tmp_path / name
    path.write_bytes(mutate(videos[name].read_bytes(), 10 * seed + len(name)))
    check(path, {**INTRA, **INTER}[name].get("rate", RATE), right=name in INTRA)
