from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
import torch
from numbered import encode_numbered, numbers

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video import count_frames, decoder, open_frames, random_access, read_frames
from cosettle_adapter.video.decoder import Video
from cosettle_adapter.video.sources import FileRange

COUNT = 60
OLD = {"g": "12", "qmin": "1", "qmax": "2"}
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
    "old.avi": {"codec": "mpeg4", "options": OLD},
    "reordered.avi": {"codec": "mpeg4", "options": OLD | {"bf": "2"}},
    "old.mpg": {"codec": "mpeg2video", "options": OLD | {"bf": "2"}, "rate": 25},
    "web.webm": {"codec": "libvpx-vp9", "options": {"speed": "8", "g": "12"}},
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


def decoded(path: Path) -> torch.Tensor:
    return torch.cat([chunk.frames for chunk in open_frames(path)])


def remuxed(source: Path, target: Path, *, shift: int = 0, turn: int = 0) -> Path:
    """Copy the packets, ``shift`` frames early and with a display rotation."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        if turn and not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV writes no display matrix")
        if turn:
            stream.set_display_rotation(turn)
        for packet in old.demux(video=0):
            if packet.size and packet.pts is not None and packet.dts is not None:
                early = round(shift / (10 * packet.time_base))
                packet.pts, packet.dts = packet.pts - early, packet.dts - early
                packet.stream = stream
                new.mux(packet)
    return target


@pytest.mark.parametrize("name", VARIANTS)
def test_frame_i_is_what_decoding_delivers_at_i(videos: dict[str, Path], name: str) -> None:
    path = videos[name]
    every = decoded(path)
    assert count_frames(path) == len(every) == COUNT
    for indices in ([0], [59], [11, 12, 13], [24, 23], [35, 5, 35], [47, 58], [30, 31, 1]):
        frames = read_frames(path, indices)
        assert numbers(frames) == indices
        assert torch.equal(frames, every[indices])


def test_an_edit_list_that_cuts_the_beginning(tmp_path: Path) -> None:
    whole = encode_numbered(tmp_path / "whole.mp4", COUNT, options={"g": "24", "bf": "2"})
    path = remuxed(whole, tmp_path / "cut.mp4", shift=5)
    with av.open(str(path)) as written:
        if not next(written.demux(video=0)).is_keyframe:
            pytest.skip("this PyAV cuts the keyframe off, too")
    every = decoded(path)
    assert count_frames(path) == len(every) == COUNT - 5
    for indices in ([0, 3], [18, 19, 20], [40, 54, 2]):
        frames = read_frames(path, indices)
        assert numbers(frames) == [index + 5 for index in indices]
        assert torch.equal(frames, every[indices])


def test_turned_upright(tmp_path: Path) -> None:
    path = encode_numbered(tmp_path / "c.mp4", 12)
    path = remuxed(path, tmp_path / "turned.mp4", turn=90)
    frames = read_frames(path, [3, 9])
    assert frames.shape == (2, 3, 64, 48)
    assert torch.equal(frames, decoded(path)[[3, 9]])


def test_no_more_is_decoded_than_the_keyframe_intervals_around(
    videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0
    packets = Video._packets

    def counted(video: Video) -> Iterator[object]:
        nonlocal read
        for packet in packets(video):
            read += 1
            yield packet

    def cost(name: str, indices: list[int]) -> int:
        nonlocal read
        count_frames(videos[name])  # the index is read before
        read = 0
        with monkeypatch.context() as patch:
            patch.setattr(Video, "_packets", counted)
            read_frames(videos[name], indices)
        return read

    for name in ("b-frames.mp4", "open-gop.mkv", "web.webm"):
        assert cost(name, [51]) <= 12 + 12 + 5
        assert cost(name, [3, 51]) <= 8 + 12 + 12 + 5
    assert cost("long-gop.mp4", [55, 20, 40]) <= COUNT + 5, "in one go"

    monkeypatch.setattr(decoder, "_SEEK_MARGINS", ())  # not every container can
    assert numbers(read_frames(videos["b-frames.mp4"], [51, 2])) == [51, 2]


def test_times_are_read_once_until_the_file_changes(tmp_path: Path) -> None:
    path = encode_numbered(tmp_path / "c.mkv", 9)
    random_access._read_index.cache_clear()
    assert [count_frames(path), count_frames(path)] == [9, 9]
    assert random_access._read_index.cache_info().misses == 1
    encode_numbered(path, 14)
    os.utime(path, ns=(1, 1))
    assert count_frames(path) == 14
    assert numbers(read_frames(path, [13])) == [13]


def test_members_of_an_archive_also_of_one_that_was_cut(
    videos: dict[str, Path], tmp_path: Path
) -> None:
    archive = tmp_path / "odd, name: x.tar"
    with tarfile.open(archive, "w") as tar:
        for name in VARIANTS.keys() - {"raw.h264"}:
            tar.add(videos[name], arcname=f"some/{name}")
    with tarfile.open(archive) as tar:
        members = [FileRange(archive, each.offset_data, each.size, each.name) for each in tar]
    for member in members:
        assert count_frames(member) == COUNT
        whole = read_frames(videos[Path(member.name).name], [7, 52])
        assert torch.equal(read_frames(member, [7, 52]), whole)
    last = members[-1]
    with archive.open("r+b") as file:
        file.truncate(last.start + last.size // 2)
    with pytest.raises(FrameError, match=rf"{last.name} is cut off: odd, name: x\.tar"):
        count_frames(last)


def test_frames_that_are_not_there(videos: dict[str, Path], tmp_path: Path) -> None:
    path = videos["b-frames.mp4"]
    for index in (-1, 60):
        with pytest.raises(FrameError, match=rf"has frames 0 to 59, got index {index}"):
            read_frames(path, [3, index])
    with pytest.raises(FrameError, match="give at least one index"):
        read_frames(path, [])
    with pytest.raises(FrameError, match=r"gone\.mp4 cannot be read \(No such file"):
        count_frames(tmp_path / "gone.mp4")
    with av.open(str(tmp_path / "c.avi"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    with pytest.raises(FrameError, match="has a video stream, but no frame of it can be decoded"):
        count_frames(tmp_path / "c.avi")


def test_positions_are_those_of_what_a_damaged_file_delivers(tmp_path: Path) -> None:
    path = encode_numbered(tmp_path / "c.mp4", 60, options={"g": "12"})
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        hit = [packet for packet in container.demux(video=0) if packet.size][30]
    assert hit.pos is not None
    content[hit.pos : hit.pos + hit.size] = bytes(hit.size)
    path.write_bytes(content)
    assert numbers(read_frames(path, [1, 20])) == [1, 20]
    delivered = torch.cat([chunk.frames for chunk in open_frames(path)])
    assert len(delivered) == count_frames(path) < count_frames(path, verify=False) == 60
    assert torch.equal(read_frames(path, range(len(delivered))), delivered)
    path = encode_numbered(tmp_path / "c.mkv", 60, options={"g": "6"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert numbers(read_frames(path, [0])) == [0]


def test_frames_of_several_sizes_are_refused(tmp_path: Path) -> None:
    joined = b""
    for side in (48, 96):
        times = [20 * side + 40 * t for t in range(10)]
        joined += encode_numbered(tmp_path / "c.ts", 10, side, times=times).read_bytes()
    (tmp_path / "c.ts").write_bytes(joined)
    with pytest.raises(FrameError, match="are of several sizes: 48 x 64, 96 x 64"):
        read_frames(tmp_path / "c.ts", [0, 19])
