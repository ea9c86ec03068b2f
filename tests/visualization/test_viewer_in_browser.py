"""The page of the viewer in Chromium; skipped where Playwright or Chromium is missing."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.visualization import similarity_maps, similarity_peaks
from cosettle_adapter.visualization.viewer import ViewerServer, view_clip

from helpers import write_video

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture
def server(tiny_adapter: CoSettleAdapter, tmp_path: Path) -> Iterator[ViewerServer]:
    video = write_video(tmp_path / "clip.mp4", frames=6, height=96, width=128)
    server = ViewerServer(view_clip(tiny_adapter, video))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def page(server: ViewerServer) -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
        page.goto(server.url)
        page.wait_for_selector("body[data-ready=true]")
        yield page
        browser.close()
        assert not complaints


def shown_peak(page: Any, panel: str) -> tuple[float, float]:
    data = page.locator(f"#{panel}").evaluate("panel => ({...panel.dataset})")
    return float(data["peakX"]), float(data["peakY"])


def test_a_click_asks_for_the_patch_and_every_frame_shows_its_best_match(
    page: Any, server: ViewerServer
) -> None:
    canvas = page.locator("#left canvas").first
    box = canvas.bounding_box()
    with page.expect_response("**/similarity?**"):
        canvas.click(position={"x": box["width"] * 0.25, "y": box["height"] * 0.7})
    playwright.expect(page.locator("#status")).to_contain_text("at 32, 67")
    point = (128 * 0.25, 96 * 0.7)
    for frame in range(3):
        for panel in ("left", "right"):
            kind = page.locator(f"#{panel} select").input_value()
            maps = similarity_maps(server.clip.features[kind], server.clip.geometry, point, frame=0)
            expected = similarity_peaks(maps, server.clip.geometry)[frame].tolist()
            assert shown_peak(page, panel) == pytest.approx(expected, abs=0.06)
        page.keyboard.press("ArrowRight")
    assert page.locator("#moment").inner_text().startswith("frame 4 of 6")
    page.locator("#strip button").first.click()
    assert page.locator("#moment").inner_text().startswith("frame 1 of 6")
    assert page.locator("#strip button").count() == 6
    assert page.locator("#error").is_hidden()


def test_views_kinds_and_the_address_follow_each_other(page: Any, server: ViewerServer) -> None:
    painted = "canvas => canvas.toDataURL()"
    canvas = page.locator("#right canvas").first
    similarity = canvas.evaluate(painted)
    with page.expect_response("**/pca?**"):
        page.keyboard.press("p")
    playwright.expect(page).to_have_url(re.compile("view=pca"))
    playwright.expect(page.locator("#status")).to_contain_text("principal")
    assert canvas.evaluate(painted) != similarity
    kind = next(iter(server.clip.features))
    page.locator("#right select").select_option(kind)
    playwright.expect(page).to_have_url(re.compile("right=raw"))
    page.reload()
    page.wait_for_selector("body[data-ready=true]")
    assert page.locator("#right select").input_value() == kind
    assert page.locator("input[name=view][value=pca]").is_checked()
