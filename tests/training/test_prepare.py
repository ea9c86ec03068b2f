from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
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


@pytest.mark.parametrize("workers", [0, 2])
def test_the_layout_is_kept_and_training_reads_the_same_frames(
    workers: int, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    on_video = lambda done, total: seen.append((done, total))  # noqa: E731
    count, skipped = prepare(videos, tmp_path, workers=workers, on_video=on_video)
    assert seen == [(done, 5) for done in range(6)]
    assert (count, [name for name, _ in skipped]) == (3, ["cut.mkv", "run/broken.mp4"])
    assert all(name in problem for name, problem in skipped)
    lines = (tmp_path / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["cut.mkv", "run/broken.mp4"]
    corpus = Corpus.open(tmp_path)
    assert not corpus.problems
    assert [video.name for video in corpus.videos] == ["c", "run/a", "run/b"]
    assert [video.length() for video in corpus.videos] == [9, 20, 12]
    frames = corpus.videos[1].read([17, 4])
    assert numbers(frames) == [17, 4]
    original = Corpus.open(videos / "run" / "a.mp4").videos[0].read([17, 4])
    assert float((frames.float() - original.float()).abs().mean()) < 6
    # again: what is there is not done again, and other videos join
    before, tried, length = tree(tmp_path), list[str](), Video.length

    def watch(video: Video) -> int:
        tried.append(video.name)
        return length(video)

    monkeypatch.setattr(Video, "length", watch)
    assert prepare(videos, tmp_path) == (count, skipped)
    assert tried == ["cut.mkv", "run/broken.mp4"]
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"every": 3}, [0, 3, 6, 9, 12, 15, 18]),
        ({"max_frames": 4}, [2, 7, 12, 17]),
        ({"max_frames": 1}, [10]),
        ({"max_frames": 50}, list(range(20))),
    ],
)
def test_thinning(changes: dict[str, Any], kept: list[int], videos: Path, tmp_path: Path) -> None:
    prepare(videos / "run" / "a.mp4", tmp_path, PrepareSettings(**changes))
    video = Corpus.open(tmp_path).videos[0]
    assert numbers(video.read(range(video.length()))) == kept


def test_images_are_made_smaller_never_larger(videos: Path, tmp_path: Path) -> None:
    sizes = []
    for size, quality in ((30, 90), (256, 90), (256, 30)):
        folder = tmp_path / f"{size}-{quality}"
        prepare(videos / "c.mp4", folder, PrepareSettings(size=size, quality=quality))
        frames = Corpus.open(folder).videos[0].read([0])
        assert tuple(frames.shape[-2:]) == ((30, 45) if size == 30 else (60, 90))
        sizes.append(sum(map(len, tree(folder).values())))
    assert sizes[2] < 0.6 * sizes[1]


def test_frame_folders_are_thinned_too(tmp_path: Path) -> None:
    (tmp_path / "in" / "v").mkdir(parents=True)
    for index in range(12):
        Image.new("RGB", (80, 40), (20 * index,) * 3).save(tmp_path / f"in/v/f{index}.png")
    prepare(tmp_path / "in", tmp_path / "out", PrepareSettings(size=20, every=5))
    frames = Corpus.open(tmp_path / "out").videos[0].read([0, 1, 2])
    assert frames.shape == (3, 3, 20, 40)
    levels = frames.float().mean((1, 2, 3))
    torch.testing.assert_close(levels, torch.tensor([0.0, 100, 200]), atol=2, rtol=0)


def test_a_decoder_that_crashes_its_process_is_named(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = Video.frames

    def crash(self: Video) -> Any:
        if self.name == "c.mp4":
            os._exit(139)
        return frames(self)

    monkeypatch.setattr(Video, "frames", crash)
    with pytest.raises(TrainingError, match=r"crashed or .* on c\.mp4; remove this"):
        prepare(videos / "c.mp4", tmp_path / "out", workers=1)


def test_stopping_leaves_nothing_half_written(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = module.write_image, list[int]()

    def interrupt(*arguments: Any) -> None:
        written.append(1)
        if len(written) == 15:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(videos, tmp_path / "out")
    assert {path.parent.name for path in tmp_path.rglob("*.jpg")} == {"c"}
    assert not list(tmp_path.rglob("*.part"))
    killed = tmp_path / "out" / "run" / ".a.part"  # of a process that was killed
    killed.mkdir()
    (killed / "000099.jpg").write_bytes(b"half")
    assert prepare(videos, tmp_path / "out")[0] == 3
    prepare(videos, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_full_disk(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    for workers in (0, 1):
        with pytest.raises(DiskFullError, match=r"no space left in .*run the same"):
            prepare(videos, tmp_path, workers=workers)
    assert not list(tmp_path.rglob("*.jpg"))


def test_refusals(videos: Path, tmp_path: Path) -> None:
    for place in (videos / "frames", videos):
        with pytest.raises(TrainingError, match="choose a folder outside"):
            prepare([videos], place)
    assert not (videos / "frames").exists()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(TrainingError, match=r"is not empty \(it holds thesis\.tex\)"):
        prepare(videos, tmp_path)
    with pytest.raises(FrameError, match=r"none of the 1 videos can be read; .*broken\.mp4"):
        prepare(videos / "run" / "broken.mp4", tmp_path / "out")
    assert "broken.mp4" in (tmp_path / "out" / "skipped.txt").read_text()
    message = r"made with other settings: every was 1, is 2; size was 256, is 128; use another"
    with pytest.raises(TrainingError, match=message):
        prepare(videos / "c.mp4", tmp_path / "out", PrepareSettings(size=128, every=2))
    (tmp_path / "out" / "prepared.json").write_text("[]")
    with pytest.raises(TrainingError, match=r"prepared\.json cannot be read"):
        prepare(videos / "c.mp4", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"quality": 96}, "quality must be at most 95, got 96"),
        ({"max_frames": 0}, "max_frames must be at least 1, got 0"),
        ({"every": 2, "max_frames": 3}, "got every 2 and max_frames 3; give only one"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareSettings(**changes)


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (["a/b.mp4", "a/c.mkv"], ["a/b", "a/c"]),
        (["b.mp4", "b.avi"], ["b.mp4", "b.avi"]),
        (["b.mp4", "b/c.mp4"], ["b.mp4", "b/c"]),
        (["v1.2", "v1.2.mp4"], ["v1.2", "v1.2.mp4"]),
        (["x/.y/a.mp4"], ["x/_y/a"]),
    ],
)
def test_every_video_has_a_folder_of_its_own(names: list[str], folders: list[str]) -> None:
    assert folder_names(names) == folders
