"""Files that video and image readers get wrong, each made by ffmpeg, Pillow and tifffile.

What is right is what FFmpeg says of the file: frames, pixels, and times from the first frame on.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video import (
    FrameSelection,
    count_frames,
    find_images,
    find_videos,
    open_frames,
    probe,
    read_frames,
)

from helpers import shared_data

pytestmark = pytest.mark.shared

# by name: how many frames, and which lost ones in tenths of a second
WHOLE = {
    "base.mp4": 20, "bframes.avi": 10, "xvid.avi": 20, "nob.avi": 20, "base.h264": 20,
    "t.vob": 50, "t.mxf": 50, "t.y4m": 10, "t.wmv": 20, "longer_audio.wmv": 20, "cut.mpg": 63,
    "cut.mkv": 51, "restarted.ts": 40, "open.mp4": 75, "sar.mp4": 20, "pq.mp4": 20,
    "interlaced.mp4": 25, "ten.gif": 10, "vp9.webm": 40, "png.mov": 20,
}  # fmt: skip
DAMAGED = {
    "damaged_{}_h264.mp4": [12], "damaged_{}_h264.ts": [12], "damaged_{}_hevc.mp4": [16],
    "damaged_{}_mpeg2.ts": [12], "damaged_{}_vp9.webm": [13], "damaged_{}_png.mov": [0],
}  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tifffile")
    for program in ("ffmpeg", "ffprobe", "avifenc"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("cases")
    script = shared_data().parent / "media_cases" / "make.sh"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", str(script), str(folder)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PATH": path})
    return folder


def read(path: Path, **options: object) -> tuple[torch.Tensor, list[float], list[float]]:
    chunks = list(open_frames(path, FrameSelection(**options)))  # type: ignore[arg-type]
    frames = torch.cat([chunk.frames for chunk in chunks])
    times = torch.cat([chunk.timestamps for chunk in chunks]).tolist()
    return frames, times, [time for chunk in chunks for time in chunk.lost]


def truth(path: Path) -> tuple[np.ndarray, list[float]]:
    """Frames (T, H, W, 3) and their times since the first one, by FFmpeg's own programs."""
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-of", "json"]
    command += ["-show_entries", "frame=best_effort_timestamp_time,width,height", str(path)]
    said = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["frames"]
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-map", "0:v:0", "-fps_mode"]
    command += ["passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    bytes_ = subprocess.run(command, check=True, capture_output=True).stdout
    pixels = np.frombuffer(bytes_, np.uint8)
    height, width = said[0]["height"], said[0]["width"]
    times = [float(frame.get("best_effort_timestamp_time", "nan")) for frame in said]
    return pixels.reshape(-1, height, width, 3), [time - times[0] for time in times]


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files(cases: Path, name: str) -> None:
    frames, times, lost = read(cases / name)
    assert (len(frames), lost) == (WHOLE[name], [])
    assert times[0] == 0
    assert times == sorted(set(times)), "rising"
    pixels, expected = truth(cases / name)
    assert len(pixels) == len(frames)
    if name != "restarted.ts" and not np.isnan(expected[-1]):
        assert times == pytest.approx(expected, abs=1e-3)
    if name not in ("interlaced.mp4", "pq.mp4"):  # whose colours depend on FFmpeg's version
        differences = np.abs(frames.movedim(1, -1).numpy().astype(int) - pixels).mean((1, 2, 3))
        assert differences.max() < 2
    assert count_frames(cases / name) == len(frames)
    assert torch.equal(read_frames(cases / name, range(len(frames))), frames)


@pytest.mark.parametrize("kind", ["zero", "head"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_takes_only_the_frames_it_reaches(cases: Path, name: str, kind: str) -> None:
    path = cases / name.format(kind)
    frames, times, lost = read(path)
    assert lost == pytest.approx([tenths / 10 for tenths in DAMAGED[name]])
    assert sorted(round(10 * time) for time in (*times, *lost)) == list(range(len(times) + 1))
    assert len(truth(path)[0]) == len(frames)
    assert torch.equal(read_frames(path, range(len(frames))), frames)
    with pytest.raises(FrameError, match="lost 1 frame "):
        read(path, on_damage="error")


def test_times_of_files_that_store_none_are_counted(
    cases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert probe(cases / "bframes.avi").times_from == "frame rate"
    assert probe(cases / "base.mp4").times_from == "container"
    assert probe(cases / "restarted.ts").offset > 0
    assert read(cases / "base.h264")[1][:3] == pytest.approx([0, 0.1, 0.2])
    assert "10 frames/s is a guess" in caplog.text
    assert read(cases / "base.h264", source_fps=25)[1][:3] == pytest.approx([0, 0.04, 0.08])


def test_images_of_many_frames_and_values(cases: Path) -> None:
    for name in ("stack.tif", "stack16.tif", "ten.webp", "ten.png"):
        assert len(read(cases / name)[0]) == probe(cases / name).frames == 10, name
    assert read(cases / "ten.gif")[1][:4] == pytest.approx([0, 0.1, 0.15, 0.35])
    assert tuple(read(cases / "grid.avif")[0].shape) == (1, 3, 256, 256)
    for name in ("int32.tif", "float.tif"):
        assert float(read(cases / name)[0].float().mean()) > 50, name
    names = [path.name for path in find_images(cases / "unpadded")]
    assert names == ["1.jpg", "2.jpg", "9.jpg", "10.jpg"]
    assert len(read(cases / "suffixes")[0]) == 9


def test_folders_of_images(cases: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(read(cases / "frames_and_masks")[0]) == 5
    assert "left out 5 of other kinds" in caplog.text
    frames, times, lost = read(cases / "one_truncated")
    assert (len(frames), times, lost) == (5, [0, 1, 2, 4, 5], [3])
    assert "00003.jpg" in caplog.text
    found = {path.name for path in find_videos(cases)}
    assert {"t.vob", "t.mxf", "t.y4m", "t.wmv", "base.h264", "ten.gif"} <= found


def test_streams_and_sizes(cases: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="cosettle_adapter")
    assert tuple(read(cases / "two_streams.mkv")[0].shape[-2:]) == (128, 192)
    assert "reading video stream 1 (128 x 192); others by stream_index: 0" in caplog.text
    assert tuple(read(cases / "two_streams.mkv", stream_index=0)[0].shape[-2:]) == (64, 96)
    with pytest.raises(FrameError, match=r"the frame at 2 s .* is 96 x 64, but .* 64 x 96"):
        read(cases / "size_change.ts")
    with pytest.raises(FrameError, match=r"encrypted\.mp4 is encrypted"):
        read(cases / "encrypted.mp4")


def test_what_may_not_be_as_expected_is_told(cases: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = {"sar.mp4": "not square but 16:11", "pq.mp4": "HDR"}
    if hasattr(av.VideoCodecContext, "field_order"):
        told["interlaced.mp4"] = "interlaced"
    for name, warning in told.items():
        caplog.clear()
        read(cases / name)
        (record,) = caplog.records
        assert name in record.getMessage()
        assert warning in record.getMessage()
    caplog.clear()
    wide, _, _ = read(cases / "sar.mp4", square_pixels=True)
    assert tuple(wide.shape[-2:]) == (64, round(96 * 16 / 11))
    assert not caplog.records
