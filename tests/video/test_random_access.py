from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numbered import encode_numbered, numbers

from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.video import count_frames, open_frames, random_access, read_frames
from cosettle_adapter.video.decoder import FileRange, Video

COUNT = 60


def decoded(path: Path) -> torch.Tensor:
    return torch.cat([chunk.frames for chunk in open_frames(path)])


VARIANTS = {
    "b-frames.mp4": {"options": {"g": "12", "bf": "3"}},
    "open-gop.mp4": {"options": {"g": "12", "bf": "3", "x264-params": "open-gop=1"}},
    "open-gop.mkv": {"options": {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}},
    "pyramid.mkv": {"options": {"g": "20", "bf": "7", "x264-params": "b-pyramid=strict"}},
    "fragments.mp4": {
        "options": {"g": "12", "bf": "2"},
        "muxing": {"movflags": "frag_keyframe+empty_moov"},
    },
    "long-gop.mp4": {"options": {"g": "250", "bf": "2"}},
    "intra.mkv": {"options": {"g": "1"}},
    "transport.ts": {"options": {"g": "12", "bf": "2"}},
    "old.avi": {"codec": "mpeg4", "options": {"g": "12", "qmin": "1", "qmax": "2"}},
    "reordered.avi": {
        "codec": "mpeg4",
        "options": {"g": "12", "bf": "2", "qmin": "1", "qmax": "2"},
    },
    "old.mpg": {
        "codec": "mpeg2video",
        "options": {"g": "12", "bf": "2", "qmin": "1", "qmax": "2"},
        "rate": 25,
    },
    "web.webm": {"codec": "libvpx-vp9", "options": {"speed": "8", "g": "12"}},
    "hevc.mp4": {"codec": "libx265", "options": {"g": "12", "x265-params": "log-level=none"}},
    "hevc.mkv": {
        "codec": "libx265",
        "options": {"g": "12", "bf": "3", "x265-params": "open-gop=1:log-level=none"},
    },
    "coding-order.mp4": {"options": {"g": "12", "bf": "3"}, "coding_order": True},
    "coding-order.mkv": {"options": {"g": "12", "bf": "2"}, "coding_order": True},
    "raw.h264": {"options": {"g": "12", "bf": "0"}, "rate": 25},
    "uneven.mp4": {
        "options": {"g": "12", "bf": "3"},
        "times": [40 * t + 7 * (t * t % 5) + 900 * (t > 30) for t in range(COUNT)],
    },
    "uneven.mkv": {
        "options": {"g": "12", "bf": "3"},
        "times": [1000 + 40 * t + 7 * (t * t % 5) + 900 * (t > 30) for t in range(COUNT)],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {
        name: encode_numbered(folder / name, COUNT, **variant)  # type: ignore[arg-type]
        for name, variant in VARIANTS.items()
    }


class TestIdentity:
    @pytest.mark.parametrize("name", VARIANTS)
    def test_frame_i_is_what_decoding_delivers_at_i(
        self, videos: dict[str, Path], name: str
    ) -> None:
        path = videos[name]
        every = decoded(path)
        assert count_frames(path) == len(every) == COUNT
        for indices in ([0], [59], [11, 12, 13], [24, 23], [35, 5, 35], [47, 58], [30, 31, 1]):
            frames = read_frames(path, indices)
            assert numbers(frames) == indices
            assert torch.equal(frames, every[indices])

    @given(
        st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=5), st.sampled_from([*VARIANTS])
    )
    def test_any_indices(self, videos: dict[str, Path], indices: list[int], name: str) -> None:
        assert numbers(read_frames(videos[name], indices)) == indices

    def test_an_edit_list_that_cuts_the_beginning(self, tmp_path: Path) -> None:
        whole = encode_numbered(tmp_path / "whole.mp4", COUNT, options={"g": "24", "bf": "2"})
        with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size and packet.pts is not None and packet.dts is not None:
                    step = round(1 / (10 * packet.time_base))
                    packet.pts, packet.dts = packet.pts - 5 * step, packet.dts - 5 * step
                    packet.stream = stream
                    target.mux(packet)
        with av.open(str(tmp_path / "cut.mp4")) as written:
            if not next(written.demux(video=0)).is_keyframe:
                pytest.skip("this PyAV cuts the keyframe off, too")
        every = decoded(tmp_path / "cut.mp4")
        assert count_frames(tmp_path / "cut.mp4") == len(every) == COUNT - 5
        for indices in ([0, 3], [18, 19, 20], [40, 54, 2]):
            frames = read_frames(tmp_path / "cut.mp4", indices)
            assert numbers(frames) == [index + 5 for index in indices]
            assert torch.equal(frames, every[indices])

    def test_turned_upright(self, tmp_path: Path) -> None:
        path = encode_numbered(tmp_path / "c.mp4", 12)
        with av.open(str(path)) as source, av.open(str(tmp_path / "turned.mp4"), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV writes no display matrix")
            stream.set_display_rotation(90)
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
        frames = read_frames(tmp_path / "turned.mp4", [3, 9])
        assert frames.shape == (2, 3, 64, 48)
        assert torch.equal(frames, decoded(tmp_path / "turned.mp4")[[3, 9]])


class TestCost:
    def packets(self, monkeypatch: pytest.MonkeyPatch, path: Path, indices: list[int]) -> int:
        """Count the packets that are given to the decoder."""
        read = 0
        packets = Video.packets

        def count(video: Video) -> Iterator[object]:
            nonlocal read
            for packet in packets(video):
                read += 1
                yield packet

        count_frames(path)  # the index is read before
        with monkeypatch.context() as patch:
            patch.setattr(Video, "packets", count)
            read_frames(path, indices)
        return read

    @pytest.mark.parametrize("name", ["b-frames.mp4", "open-gop.mkv", "web.webm"])
    def test_no_more_than_the_keyframe_intervals_around(
        self, videos: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.packets(monkeypatch, videos[name], [51]) <= 12 + 12 + 5
        assert self.packets(monkeypatch, videos[name], [3, 51]) <= 8 + 12 + 12 + 5

    def test_frames_of_one_interval_are_decoded_in_one_go(
        self, videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.packets(monkeypatch, videos["long-gop.mp4"], [55, 20, 40]) <= COUNT + 1

    def test_a_container_that_cannot_seek(
        self, videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Video, "seek", lambda *_: "no")
        assert numbers(read_frames(videos["b-frames.mp4"], [51, 2])) == [51, 2]

    def test_times_are_read_once_until_the_file_changes(self, tmp_path: Path) -> None:
        path = encode_numbered(tmp_path / "c.mkv", 9)
        random_access._read_index.cache_clear()
        assert [count_frames(path), count_frames(path)] == [9, 9]
        assert random_access._read_index.cache_info().misses == 1
        encode_numbered(path, 14)
        os.utime(path, ns=(1, 1))
        assert count_frames(path) == 14
        assert numbers(read_frames(path, [13])) == [13]


class TestRanges:
    @pytest.fixture
    def members(self, videos: dict[str, Path], tmp_path: Path) -> dict[str, FileRange]:
        archive = tmp_path / "odd, name: x.tar"
        with tarfile.open(archive, "w") as tar:
            for name, path in videos.items():
                tar.add(path, arcname=f"some/{name}")
        with tarfile.open(archive) as tar:
            return {
                Path(member.name).name: FileRange(
                    archive, member.offset_data, member.size, member.name
                )
                for member in tar
            }

    def test_members_of_an_archive(
        self, videos: dict[str, Path], members: dict[str, FileRange]
    ) -> None:
        for name in videos:
            if name == "raw.h264":
                continue
            assert count_frames(members[name]) == COUNT
            assert torch.equal(
                read_frames(members[name], [7, 52]), read_frames(videos[name], [7, 52])
            )

    def test_an_archive_that_was_cut(self, members: dict[str, FileRange]) -> None:
        member = members["uneven.mkv"]
        with member.path.open("r+b") as archive:
            archive.truncate(member.start + member.size // 2)
        with pytest.raises(TruncatedVideoError, match=r"uneven\.mkv ends early: odd, name: x\.tar"):
            count_frames(member)


class TestBroken:
    @pytest.mark.parametrize("index", [-1, 60])
    def test_an_index_outside(self, videos: dict[str, Path], index: int) -> None:
        with pytest.raises(FrameError, match=rf"has frames 0 to 59, got index {index}"):
            read_frames(videos["b-frames.mp4"], [3, index])

    def test_no_index(self, videos: dict[str, Path]) -> None:
        with pytest.raises(FrameError, match="give at least one index"):
            read_frames(videos["b-frames.mp4"], [])

    @pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
    @pytest.mark.parametrize("share", [0.9, 0.5])
    def test_a_cut_file(self, tmp_path: Path, suffix: str, share: float) -> None:
        muxing = {"movflags": "faststart"} if suffix == ".mp4" else {}
        path = encode_numbered(tmp_path / f"c{suffix}", 60, muxing=muxing, options={"g": "6"})
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(TruncatedVideoError, match=r"ends early: read \d+ "):
            read_frames(path, [0])

    def test_damage_in_the_middle_spares_what_comes_before(self, tmp_path: Path) -> None:
        path = encode_numbered(tmp_path / "c.mp4", 60, options={"g": "12"})
        content = bytearray(path.read_bytes())
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        hit = packets[30]
        assert hit.pos is not None
        content[hit.pos : hit.pos + hit.size] = bytes(hit.size)
        path.write_bytes(content)
        assert numbers(read_frames(path, [1, 20])) == [1, 20]
        assert numbers(read_frames(path, [50])) == [50]
        with pytest.raises(FrameError, match=r"c\.mp4 cannot be decoded where it should"):
            read_frames(path, [1, 31])

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FrameError, match=r"gone\.mp4 cannot be read \(No such file"):
            count_frames(tmp_path / "gone.mp4")

    def test_a_header_without_frames(self, tmp_path: Path) -> None:
        path = tmp_path / "c.avi"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            container.start_encoding()
        with pytest.raises(FrameError, match="has a video stream, but no frame in it"):
            count_frames(path)
