from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from drawn import grey, problem_of
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import (
    Clip,
    Tracks,
    queries_first,
    queries_strided,
    tapvid_clips,
    tapvid_metrics,
    tapvid_protocol,
)
from cosettle_adapter.video.geometry import plan_geometry

from helpers import noise

T, H, W, N = 4, 12, 20, 3


def entry(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(len(changes))
    return {
        "video": rng.integers(0, 256, (T, H, W, 3)).astype(np.uint8),
        "points": rng.random((N, T, 2)).astype(np.float32),
        "occluded": rng.random((N, T)) > 0.7,
        **changes,
    }


def jpegs() -> list[bytes]:
    encoded = [io.BytesIO() for _ in range(T)]
    for t, buffer in enumerate(encoded):
        Image.fromarray(np.full((H, W, 3), 10 * t, dtype=np.uint8)).save(buffer, format="JPEG")
    return [buffer.getvalue() for buffer in encoded]


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<i2"])
def test_a_dict_of_videos(tmp_path: Path, protocol: int, dtype: str) -> None:
    points = np.asfortranarray(10 * entry()["points"]).astype(dtype)
    also = [np.float32(2.5), 3, None, (True, b"\xff")]
    content = {"goat": entry(), "car": entry(points=points, also=also)}
    path = write(tmp_path / "tapvid_davis.pkl", content, protocol)
    if protocol == 2:  # has no lengths in it: as NumPy 1 wrote it
        path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
    clips = tapvid_clips(path)
    assert [(clip.name, len(clip)) for clip in clips] == [("goat", T), ("car", T)]
    for clip, expected in zip(clips, content.values(), strict=True):
        np.testing.assert_array_equal(clip.read_annotations().points, expected["points"])
        np.testing.assert_array_equal(clip.read_annotations().occluded, expected["occluded"])
        np.testing.assert_array_equal(clip.read_frame(2), expected["video"][2])
        clip.read_frame(0)[:] = 0  # a frame is the caller's own
        assert clip.read_frame(0).any()
    assert [clip.name for clip in tapvid_clips(path, clips=["car"])] == ["car"]


@pytest.mark.parametrize("kind", [list, np.array, lambda x: np.array(x, dtype=object)])
@pytest.mark.parametrize("protocol", [2, 5])
def test_frames_as_jpeg_files(tmp_path: Path, kind: Any, protocol: int) -> None:
    damaged = [*jpegs()[:1], jpegs()[1][:40], *jpegs()[2:]]
    content = [entry(video=kind(jpegs())), entry(video=kind(damaged))]
    whole, broken = tapvid_clips(write(tmp_path / "0000_of_0010.pkl", content, protocol))
    assert (whole.name, len(whole), grey(whole, 2)) == ("0000_of_0010_0000", T, 2)
    assert grey(broken, 0) == 0
    with pytest.raises(FrameError, match="frame 1 of '0000_of_0010_0001' cannot be read"):
        broken.read_frame(1)


def test_a_folder_is_read_in_order_of_its_files(tmp_path: Path) -> None:
    write(tmp_path / "1.pkl", [entry()])
    write(tmp_path / "0.pkl", [entry(), entry()])
    (tmp_path / "README").touch()
    assert [clip.name for clip in tapvid_clips(tmp_path)] == ["0_0000", "0_0001", "1_0000"]


def test_a_pickle_is_in_memory_only_while_its_videos_are_read(tmp_path: Path) -> None:
    shards = [write(tmp_path / f"000{n}_of_0003.pkl", [entry(video=jpegs())]) for n in range(3)]
    clips = tapvid_clips(tmp_path)
    digests = [clip.digest() for clip in clips]
    assert len(set(digests)) == 3, "names differ"
    assert [grey(clip, 3) for clip in clips] == [3, 3, 3]
    write(shards[0], [entry(video=jpegs()[::-1])])
    clips[2].read_annotations()
    assert grey(clips[0], 3) == 0, "read again"
    assert clips[0].digest() != digests[0]


def test_one_bad_video_does_not_lose_the_others(tmp_path: Path) -> None:
    pointless = {"tracks": 1, **{name: entry()[name] for name in ("video", "occluded")}}
    bad = {
        "pointless": (pointless, r"got \['occluded', 'tracks', 'video'\], expected video, points"),
        "no dict": (3, "got int, expected video"),
        "short": (entry(points=entry()["points"][:, :2]), r"\(3, 2, 2\) .* numbers \(N, 4, 2\)"),
        "grey": (entry(video=entry()["video"][..., 0]), r"no frames, expected uint8 \(T, H, W"),
        "unclear": (entry(occluded=np.full((N, T), 0.5)), r"occlusion of shape \(3, 4\), expected"),
        "text": (entry(video=["a"] * T), "no frames"),
    }
    content = {"good": entry()} | {name: video for name, (video, _) in bad.items()}
    good, *others = tapvid_clips(write(tmp_path / "davis.pkl", content))
    assert good.read_frame(0).shape == (H, W, 3)
    for clip, (name, (_, message)) in zip(others, bad.items(), strict=True):
        assert re.search(rf"TAP-Vid video '{name}': .*davis\.pkl: .*{message}", problem_of(clip))


def test_wrong_paths_are_explained(tmp_path: Path) -> None:
    write(tmp_path / "tapvid_davis.pkl", {"a": entry()})
    (tmp_path / "tapvid").mkdir()
    (tmp_path / "tapvid" / "tapvid_davis.zip").touch()
    for path, message in [
        (tmp_path / "tapvid_davsi.pkl", r"Did you mean 'tapvid_davis.pkl'"),
        (tmp_path / "tapvid", r"holds no .pkl, .*; found tapvid_davis.zip"),
        (write(tmp_path / "one.pkl", entry()), "holds a single video"),
        (write(tmp_path / "odd.pkl", "text"), "holds a str, expected a pickle of TAP-Vid"),
    ]:
        with pytest.raises(FrameError, match=message):
            tapvid_clips(path)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_call_is_refused_and_not_made(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "was here"
    for function, arguments in [
        (Path.touch, (trace,)),
        (eval, (f"open({str(trace)!r}, 'w')",)),
        (__import__, ("os",)),
        (getattr, ("", "join")),
        (np.frombuffer, (b"1234",)),
        (pickle.loads, (b"",)),
    ]:
        content = {"goat": {"video": [Call(function, *arguments)]}}
        with pytest.raises(FrameError, match=r"was not loaded: it asks for .* do not trust it"):
            tapvid_clips(write(tmp_path / "evil.pkl", content, protocol))
    # the same file does it, if it is executed
    write(tmp_path / "evil.pkl", Call(Path.touch, trace), protocol)
    assert not trace.exists()
    pickle.loads((tmp_path / "evil.pkl").read_bytes())
    assert trace.exists()


def stream(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


RECONSTRUCT = named("numpy._core.multiarray", "_reconstruct")
ARRAY = RECONSTRUCT + named("numpy", "ndarray") + b"K\x00\x85U\x01b\x87R"
FLOAT = named("numpy", "dtype") + b"U\x02f8\x85R"
ENCODE = named("_codecs", "encode")
KEYS = (b"video", b"points", b"occluded")


def test_tampered_streams_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pkl"
    for content, message in (
        (stream(named("builtins", "list"), b")R"), "asks for builtins.list"),
        (stream(named("numpy", "ndarray"), b"K\x05\x85R"), "cannot be read .* TypeError"),
        (stream(named("numpy", "ndarray.tobytes")), "asks for numpy.ndarray.tobytes"),
        (stream(RECONSTRUCT), "holds a function, expected"),
        (stream(FLOAT), "holds a _Type"),
        (stream(named("numpy", "dtype"), b"U\x05O,f8,\x85R"), "an array of type 'O,f8,'"),
        (stream(named("numpy", "dtype"), b"U\x02V8\x85R"), "an array of type 'V8'"),
        (stream(ENCODE, b"}U\x04evilK\x01sb"), "holds a function, expected"),  # sets its attribute
        (stream(b"U\x01aQ"), "cannot be read .* persistent"),
        (b"", "cannot be read .* EOFError"),
        (b"PK\x03\x04", "cannot be read"),
        (pickle.dumps(np.ma.masked_array([1, 2])), "asks for numpy.ma"),
        (pickle.dumps(np.array(["2020"], dtype="datetime64[D]")), "an array of type 'M8'"),
    ):
        path.write_bytes(content)
        with pytest.raises(FrameError, match=message):
            tapvid_clips(path)
        # nor has it changed how the next one is read
        assert len(tapvid_clips(write(path, {"a": entry(b=b"\xff\x00")}, protocol=2))) == 1


def test_arrays_that_cannot_be_made_are_the_clips_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    short = pickle.dumps({"a": entry(occluded=np.zeros((N, T), dtype=np.uint8))}, 2)
    path.write_bytes(short.replace(b"K\x03K\x04\x86", b"K\x03K\x05\x86"))
    assert re.search("invalid array: .*too small", problem_of(tapvid_clips(path)[0]))
    # a function that has been given the attributes of a type, and an array without a state
    fake = b"(K\x01K\x01" + ENCODE + b"}U\x04codeU\x04f8,Osb\x89C\x00tb"
    for array in (ARRAY + fake, ARRAY):
        keys = b"".join(b"U" + bytes([len(key)]) + key + array for key in KEYS)
        path.write_bytes(stream(b"}U\x01a}(", keys, b"us"))
        assert "invalid array" in problem_of(tapvid_clips(path)[0])


def chrono_by_hand(features: Tensor, query: NDArray[np.float64]) -> NDArray[np.float64]:
    """A track (T, 2) (x, y) of query (t, y, x) on a 256 x 256 raster, as Chrono's code words it.

    Cells and raster positions are both continuous; a cell's centre is half a cell from its corner.
    """
    maps = (features / features.norm(dim=1, keepdim=True)).double().numpy()
    height, width = maps.shape[2:]
    row, column = query[1] * height / 256 - 0.5, query[2] * width / 256 - 0.5
    feature = np.zeros(maps.shape[1])
    for y in (int(np.floor(row)), int(np.floor(row)) + 1):
        for x in (int(np.floor(column)), int(np.floor(column)) + 1):
            weight = (1 - abs(row - y)) * (1 - abs(column - x))
            feature += (
                weight
                * maps[int(query[0]), :, min(max(y, 0), height - 1), min(max(x, 0), width - 1)]
            )
    track = []
    for frame in maps:
        heat = np.exp(20 * np.einsum("c,chw->hw", feature, frame))
        top, left = np.unravel_index(heat.argmax(), heat.shape)
        total, place = 0.0, np.zeros(2)
        for y in range(height):
            for x in range(width):
                if (y - top) ** 2 + (x - left) ** 2 < 5**2:
                    total += heat[y, x]
                    place += heat[y, x] * np.array([x + 0.5, y + 0.5])
        track.append(place / total * 256 / np.array([width, height]))
    return np.array(track)


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_points_are_tracked_as_chrono_does(mode: Any, tmp_path: Path) -> None:
    protocol = tapvid_protocol(Path(), mode=mode, protocol="chrono")
    geometry = plan_geometry(896, 896, patch=56, stride=56, size=(896, 896))
    features = F.interpolate(noise(5, 32, 16, 12, seed=3), geometry.grid, mode="bilinear")
    rng = np.random.default_rng(0)
    truth = Tracks(rng.random((4, 5, 2)), rng.random((4, 5)) > 0.6)
    scores = protocol.score(Clip("clip", [], lambda: truth), features, geometry, tmp_path)
    queries = {"first": queries_first, "strided": queries_strided}[mode](
        truth.occluded, 256 * truth.points
    )
    expected = np.array([chrono_by_hand(features, query) for query in queries.points])
    found = np.array(json.loads((tmp_path / "positions.json").read_text())["xy"]) * 256 / 896
    np.testing.assert_allclose(found, expected, atol=1e-3)
    hidden = np.zeros(queries.occluded.shape, dtype=bool)  # delta_avg does not depend on it
    by_hand = tapvid_metrics(
        queries.points, queries.occluded, queries.tracks, hidden, expected, mode
    )
    assert scores.values["delta_avg"] == pytest.approx(by_hand.delta_avg)


def test_chrono_reduces_frames_and_enlarges_them() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 30, 50, 3), dtype=np.uint8)
    protocol = tapvid_protocol(Path(), protocol="chrono")
    assert protocol.size(Clip("clip", [], lambda: None)) == (896, 896)
    small = np.asarray(Image.fromarray(frames[1]).resize((256, 256), Image.Resampling.LANCZOS))
    adapter: Any = SimpleNamespace(preprocess=lambda images, size: images)
    given = rearrange(torch.from_numpy(frames), "t h w c -> t c h w")
    found = rearrange(protocol.preprocess(adapter, given, size=(896, 896))[1], "c h w -> h w c")
    # pixel k is the mean of pixels at (k + 0.5) * 256 / 896 - 0.5
    at = (np.arange(896) + 0.5) * 256 / 896 - 0.5
    rows = np.apply_along_axis(lambda line: np.interp(at, np.arange(256), line), 0, small / 255)
    expected = np.apply_along_axis(lambda line: np.interp(at, np.arange(256), line), 1, rows)
    np.testing.assert_allclose(found, expected, atol=1e-5)
