"""The page of the viewer in Chromium; skipped where Playwright or Chromium is missing."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path

import pytest

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.visualization import similarity_maps, similarity_peaks
from cosettle_adapter.visualization.viewer import ViewerServer, view_clip

from helpers import write_video

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_click_shows_the_best_match_in_every_frame_and_the_address_follows(
    tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    video = write_video(tmp_path / "clip.mp4", frames=6, height=96, width=128)
    complaints: list[str] = []
    with ViewerServer(view_clip(tiny_adapter, video)) as server, playwright.sync_playwright() as p:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
        page.goto(server.url)
        page.wait_for_selector("body[data-ready=true]")

        canvas = page.locator("#left canvas").first
        box = canvas.bounding_box()
        with page.expect_response("**/similarity?**"):
            canvas.click(position={"x": box["width"] * 0.25, "y": box["height"] * 0.7})
        playwright.expect(page.locator("#status")).to_contain_text("at 32, 67")
        point = (128 * 0.25, 96 * 0.7)
        for frame in range(3):
            for panel in ("left", "right"):
                kind = page.locator(f"#{panel} select").input_value()
                maps = similarity_maps(server.clip.features[kind], server.clip.geometry, point)
                expected = similarity_peaks(maps, server.clip.geometry)[frame].tolist()
                data = page.locator(f"#{panel}").evaluate("panel => ({...panel.dataset})")
                shown = float(data["peakX"]), float(data["peakY"])
                assert shown == pytest.approx(expected, abs=0.06)
            page.keyboard.press("ArrowRight")
        assert page.locator("#moment").inner_text().startswith("frame 4 of 6")
        page.locator("#strip button").first.click()
        assert page.locator("#moment").inner_text().startswith("frame 1 of 6")
        assert page.locator("#strip button").count() == 6

        canvas, painted = page.locator("#right canvas").first, "canvas => canvas.toDataURL()"
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
        assert page.locator("#error").is_hidden()
        server.shutdown()
    assert not complaints
