from __future__ import annotations

import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cosettle_adapter.training.discovery import INDEX_NAME, write_index
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


def names(corpus: Corpus) -> list[str]:
    return [video.name for video in corpus.videos]


class TestFolders:
    def test_videos_at_any_depth_in_order_of_name(self, clip: Path, tmp_path: Path) -> None:
        put(clip, *(tmp_path / name for name in ("b/x.mp4", "a/deep/er/y.MKV", "z.webm", "a.mp4")))
        put(clip, tmp_path / "notes.pdf", tmp_path / ".hidden" / "h.mp4", tmp_path / "b/._x.mp4")
        corpus = Corpus.open(tmp_path)
        assert names(corpus) == ["a.mp4", "a/deep/er/y.MKV", "b/x.mp4", "z.webm"]
        assert [video.length() for video in corpus.videos] == [LENGTH] * 4
        assert numbers(corpus.videos[1].read([7, 2, 7])) == [7, 2, 7]

    def test_frame_folders_in_natural_order(self, tmp_path: Path) -> None:
        images(tmp_path / "class a" / "video.mp4", LENGTH)  # a folder may be called so
        images(tmp_path / "class b" / "other", 3)
        images(tmp_path / "alone", 2, "{:06d}.jpg")
        corpus = Corpus.open([str(tmp_path)])
        assert names(corpus) == ["alone", "class a/video.mp4", "class b/other"]
        assert [video.length() for video in corpus.videos] == [2, LENGTH, 3]
        assert numbers(corpus.videos[1].read([11, 0, 2])) == [11, 0, 2]
        frames = [pending.load() for pending in corpus.videos[1].frames()]
        assert numbers(torch.stack(frames)) == list(range(LENGTH))

    def test_previews_beside_videos_and_notes_beside_frames(
        self, clip: Path, tmp_path: Path
    ) -> None:
        put(clip, tmp_path / "a" / "clip.mp4")
        images(tmp_path / "a", 1)
        images(tmp_path / "b", 3)
        (tmp_path / "b" / "timestamps.txt").write_text("0 1 2")
        images(tmp_path / "c", 1)
        images(tmp_path / "c" / "inner", 2)
        assert names(Corpus.open(tmp_path)) == ["a/clip.mp4", "b", "c/inner"]

    def test_a_folder_that_is_itself_a_video(self, tmp_path: Path) -> None:
        corpus = Corpus.open(images(tmp_path / "one", 5))
        assert names(corpus) == ["one"]
        assert corpus.videos[0].length() == 5

    def test_several_places(self, clip: Path, tmp_path: Path) -> None:
        put(clip, *(tmp_path / name for name in ("train/a.mp4", "val/a.mp4", "val/deep/b.mp4")))
        corpus = Corpus.open([tmp_path / "val", tmp_path / "train"])
        assert names(corpus) == ["val/a.mp4", "val/deep/b.mp4", "train/a.mp4"]

    def test_what_is_found_twice_is_there_once(self, clip: Path, tmp_path: Path) -> None:
        put(clip, tmp_path / "d/a.mp4", tmp_path / "d/in/b.mp4", tmp_path / "far/c.mp4")
        (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
        (tmp_path / "d" / "link.mp4").symlink_to(tmp_path / "d" / "a.mp4")
        for name in ("far1", "far2"):
            (tmp_path / "d" / name).symlink_to(tmp_path / "far")
        places = [tmp_path / "d", tmp_path / "d" / "in", tmp_path / "d" / "in" / ".." / "a.mp4"]
        assert names(Corpus.open(places)) == ["a.mp4", "far1/c.mp4", "in/b.mp4"]

    def test_nothing_is_opened(
        self, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(clip, tmp_path / "a.mp4", tmp_path / "b.mp4")
        monkeypatch.setattr("builtins.open", None)
        monkeypatch.setattr("av.open", None)
        assert len(Corpus.open(tmp_path)) == 2

    def test_pickles_small(self, clip: Path, tmp_path: Path) -> None:
        put(clip, *(tmp_path / f"{index:03d}.mp4" for index in range(100)))
        corpus = Corpus.open(tmp_path)
        content = pickle.dumps(corpus)
        assert len(content) < 300 * 100
        assert names(pickle.loads(content)) == names(corpus)

    def test_an_unreadable_folder_is_told(self, clip: Path, tmp_path: Path) -> None:
        put(clip, tmp_path / "a.mp4")
        (tmp_path / "closed").mkdir(mode=0)
        if os.access(tmp_path / "closed", os.R_OK):
            pytest.skip("root reads everything")
        corpus = Corpus.open(tmp_path)
        assert names(corpus) == ["a.mp4"]
        assert "Permission denied" in corpus.problems[0][1]


class TestLists:
    @pytest.mark.parametrize(
        "line",
        ["{}", "{} 3", "{},12", '"{}",12,3', "{}\t7", "{} 57 3", "./{}", "  {}  ", "{},some class"],
    )
    @pytest.mark.parametrize("name", ["vids/a b.mp4", "vids/c.mp4"])
    def test_dialects(self, clip: Path, tmp_path: Path, line: str, name: str) -> None:
        put(clip, tmp_path / name)
        gone = "vids/gone one.mp4" if " " in name else "vids/gone.mp4"
        (tmp_path / "list.csv").write_text(
            f"# comment\n\n{line.format(gone)}\n{line.format(name)}\n{line.format(name)}\n"
        )
        corpus = Corpus.open(tmp_path / "list.csv")
        assert names(corpus) == [gone, name], "in the order of the file, once"
        assert corpus.videos[1].length() == LENGTH
        with pytest.raises(FrameError, match=r"gone.*\.mp4 cannot be read"):
            corpus.videos[0].length()

    def test_the_published_lists_name_frame_folders_from_the_working_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images(tmp_path / "data/frames/val/Zr6_000014_000024", 4)
        (tmp_path / "lists").mkdir()
        (tmp_path / "lists" / "k400_val.csv").write_text("data/frames/val/Zr6_000014_000024\n")
        monkeypatch.chdir(tmp_path)
        corpus = Corpus.open("lists/k400_val.csv")
        assert corpus.videos[0].length() == 4
        assert corpus.videos[0].name.endswith("data/frames/val/Zr6_000014_000024")

    def test_column_names_and_absolute_paths(self, clip: Path, tmp_path: Path) -> None:
        put(clip, tmp_path / "x/a.mp4", tmp_path / "y/b.mp4")
        listed = tmp_path / "y" / "list.txt"
        listed.write_text(f"\ufeffpath,label\n{tmp_path}/x/a.mp4,1\nb.mp4,2\n", "utf-8")
        corpus = Corpus.open(listed)
        assert len(corpus) == 2
        assert all(video.length() == LENGTH for video in corpus.videos)
        assert corpus.videos[1].name == "b.mp4"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "lists no videos"),
            (b"# nothing\n\n", "lists no videos"),
            (b"gone.mp4 1\nlost.mp4 2\n", r"none of the first 2 lines .* look like 'lost\.mp4 2'"),
            (b"\xff\xfe\x00bad", "cannot be read as a list of videos"),
        ],
    )
    def test_lists_that_are_none(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "list.txt").write_bytes(content)
        with pytest.raises(FrameError, match=message):
            Corpus.open(tmp_path / "list.txt")


class TestPatterns:
    def test_patterns_and_braces(self, clip: Path, tmp_path: Path) -> None:
        put(clip, *(tmp_path / f"p{n}/c{n:02d}.mp4" for n in (1, 2, 9, 10)), tmp_path / "x/[1].mp4")
        assert names(Corpus.open(f"{tmp_path}/p*/*.mp4")) == [
            "p1/c01.mp4", "p10/c10.mp4", "p2/c02.mp4", "p9/c09.mp4",
        ]  # fmt: skip
        assert names(Corpus.open(f"{tmp_path}/p{{1,9}}")) == ["p1/c01.mp4", "p9/c09.mp4"]
        assert names(Corpus.open(f"{tmp_path}/p*/c{{08..10}}.mp4")) == ["p9/c09.mp4", "p10/c10.mp4"]
        assert names(Corpus.open(f"{tmp_path}/**/c0*.mp4")) == [
            "p1/c01.mp4", "p2/c02.mp4", "p9/c09.mp4",
        ]  # fmt: skip
        assert names(Corpus.open(f"{tmp_path}/x/[1].mp4")) == ["[1].mp4"], "a name before a pattern"


class TestShards:
    def shard(self, path: Path, clip: Path, members: list[str]) -> Path:
        with tarfile.open(path, "w") as tar:
            for name in members:
                if name.endswith("/"):
                    entry = tarfile.TarInfo(name)
                    entry.type = tarfile.DIRTYPE
                    tar.addfile(entry)
                else:
                    tar.add(clip, arcname=name)
        return path

    def test_members_are_videos_where_they_lie(self, clip: Path, tmp_path: Path) -> None:
        long = "x" * 120 + ".mp4"  # a name that takes an extra header
        self.shard(tmp_path / "s-000.tar", clip, ["000.mp4", "000.json", "sub/", f"sub/{long}"])
        self.shard(tmp_path / "s-001.tar", clip, ["001.txt", "001.mp4"])
        for place in (tmp_path, f"{tmp_path}/s-{{000..001}}.tar", f"{tmp_path}/*.tar"):
            corpus = Corpus.open(place)
            assert names(corpus) == ["s-000/000.mp4", f"s-000/sub/{long}", "s-001/001.mp4"]
        assert [video.length() for video in corpus.videos] == [LENGTH] * 3
        assert numbers(corpus.videos[1].read([3, 9])) == [3, 9]
        decoded = [pending.load() for pending in corpus.videos[2].frames()]
        assert numbers(torch.stack(decoded)) == list(range(LENGTH))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["s-000.tar", "s-001.tar"]

    def test_lists_of_shards(self, clip: Path, tmp_path: Path) -> None:
        self.shard(tmp_path / "s.tar", clip, ["a.mp4"])
        (tmp_path / "list.txt").write_text("s.tar\n")
        assert names(Corpus.open(tmp_path / "list.txt")) == ["s/a.mp4"]

    def test_a_shard_that_was_cut_gives_what_is_whole(self, clip: Path, tmp_path: Path) -> None:
        path = self.shard(tmp_path / "s.tar", clip, ["a.mp4", "b.mp4", "c.mp4"])
        with path.open("r+b") as file:
            file.truncate(512 + clip.stat().st_size * 2)
        corpus = Corpus.open(path)
        assert names(corpus) == ["s/a.mp4"]
        assert corpus.problems[0][0] == str(path)
        assert "cut off within b.mp4" in corpus.problems[0][1]

    def test_a_broken_shard_among_good_ones(self, clip: Path, tmp_path: Path) -> None:
        self.shard(tmp_path / "a.tar", clip, ["a.mp4"])
        (tmp_path / "b.tar").write_bytes(b"no archive" * 200)
        corpus = Corpus.open(tmp_path)
        assert names(corpus) == ["a/a.mp4"]
        assert "no uncompressed tar archive" in corpus.problems[0][1]

    def test_shards_without_videos(self, clip: Path, tmp_path: Path) -> None:
        self.shard(tmp_path / "a.tar", clip, ["a.jpg", "b.jpg", "c.json", "d.cls"])
        with pytest.raises(FrameError, match=r"holds no video files .* a\.jpg, .* and 1 more"):
            Corpus.open(tmp_path)

    def test_a_compressed_shard(self, clip: Path, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
            tar.add(clip, arcname="a.mp4")
        with pytest.raises(FrameError, match=r"is compressed; unpack it"):
            Corpus.open(tmp_path / "a.tar.gz")
        (tmp_path / "a.tar.gz").rename(tmp_path / "a.tar")
        with pytest.raises(FrameError, match=r"unpack a compressed one"):
            Corpus.open(tmp_path / "a.tar")


class TestMistakes:
    def test_a_missing_folder(self, tmp_path: Path) -> None:
        (tmp_path / "videos").mkdir()
        with pytest.raises(FrameError, match=r"vidoes does not exist\. Did you mean 'videos'\?"):
            Corpus.open(tmp_path / "vidoes")

    def test_an_empty_folder_and_one_with_other_things(self, tmp_path: Path) -> None:
        with pytest.raises(FrameError, match=r"looked for video files .* and found nothing$"):
            Corpus.open(tmp_path)
        for name in ("b.pdf", "a.zip", "x.npy", "y.npy"):
            (tmp_path / name).touch()
        with pytest.raises(
            FrameError, match=r"found 4 other files, such as a\.zip, b\.pdf, x\.npy; unpack the"
        ):
            Corpus.open(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("https://host/a.mp4", "is a URL"),
            ("pipe:curl x", "is a URL"),
            ("nowhere/*.mp4", "matches nothing"),
            ("nowhere-{000..003}.tar", "matches nothing"),
        ],
    )
    def test_near_misses(self, text: str, message: str) -> None:
        with pytest.raises(FrameError, match=message):
            Corpus.open(text)

    def test_no_data(self) -> None:
        with pytest.raises(FrameError, match="no data was given; expected a folder of videos"):
            Corpus.open([])

    def test_a_single_image(self, tmp_path: Path) -> None:
        images(tmp_path, 1)
        with pytest.raises(FrameError, match="is a single image; give the folder"):
            Corpus.open(tmp_path / "frame0.png")


class TestReading:
    def test_images_of_several_sizes(self, tmp_path: Path) -> None:
        images(tmp_path / "v", 3)
        Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(tmp_path / "v" / "frame1.png")
        video = Corpus.open(tmp_path).videos[0]
        assert numbers(video.read([0, 2])) == [0, 2]
        with pytest.raises(FrameError, match="are of several sizes"):
            video.read([0, 1])

    def test_a_damaged_image(self, tmp_path: Path) -> None:
        images(tmp_path / "v", 3)
        (tmp_path / "v" / "frame1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
        with pytest.raises(FrameError, match=r"frame1\.png cannot be read as an image"):
            Corpus.open(tmp_path).videos[0].read([1])

    def test_a_folder_whose_images_vanished(self, tmp_path: Path) -> None:
        images(tmp_path / "v", 1)
        video = Corpus.open(tmp_path).videos[0]
        (tmp_path / "v" / "frame0.png").unlink()
        with pytest.raises(FrameError, match="is a folder without images"):
            video.length()

    def test_whatever_a_reader_raises_is_a_sentence(
        self, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(clip, tmp_path / "a.mp4")
        video = Corpus.open(tmp_path).videos[0]

        def fail(*_: object) -> None:
            raise MemoryError("too large")

        monkeypatch.setattr("cosettle_adapter.training.corpus.count_frames", fail)
        with pytest.raises(FrameError, match=r"a\.mp4 cannot be read \(MemoryError: too large\)"):
            video.length()

    def test_a_missing_library_is_no_broken_video(
        self, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(clip, tmp_path / "new.mp4")
        monkeypatch.setitem(__import__("sys").modules, "av", None)
        with pytest.raises(MissingExtraError):
            Corpus.open(tmp_path).videos[0].length()


class TestDigest:
    def test_names_and_sizes(self, clip: Path, tmp_path: Path) -> None:
        put(clip, tmp_path / "d/a.mp4", tmp_path / "d/b.mp4")
        images(tmp_path / "d" / "frames", 2)
        digest = Corpus.open(tmp_path / "d").digest
        (tmp_path / "d").rename(tmp_path / "moved")
        assert Corpus.open(tmp_path / "moved").digest == digest, "moving changes nothing"
        (tmp_path / "moved/a.mp4").write_bytes(clip.read_bytes() + b"\0")
        changed = Corpus.open(tmp_path / "moved").digest
        (tmp_path / "moved/a.mp4").unlink()
        assert len({digest, changed, Corpus.open(tmp_path / "moved").digest}) == 3


class TestIndex:
    def make(self, root: Path) -> Path:
        for name in ("a/one", "a/two", "three"):
            images(root / name, 3)
        counts = {"a/one": 3, "a/two": 3, "three": 3}
        write_index(root, {"size": 256}, counts)
        return root

    def test_an_index_saves_looking(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = self.make(tmp_path)
        listed = []
        scan = os.scandir

        def watch(folder: str | Path) -> object:
            listed.append(os.path.relpath(folder, root))
            return scan(folder)

        monkeypatch.setattr(os, "scandir", watch)
        monkeypatch.setattr(os, "listdir", None)
        corpus = Corpus.open(root)
        assert names(corpus) == ["a/one", "a/two", "three"]
        assert [video.length() for video in corpus.videos] == [3, 3, 3]
        assert sorted(listed) == [".", "a"]

    def test_an_index_that_is_out_of_date_is_not_used(self, tmp_path: Path) -> None:
        root = self.make(tmp_path)
        images(root / "a" / "new", 2)
        corpus = Corpus.open(root)
        assert names(corpus) == ["a/new", "a/one", "a/two", "three"]
        assert "it was not used" in corpus.problems[0][1]

    def test_images_that_were_removed(self, tmp_path: Path) -> None:
        root = self.make(tmp_path)
        video = Corpus.open(root).videos[2]
        (root / "three" / "frame1.png").unlink()
        with pytest.raises(FrameError, match="holds 2 images, but the index of its corpus says 3"):
            video.read([0])

    @pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": "x", "version": 1}', "null"])
    def test_a_damaged_index_is_ignored(self, tmp_path: Path, content: str) -> None:
        root = self.make(tmp_path)
        (root / INDEX_NAME).write_text(content)
        assert len(Corpus.open(root)) == 3

    def test_an_unfinished_index_only_tells_settings(self, tmp_path: Path) -> None:
        root = self.make(tmp_path)
        content = json.loads((root / INDEX_NAME).read_text())
        (root / INDEX_NAME).write_text(json.dumps({**content, "complete": False, "frames": {}}))
        assert len(Corpus.open(root)) == 3
        assert not Corpus.open(root).problems
