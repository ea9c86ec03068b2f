"""The local page of ``cosettle-adapter view``: click a patch, see its similarity in every frame."""

from __future__ import annotations

import base64
import dataclasses
import errno
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter, Size
from cosettle_adapter.correspondence.fusion import FusionMode
from cosettle_adapter.errors import CosettleError, FrameError
from cosettle_adapter.evaluation.variants import encode_variants, feature_variants
from cosettle_adapter.video import FrameSelection, Geometry, open_frames, prefetch
from cosettle_adapter.visualization.drawing import colour_scale, to_image
from cosettle_adapter.visualization.overlays import heat, similarity_maps, similarity_peaks
from cosettle_adapter.visualization.pca import fit_alike, pca_frames

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"

_LONGEST = 960  # pixels, longer side of a picture; panels are rarely wider
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'",
}


@dataclasses.dataclass(frozen=True, eq=False)
class ViewedClip:
    """The data of a clip that the page shows."""

    name: str
    facts: Sequence[str]  # about the model and the encoding
    pictures: Sequence[bytes]  # a JPEG per frame
    times: Tensor  # (T,) seconds
    geometry: Geometry  # maps the original frames to the grid of all features
    features: Mapping[str, Tensor]  # by kind, in the order of the menu: (T, C, h, w) float16
    pca: Mapping[str, bytes]  # by kind, a PNG of PCA colours, frames stacked vertically


@torch.inference_mode()
def view_clip(
    adapter: CoSettleAdapter,
    source: str | os.PathLike[str],
    *,
    size: Size | None = None,
    select: FrameSelection | None = None,
    batch_size: int = 4,
    fusion: FusionMode | None = None,
    on_frames: Callable[[int], None] = lambda done: None,
) -> ViewedClip:
    """Encode a clip for the page.

    Arguments are those of the adapter's ``stream``; with a ``fusion``, the projection's features
    are shown fused over time as well. ``on_frames`` is called after each forward pass with the
    number of encoded frames. An unusable source raises :class:`FrameError`.
    """
    pictures: list[bytes] = []
    times: list[Tensor] = []
    sides: tuple[int, ...] = ()

    def batches() -> Iterator[Tensor]:
        nonlocal sides
        for chunk in prefetch(open_frames(source, select, chunk_size=batch_size)):
            pictures.extend(map(_jpeg, chunk.frames))
            times.append(chunk.timestamps)
            sides = chunk.frames.shape[-2:]
            yield chunk.frames
            on_frames(len(pictures))

    kinds = feature_variants(adapter, fusion=fusion)
    kinds = [kind for kind in kinds if kind.fusion is None or kind.projection is not None]
    encoded = encode_variants(adapter, batches(), kinds, size=size)
    features = {name: maps.half().cpu() for name, maps in encoded}
    config, geometry = adapter.config, adapter.geometry(*sides, size=size)
    pca = {}
    for name, basis in fit_alike(features).items():
        painted = pca_frames(features[name], basis, size=geometry.grid)
        pca[name] = _png(rearrange(painted, "t c h w -> (t h) w c"))
    (height, width), (rows, columns) = geometry.padded, geometry.grid
    projection = "tokens" if config.kind == "identity" else f"{config.kind} projection"
    facts = (
        config.backbone,
        f"{projection} of layers {', '.join(map(str, config.layers))}",
        f"encoded at {width} x {height} pixels, {columns} x {rows} patches",
    )
    name = Path(source).name
    return ViewedClip(name, facts, pictures, torch.cat(times), geometry, features, pca)


class ViewerServer(ThreadingHTTPServer):
    """Serves one clip to this machine only."""

    daemon_threads = True  # open connections do not delay the exit

    def __init__(self, clip: ViewedClip, port: int = 0) -> None:
        """Listen on the port, or on any free one if it is 0 or taken."""
        self.clip = clip
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            super().__init__((HOST, 0), _Handler)

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log errors instead of printing them, except closed connections."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            logger.exception("a request from %s failed", client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ViewerServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        # rejects DNS rebinding: another site's page must not read the clip
        if self.headers.get("Host", "").split(":")[0] not in (HOST, "localhost"):
            self._send(403, "text/plain", f"Open {self.server.url} instead.".encode())
            return
        parts = urlsplit(self.path)
        try:
            answer = self._answer(parts.path, dict(parse_qsl(parts.query)))
        except (CosettleError, KeyError, ValueError) as error:
            answer = 400, "text/plain", f"{self.path} is not a valid request: {error}".encode()
        self._send(*answer)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)

    def _answer(self, path: str, query: Mapping[str, str]) -> tuple[int, str, bytes]:
        clip = self.server.clip
        if path == "/":
            return 200, "text/html; charset=utf-8", Path(__file__).with_suffix(".html").read_bytes()
        if path == "/clip.json":
            return 200, "application/json", json.dumps(_describe(clip)).encode()
        if path == "/pca":
            return 200, "image/png", clip.pca[query["kind"]]
        if path in ("/frame", "/similarity"):
            frame, count = int(query["frame"]), len(clip.pictures)
            if not 0 <= frame < count:
                raise FrameError(f"got frame={frame}, expected 0 to {count - 1}")
            if path == "/frame":
                return 200, "image/jpeg", clip.pictures[frame]
            return 200, "application/json", json.dumps(_similarity(clip, frame, query)).encode()
        return 404, "text/plain", f"{path} does not exist.".encode()

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        length = str(len(body))
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": length}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _similarity(clip: ViewedClip, frame: int, query: Mapping[str, str]) -> dict[str, Any]:
    """Compare all patches with a point (x, y) of a frame: a PNG heat map, peaks of all frames."""
    point = float(query["x"]), float(query["y"])
    maps = similarity_maps(clip.features[query["kind"]], clip.geometry, point, frame=frame)
    values = rearrange(maps, "t h w -> (t h) w").clamp(0, 1)
    drawn = _png(rearrange(heat(values), "c h w -> h w c"))
    highest = rearrange(maps.amax((1, 2)), "t -> t 1")
    peaks = torch.cat([similarity_peaks(maps, clip.geometry), highest], dim=1)
    return {"peaks": peaks.tolist(), "heat": base64.b64encode(drawn).decode()}


def _describe(clip: ViewedClip) -> dict[str, Any]:
    """Return the content of ``/clip.json``; sizes are (width, height)."""
    h, w = clip.geometry.grid
    corners = torch.tensor([[-0.5, -0.5], [h - 0.5, w - 0.5]], dtype=torch.float64)
    return {
        "name": clip.name,
        "facts": clip.facts,
        "times": clip.times.tolist(),
        "size": clip.geometry.frame[::-1],
        "grid": [w, h],
        # top left and bottom right pixel of the area of the patches, each a stride wide
        "covered": clip.geometry.cells_to_pixels(corners).tolist(),
        "kinds": list(clip.features),
        "colours": colour_scale(torch.linspace(0, 1, 16)).tolist(),
    }


def _jpeg(frame: Tensor) -> bytes:
    image, file = to_image(frame), io.BytesIO()
    image.thumbnail((_LONGEST, _LONGEST))
    image.save(file, format="JPEG", quality=88)
    return file.getvalue()


def _png(pixels: Tensor) -> bytes:
    """Encode ``(H, W, 3 or 4)`` uint8 pixels as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, format="PNG")
    return file.getvalue()
