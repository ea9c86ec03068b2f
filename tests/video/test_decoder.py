from __future__ import annotations

import gc
import json
import logging
import re
import struct
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numbered import encode

from cosettle_adapter.errors import DamagedError, FrameError, MissingExtraError
from cosettle_adapter.video import FrameSelection, SourceInfo, decoder, open_frames, probe
from cosettle_adapter.video.decoder import decode_video

from helpers import shared_data

HEIGHT, WIDTH = 48, 64
QUADRANTS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128,) * 3}
FASTSTART = {"movflags": "faststart"}


def grey_levels(count: int) -> list[np.ndarray]:
    """Frame t is grey of level 3 t, so that a decoded frame tells its number."""
    return [np.full((HEIGHT, WIDTH, 3), 3 * t, dtype=np.uint8) for t in range(count)]


def quadrants() -> np.ndarray:
    red, green, blue, grey = QUADRANTS.values()
    picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    picture[: HEIGHT // 2, : WIDTH // 2], picture[: HEIGHT // 2, WIDTH // 2 :] = red, green
    picture[HEIGHT // 2 :, : WIDTH // 2], picture[HEIGHT // 2 :, WIDTH // 2 :] = blue, grey
    return picture


def noise(count: int) -> list[np.ndarray]:
    """Frames that take many bytes each."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(count)]


def read(path: Path, **options: float) -> tuple[torch.Tensor, list[float]]:
    chunks = list(open_frames(path, FrameSelection(**options)))  # type: ignore[arg-type]
    times = torch.cat([chunk.timestamps for chunk in chunks]).tolist()
    return torch.cat([chunk.frames for chunk in chunks]), times


def levels(frames: torch.Tensor) -> list[int]:
    """The numbers of decoded :func:`grey_levels`."""
    return [round(float(frame.float().mean()) / 3) for frame in frames]


def read_damaged(path: Path, **options: float) -> tuple[int, list[float]]:
    """How many frames are delivered, and when others were lost."""
    chunks = list(open_frames(path, FrameSelection(**options)))  # type: ignore[arg-type]
    lost = [time for chunk in chunks for time in chunk.lost]
    with pytest.raises(DamagedError, match=re.escape(path.name)):
        list(open_frames(path, FrameSelection(on_damage="error", **options)))  # type: ignore[arg-type]
    return sum(len(chunk.frames) for chunk in chunks), lost


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames at 10 per second, with a keyframe every 12 and frames coded out of order."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return encode(path, grey_levels(60), options={"g": "12", "bf": "3"})


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi", ".ts", ".webm", ".gif"])
def test_every_frame_in_order_whatever_the_container(tmp_path: Path, suffix: str) -> None:
    codec = {".avi": "mpeg4", ".webm": "libvpx-vp9", ".gif": "gif"}.get(suffix, "libx264")
    pixel_format = "rgb8" if suffix == ".gif" else "yuv420p"
    options = {"speed": "8"} if suffix == ".webm" else {}
    path = tmp_path / f"clip{suffix}"
    encode(path, grey_levels(30), codec=codec, pixel_format=pixel_format, options=options)
    frames, times = read(path)
    assert (frames.shape, frames.dtype) == ((30, 3, HEIGHT, WIDTH), torch.uint8)
    assert times == pytest.approx([t / 10 for t in range(30)], abs=1e-6)
    info = probe(path)
    assert (info.height, info.width, info.fps) == (HEIGHT, WIDTH, 10.0)
    assert info.frames in (30, None)
    assert info.times_from == ("frame rate" if suffix == ".avi" else "container")
    if suffix != ".gif":
        assert levels(frames) == pytest.approx(list(range(30)), abs=1)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_uneven_times_count_from_the_first_frame(tmp_path: Path, suffix: str) -> None:
    offset, shown = 0 if suffix == ".mp4" else 5000, [0, 40, 50, 400, 1000, 1001, 4000]
    path = tmp_path / f"clip{suffix}"
    encode(path, grey_levels(7), times=[offset + time for time in shown])
    frames, times = read(path)
    assert times == pytest.approx([ms / 1000 for ms in shown], abs=6e-4)
    assert levels(frames) == list(range(7))
    assert levels(read(path, start=0.045, end=3)[0]) == [2, 3, 4, 5]


def test_a_raw_stream_without_times_is_even(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.h264", grey_levels(20), rate=25, options={"bf": "0"})
    frames, times = read(path)
    assert levels(frames) == list(range(20))
    assert times == pytest.approx([t / 25 for t in range(20)])
    assert levels(read(path, start=0.4)[0]) == list(range(10, 20))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
def test_reading_from_a_second_gives_the_same_frames(tmp_path: Path, suffix: str) -> None:
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    options = {"g": "12", "bf": "2"}
    path = encode(tmp_path / f"c{suffix}", grey_levels(60), codec=codec, options=options)
    every, all_times = read(path)
    for start in (0.05, 0.1, 1.1, 1.2, 1.3, 2.37, 5.9):
        frames, times = read(path, start=start, max_frames=3)
        wanted = [t for t, time in enumerate(all_times) if time >= start][:3]
        assert times == [all_times[t] for t in wanted]
        assert torch.equal(frames, every[wanted])


def test_decoding_begins_at_the_keyframe_before_where_the_container_can_seek(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = decode_video(clip, FrameSelection(start=5.0))
    assert next(frames).time == 4.8
    frames.close()

    monkeypatch.setattr(decoder, "_SEEK_MARGINS", ())
    assert levels(read(clip, start=5.7)[0]) == [57, 58, 59]
    with pytest.raises(FrameError, match=r"no frame from 60 s on; .* to 5\.9 s") as caught:
        read(clip, start=60)
    assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize(
    ("matrix", "corners"),
    [
        ((1, 0, 0, 1), ["red", "green", "blue", "grey"]),
        ((0, 1, -1, 0), ["blue", "red", "grey", "green"]),  # clockwise
        ((-1, 0, 0, -1), ["grey", "blue", "green", "red"]),
        ((0, -1, 1, 0), ["green", "grey", "red", "blue"]),  # counterclockwise
        ((-1, 0, 0, 1), ["green", "red", "grey", "blue"]),  # a mirror
        ((1, 0, 0, -1), ["blue", "grey", "red", "green"]),
        ((0, 1, 1, 0), ["red", "blue", "green", "grey"]),
        ((0, -1, -1, 0), ["grey", "green", "blue", "red"]),
    ],
)
def test_rotation_is_applied(
    tmp_path: Path, matrix: tuple[int, int, int, int], corners: list[str]
) -> None:
    path = encode(tmp_path / "c.mp4", [quadrants()] * 2, options={"qp": "1"})
    # overwrite the track header's matrix, as a phone held sideways would
    content = path.read_bytes()
    one, whole = 1 << 16, 1 << 30
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, whole)
    a, b, c, d = (value * one for value in matrix)
    place = content.index(identity, content.index(b"tkhd"))
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, whole)
    path.write_bytes(content[:place] + turned + content[place + len(turned) :])
    frames, _ = read(path)
    height, width = (WIDTH, HEIGHT) if matrix[0] == 0 else (HEIGHT, WIDTH)
    assert frames.shape == (2, 3, height, width)
    assert probe(path) == SourceInfo(2, height, width, 10.0, "container")
    places = [(y, x) for y in (8, height - 8) for x in (8, width - 8)]
    assert [_name(frames[1, :, y, x]) for y, x in places] == corners


def _name(colour: torch.Tensor) -> str:
    distances = {
        name: int((colour.int() - torch.tensor(value)).abs().max())
        for name, value in QUADRANTS.items()
    }
    name = min(distances, key=distances.__getitem__)
    assert distances[name] < 40, colour
    return name


@pytest.mark.parametrize(
    ("suffix", "codec", "pixel_format"),
    [
        (".mkv", "ffv1", "gray"),
        (".mkv", "ffv1", "yuv444p16le"),
        (".mkv", "ffv1", "yuva420p"),
        (".mov", "qtrle", "argb"),
        (".mp4", "libx264", "yuv420p10le"),
        (".avi", "mjpeg", "yuvj420p"),
    ],
)
def test_every_format_becomes_eight_bit_rgb(
    tmp_path: Path, suffix: str, codec: str, pixel_format: str
) -> None:
    path = tmp_path / f"c{suffix}"
    encode(path, grey_levels(20), codec=codec, pixel_format=pixel_format)
    frames, _ = read(path)
    assert frames.shape == (20, 3, HEIGHT, WIDTH)
    assert levels(frames) == pytest.approx(list(range(20)), abs=1)


def test_odd_sizes_and_transparency_that_is_dropped_not_blended(tmp_path: Path) -> None:
    for height, width in ((47, 63), (1, 5)):
        picture = np.arange(height * width * 3, dtype=np.uint64) * 7 % 256
        picture = picture.astype(np.uint8).reshape(height, width, 3)
        path = encode(tmp_path / "c.mkv", [picture] * 2, codec="ffv1", pixel_format="bgr0")
        np.testing.assert_array_equal(read(path)[0][0].permute(1, 2, 0).numpy(), picture)
    picture = np.concatenate([quadrants(), np.full((HEIGHT, WIDTH, 1), 0, np.uint8)], axis=-1)
    path = encode(tmp_path / "c.mov", [picture] * 2, codec="png", pixel_format="rgba")
    assert _name(read(path)[0][0, :, 8, 8]) == "red"


@pytest.mark.parametrize("share", [0.9, 0.5])
@pytest.mark.parametrize(
    ("suffix", "codec", "muxing"),
    [
        (".mp4", "libx264", FASTSTART),
        (".mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        (".mkv", "libx264", {}),
        (".webm", "libvpx-vp9", {}),
        (".avi", "mpeg4", {}),
    ],
)
def test_a_cut_file_is_read_and_then_reported(
    tmp_path: Path, suffix: str, codec: str, muxing: dict[str, str], share: float
) -> None:
    options = {"speed": "8"} if codec == "libvpx-vp9" else {"g": "6", "bf": "2"}
    path = tmp_path / f"cut{suffix}"
    encode(path, noise(60), codec=codec, muxing=muxing, options=options)
    assert len(read(path)[0]) == 60
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    seen, lost = read_damaged(path)
    assert 0 < seen < 60
    known = [t / 10 for t in range(seen, 60)]
    fragmented = "frag_keyframe+empty_moov" in muxing.values()  # nothing tells how long it was
    assert lost == pytest.approx(known[:1] if fragmented else known)


def test_one_missing_frame_is_noticed(tmp_path: Path) -> None:
    path = encode(tmp_path / "c.mp4", noise(20), muxing=FASTSTART)
    path.write_bytes(path.read_bytes()[:-10])
    assert read_damaged(path) == (19, [1.9])


def test_damage_in_the_middle(tmp_path: Path) -> None:
    path = encode(tmp_path / "c.mp4", noise(40), muxing=FASTSTART, options={"g": "8"})
    whole = read(path)[0]
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + len(content) // 5] = bytes(len(content) // 5)
    path.write_bytes(content)
    seen, lost = read_damaged(path)
    assert seen + len(lost) == 40
    assert 0 < len(lost) < 20
    assert levels(read(path)[0][-1:]) == levels(whole[-1:]), "what follows the damage is there"


def test_patched_frames_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = encode(tmp_path / "c.avi", noise(12), codec="mpeg4", options={"g": "1"})
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, 2 * len(content) // 3, 997):
        content[place] ^= 0x55
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="cosettle_adapter"):
        assert len(read(path)[0]) == 12
    assert re.search(r"c\.avi is damaged: the decoder concealed it in \d+ frames", caplog.text)


def test_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    path = encode(tmp_path / "c.mp4", noise(60), muxing=FASTSTART)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(read(path, max_frames=10)[0]) == 10
    assert len(read(path, end=1.0)[0]) == 10
    seen, lost = read_damaged(path)
    assert read_damaged(path, start=1.0) == (seen - 10, lost)
    assert read_damaged(path, every=5) == ((seen + 4) // 5, lost)
    with pytest.raises(FrameError, match=r"no frame from 4\.0 s on"):
        read(path, start=4.0)


@pytest.mark.parametrize("suffix", [".mkv", ".mov", ".avi"])
def test_sound_may_outlast_the_pictures(tmp_path: Path, suffix: str) -> None:
    path = encode(tmp_path / f"c{suffix}", grey_levels(20), audio_seconds=9)
    assert len(read(path)[0]) == 20
    assert len(read(encode(path, grey_levels(1)))[0]) == 1
    if suffix == ".mov":
        return  # its index is at the end
    for muxing in ({}, {"max_interleave_delta": "1"}):  # or all sound before the pictures
        encode(path, noise(60), codec="mpeg4", audio_seconds=6, muxing=muxing)
        path.write_bytes(path.read_bytes()[: -path.stat().st_size // 10])
        assert 0 < read_damaged(path)[0] < 60, "a cut is noticed all the same"


@pytest.mark.parametrize(
    ("suffix", "shown"),
    [
        (".mkv", [0, 100, 200, 4200, 4300]),
        (".mp4", [0, 100, 200, 4200, 4300]),
        (".avi", [0, 100, 200, 700, 800, 900, 1600]),
    ],
)
def test_frames_that_stand_for_long_are_no_sign_of_a_cut(
    tmp_path: Path, suffix: str, shown: list[int]
) -> None:
    codec, count = "mpeg4" if suffix == ".avi" else "libx264", len(shown)
    options = {"bf": "0"} if suffix == ".avi" else {}
    path = tmp_path / f"c{suffix}"
    encode(path, grey_levels(count), codec=codec, times=shown, options=options)
    assert read(path)[1] == pytest.approx([ms / 1000 for ms in shown], abs=6e-4)


def test_what_is_no_video_says_so(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    np.save(tmp_path / "frames.npy", np.zeros((2, 4, 4, 3), np.uint8))
    with av.open(str(tmp_path / "none.avi"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        container.start_encoding()
    (tmp_path / "notes.txt").write_bytes(b"a line of text\n" * 30)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "bytes.bin").write_bytes(bytes(range(256)) * 64)
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    messages = {
        "sound.wav": r"has no video stream \(streams: 0: audio\)",
        "frames.npy": r"load it with numpy\.load or torch\.load and pass the frames",
        "none.avi": "no frame of it can be decoded",
        "notes.txt": "it looks like text",
        "empty.mp4": "cannot be read as a video",
        "bytes.bin": "cannot be read as a video",
        "cut.mp4": "its end, which holds the index, is missing",
    }
    for name, message in messages.items():
        for use in (read, probe):
            with pytest.raises(FrameError, match=rf"{name} .*{message}"):
                use(tmp_path / name)  # type: ignore[operator]
    with pytest.raises(FrameError, match="has times of its own; leave out source_fps"):
        open_frames(clip, FrameSelection(source_fps=5))
    monkeypatch.chdir(tmp_path)
    Path("concat:a.mp4").write_bytes(clip.read_bytes())  # reads like a protocol
    assert len(read(Path("concat:a.mp4"))[0]) == 60
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"reading video files .*\[video\]"):
        open_frames(clip)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc to count in")
def test_files_and_threads_are_released_at_once(clip: Path) -> None:
    def leave_early(**options: float) -> None:
        chunks = open_frames(clip, FrameSelection(**options), chunk_size=2)  # type: ignore[arg-type]
        next(chunks)
        chunks.close()

    def count() -> tuple[int, int]:
        files, threads = (Path("/proc/self", name).iterdir() for name in ("fd", "task"))
        return len(list(files)), len(list(threads))

    leave_early()
    gc.collect()
    gc.disable()
    try:
        before = count()
        for _ in range(4):
            leave_early()
            leave_early(start=3.0)
            read(clip, max_frames=3)
            probe(clip)
            open_frames(clip)
        after = count()
    finally:
        gc.enable()
    assert after[0] <= before[0]
    assert after[1] <= before[1] + 1


@pytest.mark.shared
@pytest.mark.slow
def test_ordinary_clips_raise_no_alarm() -> None:
    for clip in json.loads((shared_data() / "train" / "INDEX.json").read_text()):
        path = shared_data() / clip["file"]
        times = [time for chunk in open_frames(path) for time in chunk.timestamps.tolist()]
        assert (len(times), times[0]) == (clip["frames"], 0), path
        start = times[len(times) // 2]
        assert next(open_frames(path, FrameSelection(start=start))).timestamps[0] == start, path
