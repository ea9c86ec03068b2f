"""The page over HTTP, to this machine alone."""

from __future__ import annotations

import errno
import importlib.resources
import json
import logging
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.errors import CosettleError
from cosettle_adapter.video import Geometry
from cosettle_adapter.visualization.colours import colour_scale
from cosettle_adapter.visualization.viewed_clip import ViewedClip
from cosettle_adapter.visualization.viewer_query import Query, RequestError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"

_TRIES = 20  # ports after the wanted one
_FULL = 32767  # cosine 1 as the page gets it
_PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
    "/viewer.css": ("viewer.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_BYTES = "application/octet-stream"


class ViewerServer(ThreadingHTTPServer):
    """Serves one clip until it is shut down.

    Attributes:
        clip: what it serves.
    """

    daemon_threads = True  # an open connection does not hold up the end

    def __init__(self, clip: ViewedClip, port: int) -> None:
        self.clip = clip
        self.facts = _describe(clip)
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log in place of printing; a reader who goes away in the middle is no news."""
        gone = isinstance(sys.exc_info()[1], ConnectionError)
        level = logging.DEBUG if gone else logging.ERROR
        logger.log(level, "a request of %s failed", client_address, exc_info=True)


def open_server(clip: ViewedClip, *, port: int = 0) -> ViewerServer:
    """Bind to a port of 127.0.0.1, or to one of the next that are free.

    Args:
        clip: what to serve.
        port: the wanted one; 0 takes any that is free.

    Returns:
        A server that listens; run its ``serve_forever`` and ``server_close``.

    Raises:
        ValueError: no such port.
        OSError: no port in reach is free.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"got port {port}, expected 0 (any) to 65535")
    last = min(port + _TRIES, 65535)
    for candidate in range(port, last + 1):
        try:
            return ViewerServer(clip, candidate)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            logger.debug("port %d cannot be had: %s", candidate, error)
    raise OSError(f"no port from {port} to {last} is free; give another one, or 0 for any")


class _Handler(BaseHTTPRequestHandler):
    server: ViewerServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        try:
            kind, body = self._answer()
            self._send(HTTPStatus.OK, kind, body)
        except RequestError as error:
            self._refuse(error.status, str(error))
        except CosettleError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)

    def _answer(self) -> tuple[str, bytes]:
        self._check_host()
        parts = urlsplit(self.path)
        if parts.path in _PAGES:
            name, kind = _PAGES[parts.path]
            return kind, _page(name)
        query = Query(parts.query)
        answers: dict[str, Callable[[Query], tuple[str, bytes]]] = {
            "/clip.json": self._facts,
            "/frame": self._frame,
            "/colours": self._colours,
            "/similarity": self._similarity,
        }
        if parts.path not in answers:
            raise RequestError(HTTPStatus.NOT_FOUND, f"There is nothing at {parts.path}.")
        return answers[parts.path](query)

    def _facts(self, query: Query) -> tuple[str, bytes]:
        """What the page must know before it asks for anything else."""
        del query
        return "application/json", json.dumps(self.server.facts).encode()

    def _frame(self, query: Query) -> tuple[str, bytes]:
        """One frame as JPEG: ``/frame?index=0``."""
        return "image/jpeg", self.server.clip.pictures[query.frame("index", self.server.clip)]

    def _colours(self, query: Query) -> tuple[str, bytes]:
        """PCA colours of all frames: ``/colours?kind=adapted``, ``(T, h, w, 3)`` uint8."""
        colours = self.server.clip.colours[query.kind(self.server.clip)]
        return _BYTES, _raw(rearrange(colours, "t c h w -> t h w c"))

    def _similarity(self, query: Query) -> tuple[str, bytes]:
        """``/similarity?kind=adapted&frame=0&x=120&y=80``: cosines, ``(T, h, w)`` little int16.

        32767 is a cosine of 1. x and y are pixels of the original frame.
        """
        clip = self.server.clip
        kind, frame = query.kind(clip), query.frame("frame", clip)
        cosines = clip.similarity(kind, frame, (query.number("x"), query.number("y")))
        return _BYTES, _raw((cosines * _FULL).round().to(torch.int16))

    def _check_host(self) -> None:
        # a page of another site whose name was made to lead here would read the clip otherwise
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in (HOST, "localhost"):
            raise RequestError(
                HTTPStatus.FORBIDDEN, f"This page is for {self.server.url} alone, not for {host!r}."
            )

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        self._send(status, "text/plain; charset=utf-8", sentence.encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _describe(clip: ViewedClip) -> dict[str, Any]:
    """``/clip.json``; sizes are (width, height), as pages have them."""
    height, width = clip.geometry.frame
    return {
        "name": clip.name,
        "facts": dict(clip.facts),
        "frames": len(clip.pictures),
        "times": clip.times.tolist(),
        "size": [width, height],
        "grid": list(reversed(clip.geometry.grid)),
        "covered": _covered(clip.geometry),
        "kinds": list(clip.features),
        "colours": colour_scale(torch.linspace(0, 1, 256)).tolist(),
    }


def _covered(geometry: Geometry) -> list[float]:
    """Left, top, right and bottom pixel of what the cells cover, a cell being a stride wide."""
    h, w = geometry.grid
    corners = torch.tensor([[-0.5, -0.5], [h - 0.5, w - 0.5]], dtype=torch.float64)
    covered: list[float] = rearrange(geometry.cells_to_pixels(corners), "n xy -> (n xy)").tolist()
    return covered


def _page(name: str) -> bytes:
    return (importlib.resources.files(__package__) / "page" / name).read_bytes()


def _raw(values: Tensor) -> bytes:
    """The values one after another, the last axis fastest, little-endian."""
    array = values.contiguous().numpy()
    little: bytes = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return little
