from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cosettle_adapter.training.discovery import INDEX_NAME, Found
from numbered import encode_numbered, numbers
from PIL import Image

from cosettle_adapter.errors import FrameError
from cosettle_adapter.training import prepare as module
from cosettle_adapter.training.corpus import Corpus, Video
from cosettle_adapter.training.errors import DiskFullError, TrainingError
from cosettle_adapter.training.prepare import PrepareSettings, folder_names, prepare


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for name, length in (("run/a.mp4", 20), ("run/b.mkv", 12), ("c.mp4", 9)):
        (root / name).parent.mkdir(exist_ok=True)
        encode_numbered(root / name, length, 60, 90)
    (root / "run" / "broken.mp4").write_bytes(b"no video")
    (root / "cut.mkv").write_bytes((root / "run/b.mkv").read_bytes()[:-2000])
    return root


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(files)}


class TestExtraction:
    def test_the_layout_and_what_is_told(self, videos: Path, tmp_path: Path) -> None:
        seen = []
        result = prepare(
            videos, tmp_path / "out", on_video=lambda done, total: seen.append((done, total))
        )
        assert seen == [(done, 5) for done in range(6)]
        assert (result.videos, result.frames, result.found) == (3, 41, 0)
        assert [name for name, _ in result.skipped] == ["cut.mkv", "run/broken.mp4"]
        assert all(name in problem for name, problem in result.skipped)
        assert {name.rpartition("/")[0] for name in tree(result.folder)} == {
            "", "c", "run/a", "run/b",
        }  # fmt: skip
        assert (result.folder / "run/a/000019.jpg").exists()
        lines = (result.folder / "skipped.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines] == ["cut.mkv", "run/broken.mp4"]

    def test_training_reads_the_same_frames(self, videos: Path, tmp_path: Path) -> None:
        folder = prepare(videos, tmp_path, PrepareSettings(size=60)).folder
        corpus = Corpus.open(folder)
        assert not corpus.problems
        assert [video.name for video in corpus.videos] == ["c", "run/a", "run/b"]
        assert [video.length() for video in corpus.videos] == [9, 20, 12]
        video = corpus.videos[1]
        assert numbers(video.read([17, 4])) == [17, 4]
        original = Corpus.open(videos / "run" / "a.mp4").videos[0].read([17, 4])
        difference = (video.read([17, 4]).float() - original.float()).abs()
        assert float(difference.mean()) < 6

    @pytest.mark.parametrize(
        ("changes", "kept"),
        [
            ({"every": 3}, [0, 3, 6, 9, 12, 15, 18]),
            ({"fps": 2.0}, [0, 5, 10, 15]),
            ({"fps": 4.0}, [0, 3, 5, 8, 10, 13, 15, 18]),
            ({"fps": 100.0}, list(range(20))),
            ({"max_frames": 4}, [2, 7, 12, 17]),
            ({"max_frames": 1}, [10]),
            ({"max_frames": 50}, list(range(20))),
        ],
    )
    def test_thinning(
        self, changes: dict[str, Any], kept: list[int], videos: Path, tmp_path: Path
    ) -> None:
        prepare(videos / "run" / "a.mp4", tmp_path, PrepareSettings(**changes))
        video = Corpus.open(tmp_path).videos[0]
        assert numbers(video.read(range(video.length()))) == kept

    @pytest.mark.parametrize(("size", "sides"), [(30, (30, 45)), (256, (60, 90))])
    def test_the_shorter_side_and_no_enlarging(
        self, size: int, sides: tuple[int, int], videos: Path, tmp_path: Path
    ) -> None:
        prepare(videos / "c.mp4", tmp_path, PrepareSettings(size=size))
        frames = Corpus.open(tmp_path).videos[0].read([0])
        assert tuple(frames.shape[-2:]) == sides

    def test_quality(self, videos: Path, tmp_path: Path) -> None:
        sizes = [
            sum(map(len, tree(prepare(videos / "c.mp4", tmp_path / f"{quality}",
                PrepareSettings(quality=quality)).folder).values()))
            for quality in (30, 90)
        ]  # fmt: skip
        assert sizes[0] < 0.6 * sizes[1]

    def test_frame_folders_are_thinned_too(self, tmp_path: Path) -> None:
        (tmp_path / "in" / "v").mkdir(parents=True)
        for index in range(12):
            Image.new("RGB", (80, 40), (20 * index,) * 3).save(tmp_path / f"in/v/f{index}.png")
        prepare(tmp_path / "in", tmp_path / "out", PrepareSettings(size=20, every=5))
        frames = Corpus.open(tmp_path / "out").videos[0].read([0, 1, 2])
        assert frames.shape == (3, 3, 20, 40)
        levels = frames.float().mean((1, 2, 3))
        torch.testing.assert_close(levels, torch.tensor([0.0, 100, 200]), atol=2, rtol=0)
        with pytest.raises(FrameError, match="is a folder of images, which have no times"):
            prepare(tmp_path / "in", tmp_path / "other", PrepareSettings(fps=2))


class TestProcesses:
    def test_several_write_what_one_writes(self, videos: Path, tmp_path: Path) -> None:
        one = prepare(videos, tmp_path / "one")
        two = prepare(videos, tmp_path / "two", workers=2)
        assert tree(one.folder) == tree(two.folder)
        assert one.skipped == two.skipped
        assert not multiprocessing.active_children()

    def test_a_decoder_that_crashes_its_process(
        self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_pool", _short_lived_pool)
        (tmp_path / "in").mkdir()
        for name in ("1.mp4", "2.mp4", "crash.mp4", "3.mp4", "4.mp4"):
            (tmp_path / "in" / name).write_bytes((videos / "c.mp4").read_bytes())
        result = prepare(tmp_path / "in", tmp_path / "out", workers=2)
        assert result.skipped == (("crash.mp4", module._CRASHED),)
        assert result.videos == 4
        assert not list(result.folder.rglob("*.part"))

    def test_stopping_leaves_nothing_half_written(
        self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = module._write_jpeg
        written: list[int] = []

        def interrupt(*arguments: Any) -> None:
            written.append(1)
            if len(written) == 15:
                raise KeyboardInterrupt
            write(*arguments)

        monkeypatch.setattr(module, "_write_jpeg", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(videos, tmp_path)
        assert {path.parent.name for path in tmp_path.rglob("*.jpg")} == {"c"}
        assert not list(tmp_path.rglob(".*"))
        assert [video.name for video in Corpus.open(tmp_path).videos] == ["c"]
        monkeypatch.setattr(module, "_write_jpeg", write)
        result = prepare(videos, tmp_path)
        assert (result.videos, result.found) == (3, 1)
        assert tree(tmp_path) == tree(prepare(videos, tmp_path.parent / "whole").folder)


class TestAgain:
    def test_what_is_there_is_not_done_again(
        self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = prepare(videos, tmp_path)
        before = tree(tmp_path)
        extract = module.extract
        tried: list[str] = []

        def watch(job: module.Job) -> int | str:
            tried.append(job.video.name)
            return extract(job)

        monkeypatch.setattr(module, "extract", watch)
        again = prepare(videos, tmp_path)
        assert tried == ["cut.mkv", "run/broken.mp4"]
        assert (again.videos, again.frames, again.found) == (3, first.frames, 3)
        assert again.skipped == first.skipped
        assert tree(tmp_path) == before

    def test_more_videos_join_those_from_before(self, videos: Path, tmp_path: Path) -> None:
        prepare(videos / "c.mp4", tmp_path)
        prepare(videos / "run" / "b.mkv", tmp_path)
        corpus = Corpus.open(tmp_path)
        assert [video.name for video in corpus.videos] == ["b", "c"]
        assert not corpus.problems

    def test_what_a_killed_run_left_is_cleared(self, videos: Path, tmp_path: Path) -> None:
        (tmp_path / ".c.part").mkdir()
        (tmp_path / ".c.part" / "000099.jpg").write_bytes(b"half")
        (tmp_path / INDEX_NAME).write_text(
            json.dumps(
                {
                    "format": "cosettle-corpus", "version": 1, "complete": False, "frames": {},
                    "settings": {
                        "size": 256, "every": 1, "fps": None, "max_frames": None, "quality": 90,
                    },
                }
            )
        )  # fmt: skip
        prepare(videos / "c.mp4", tmp_path)
        assert sorted(path.name for path in (tmp_path / "c").iterdir())[-1] == "000008.jpg"
        assert not list(tmp_path.rglob("*.part"))

    def test_other_settings(self, videos: Path, tmp_path: Path) -> None:
        prepare(videos / "c.mp4", tmp_path)
        message = r"were extracted with size 256 \(now 128\), every 1 \(now 2\); use another"
        with pytest.raises(TrainingError, match=message):
            prepare(videos / "c.mp4", tmp_path, PrepareSettings(size=128, every=2))


class TestRefusals:
    def test_a_folder_that_holds_something_else(self, videos: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(TrainingError, match=r"is not empty \(it holds thesis\.tex\)"):
            prepare(videos, tmp_path)

    def test_a_folder_among_the_videos(self, videos: Path) -> None:
        with pytest.raises(TrainingError, match="choose a folder outside"):
            prepare([videos], videos / "frames")
        assert not (videos / "frames").exists()

    def test_no_readable_video(self, videos: Path, tmp_path: Path) -> None:
        with pytest.raises(FrameError, match=r"none of the 1 videos can be read; .*broken\.mp4"):
            prepare(videos / "run" / "broken.mp4", tmp_path)
        assert "broken.mp4" in (tmp_path / "skipped.txt").read_text()

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_full_disk(
        self, workers: int, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        if workers == 1:
            monkeypatch.setattr(Image.Image, "save", full)
        else:
            monkeypatch.setattr(module, "_pool", _full_pool)
        with pytest.raises(
            DiskFullError, match=r"no room is left for the frames of .*run the same"
        ):
            prepare(videos, tmp_path, workers=workers)
        assert not list(tmp_path.rglob("*.jpg"))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"size": 0}, "size must be at least 1, got 0"),
            ({"quality": 96}, "quality must be from 1 to 95, got 96"),
            ({"every": 0}, "every must be at least 1, got 0"),
            ({"max_frames": 0}, "max_frames must be at least 1, got 0"),
            ({"fps": 0.0}, "fps must be positive"),
            ({"every": 2, "fps": 3.0}, "give only one of every, fps and max_frames"),
        ],
    )
    def test_settings_out_of_range(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            PrepareSettings(**changes)


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (["a/b.mp4", "a/c.mkv"], ["a/b", "a/c"]),
        (["b.mp4", "b.avi"], ["b.mp4", "b.avi"]),
        (["b.mp4", "b/c.mp4"], ["b.mp4", "b/c"]),
        (["v1.2", "v1.2.mp4"], ["v1.2", "v1.2.mp4"]),
        (["x/.a.mp4"], ["x/_a"]),
        (["b.mp4", "b.avi", "b.mp4/c.mp4"], ["b.mp4~2", "b.avi", "b.mp4/c"]),
    ],
)
def test_every_video_has_a_folder_of_its_own(names: list[str], folders: list[str]) -> None:
    found = folder_names([Video(name, Found("", "")) for name in names])
    assert found == folders
    assert not any(f"{one}/".startswith(f"{two}/") for one in found for two in found if one != two)


def _short_lived_pool(workers: int) -> Any:
    return _patched_pool(workers, _crash_on_purpose)


def _full_pool(workers: int) -> Any:
    return _patched_pool(workers, _fill_the_disk)


class _patched_pool:  # noqa: N801  # stands in for a function
    """The pool, whose processes misbehave."""

    def __init__(self, workers: int, initializer: Any) -> None:
        from concurrent.futures import ProcessPoolExecutor

        context = multiprocessing.get_context("fork")
        self.pool = ProcessPoolExecutor(workers, context, initializer)

    def __enter__(self) -> Any:
        return self.pool

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)


def _crash_on_purpose() -> None:
    frames = Video.frames

    def crash(self: Video) -> Any:
        if self.name == "crash.mp4":
            os._exit(139)
        return frames(self)

    Video.frames = crash  # type: ignore[method-assign]


def _fill_the_disk() -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Image.Image.save = full  # type: ignore[method-assign]
