from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numbered import encode_numbered, numbered, numbers
from PIL import Image

from cosettle_adapter.errors import FrameError, MissingExtraError
from cosettle_adapter.training.corpus import Corpus

LENGTH = 12


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode_numbered(tmp_path_factory.mktemp("clip") / "clip.mp4", LENGTH)


def put(clip: Path, *paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip.read_bytes())


def images(folder: Path, count: int, pattern: str = "frame{}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(numbered(count)):
        Image.fromarray(pixels).save(folder / pattern.format(index))
    return folder


def shard(path: Path, clip: Path, members: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in members:
            if name.endswith("/"):
                entry = tarfile.TarInfo(name)
                entry.type = tarfile.DIRTYPE
                tar.addfile(entry)
            else:
                tar.add(clip, arcname=name)
    return path


def names(corpus: Corpus) -> list[str]:
    return [video.name for video in corpus.videos]


def test_videos_at_any_depth_in_order_of_name(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(clip, *(tmp_path / name for name in ("b/x.mp4", "a/deep/er/y.MKV", "z.webm", "a.mp4")))
    put(clip, tmp_path / "notes.pdf", tmp_path / ".hidden" / "h.mp4", tmp_path / "b/._x.mp4")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", None)  # nothing is opened
        patch.setattr("av.open", None)
        corpus = Corpus.open(tmp_path)
    assert names(corpus) == ["a.mp4", "a/deep/er/y.MKV", "b/x.mp4", "z.webm"]
    assert [video.length() for video in corpus.videos] == [LENGTH] * 4
    assert numbers(corpus.videos[1].read([7, 2, 7])) == [7, 2, 7]
    several = Corpus.open([tmp_path / "b", tmp_path / "a"])
    assert names(several) == ["b/x.mp4", "a/deep/er/y.MKV"]


def test_folders_of_images_in_natural_order(clip: Path, tmp_path: Path) -> None:
    images(tmp_path / "class a" / "video.mp4", LENGTH)  # a folder may be called so
    images(tmp_path / "class b" / "other", 3)
    (tmp_path / "class b" / "other" / "timestamps.txt").write_text("0 1 2")
    images(tmp_path / "alone", 2, "{:06d}.jpg")
    corpus = Corpus.open([str(tmp_path)])
    assert names(corpus) == ["alone", "class a/video.mp4", "class b/other"]
    assert [video.length() for video in corpus.videos] == [2, LENGTH, 3]
    assert numbers(corpus.videos[1].read([11, 0, 2])) == [11, 0, 2]
    frames = [pending.load() for pending in corpus.videos[1].frames()]
    assert numbers(torch.stack(frames)) == list(range(LENGTH))
    assert names(Corpus.open(tmp_path / "alone")) == ["alone"]
    # images beside videos, or beside folders of images, are previews of them
    put(clip, tmp_path / "alone" / "clip.mp4")
    images(tmp_path / "class a", 1)
    assert names(Corpus.open(tmp_path)) == ["alone/clip.mp4", "class a/video.mp4", "class b/other"]


def test_what_is_found_twice_is_there_once(clip: Path, tmp_path: Path) -> None:
    put(clip, tmp_path / "d/a.mp4", tmp_path / "d/in/b.mp4", tmp_path / "far/c.mp4")
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "link.mp4").symlink_to(tmp_path / "d" / "a.mp4")
    for name in ("far1", "far2"):
        (tmp_path / "d" / name).symlink_to(tmp_path / "far")
    places = [tmp_path / "d", tmp_path / "d" / "in", tmp_path / "d" / "in" / ".." / "a.mp4"]
    assert names(Corpus.open(places)) == ["a.mp4", "far1/c.mp4", "in/b.mp4"]


def test_an_unreadable_folder_is_told(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(clip, tmp_path / "a.mp4", tmp_path / "closed" / "b.mp4")
    scan = os.scandir

    def closed(folder: str) -> object:
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", closed)
    corpus = Corpus.open(tmp_path)
    assert names(corpus) == ["a.mp4"]
    assert "Permission denied" in corpus.problems[0][1]


@pytest.mark.parametrize(
    "line", ["{}", "{} 3", "{},12", '"{}",12,3', "{}\t7", "{} 57 3", "./{}", "  {}  ", "{},a class"]
)
@pytest.mark.parametrize("name", ["vids/a b.mp4", "vids/c.mp4"])
def test_lists(clip: Path, tmp_path: Path, line: str, name: str) -> None:
    put(clip, tmp_path / name)
    gone = "vids/gone one.mp4" if " " in name else "vids/gone.mp4"
    (tmp_path / "list.csv").write_text(
        f"# comment\n\npath,label\n{line.format(gone)}\n{line.format(name)}\n{line.format(name)}\n"
    )
    corpus = Corpus.open(tmp_path / "list.csv")
    assert names(corpus)[-2:] == [gone, name], "in the order of the file, once"
    assert corpus.videos[-1].length() == LENGTH
    with pytest.raises(FrameError, match=r"gone.*\.mp4 cannot be read"):
        corpus.videos[-2].length()


def test_lists_name_paths_from_the_working_folder_or_anywhere(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(tmp_path / "data/frames/val/Zr6_000014_000024", 4)
    put(clip, tmp_path / "x/a.mp4")
    shard(tmp_path / "s.tar", clip, ["a.mp4"])
    listed = tmp_path / "lists" / "k400_val.csv"
    listed.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    listed.write_text(f"\ufeffpath\ndata/frames/val/Zr6_000014_000024\n{tmp_path}/x/a.mp4\ns.tar\n")
    corpus = Corpus.open("lists/k400_val.csv")
    assert [video.length() for video in corpus.videos] == [4, LENGTH, LENGTH]
    assert corpus.videos[0].name.endswith("data/frames/val/Zr6_000014_000024")


def test_patterns_and_braces(clip: Path, tmp_path: Path) -> None:
    put(clip, *(tmp_path / f"p{n}/c{n:02d}.mp4" for n in (1, 2, 9, 10)), tmp_path / "x/[1].mp4")
    assert names(Corpus.open(f"{tmp_path}/p*/*.mp4")) == [
        "p1/c01.mp4", "p10/c10.mp4", "p2/c02.mp4", "p9/c09.mp4",
    ]  # fmt: skip
    assert names(Corpus.open(f"{tmp_path}/p{{1,9}}")) == ["p1/c01.mp4", "p9/c09.mp4"]
    assert names(Corpus.open(f"{tmp_path}/p*/c{{08..10}}.mp4")) == ["p9/c09.mp4", "p10/c10.mp4"]
    assert len(Corpus.open(f"{tmp_path}/**/c0*.mp4")) == 3
    assert names(Corpus.open(f"{tmp_path}/x/[1].mp4")) == ["[1].mp4"], "a name before a pattern"


def test_members_of_shards_are_videos_where_they_lie(clip: Path, tmp_path: Path) -> None:
    long = "x" * 120 + ".mp4"  # a name that takes an extra header
    shard(tmp_path / "s-000.tar", clip, ["000.mp4", "000.json", "sub/", f"sub/{long}"])
    shard(tmp_path / "s-001.tar", clip, ["001.txt", "001.mp4"])
    for place in (tmp_path, f"{tmp_path}/s-{{000..001}}.tar", f"{tmp_path}/*.tar"):
        corpus = Corpus.open(place)
        assert names(corpus) == ["s-000/000.mp4", f"s-000/sub/{long}", "s-001/001.mp4"]
    assert [video.length() for video in corpus.videos] == [LENGTH] * 3
    assert numbers(corpus.videos[1].read([3, 9])) == [3, 9]
    decoded = [pending.load() for pending in corpus.videos[2].frames()]
    assert numbers(torch.stack(decoded)) == list(range(LENGTH))


def test_what_is_whole_in_broken_shards_counts(clip: Path, tmp_path: Path) -> None:
    path = shard(tmp_path / "cut.tar", clip, ["a.mp4", "b.mp4", "c.mp4"])
    with path.open("r+b") as file:
        file.truncate(512 + clip.stat().st_size * 2)
    (tmp_path / "none.tar").write_bytes(b"no archive" * 200)
    shard(tmp_path / "other.tar", clip, ["a.jpg", "b.jpg", "c.json"])
    corpus = Corpus.open(tmp_path)
    assert names(corpus) == ["cut/a.mp4"]
    problems = {Path(name).name: problem for name, problem in corpus.problems}
    assert "cut off within b.mp4" in problems["cut.tar"]
    assert "not an uncompressed tar archive" in problems["none.tar"]
    assert problems["other.tar"] == "it holds no video files, but a.jpg, b.jpg, c.json"
    with pytest.raises(FrameError, match=r"no videos in .*other.tar.*holds no video files, but a"):
        Corpus.open(tmp_path / "other.tar")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("vidoes", r"vidoes does not exist\. Did you mean 'videos'"),
        ("videos", r"no videos in .*found nothing\. Expected a folder"),
        ("others", r"found 4 other files, such as a\.zip, b\.pdf, frame0.*not compressed"),
        ("others/x.npy", "found 1 other files, such as x.npy"),
        ("https://host/a.mp4", "is a URL"),
        ("nowhere/*.mp4", "matches nothing"),
        ("nowhere-{000..003}.tar", "matches nothing"),
        ("empty.txt", "lists 0 videos"),
        ("gone.txt", r"lists 2 videos, but none .* got ..lost\.mp4 2"),
        ("binary.txt", "cannot be read as a list of videos"),
        ([], "no data given; expected a folder of videos"),
    ],
)
def test_mistakes(
    place: str | list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "others").mkdir()
    for name in ("b.pdf", "a.zip", "x.npy", "frame0.txt.gz"):
        (tmp_path / "others" / name).touch()
    lists = {
        "empty": b"# nothing\n\n",
        "gone": b"gone.mp4 1\nlost.mp4 2\n",
        "binary": b"\xff\xfe\0",
    }
    for name, content in lists.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FrameError, match=message):
        Corpus.open(place)


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    images(tmp_path / "v", 3)
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(tmp_path / "v" / "frame1.png")
    (tmp_path / "v" / "frame2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    video = Corpus.open(tmp_path).videos[0]
    with pytest.raises(FrameError, match="have different sizes"):
        video.read([0, 1])
    with pytest.raises(FrameError, match=r"frame2\.png cannot be read as an image"):
        video.read([2])
    for path in (tmp_path / "v").iterdir():
        path.unlink()
    with pytest.raises(FrameError, match="is a folder without images"):
        video.length()


def test_whatever_a_reader_raises_is_a_sentence_but_for_a_missing_library(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(clip, tmp_path / "a.mp4")
    video = Corpus.open(tmp_path).videos[0]

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("too large")

    with monkeypatch.context() as patch:
        patch.setattr("cosettle_adapter.training.corpus.count_frames", fail)
        with pytest.raises(FrameError, match=r"a\.mp4 cannot be read \(MemoryError: too large\)"):
            video.length()
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingExtraError):
        video.length()


def test_the_digest_is_over_names_and_sizes(clip: Path, tmp_path: Path) -> None:
    put(clip, tmp_path / "d/a.mp4", tmp_path / "d/b.mp4")
    images(tmp_path / "d" / "frames", 2)
    shard(tmp_path / "d" / "s.tar", clip, ["a.mp4"])
    digest = Corpus.open(tmp_path / "d").digest
    (tmp_path / "d").rename(tmp_path / "moved")
    assert Corpus.open(tmp_path / "moved").digest == digest, "moving changes nothing"
    (tmp_path / "moved/a.mp4").write_bytes(clip.read_bytes() + b"\0")
    changed = Corpus.open(tmp_path / "moved").digest
    (tmp_path / "moved/a.mp4").unlink()
    assert len({digest, changed, Corpus.open(tmp_path / "moved").digest}) == 3
