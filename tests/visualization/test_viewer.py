"""The local page of ``view``: what it is made of, and what the server answers."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from cosettle_adapter import CoSettleAdapter, FrameSelection
from cosettle_adapter.errors import FrameError
from cosettle_adapter.video import plan_geometry
from cosettle_adapter.visualization import similarity_maps, similarity_peaks, viewer
from cosettle_adapter.visualization.overlays import heat
from cosettle_adapter.visualization.viewer import ViewedClip, ViewerServer, view_clip

from helpers import broken_off, noise, write_video

FRAMES = 5


def decoded(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def viewed() -> ViewedClip:
    features = {"raw last layer": noise(FRAMES, 16, 6, 9).half()}
    features["adapted"] = noise(FRAMES, 16, 6, 9, seed=1).half()
    pictures, pca = [b"picture %d" % t for t in range(FRAMES)], dict.fromkeys(features, b"colours")
    times = torch.arange(FRAMES, dtype=torch.float64) / 10
    geometry = plan_geometry(60, 90, patch=10)
    return ViewedClip("a & <b>.mp4", ["tiny"], pictures, times, geometry, features, pca)


@pytest.fixture(scope="module")
def server(viewed: ViewedClip) -> Iterator[ViewerServer]:
    with ViewerServer(viewed) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: ViewerServer, path: str, **headers: str) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def test_the_page_needs_nothing_from_elsewhere(server: ViewerServer, viewed: ViewedClip) -> None:
    status, headers, body = get(server, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert not re.search(rb"https?://|//[a-z]+\.", body)
    assert get(server, "/frame?frame=4")[2] == viewed.pictures[4]
    assert get(server, "/pca?kind=raw+last+layer")[2] == viewed.pca["raw last layer"]
    facts = json.loads(get(server, "/clip.json")[2])
    assert len(facts.pop("colours")) == 16
    assert facts == {
        "name": viewed.name, "facts": ["tiny"], "times": [0, 0.1, 0.2, 0.3, 0.4], "size": [90, 60],
        "grid": [9, 6], "covered": [[0, 0], [90, 60]], "kinds": ["raw last layer", "adapted"],
    }  # fmt: skip


def test_similarities_are_those_of_the_library(server: ViewerServer, viewed: ViewedClip) -> None:
    status, _, body = get(server, "/similarity?kind=adapted&frame=1&x=35.5&y=24")
    assert status == 200
    answer = json.loads(body)
    maps = similarity_maps(viewed.features["adapted"], viewed.geometry, (35.5, 24), frame=1)
    peaks = torch.tensor(answer["peaks"], dtype=torch.float64)
    torch.testing.assert_close(peaks[:, :2], similarity_peaks(maps, viewed.geometry))
    torch.testing.assert_close(peaks[:, 2].float(), maps.amax((1, 2)))
    expected = rearrange(heat(rearrange(maps, "t h w -> (t h) w").clamp(0, 1)), "c h w -> h w c")
    np.testing.assert_array_equal(decoded(base64.b64decode(answer["heat"])), expected)


def test_what_makes_no_sense_and_other_sites_are_refused(server: ViewerServer) -> None:
    similarity, port = "/similarity?kind=adapted&frame=0", server.server_port
    for path, host, status, sentence in (
        ("/frame", "localhost", 400, "'frame'"),
        ("/frame?frame=5", "localhost", 400, "frame=5, expected 0 to 4"),
        ("/pca?kind=other", "localhost", 400, "'other'"),
        (f"{similarity}&x=a&y=3", "localhost", 400, "'a'"),
        (f"{similarity}&x=90.5&y=3", "localhost", 400, "outside the frame of 90 x 60"),
        ("/%2e%2e/viewer.py", "localhost", 404, "does not exist"),
        ("/clip.json", "evil.example", 403, "Open http://127.0.0.1"),  # a name of theirs
    ):
        found, headers, body = get(server, path, Host=f"{host}:{port}")
        assert (found, headers["Content-Type"]) == (status, "text/plain")
        assert sentence in body.decode()
    assert server.server_address[0] == "127.0.0.1"


def test_a_clip_is_encoded_like_the_adapter_does(
    tiny_adapter: CoSettleAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=7, height=60, width=100)
    done: list[int] = []
    select = FrameSelection(every=2)
    viewed = view_clip(
        tiny_adapter, path, size=48, select=select, batch_size=3, on_frames=done.append
    )
    assert done == [3, 4]
    assert viewed.name == "clip.mp4"
    assert list(viewed.features) == ["raw last layer", "raw same layer", "centred", "adapted"]
    assert viewed.times.tolist() == pytest.approx([0, 0.08, 0.16, 0.24])
    (chunk,) = tiny_adapter.stream(path, size=48, select=select, return_backbone=True)
    assert viewed.geometry == chunk.geometry
    assert chunk.backbone is not None
    for kind, expected in {"adapted": chunk.features, "raw same layer": chunk.backbone}.items():
        maps = viewed.features[kind]
        assert maps.dtype == torch.float16
        torch.testing.assert_close(maps.float(), expected.float(), atol=5e-3, rtol=5e-3)
    h, w = chunk.geometry.grid
    assert {decoded(picture).shape for picture in viewed.pca.values()} == {(4 * h, w, 3)}
    assert decoded(viewed.pictures[0]).shape == (60, 100, 3)
    monkeypatch.setattr(viewer, "_LONGEST", 50)
    viewed = view_clip(tiny_adapter, path, size=48, fusion="causal")
    assert decoded(viewed.pictures[0]).shape == (30, 50, 3), "no larger than a screen"
    fused = viewed.features
    assert list(fused)[-2:] == ["adapted", "adapted, fused causally"]
    assert (fused["adapted"] - fused["adapted, fused causally"])[1:].abs().mean() > 4e-3


def test_the_readable_part_of_a_broken_video_is_shown(
    tiny_adapter: CoSettleAdapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = write_video(tmp_path / "whole.mkv", frames=40, height=64, width=96, noisy=True)
    broken = broken_off(whole)
    viewed = view_clip(tiny_adapter, broken, size=32)
    assert 0 < len(viewed.pictures) < 40
    assert "cut.mkv lost" in caplog.text
    with pytest.raises(FrameError):
        view_clip(tiny_adapter, tmp_path / "none.mp4")
