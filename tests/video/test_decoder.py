from __future__ import annotations

import gc
import json
import logging
import struct
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numbered import encode

from cosettle_adapter.errors import FrameError, MissingExtraError, TruncatedVideoError
from cosettle_adapter.video import FrameSelection, SourceInfo, open_frames, probe
from cosettle_adapter.video.decoder import Video, decode_video

from helpers import shared_data

HEIGHT, WIDTH = 48, 64
QUADRANTS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128,) * 3}


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


def read_until_failure(path: Path) -> tuple[int, TruncatedVideoError]:
    seen = 0
    chunks = open_frames(path)  # of 8, so that the last one is not full
    while True:
        try:
            seen += len(next(chunks).frames)
        except TruncatedVideoError as error:
            return seen, error


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames at 10 per second, with a keyframe every 12 and frames coded out of order."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return encode(path, grey_levels(60), options={"g": "12", "bf": "3"})


class TestTimes:
    def test_every_frame_in_order(self, clip: Path) -> None:
        frames, times = read(clip)
        assert frames.shape == (60, 3, HEIGHT, WIDTH)
        assert frames.dtype == torch.uint8
        assert levels(frames) == list(range(60))
        assert times == [t / 10 for t in range(60)]
        assert probe(clip) == SourceInfo(60, HEIGHT, WIDTH, 10.0)

    @pytest.mark.parametrize("suffix", [".mkv", ".mov", ".avi", ".ts", ".webm", ".gif"])
    def test_containers(self, tmp_path: Path, suffix: str) -> None:
        codec = {".avi": "mpeg4", ".webm": "libvpx-vp9", ".gif": "gif"}.get(suffix, "libx264")
        pixel_format = "rgb8" if suffix == ".gif" else "yuv420p"
        options = {"speed": "8"} if suffix == ".webm" else {}
        path = encode(
            tmp_path / f"clip{suffix}",
            grey_levels(30),
            codec=codec,
            pixel_format=pixel_format,
            options=options,
        )
        _, times = read(path)
        assert times == pytest.approx([t / 10 for t in range(30)], abs=1e-6)
        assert probe(path).frames in (30, None)

    @pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
    def test_variable_frame_rate(self, tmp_path: Path, suffix: str) -> None:
        shown = [0, 40, 50, 400, 1000, 1001, 4000]
        path = encode(tmp_path / f"clip{suffix}", grey_levels(7), times=shown)
        frames, times = read(path)
        assert times == pytest.approx([ms / 1000 for ms in shown], abs=6e-4)
        assert levels(frames) == list(range(7))
        assert levels(read(path, start=0.05, end=3)[0]) == [2, 3, 4, 5]

    def test_times_count_from_the_first_frame(self, tmp_path: Path) -> None:
        shown = [5000 + 100 * t for t in range(20)]
        for suffix in (".mkv", ".ts"):
            path = encode(tmp_path / f"clip{suffix}", grey_levels(20), times=shown)
            assert read(path)[1] == pytest.approx([t / 10 for t in range(20)], abs=1e-6)

    def test_a_raw_stream_without_times_is_even(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "clip.h264", grey_levels(20), rate=25, options={"bf": "0"})
        frames, times = read(path)
        assert levels(frames) == list(range(20))
        assert times == pytest.approx([t / 25 for t in range(20)])
        assert levels(read(path, start=0.4)[0]) == list(range(10, 20))

    def test_a_video_keeps_its_own_times(self, clip: Path) -> None:
        with pytest.raises(FrameError, match="has times of its own; leave out fps"):
            open_frames(clip, FrameSelection(fps=5))


class TestSeeking:
    @pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
    def test_the_same_frames_as_without(self, tmp_path: Path, suffix: str) -> None:
        codec = "mpeg4" if suffix == ".avi" else "libx264"
        options = {"g": "12", "bf": "2"}
        path = encode(tmp_path / f"c{suffix}", grey_levels(60), codec=codec, options=options)
        every, all_times = read(path)
        for start in (0.05, 0.1, 1.1, 1.2, 1.3, 2.37, 5.9):
            frames, times = read(path, start=start, max_frames=3)
            wanted = [t for t, time in enumerate(all_times) if time >= start][:3]
            assert times == [all_times[t] for t in wanted]
            assert torch.equal(frames, every[wanted])

    def test_what_lies_far_before_is_not_decoded(self, clip: Path) -> None:
        frames = decode_video(clip, 5.0)
        assert next(frames).time == 4.8
        frames.close()

    def test_a_container_that_cannot_seek_is_read_from_the_beginning(
        self, clip: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Video, "seek", lambda *_: "no")
        assert levels(read(clip, start=5.7)[0]) == [57, 58, 59]

    def test_a_start_behind_the_end(self, clip: Path) -> None:
        with pytest.raises(FrameError, match=r"no frame from 60 s on; .* to 5\.9 s") as caught:
            read(clip, start=60)
        assert not isinstance(caught.value, TruncatedVideoError)


class TestPixels:
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
        self, tmp_path: Path, matrix: tuple[int, int, int, int], corners: list[str]
    ) -> None:
        path = encode(tmp_path / "c.mp4", [quadrants()] * 2, options={"qp": "1"})
        _set_display_matrix(path, matrix)
        frames, _ = read(path)
        height, width = (WIDTH, HEIGHT) if matrix[0] == 0 else (HEIGHT, WIDTH)
        assert frames.shape == (2, 3, height, width)
        info = probe(path)
        assert (info.height, info.width) == (height, width)
        places = [(y, x) for y in (8, height - 8) for x in (8, width - 8)]
        assert [_name(frames[1, :, y, x]) for y, x in places] == corners

    @pytest.mark.parametrize(
        ("suffix", "codec", "pixel_format"),
        [
            (".mkv", "ffv1", "gray"),
            (".mkv", "ffv1", "gray10le"),
            (".mkv", "ffv1", "yuv420p10le"),
            (".mkv", "ffv1", "yuv444p16le"),
            (".mkv", "ffv1", "yuva420p"),
            (".mkv", "ffv1", "bgra"),
            (".mov", "png", "rgba"),
            (".mov", "qtrle", "argb"),
            (".mp4", "libx264", "yuv420p10le"),
            (".mp4", "libx264", "yuv444p"),
            (".avi", "mjpeg", "yuvj420p"),
        ],
    )
    def test_every_format_becomes_eight_bit_rgb(
        self, tmp_path: Path, suffix: str, codec: str, pixel_format: str
    ) -> None:
        path = encode(
            tmp_path / f"c{suffix}", grey_levels(20), codec=codec, pixel_format=pixel_format
        )
        frames, _ = read(path)
        assert frames.shape == (20, 3, HEIGHT, WIDTH)
        assert levels(frames) == pytest.approx(list(range(20)), abs=1)

    def test_transparency_is_dropped_not_blended(self, tmp_path: Path) -> None:
        picture = np.concatenate([quadrants(), np.full((HEIGHT, WIDTH, 1), 0, np.uint8)], axis=-1)
        path = encode(tmp_path / "c.mov", [picture] * 2, codec="png", pixel_format="rgba")
        frames, _ = read(path)
        assert _name(frames[0, :, 8, 8]) == "red"

    @pytest.mark.parametrize(("height", "width"), [(47, 63), (1, 5), (33, 64)])
    def test_odd_sizes(self, tmp_path: Path, height: int, width: int) -> None:
        picture = np.arange(height * width * 3, dtype=np.uint64) * 7 % 256
        picture = picture.astype(np.uint8).reshape(height, width, 3)
        path = encode(tmp_path / "c.mkv", [picture] * 2, codec="ffv1", pixel_format="bgr0")
        frames, _ = read(path)
        np.testing.assert_array_equal(frames[0].permute(1, 2, 0).numpy(), picture)

    @pytest.mark.skipif(
        int(av.__version__.split(".")[0]) < 18, reason="this PyAV takes all colours for BT.601"
    )
    def test_the_colour_matrix_of_the_file_is_used(self, tmp_path: Path) -> None:
        colours = {}
        for space in (1, 5):  # BT.709 and BT.601
            path = tmp_path / f"{space}.mp4"
            with av.open(str(path), "w") as container:
                stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
                stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
                stream.codec_context.colorspace = space
                frame = av.VideoFrame(WIDTH, HEIGHT, "yuv420p")
                for plane, value in zip(frame.planes, (120, 90, 200), strict=True):
                    plane.update(bytes([value]) * plane.buffer_size)
                container.mux(stream.encode(frame))
                container.mux(stream.encode())
            colours[space] = read(path)[0][0, :, 5, 5].tolist()
        assert colours[1] == pytest.approx([250, 90, 40], abs=2)
        assert colours[5] == pytest.approx([235, 76, 44], abs=2)


class TestIncomplete:
    @pytest.mark.parametrize("share", [0.9, 0.5])
    @pytest.mark.parametrize(
        ("suffix", "codec", "muxing"),
        [
            (".mp4", "libx264", {"movflags": "faststart"}),
            (".mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
            (".mkv", "libx264", {}),
            (".webm", "libvpx-vp9", {}),
            (".avi", "mpeg4", {}),
        ],
    )
    def test_a_cut_file_is_read_and_then_reported(
        self, tmp_path: Path, suffix: str, codec: str, muxing: dict[str, str], share: float
    ) -> None:
        options = {"speed": "8"} if codec == "libvpx-vp9" else {"g": "6", "bf": "2"}
        whole = encode(
            tmp_path / f"whole{suffix}", noise(60), codec=codec, muxing=muxing, options=options
        )
        assert len(read(whole)[0]) == 60
        content = whole.read_bytes()
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(content[: int(share * len(content))])
        seen, error = read_until_failure(cut)
        assert 0 < seen < 60
        assert error.frames_read == seen
        assert f"read {seen}" in str(error)
        assert f"{cut} ends early: read" in str(error)
        assert "of 60 frames" in str(error) or "0 s" in str(error)

    def test_one_missing_frame_is_noticed(self, tmp_path: Path) -> None:
        whole = encode(tmp_path / "c.mp4", noise(20), muxing={"movflags": "faststart"})
        whole.write_bytes(whole.read_bytes()[:-10])
        seen, error = read_until_failure(whole)
        assert seen == 19
        assert "read 19 of 20 frames, 1.90 s of 2.00 s" in str(error)

    def test_damage_in_the_middle(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "c.mp4", noise(40), muxing={"movflags": "faststart"})
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + len(content) // 5] = bytes(len(content) // 5)
        path.write_bytes(content)
        seen, error = read_until_failure(path)
        assert 0 < seen < 30
        assert error.frames_read == seen
        assert "breaks off (Invalid data found" in str(error)
        assert f"read {seen} of 40 frames" in str(error)

    def test_patched_frames_are_mentioned(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = encode(tmp_path / "c.avi", noise(12), codec="mpeg4", options={"g": "1"})
        content = bytearray(path.read_bytes())
        for place in range(len(content) // 3, 2 * len(content) // 3, 997):
            content[place] ^= 0x55
        path.write_bytes(content)
        with caplog.at_level(logging.WARNING, logger="cosettle_adapter"):
            assert len(read(path)[0]) == 12
        assert [record.message for record in caplog.records] == [
            f"{path} is damaged: the decoder patched up what it could"
        ]

    def test_no_more_is_read_than_asked_for(self, tmp_path: Path) -> None:
        whole = encode(tmp_path / "c.mp4", noise(60), muxing={"movflags": "faststart"})
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        assert len(read(whole, max_frames=10)[0]) == 10
        assert len(read(whole, end=1.0)[0]) == 10
        with pytest.raises(TruncatedVideoError) as caught:
            read(whole, start=1.0)
        assert 0 < caught.value.frames_read < 30
        with pytest.raises(TruncatedVideoError) as caught:
            read(whole, start=4.0)
        assert caught.value.frames_read == 0
        seen, _ = read_until_failure(whole)
        with pytest.raises(TruncatedVideoError) as caught:
            read(whole, every=5)
        assert caught.value.frames_read == (seen + 4) // 5

    def test_a_missing_index(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "c.mp4", noise(10))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(FrameError, match="its end, which holds the index, is missing"):
            open_frames(path)


class TestCompleteAfterAll:
    """Ordinary files that a careless check would take for truncated."""

    def test_sound_that_outlasts_the_picture(self, tmp_path: Path) -> None:
        for suffix in (".mkv", ".mov", ".avi"):
            path = encode(tmp_path / f"c{suffix}", grey_levels(20), audio_seconds=9)
            assert len(read(path)[0]) == 20
            assert len(read(encode(path, grey_levels(1)))[0]) == 1

    def test_a_cut_file_with_sound_is_still_noticed(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "c.mkv", noise(60), audio_seconds=6)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert 0 < read_until_failure(path)[0] < 60

    def test_a_last_frame_that_stands_for_long(self, tmp_path: Path) -> None:
        shown = [0, 100, 200, 4200, 4300]
        for suffix in (".mkv", ".mp4"):
            path = encode(tmp_path / f"c{suffix}", grey_levels(5), times=shown)
            assert len(read(path)[0]) == 5

    def test_dropped_frames_of_avi(self, tmp_path: Path) -> None:
        shown = [0, 100, 200, 700, 800, 900, 1600]
        path = encode(tmp_path / "c.avi", grey_levels(7), codec="mpeg4", options={"bf": "0"})
        assert len(read(path)[0]) == 7
        path = encode(
            tmp_path / "d.avi", grey_levels(7), codec="mpeg4", times=shown, options={"bf": "0"}
        )
        assert read(path)[1] == pytest.approx([ms / 1000 for ms in shown], abs=1e-6)


class TestNotVideos:
    def test_other_files(self, tmp_path: Path) -> None:
        contents = {
            "notes.txt": b"a line of text\n" * 30,
            "notes.mp4": b"a line of text\n" * 30,
            "empty.mp4": b"",
            "bytes.bin": bytes(range(256)) * 64,
            "subtitles.srt": b"1\n00:00:01,000 --> 00:00:02,000\nhi\n",
        }
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
            for use in (open_frames, probe):
                with pytest.raises(FrameError) as caught:
                    use(tmp_path / name)  # type: ignore[operator]
                assert name in str(caught.value)
                assert "\n" not in str(caught.value)

    def test_arrays_on_disk(self, tmp_path: Path) -> None:
        np.save(tmp_path / "frames.npy", np.zeros((2, 4, 4, 3), np.uint8))
        with pytest.raises(FrameError, match=r"load it with numpy\.load or torch"):
            open_frames(tmp_path / "frames.npy")

    def test_sound(self, tmp_path: Path) -> None:
        with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(bytes(16000))
        with pytest.raises(FrameError, match=r"has no video stream \(streams: audio\)"):
            open_frames(tmp_path / "sound.wav")

    def test_a_stream_without_frames(self, tmp_path: Path) -> None:
        path = tmp_path / "c.avi"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
            container.start_encoding()
        for attempt in (lambda: read(path), lambda: probe(path)):
            with pytest.raises(FrameError, match="no frame of it can be decoded"):
                attempt()

    def test_without_pyav(self, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(MissingExtraError, match=r"reading video files .*\[video\]"):
            open_frames(clip)

    def test_a_name_that_reads_like_a_protocol(
        self, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("concat:a.mp4").write_bytes(clip.read_bytes())
        assert len(read(Path("concat:a.mp4"))[0]) == 60


class TestResources:
    @pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc to count in")
    def test_files_and_threads_are_released_at_once(self, clip: Path) -> None:
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


def _name(colour: torch.Tensor) -> str:
    distances = {
        name: int((colour.int() - torch.tensor(value)).abs().max())
        for name, value in QUADRANTS.items()
    }
    name = min(distances, key=distances.__getitem__)
    assert distances[name] < 40, colour
    return name


def _set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Overwrite the track header's matrix, as a phone held sideways would."""
    content = path.read_bytes()
    one, whole = 1 << 16, 1 << 30
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, whole)
    a, b, c, d = (value * one for value in matrix)
    place = content.index(identity, content.index(b"tkhd"))
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, whole)
    path.write_bytes(content[:place] + turned + content[place + len(turned) :])


@pytest.mark.shared
@pytest.mark.slow
def test_ordinary_clips_raise_no_alarm() -> None:
    clips = json.loads((shared_data() / "train" / "INDEX.json").read_text())
    for clip in clips:
        path = shared_data() / clip["file"]
        times = [time for chunk in open_frames(path) for time in chunk.timestamps.tolist()]
        assert len(times) == clip["frames"], path
        assert times[0] == 0
        start = times[len(times) // 2]
        assert next(open_frames(path, FrameSelection(start=start))).timestamps[0] == start, path
