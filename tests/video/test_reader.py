from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video import FrameChunk, FrameSelection, SourceInfo, open_frames, probe


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


class TestChunks:
    def test_sizes_starts_and_times(self) -> None:
        chunks = list(open_frames(numbered(7), FrameSelection(fps=2), chunk_size=3))
        assert [len(chunk.frames) for chunk in chunks] == [3, 3, 1]
        assert [chunk.start for chunk in chunks] == [0, 3, 6]
        assert torch.cat([chunk.timestamps for chunk in chunks]).tolist() == [
            0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0,
        ]  # fmt: skip
        for chunk in chunks:
            assert chunk.frames.shape[1:] == (3, 4, 6)
            assert chunk.frames.dtype == torch.uint8
            assert chunk.timestamps.dtype == torch.float64
        assert [len(chunk.frames) for chunk in open_frames(numbered(6), chunk_size=3)] == [3, 3]

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"start": 2}, [2, 3, 4, 5, 6, 7, 8, 9]),
            ({"end": 3}, [0, 1, 2]),
            ({"start": 2.5, "end": 6}, [3, 4, 5]),
            ({"every": 4}, [0, 4, 8]),
            ({"start": 1, "every": 4}, [1, 5, 9]),
            ({"max_frames": 3}, [0, 1, 2]),
            ({"start": 1, "end": 9, "every": 3, "max_frames": 2}, [1, 4]),
            ({"fps": 5, "start": 0.6, "end": 1.2}, [3, 4, 5]),
            ({"end": 1000}, list(range(10))),
        ],
    )
    def test_selection(self, options: dict[str, float], expected: list[int]) -> None:
        select = FrameSelection(**options)  # type: ignore[arg-type]
        chunks = list(open_frames(numbered(10), select, chunk_size=2))
        assert numbers(iter(chunks)) == expected
        times = torch.cat([chunk.timestamps for chunk in chunks]).tolist()
        assert times == [number / options.get("fps", 1) for number in expected]
        if len(expected) > 1:
            later = list(open_frames(numbered(10), select, skip=1))
            assert numbers(iter(later)) == expected[1:]
            assert later[0].start == 1

    def test_only_kept_frames_are_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded = []

        def load(path: Path) -> torch.Tensor:
            loaded.append(path.name)
            return numbered(1)[0]

        monkeypatch.setattr("cosettle_adapter.video.files.read_image", load)
        paths = [Path(f"{number}.png") for number in range(10)]
        select = FrameSelection(start=2, every=3, max_frames=2)
        assert len(numbers(open_frames(paths, select))) == 2
        assert loaded == ["2.png", "5.png"]

    def test_an_iterator_is_read_no_further_than_needed_and_left_open(self) -> None:
        frames = iter(numbered(10))
        assert numbers(open_frames(frames, FrameSelection(max_frames=3))) == [0, 1, 2]
        assert int(next(frames)[0, 0, 0]) == 3

    def test_memory_holds_one_chunk(self) -> None:
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
            ({"start": 2, "end": 2}, "end must come after start=2, got end=2"),
            ({"end": 0}, "end must come after start=0, got end=0"),
            ({"every": 0}, "every must be at least 1"),
            ({"max_frames": 0}, "max_frames must be at least 1, or None, got 0"),
            ({"fps": 0}, "fps must be positive, got 0"),
            ({"fps": float("inf")}, "fps must be positive, got inf"),
        ],
    )
    def test_selections_are_checked(self, options: dict[str, float], message: str) -> None:
        with pytest.raises(FrameError, match=message):
            FrameSelection(**options)  # type: ignore[arg-type]

    def test_arguments_are_checked_at_the_call(self) -> None:
        with pytest.raises(FrameError, match="chunk_size must be at least 1, got 0"):
            open_frames(numbered(3), chunk_size=0)
        with pytest.raises(FrameError, match="skip must be at least 0, got -1"):
            open_frames(numbered(3), skip=-1)

    def test_a_range_without_frames(self) -> None:
        expected = r"no frame from 7\.5 s on; the frames met lie from 0 s to 4 s"
        with pytest.raises(FrameError, match=expected):
            list(open_frames(numbered(5), FrameSelection(start=7.5)))
        with pytest.raises(FrameError, match=r"from 1\.2 s to 1\.8 s; .* from 0 s to 2"):
            list(open_frames(numbered(5), FrameSelection(start=1.2, end=1.8)))
        with pytest.raises(FrameError, match="the list_iterator of frames holds no frames"):
            list(open_frames(iter([])))

    def test_frames_before_a_failure_are_delivered(self) -> None:
        def failing() -> Iterator[torch.Tensor]:
            yield from numbered(4)
            raise OSError("the camera went away")

        chunks = open_frames(failing(), chunk_size=3)
        assert [len(next(chunks).frames) for _ in range(2)] == [3, 1]
        with pytest.raises(OSError, match="the camera went away"):
            next(chunks)


class TestMemory:
    @pytest.mark.parametrize(
        "source",
        [
            numbered(3),
            numbered(3).permute(0, 2, 3, 1).numpy(),
            list(numbered(3)),
            tuple(numbered(3).permute(0, 2, 3, 1).numpy()),
            [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in numbered(3)],
        ],
        ids=["tensor", "array", "tensors", "arrays", "images"],
    )
    def test_everything_that_holds_frames(self, source: object) -> None:
        assert numbers(open_frames(source)) == [0, 1, 2]
        assert probe(source) == SourceInfo(3, 4, 6, None)

    def test_one_frame_is_a_clip(self) -> None:
        for source in (numbered(1)[0], Image.new("L", (6, 4))):
            (chunk,) = open_frames(source)
            assert chunk.frames.shape == (1, 3, 4, 6)
            assert probe(source).frames == 1

    def test_floats_are_rounded_to_bytes(self) -> None:
        every = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, -1)
        for floats in (every / 255, every.double() / 255, every / 255 + 0.4 / 255 * (every < 255)):
            (chunk,) = open_frames(floats)
            assert torch.equal(chunk.frames, every)

    def test_iterators_and_iterables_with_a_length(self) -> None:
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
            (7, "cannot read frames from an object of type int; expected a video"),
            (b"clip.mp4", "object of type bytes"),
            ({}, "object of type dict"),
            (torch.zeros(2, 3, 4, 4) - 1, "do not normalise"),
        ],
        ids=["batch", "empty", "number", "bytes", "mapping", "range"],
    )
    def test_what_holds_no_frames_is_refused_at_the_call(
        self, source: object, message: str
    ) -> None:
        for use in (open_frames, probe):
            with pytest.raises(FrameError, match=message):
                use(source)  # type: ignore[operator]

    def test_bad_frames_of_an_iterator_are_named(self) -> None:
        clips = open_frames(iter([numbered(2)]))
        with pytest.raises(FrameError, match=r"frame 0 has shape \(2, 3, 4, 6\), expected one"):
            next(clips)


class TestFiles:
    def test_folders_patterns_and_lists_in_natural_order(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for source in (folder, str(folder), f"{folder}{os.sep}", f"{folder}/frame*"):
            assert numbers(open_frames(source)) == [1, 2, 3]
            assert probe(source) == SourceInfo(3, 4, 6, None)
        assert numbers(open_frames(folder / "frame1*.*")) == [1, 3]
        assert numbers(open_frames(f"{folder.parent}/{folder.name[:-1]}[0-9]/frame?.*")) == [1, 2]
        monkeypatch.chdir(folder)
        assert numbers(open_frames("*")) == [1, 2, 3]
        assert numbers(open_frames("**/frame10.png")) == [3]
        assert numbers(open_frames("frame10.png")) == [3]
        assert numbers(open_frames([folder / "frame10.png", "frame1.bmp"])) == [3, 1]
        assert probe([folder / "frame10.png"]) == SourceInfo(1, 4, 6, None)

    def test_a_folder_whose_name_looks_like_a_pattern(self, tmp_path: Path) -> None:
        (tmp_path / "clip [1]").mkdir()
        save(tmp_path / "clip [1]" / "0.png", 5)
        assert numbers(open_frames(tmp_path / "clip [1]")) == [5]

    def test_photographs_stand_upright(self, tmp_path: Path) -> None:
        image = Image.new("RGB", (6, 4))
        exif = image.getexif()
        exif[0x0112] = 6  # turn by 90 degrees to view
        image.save(tmp_path / "phone.jpg", exif=exif)
        (chunk,) = open_frames(tmp_path)
        assert chunk.frames.shape == (1, 3, 6, 4)

    def test_another_size_is_named(self, folder: Path) -> None:
        save(folder / "frame11.png", 4, (8, 6))
        chunks = open_frames(folder)
        assert len(next(chunks).frames) == 3
        with pytest.raises(FrameError, match=r"frame11\.png of .* is 8 x 6, but .* 4 x 6; resize"):
            next(chunks)

    def test_a_damaged_image_is_named(self, folder: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "frame11.jpg")
        content = (folder / "frame11.jpg").read_bytes()
        for damaged in (content[: len(content) // 2], b"no image"):
            (folder / "frame11.jpg").write_bytes(damaged)
            with pytest.raises(FrameError, match=r"frame11\.jpg cannot be read as an image"):
                list(open_frames(folder))

    def test_what_is_not_there(self, folder: Path) -> None:
        with pytest.raises(FrameError, match=r"frame3\.png does not exist. Did you mean 'frame"):
            open_frames(folder / "frame3.png")
        with pytest.raises(FrameError, match=r"does not exist\.$"):
            probe(folder / "nowhere" / "clip.mp4")
        with pytest.raises(FrameError, match="is a URL; download it"):
            open_frames("https://example.org/clip.mp4")

    def test_folders_and_patterns_without_images(self, tmp_path: Path) -> None:
        with pytest.raises(FrameError, match=r"holds no images \(\.png, .*; it holds nothing;"):
            open_frames(tmp_path)
        for name in ("b.mp4", "a.mp4", "c.mp4", "d.mp4"):
            (tmp_path / name).write_text("")
        with pytest.raises(FrameError, match=r"it holds a\.mp4, b\.mp4, c\.mp4, \.\.\.; a video"):
            open_frames(tmp_path)
        with pytest.raises(FrameError, match="matches no files"):
            open_frames(tmp_path / "*.png")
        with pytest.raises(
            FrameError, match=r"matches 4 files and none is an image, among .*a\.mp4"
        ):
            open_frames(tmp_path / "*")


def test_only_what_can_be_read_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "clip_a.py").touch()
    with pytest.raises(FrameError, match=r"clip\.mp4 does not exist\.$"):
        open_frames(tmp_path / "clip.mp4")
    (tmp_path / "clip_a.mp4").touch()
    with pytest.raises(FrameError, match=r"Did you mean 'clip_a\.mp4'"):
        open_frames(tmp_path / "clip.mp4")
