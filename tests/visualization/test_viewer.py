from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from cosettle_adapter import CoSettleAdapter, FrameSelection
from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.correspondence import temporal_fusion
from cosettle_adapter.errors import FrameError
from cosettle_adapter.video import plan_geometry
from cosettle_adapter.visualization import fit_pca, similarity_maps
from cosettle_adapter.visualization.viewed_clip import ViewedClip, view_clip
from cosettle_adapter.visualization.viewer_server import ViewerServer, open_server

from helpers import write_video

Image = pytest.importorskip("PIL.Image")

FRAMES = 5
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def shifting(seed: int) -> torch.Tensor:
    """Random features on 9 x 6 cells that move right by one cell a frame."""
    row = torch.randn((16, 6, 9 + FRAMES), generator=torch.Generator().manual_seed(seed))
    clip = [row[:, :, FRAMES - t : FRAMES - t + 9] for t in range(FRAMES)]
    return torch.stack(clip).half()


@pytest.fixture(scope="module")
def viewed() -> ViewedClip:
    """Adapted features that move with the picture, and raw ones that stay where they are."""
    pictures = []
    for t in range(FRAMES):
        pixels = np.full((60, 90, 3), 120, dtype=np.uint8)
        pixels[20:30, 30 + 10 * t : 40 + 10 * t] = (250, 180, 20)
        written = io.BytesIO()
        Image.fromarray(pixels).save(written, format="JPEG")
        pictures.append(written.getvalue())
    features = {
        "raw last layer": shifting(1)[:1].expand(FRAMES, -1, -1, -1),
        "adapted": shifting(2),
    }
    colours = {
        kind: (255 * fit_pca(maps).colours(maps)).to(torch.uint8) for kind, maps in features.items()
    }
    return ViewedClip(
        name="a & <b>.mp4",
        facts={"backbone": "tiny"},
        pictures=pictures,
        times=torch.arange(FRAMES, dtype=torch.float64) / 10,
        geometry=plan_geometry(60, 90, patch=10),
        features=features,
        colours=colours,
    )


@pytest.fixture(scope="module")
def server(viewed: ViewedClip) -> Iterator[ViewerServer]:
    with serving(viewed) as server:
        yield server


@contextlib.contextmanager
def serving(clip: ViewedClip) -> Iterator[ViewerServer]:
    server = open_server(clip)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def get(
    server: ViewerServer, path: str, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


# what the server answers


def test_the_page_needs_nothing_from_elsewhere(server: ViewerServer) -> None:
    for path, kind in {"/": "html", "/viewer.js": "javascript", "/viewer.css": "css"}.items():
        status, headers, body = get(server, path)
        assert status == 200
        assert kind in headers["Content-Type"]
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert not re.search(rb"https?://|//[a-z]+\.", body), path


def test_facts_of_the_clip(server: ViewerServer, viewed: ViewedClip) -> None:
    facts = json.loads(get(server, "/clip.json")[2])
    assert facts["name"] == viewed.name
    assert facts["frames"] == FRAMES
    assert facts["size"] == [90, 60]
    assert facts["grid"] == [9, 6]
    assert facts["covered"] == [0, 0, 90, 60]
    assert facts["kinds"] == ["raw last layer", "adapted"]
    assert facts["times"] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert len(facts["colours"]) == 256


def test_frames_are_pictures(server: ViewerServer) -> None:
    status, headers, body = get(server, "/frame?index=4")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    with Image.open(io.BytesIO(body)) as image:
        assert image.size == (90, 60)


@pytest.mark.parametrize("kind", ["adapted", "raw+last+layer"])
def test_similarities_are_those_of_the_library(
    server: ViewerServer, viewed: ViewedClip, kind: str
) -> None:
    status, _, body = get(server, f"/similarity?kind={kind}&frame=1&x=35.5&y=24")
    assert status == 200
    sent = rearrange(np.frombuffer(body, "<i2"), "(t h w) -> t h w", t=FRAMES, h=6) / 32767
    features = viewed.features[kind.replace("+", " ")]
    expected = similarity_maps(features, viewed.geometry, (35.5, 24), frame=1)
    np.testing.assert_allclose(sent, expected, atol=2e-5)


def test_colours_come_pixel_by_pixel(server: ViewerServer, viewed: ViewedClip) -> None:
    body = get(server, "/colours?kind=adapted")[2]
    sent = rearrange(np.frombuffer(body, np.uint8), "(t h w c) -> t c h w", t=FRAMES, h=6, c=3)
    np.testing.assert_array_equal(sent, viewed.colours["adapted"])


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/frame", "lacks index="),
        ("/frame?index=5", "Got index='5', expected a frame from 0 to 4"),
        ("/frame?index=-1", "index='-1'"),
        ("/frame?index=1e2", "index='1e2'"),
        ("/frame?index=%C2%B2", "expected a frame"),
        ("/colours?kind=other", "Got kind='other', expected one of 'raw last layer', 'adapted'"),
        ("/similarity?kind=adapted&frame=0&y=3", "lacks x="),
        ("/similarity?kind=adapted&frame=0&x=a&y=3", "Got x='a', expected a number"),
        ("/similarity?kind=adapted&frame=0&x=90.5&y=3", "outside the frame of 90 x 60"),
        ("/similarity?kind=adapted&frame=0&x=nan&y=3", "outside the frame"),
        ("/similarity?kind=adapted&frame=0&x=inf&y=-inf", "outside the frame"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    server: ViewerServer, path: str, sentence: str
) -> None:
    status, headers, body = get(server, path)
    assert status == 400
    assert headers["Content-Type"].startswith("text/plain")
    assert sentence in body.decode()


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/../server.py", "/page/index.html", "/%2e%2e/server.py", "//etc/passwd", "/?/.."],
)
def test_only_the_page_is_served(server: ViewerServer, path: str) -> None:
    status, _, body = get(server, path)
    assert status == (200 if path == "/?/.." else 404)
    assert b"import" not in body


def test_other_sites_cannot_read_the_clip_through_a_name_of_theirs(server: ViewerServer) -> None:
    port = server.server_port
    assert server.server_address[0] == "127.0.0.1"
    assert get(server, "/clip.json", Host=f"evil.example:{port}")[0] == 403
    assert get(server, "/clip.json", Host=f"localhost:{port}")[0] == 200


def test_a_port_in_use_leads_to_the_next(viewed: ViewedClip) -> None:
    with open_server(viewed) as first:
        wanted = first.server_port
        with open_server(viewed, port=wanted) as second:
            assert wanted < second.server_port <= wanted + 20
    with pytest.raises(ValueError, match="port 70000"):
        open_server(viewed, port=70000)


# what it is made of


def test_a_clip_is_encoded_like_the_adapter_does(
    tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=7, height=60, width=100)
    done: list[int] = []
    viewed = view_clip(
        tiny_adapter,
        path,
        size=48,
        select=FrameSelection(every=2),
        batch_size=3,
        on_frames=done.append,
    )
    assert done == [3, 4]
    assert viewed.name == "clip.mp4"
    assert list(viewed.features) == ["raw last layer", "raw same layer", "centred", "adapted"]
    assert viewed.times.tolist() == pytest.approx([0, 0.08, 0.16, 0.24])
    chunks = tiny_adapter.stream(
        path, size=48, select=FrameSelection(every=2), return_backbone=True
    )
    (chunk,) = chunks
    assert viewed.geometry == chunk.geometry
    assert chunk.backbone is not None
    for kind, expected in {"adapted": chunk.features, "raw same layer": chunk.backbone}.items():
        maps = viewed.features[kind]
        assert maps.dtype == torch.float16
        torch.testing.assert_close(maps.float(), expected.float(), atol=5e-3, rtol=5e-3)
    mean = viewed.features["centred"].float().mean(dim=(0, 2, 3))
    assert mean.abs().max() < 1e-2
    for colours in viewed.colours.values():
        assert colours.shape == (4, 3, *chunk.geometry.grid)
        assert colours.dtype == torch.uint8
    with Image.open(io.BytesIO(viewed.pictures[0])) as image:
        assert image.size == (100, 60)


def test_fused_features_stand_beside_the_others_if_asked_for(
    tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=5, height=60, width=100)
    features = view_clip(tiny_adapter, path, size=48, fusion="causal").features
    assert list(features)[-2:] == ["adapted", "adapted, fused"]
    guide = tiny_adapter._guide(features["raw same layer"].float())
    expected = temporal_fusion(features["adapted"].float(), guide, mode="causal")
    # guides are rounded to half precision at different places
    assert (features["adapted, fused"] - expected).abs().mean() < 2e-3
    assert (features["adapted"] - expected)[1:].abs().mean() > 4e-3


def test_large_frames_become_pictures_of_a_screen(
    tiny_backbone: VisionTransformerBackbone, tmp_path: Path
) -> None:
    Image.new("RGB", (2000, 400)).save(tmp_path / "0.png")
    viewed = view_clip(CoSettleAdapter.raw(tiny_backbone), str(tmp_path), size=32)
    with Image.open(io.BytesIO(viewed.pictures[0])) as image:
        assert image.size == (960, 192)
    assert viewed.geometry.frame == (400, 2000)


def test_the_readable_part_of_a_broken_video_is_shown(
    tiny_adapter: CoSettleAdapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = write_video(tmp_path / "whole.mkv", frames=40, height=64, width=96, noisy=True)
    broken = tmp_path / "broken.mkv"
    broken.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    viewed = view_clip(tiny_adapter, broken, size=32)
    assert 0 < len(viewed.pictures) < 40
    assert "readable part" in caplog.text
    with pytest.raises(FrameError):
        view_clip(tiny_adapter, tmp_path / "none.mp4")


# what a reader sees


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser of {', '.join(BROWSERS)} is installed")
    return found


def browse(browser: str, profile: Path, url: str, *options: str) -> str:
    """Load a page without a window, let its scripts come to rest, and return what was printed."""
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--hide-scrollbars",
        "--window-size=1280,800",
        "--virtual-time-budget=10000",
        f"--user-data-dir={profile}",
        *options,
        url,
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_the_page_marks_the_peaks_of_a_point_in_its_address(
    browser: str, server: ViewerServer, tmp_path: Path
) -> None:
    url = f"{server.url}#frame=3&query=0&x=35&y=25"
    dom = browse(browser, tmp_path, url, "--dump-dom")
    assert 'data-ready="true"' in dom
    assert '<h1 id="name">a &amp; &lt;b&gt;.mp4</h1>' in dom
    peaks = re.findall(r'id="(left|right)"[^>]*data-peak-x="([\d.]+)" data-peak-y="([\d.]+)"', dom)
    # raw features stay where they are; adapted ones went three cells of ten pixels
    assert peaks == [("left", "35.0", "25.0"), ("right", "65.0", "25.0")]
    assert "frame 4 of 5" in dom
    assert "peak 1.00 at 65, 25" in dom
    assert "Patch at 35, 25 of frame 1" in dom
    assert dom.count("<option") == 4
    assert dom.count('<button type="button" title="frame') == FRAMES
    assert 'id="trouble" role="alert" hidden' in dom


def test_the_page_shows_pictures(browser: str, server: ViewerServer, tmp_path: Path) -> None:
    views = {}
    for view in ("similarity", "pca"):
        shot = tmp_path / f"{view}.png"
        url = f"{server.url}#frame=3&query=0&x=35&y=25&view={view}"
        browse(browser, tmp_path / "profile", url, f"--screenshot={shot}")
        with Image.open(shot) as image:
            views[view] = np.asarray(image.convert("RGB")).astype(int)
    for pixels in views.values():
        height, width, _ = pixels.shape
        panels = pixels[height // 5 : height // 2]
        left, right = panels[:, : width // 2], panels[:, width // 2 :]
        for panel in (left, right):
            colours = np.unique(rearrange(panel[::4, ::4], "h w c -> (h w) c"), axis=0)
            assert len(colours) > 20, "not blank"
        assert np.abs(left - right).mean() > 5
    assert np.abs(views["similarity"] - views["pca"]).mean() > 5
