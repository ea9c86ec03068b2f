from __future__ import annotations

import http.client
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.cli.common import ModelOptions
from cosettle_adapter.visualization.viewer import ViewerServer

from helpers import write_video

Run = Callable[..., str]


@pytest.fixture
def clip(tmp_path: Path, tiny_adapter: CoSettleAdapter, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clip, with the tiny model to show it and no screen."""
    monkeypatch.setattr(ModelOptions, "load", lambda self, **_: tiny_adapter)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    return write_video(tmp_path / "clip.mp4", frames=6, height=48, width=64)


@pytest.fixture
def stopped_at_once(monkeypatch: pytest.MonkeyPatch) -> list[ViewerServer]:
    """Ctrl-C comes as soon as the server runs. Holds the servers that ran."""
    ran: list[ViewerServer] = []

    def serve(server: ViewerServer) -> None:
        ran.append(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(ViewerServer, "serve_forever", serve)
    return ran


def test_ctrl_c_ends_the_server_cleanly(
    clip: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a connection of the browser stays open."""
    ran: list[ViewerServer] = []
    connections: list[http.client.HTTPConnection] = []
    serve = ViewerServer.serve_forever

    def browse(server: ViewerServer) -> None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
            connection.request("GET", "/clip.json")
            assert connection.getresponse().status == 200
            connections.append(connection)
        finally:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def serve_to_a_browser(server: ViewerServer) -> None:
        ran.append(server)
        threading.Thread(target=browse, args=(server,)).start()
        serve(server)

    monkeypatch.setattr(ViewerServer, "serve_forever", serve_to_a_browser)
    command = ("view", clip, "--size", 32, "--port", 0, "--temporal-fusion", "symmetric")
    printed = run(*command, "--no-browser")
    (server,) = ran
    assert len(connections) == 1, "it was answered"
    assert f"{server.url}   Ctrl-C stops" in printed
    assert "6/6" in printed
    assert "first" not in printed, "nothing was left out"
    assert printed.rstrip().endswith("stopped")
    assert server.socket.fileno() == -1, "the port is free again"
    assert "adapted, fused" in server.clip.features
    assert len(server.clip.pictures) == 6
    connections[0].close()


def test_the_browser_opens_only_where_there_is_a_screen(
    clip: Path, stopped_at_once: list[ViewerServer], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(sys, "platform", "linux")
    command = ("view", clip, "--size", 32, "--max-frames", 2, "--port")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        printed = run(*command, port)
    assert "these are the first 2 frames; --every 3 spreads them" in printed
    assert f"port {port} is taken" in printed
    assert stopped_at_once[0].server_port != port
    monkeypatch.setenv("DISPLAY", ":0")
    run(*command, 0, "--no-browser")
    assert opened == []
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 1 10.0.0.2 22")
    printed = run(*command, 0)
    assert opened == [stopped_at_once[-1].url]
    assert f"ssh -L {stopped_at_once[-1].server_port}:127.0.0.1:" in printed


def test_a_clip_that_is_not_there_is_told_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(ModelOptions, "load", lambda *_, **__: pytest.fail("was loaded"))
    assert "none.mp4" in run("view", tmp_path / "none.mp4", "--no-browser", status=1)
