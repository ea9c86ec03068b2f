"""Deinterlacing and tone mapping."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numbered import encode, encode_numbered

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video import FrameSelection, filters, open_frames

LIGHT = np.array([0, 1, 5, 10, 26, 58, 100, 203, 400, 1000])  # cd/m2; the 26 of mid grey, white


def read(path: Path, **options: bool) -> tuple[np.ndarray, list[float], list[float]]:
    chunks = list(open_frames(path, FrameSelection(**options)))  # type: ignore[arg-type]
    frames = torch.cat([chunk.frames for chunk in chunks]).movedim(1, -1).numpy()
    times = torch.cat([chunk.timestamps for chunk in chunks]).tolist()
    return frames.astype(int), times, [time for chunk in chunks for time in chunk.lost]


def combing(frames: np.ndarray) -> float:
    """How much lines differ from both of their neighbours, rather than from one."""
    middle = frames[:, 1:-1]
    above, below = middle - frames[:, :-2], middle - frames[:, 2:]
    return float(np.sqrt(np.clip(above * below, 0, None)).mean())


def moving_bar(count: int, height: int = 64, width: int = 96) -> list[np.ndarray]:
    """Frames of two fields each; between fields a bar moves by 4 pixels."""
    fields = np.full((2 * count, height, width, 3), 40, dtype=np.uint8)
    for number, field in enumerate(fields):
        field[:, 4 * number % width : 4 * number % width + 12] = 220
    frames = fields[::2].copy()
    frames[:, 1::2] = fields[1::2, 1::2]
    return list(frames)


@pytest.mark.parametrize("count", [1, 2, 12])
def test_a_moving_bar_loses_its_combing(tmp_path: Path, count: int) -> None:
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1", "g": "6"}
    path = encode(tmp_path / "bar.mp4", moving_bar(count), options=options)
    plain, times, _ = read(path)
    smooth, same_times, _ = read(path, deinterlace=True)
    assert same_times == times
    assert smooth.shape == plain.shape
    kept = [np.abs(smooth[:, line::2] - plain[:, line::2]).mean() for line in (0, 1)]
    assert min(kept) < 1, "one field stays as it is"
    if count > 2:
        assert combing(plain) > 4
        assert combing(smooth) < 1


def test_lost_frames_pass_the_filters_in_their_place(tmp_path: Path) -> None:
    path = encode_numbered(tmp_path / "clip.ts", 30, options={"g": "1"})
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    path.write_bytes(content)
    plain, deinterlaced = read(path), read(path, deinterlace=True)
    assert plain[1:] == deinterlaced[1:]
    assert plain[2]
    assert plain[0].shape == deinterlaced[0].shape


def pq(light: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084: cd/m2 to [0, 1]."""
    power = (light / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hdr(path: Path) -> Path:
    """Three frames of grey patches in PQ, with the primaries of BT.2020, mastered to 1000 cd/m2."""
    width = 16 * len(LIGHT)
    luma = np.repeat(np.round(64 + 876 * pq(LIGHT)).astype(np.uint16), 16)
    frame = av.VideoFrame(width, 16, "yuv420p10le")
    for plane in frame.planes:
        values = np.full((plane.height, plane.line_size // 2), 512, np.uint16)
        if plane.width == width:
            values[:, :width] = luma
        plane.update(values.tobytes())
    tags = "lossless=1:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc:master-display="
    tags += "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,1)"
    with av.open(str(path), "w") as container:
        options = {"x265-params": f"{tags}:log-level=none"}
        stream = container.add_stream("libx265", rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = width, 16, "yuv420p10le"
        codec = stream.codec_context
        codec.color_trc, codec.color_primaries, codec.colorspace = 16, 9, 9
        for frame.pts in range(3):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def mapped(light: np.ndarray, *, peak: float, white: float = 203.0) -> np.ndarray:
    """Grey of [0, 255] by the spline of libplacebo in PQ, and the BT.1886 curve of displays."""
    source, target = pq(np.array(peak)), pq(np.array(white))  # white by BT.2408
    knee = 0.4 * source
    target_knee = knee + 0.4 * (0.4 * target - knee)  # SMPTE ST 2094-10, adapted by 40 %
    slope = (target_knee / knee) ** (0.5 * np.clip(1.5 * (source / target - 1), 0.2, 1.2))
    rest, target_rest = source - knee, target - target_knee
    bend = (slope * rest - target_rest) / (2 * rest**3)
    x = pq(light) - knee
    below = (slope * knee - target_knee) / knee**2 * x**2 + slope * x
    above = bend * x**3 - 3 * bend * rest * x**2 + slope * x
    root = np.clip(np.where(x > 0, above, below) + target_knee, 0, 1) ** (1 / 78.84375)
    linear = np.clip(root - 0.8359375, 0, None) / (18.8515625 - 18.6875 * root)
    shown = 10000 * linear ** (1 / 0.1593017578125) / white
    return 255 * np.clip(shown, 0, 1) ** (1 / 2.4)


def test_hdr_is_mapped_to_sdr(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = hdr(tmp_path / "hdr.mkv")
    assert read(path)[1:] == ([0, 0.1, 0.2], [])
    assert "give tone_map" in caplog.text
    caplog.clear()
    frames, times, _ = read(path, tone_map=True)
    assert not caplog.records
    assert times == [0, 0.1, 0.2]
    patches = frames[0, 8, 8::16]
    assert np.ptp(patches, axis=-1).max() <= 1, "grey stays grey"
    assert patches[:, 0] == pytest.approx(mapped(LIGHT, peak=1000), abs=3)


def test_tone_mapping_leaves_sdr_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode_numbered(tmp_path / "sdr.mp4", 3)
    assert np.array_equal(read(path, tone_map=True)[0], read(path)[0])
    monkeypatch.setattr(filters, "HDR", (2,))  # and a filter that this FFmpeg does not have
    monkeypatch.setattr(filters, "_TONE_MAP", "out_transfer=none")
    with pytest.raises(FrameError, match="tone_map needs FFmpeg 8"):
        read(path, tone_map=True)
