from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.video import open_frames, prefetch, probe

from helpers import write_video


def left_edges(path: Path, **options: object) -> tuple[list[int], list[float]]:
    """Where the bright square is in each frame, and the frames' times."""
    edges: list[int] = []
    times: list[float] = []
    for chunk in open_frames(path, **options):  # type: ignore[arg-type]
        assert chunk.frames.dtype == torch.uint8
        assert chunk.start == len(edges)
        for frame in chunk.frames:
            edges.append(int((frame[0, 16] > 150).nonzero()[0]))
        times += chunk.timestamps.tolist()
    return edges, times


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    return write_video(folder / "clip.mp4", frames=40, height=48, width=128, fps=20)


def test_every_frame_comes_once_in_order(clip: Path) -> None:
    edges, times = left_edges(clip, chunk_size=7)
    np.testing.assert_allclose(edges, 2 * np.arange(40), atol=2)
    np.testing.assert_allclose(times, np.arange(40) / 20, atol=1e-6)
    info = probe(clip)
    assert (info.frames, info.height, info.width) == (40, 48, 128)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every": 3}, range(0, 40, 3)),
        ({"max_frames": 5}, range(5)),
        ({"start": 1.25}, range(25, 40)),
        ({"end": 0.5}, range(10)),
        ({"start": 0.5, "end": 1.5, "every": 4, "max_frames": 3}, (10, 14, 18)),
    ],
)
def test_ranges(clip: Path, options: dict[str, float], expected: range) -> None:
    edges, times = left_edges(clip, **options)
    np.testing.assert_allclose(times, np.asarray(expected) / 20, atol=1e-6)
    np.testing.assert_allclose(edges, 2 * np.asarray(expected), atol=2)


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"max_frames": 0},
        {"chunk_size": 0},
        {"start": -1.0},
        {"start": 2.0, "end": 1.0},
    ],
)
def test_arguments_are_checked_at_the_call(clip: Path, options: dict[str, float]) -> None:
    with pytest.raises(FrameError):
        open_frames(clip, **options)  # type: ignore[arg-type]


def test_a_folder_of_images_is_read_in_natural_order(tmp_path: Path) -> None:
    for index in (10, 2, 1):
        picture = np.full((8, 12, 3), index, dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"frame{index}.png")
    for source in (tmp_path, str(tmp_path / "*.png")):
        (chunk,) = open_frames(source, fps=2)
        assert chunk.frames[:, 0, 0, 0].tolist() == [1, 2, 10]
        assert chunk.timestamps.tolist() == [0.0, 0.5, 1.0]
    assert probe(tmp_path).frames == 3


def test_images_of_differing_sizes_are_named(tmp_path: Path) -> None:
    for index, height in enumerate((8, 9)):
        Image.fromarray(np.zeros((height, 12, 3), np.uint8)).save(tmp_path / f"{index}.png")
    with pytest.raises(FrameError, match="9"):
        list(open_frames(tmp_path))


def test_sources_that_are_not(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("no video at all")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "clip.mp4", tmp_path / "empty", tmp_path / "*.jpg", 7):
        with pytest.raises(FrameError):
            list(open_frames(source))
    with pytest.raises(FrameError, match=r"clip\.mp4"):
        open_frames(tmp_path / "clip.mpg")


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_a_truncated_video_yields_what_it_has_and_says_so(tmp_path: Path, suffix: str) -> None:
    whole = write_video(tmp_path / f"w{suffix}", frames=150, height=64, width=64, noisy=True)
    content = whole.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(content[: len(content) // 2])
    seen = 0
    with pytest.raises(TruncatedVideoError) as caught:  # noqa: PT012 - counts what comes before
        for chunk in open_frames(cut):
            seen += len(chunk.frames)
    assert 0 < seen < 150
    assert abs(caught.value.frames_read - seen) <= 1


def test_prefetch_raises_where_it_happened_and_stops_when_left() -> None:
    closed: list[bool] = []

    def count(fail_at: int):  # type: ignore[no-untyped-def]
        try:
            for index in range(100):
                if index == fail_at:
                    raise RuntimeError("broken")
                yield index
        finally:
            closed.append(True)

    received: list[int] = []
    with pytest.raises(RuntimeError, match="broken"):  # noqa: PT012 - collects what comes before
        for item in prefetch(count(5)):
            received.append(item)
    assert received == [0, 1, 2, 3, 4]
    running = prefetch(count(1000))
    assert next(running) == 0
    running.close()
    assert closed == [True, True]
