from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.cli import main
from cosettle_adapter.cli.common import ModelOptions
from cosettle_adapter.visualization.viewer import ViewerServer

from helpers import write_video


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4", frames=6, height=48, width=64)


@pytest.fixture
def stopped_at_once(
    tiny_adapter: CoSettleAdapter, monkeypatch: pytest.MonkeyPatch
) -> list[ViewerServer]:
    """The tiny model; Ctrl-C comes as soon as the server runs. Holds the servers that ran."""
    ran: list[ViewerServer] = []

    def serve(server: ViewerServer) -> None:
        ran.append(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelOptions, "load", lambda self, **_: tiny_adapter)
    monkeypatch.setattr(ViewerServer, "serve_forever", serve)
    monkeypatch.setenv("COLUMNS", "300")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    return ran


def test_it_serves_until_it_is_stopped(
    clip: Path, stopped_at_once: list[ViewerServer], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["view", str(clip), "--size", "32", "--port", "0", "--no-browser"]
    assert main([*command, "--temporal-fusion", "symmetric"]) == 0
    (server,) = stopped_at_once
    assert "adapted, fused" in server.clip.features
    printed = capsys.readouterr().out
    assert f"{server.url}   Ctrl-C stops" in printed
    assert "6/6" in printed
    assert "first" not in printed, "nothing was left out"
    assert printed.rstrip().endswith("stopped")
    assert server.socket.fileno() == -1, "the port is free again"
    assert len(server.clip.pictures) == 6


def test_it_tells_what_was_left_out_and_that_the_port_was_taken(
    clip: Path, stopped_at_once: list[ViewerServer], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = ["view", str(clip), "--size", "32", "--no-browser", "--max-frames", "2"]
        assert main([*command, "--port", str(port)]) == 0
    printed = capsys.readouterr().out
    assert "these are the first 2 frames; --every 3 spreads them" in printed
    assert f"port {port} is taken" in printed
    assert stopped_at_once[0].server_port != port


def test_the_browser_opens_only_where_there_is_a_screen(
    clip: Path,
    stopped_at_once: list[ViewerServer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(sys, "platform", "linux")
    command = ["view", str(clip), "--size", "32", "--port", "0"]
    assert main(command) == 0
    assert opened == []
    monkeypatch.setenv("DISPLAY", ":0")
    assert main([*command, "--no-browser"]) == 0
    assert opened == []
    assert main(command) == 0
    assert opened == [stopped_at_once[-1].url]
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 1 10.0.0.2 22")
    assert main(command) == 0
    assert f"ssh -L {stopped_at_once[-1].server_port}:127.0.0.1:" in capsys.readouterr().out


def test_a_clip_that_is_not_there_is_told_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ModelOptions, "load", lambda *_, **__: pytest.fail("was loaded"))
    assert main(["view", str(tmp_path / "none.mp4"), "--no-browser"]) == 1
    assert "none.mp4" in capsys.readouterr().err


def test_ctrl_c_ends_a_real_server_cleanly(clip: Path) -> None:
    script = """
        import signal, sys
        from cosettle_adapter import CoSettleAdapter
        from cosettle_adapter.backbones import build_backbone
        from cosettle_adapter.backbones.weights import fingerprint
        from cosettle_adapter.cli import main
        from cosettle_adapter.cli.common import ModelOptions
        from helpers import TINY, projection_for, tiny_state

        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
        state = tiny_state()
        backbone = build_backbone(TINY, state, fingerprint=fingerprint(state), origin="random")
        adapter = CoSettleAdapter(backbone, projection_for(backbone))
        ModelOptions.load = lambda self, **_: adapter
        sys.exit(main(["view", sys.argv[1], "--size", "32", "--port", "0", "--no-browser"]))
    """
    tests = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", textwrap.dedent(script), str(clip)],
        env={"PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("http"))
        port = int(line.split("/")[2].rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/clip.json")
        assert connection.getresponse().status == 200  # and the connection stays open
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "stopped" in out
    assert "Traceback" not in err
