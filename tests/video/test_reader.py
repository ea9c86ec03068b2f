from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cosettle_adapter.errors import DamagedError, FrameError
from cosettle_adapter.video import (
    FrameChunk,
    FrameSelection,
    SourceInfo,
    find_images,
    find_videos,
    is_image,
    is_video,
    open_frames,
    probe,
)


def numbered(count: int, height: int = 4, width: int = 6) -> torch.Tensor:
    """(T, 3, H, W) uint8 whose frame t is filled with t."""
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, height, width)


def numbers(chunks: Iterator[FrameChunk]) -> list[int]:
    return [int(frame[0, 0, 0]) for chunk in chunks for frame in chunk.frames]


def save(path: Path, value: int, size: tuple[int, int] = (4, 6)) -> Path:
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, value in (("frame10.png", 3), ("frame2.PNG", 2), ("frame1.bmp", 1)):
        save(tmp_path / name, value)
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "._frame3.png").write_text("what macOS leaves behind")
    return tmp_path


def test_sizes_starts_and_times_of_chunks() -> None:
    chunks = list(open_frames(numbered(7), FrameSelection(source_fps=2), chunk_size=3))
    assert [chunk.frames.shape for chunk in chunks] == [(n, 3, 4, 6) for n in (3, 3, 1)]
    assert [chunk.start for chunk in chunks] == [0, 3, 6]
    times = torch.cat([chunk.timestamps for chunk in chunks])
    assert torch.equal(times, torch.arange(7, dtype=torch.float64) / 2)
    assert chunks[0].frames.dtype == torch.uint8
    assert [len(chunk.frames) for chunk in open_frames(numbered(6), chunk_size=3)] == [3, 3]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"start": 2}, [2, 3, 4, 5, 6, 7, 8, 9]),
        ({"end": 3}, [0, 1, 2]),
        ({"start": 2.5, "end": 6}, [3, 4, 5]),
        ({"start": 1, "every": 4}, [1, 5, 9]),
        ({"start": 1, "end": 9, "every": 3, "max_frames": 2}, [1, 4]),
        ({"source_fps": 5, "start": 0.6, "end": 1.2}, [3, 4, 5]),
        ({"end": 1000}, list(range(10))),
    ],
)
def test_selection(options: dict[str, float], expected: list[int]) -> None:
    select = FrameSelection(**options)  # type: ignore[arg-type]
    chunks = list(open_frames(numbered(10), select, chunk_size=2))
    assert numbers(iter(chunks)) == expected
    times = torch.cat([chunk.timestamps for chunk in chunks]).tolist()
    assert times == [number / options.get("source_fps", 1) for number in expected]
    later = list(open_frames(numbered(10), select, skip=1))
    assert numbers(iter(later)) == expected[1:]
    assert later[0].start == 1


def test_no_more_is_loaded_than_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(path: Path) -> torch.Tensor:
        loaded.append(path.name)
        return numbered(1)[0]

    monkeypatch.setattr("cosettle_adapter.video.files.read_image", load)
    paths = [Path(f"{number}.png") for number in range(10)]
    assert len(numbers(open_frames(paths, FrameSelection(start=2, every=3, max_frames=2)))) == 2
    assert loaded == ["2.png", "5.png"]
    frames = iter(numbered(10))
    assert numbers(open_frames(frames, FrameSelection(max_frames=3))) == [0, 1, 2]
    assert int(next(frames)[0, 0, 0]) == 3, "an iterator is left open"


def test_memory_holds_one_chunk() -> None:
    alive = peak = 0

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def frames() -> Iterator[torch.Tensor]:
        nonlocal alive, peak
        for frame in numbered(50):
            alive += 1
            peak = max(peak, alive)
            yield frame.clone().as_subclass(Counted)

    assert len(numbers(open_frames(frames(), chunk_size=5))) == 50
    assert peak <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -0.5}, "start must be at least 0 seconds, got -0.5"),
        ({"start": float("nan")}, "start must be at least 0"),
        ({"start": 2, "end": 2}, "end must be after start=2, got 2"),
        ({"end": 0}, "end must be after start=0, got 0"),
        ({"every": 0}, "every must be a whole number of at least 1"),
        ({"max_frames": 0}, "max_frames must be a whole number of at least 1, got 0"),
        ({"max_frames": 2.5}, "max_frames must be a whole number"),
        ({"source_fps": 0}, "source_fps must be positive, got 0"),
        ({"fps": float("inf")}, "fps must be positive, got inf"),
        ({"fps": 2, "every": 2}, "give only one of every, fps and times"),
        ({"times": (2.0, 1.0)}, "times must be increasing"),
        ({"times": (-1.0, 1.0)}, "times must be increasing, from 0 on"),
        ({"times": (float("nan"),)}, "times must be increasing"),
        ({"every": 2.5}, "every must be a whole number"),
        ({"times": 0.5}, "times must be a tuple or list of seconds, got 0.5"),
        ({"every": None}, "every must be a number, got None"),
        ({"times": ("1",)}, "times must be a number, got '1'"),
        ({"times": (None,)}, "times must be a number, got None"),
        ({"start": "1"}, "start must be a number, got '1'"),
        ({"on_damage": "skip"}, "on_damage must be 'warn' or 'error', got skip"),
    ],
)
def test_selections_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        FrameSelection(**options)  # type: ignore[arg-type]


def test_a_range_without_frames() -> None:
    for select, message in (
        (
            FrameSelection(start=7.5),
            r"no frame from 7\.5 s on; the frames read range from 0 s to 4 s",
        ),
        (FrameSelection(start=1.2, end=1.8), r"from 1\.2 s to 1\.8 s; .* from 0 s to 2"),
    ):
        with pytest.raises(FrameError, match=message):
            list(open_frames(numbered(5), select))
    with pytest.raises(FrameError, match="the list_iterator of frames holds no frames"):
        list(open_frames(iter([])))


def test_frames_before_a_failure_are_delivered() -> None:
    def failing() -> Iterator[torch.Tensor]:
        yield from numbered(4)
        raise OSError("the camera went away")

    chunks = open_frames(failing(), chunk_size=3)
    assert [len(next(chunks).frames) for _ in range(2)] == [3, 1]
    with pytest.raises(OSError, match="the camera went away"):
        next(chunks)


@pytest.mark.parametrize(
    "source",
    [
        numbered(3),
        numbered(3).permute(0, 2, 3, 1).numpy(),
        tuple(numbered(3).permute(0, 2, 3, 1).numpy()),
        [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in numbered(3)],
    ],
    ids=["tensor", "array", "arrays", "images"],
)
def test_everything_that_holds_frames(source: object) -> None:
    assert numbers(open_frames(source)) == [0, 1, 2]
    assert probe(source) == SourceInfo(3, 4, 6, None)


def test_one_frame_is_a_clip_and_floats_are_rounded() -> None:
    for source in (numbered(1)[0], Image.new("L", (6, 4))):
        (chunk,) = open_frames(source)
        assert chunk.frames.shape == (1, 3, 4, 6)
        assert probe(source).frames == 1
    every = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, -1)
    for floats in (every / 255, every.double() / 255, every / 255 + 0.4 / 255 * (every < 255)):
        assert torch.equal(next(open_frames(floats)).frames, every)


def test_iterators_and_iterables_with_a_length() -> None:
    class Recording:
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter(numbered(4))

    assert probe(Recording()) == SourceInfo(frames=4)
    assert numbers(open_frames(Recording())) == [0, 1, 2, 3]
    frames = (frame.permute(1, 2, 0).numpy() for frame in numbered(5))
    assert probe(frames) == SourceInfo()
    assert numbers(open_frames(frames, chunk_size=2)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (numbered(4)[None], r"batch of clips, shape \(1, 4, 3, 4, 6\); .*open them one by one"),
        ([], "got zero frames: an empty list"),
        (7.5, "cannot read frames from an object of type float; expected a video"),
        (b"clip.mp4", "object of type bytes"),
        ({}, "object of type dict"),
        (torch.zeros(2, 3, 4, 4) - 1, "pass raw frames"),
        ("nowhere/clip.mp4", r"does not exist\.$"),
    ],
    ids=["batch", "empty", "number", "bytes", "mapping", "range", "missing"],
)
def test_what_holds_no_frames_is_refused_at_the_call(source: object, message: str) -> None:
    for use in (open_frames, probe):
        with pytest.raises(FrameError, match=message):
            use(source)  # type: ignore[operator]
    for name, count in (("chunk_size", 0), ("chunk_size", 2.5), ("skip", -1)):
        with pytest.raises(FrameError, match=rf"{name}.* must be .*at least .*, got {count}"):
            open_frames(numbered(3), **{name: count})  # type: ignore[arg-type]
    with pytest.raises(FrameError, match=r"frame 0 has shape \(2, 3, 4, 6\), expected one"):
        next(open_frames(iter([numbered(2)])))


def test_folders_patterns_and_lists_in_natural_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in (folder, f"{folder}{os.sep}", f"{folder}/frame*"):
        assert numbers(open_frames(source)) == [1, 2, 3]
        assert probe(source) == SourceInfo(3, 4, 6, None)
    assert numbers(open_frames(folder / "frame1*.*")) == [1, 3]
    monkeypatch.chdir(folder)
    assert numbers(open_frames("**/frame10.png")) == [3]
    assert numbers(open_frames("frame10.png")) == [3]
    assert numbers(open_frames([folder / "frame10.png", "frame1.bmp"])) == [3, 1]
    assert probe([folder / "frame10.png"]) == SourceInfo(1, 4, 6, None)
    (folder / "clip [1]").mkdir()  # looks like a pattern
    save(folder / "clip [1]" / "0.png", 5)
    assert numbers(open_frames(folder / "clip [1]")) == [5]


def test_photographs_stand_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    image.save(tmp_path / "phone.jpg", exif=exif)
    assert next(open_frames(tmp_path)).frames.shape == (1, 3, 6, 4)


def test_images_that_cannot_be_used_are_named(folder: Path) -> None:
    last = save(folder / "frame11.png", 4, (8, 6))
    chunks = open_frames(folder)
    assert len(next(chunks).frames) == 3
    with pytest.raises(FrameError, match=r"frame11\.png of .* is 8 x 6, but .* 4 x 6; resize"):
        next(chunks)
    content = save(last, 4, (64, 64)).read_bytes()
    for damaged in (content[: len(content) // 2], b"no image"):
        last.write_bytes(damaged)
        chunks = list(open_frames(folder))
        assert [chunk.lost for chunk in chunks] == [(3.0,)]
        assert len(chunks[0].frames) == 3, "the others are not lost with it"
        with pytest.raises(DamagedError, match=r"frame11\.png cannot be read as an image"):
            list(open_frames(folder, FrameSelection(on_damage="error")))
        with pytest.raises(FrameError, match=r"frame11\.png cannot be read as an image"):
            list(open_frames(last))


def test_folders_and_patterns_without_images(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match=r"holds no images \(\.avif, .*; it holds nothing;"):
        open_frames(tmp_path)
    for name in ("clip_b.py", "clip_a.mp4", "c.mp4", "d.mp4"):
        (tmp_path / name).touch()
    for source, message in (
        (tmp_path, r"it holds c\.mp4, clip_a\.mp4, clip_b\.py; to open a video, pass"),
        (tmp_path / "*.png", "matches nothing; expected images"),
        (tmp_path / "*", r"matches c\.mp4, clip_a\.mp4, clip_b\.py; expected images, or a single"),
        (
            tmp_path / "clip.mp4",
            r"clip\.mp4 does not exist\. Did you mean 'clip_a\.mp4'( or '[cd]\.mp4')*\?$",
        ),
    ):
        with pytest.raises(FrameError, match=message):
            open_frames(source)


def test_one_rule_says_what_is_found(tmp_path: Path) -> None:
    for name in (
        "clip10.mp4", "clip2.MP4", "clip1.ogv", "._clip3.mp4", "a.jpeg", "b.WEBP", "c.TIF",
        ".hidden.png", "notes.txt", "below/deep/clip3.3gp", "below/d.png", ".git/e.mp4",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    videos, images = find_videos(tmp_path), find_images(str(tmp_path))
    assert [path.name for path in videos] == ["clip1.ogv", "clip2.MP4", "clip10.mp4"]
    assert [path.name for path in images] == ["a.jpeg", "b.WEBP", "c.TIF"]
    deep = tmp_path / "below" / "deep" / "clip3.3gp"
    assert find_videos(tmp_path, recursive=True) == [deep, *videos]
    assert len(find_images(tmp_path, recursive=True)) == 4
    assert is_video("clips/A.WMV")
    assert is_image(Path("a.b.JPG"))
    assert not any(is_video(name) or is_image(name) for name in ("mp4", "x/._a.png", "a.txt"))
    with pytest.raises(FileNotFoundError):
        find_videos(tmp_path / "gone")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fps": 5}, [0, 2, 4, 6, 8]),
        ({"fps": 4}, [0, 2, 5, 7]),
        ({"fps": 25}, list(range(10))),  # never a frame twice
        ({"fps": 5, "start": 0.25, "end": 0.75}, [3, 5, 7]),
        ({"fps": 5, "max_frames": 2}, [0, 2]),
        ({"times": (0.0, 0.34, 0.36, 0.9)}, [0, 3, 4, 9]),
        ({"times": (0.1, 0.12)}, [1]),
        ({"times": (0.95,)}, [9]),
    ],
)
def test_frames_nearest_to_a_clock_or_to_times(
    options: dict[str, Any], expected: list[int]
) -> None:
    select = FrameSelection(source_fps=10, **options)
    times = [time for chunk in open_frames(numbered(10), select) for time in chunk.timestamps]
    assert [round(10 * float(time)) for time in times] == expected
    skipped = list(open_frames(numbered(10), select, skip=1))
    assert sum(len(chunk.frames) for chunk in skipped) == len(expected) - 1


def test_a_clock_needs_times() -> None:
    with pytest.raises(FrameError, match=r"fps and times need the times of frames.*source_fps"):
        open_frames(numbered(3), FrameSelection(fps=2))
    with pytest.raises(FrameError, match=r"no frame near 9 s; its last frame is at 0\.2 s"):
        list(open_frames(numbered(3), FrameSelection(times=(9.0,), source_fps=10)))


@pytest.mark.parametrize("suffix", [".webp", ".png", ".tif"])
def test_pages_are_read_forward_from_a_file_that_is_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    pages = [Image.new("RGB", (6, 4), (20 * page,) * 3) for page in range(10)]
    path = tmp_path / f"pages{suffix}"
    options = {} if suffix == ".tif" else {"lossless": True, "duration": 100}
    pages[0].save(path, save_all=True, append_images=pages[1:], **options)
    opened = []
    monkeypatch.setattr(Image, "open", lambda file, open=Image.open: opened.append(1) or open(file))
    assert numbers(open_frames(path)) == [20 * page for page in range(10)]
    assert len(opened) == 2, "to count them and to read them"
    step = 1.0 if suffix == ".tif" else 0.1
    select = FrameSelection(times=(0.4 * step, 3.2 * step, 9.4 * step))
    assert numbers(open_frames(path, select)) == [0, 60, 180]
    assert probe(path).frames == 10
    assert not caplog.records
    save(tmp_path / "second.png", 7)
    assert len(numbers(open_frames([path, tmp_path / "second.png"]))) == 2
    assert f"pages{suffix} holds 10 images; only the first one is read" in caplog.text
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with contextlib.suppress(FrameError):  # where nothing of it can be read
        chunks = list(open_frames(path))
        assert sum(len(chunk.frames) + len(chunk.lost) for chunk in chunks) == 10
