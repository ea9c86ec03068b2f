"""Live inputs over TCP on the loopback address."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator

import pytest
import torch
from numbered import encode_numbered, numbers

from cosettle_adapter.errors import DamagedError, FrameError
from cosettle_adapter.video import FrameChunk, FrameSelection, live, open_frames, probe

COUNT = 40
PATIENCE = 60  # seconds, for a loaded machine


@pytest.fixture(scope="module")
def broadcast(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("live") / "clip.ts"
    return encode_numbered(path, COUNT, options={"g": "8", "bf": "0"}).read_bytes()


class Sender:
    """Listens on a port and sends some bytes to one client, once or for ever."""

    def __init__(self, content: bytes, *, endless: bool = False, port: int = 0) -> None:
        self.content, self.endless = content, endless
        self.sent = 0  # times that all was sent
        self.closed = threading.Event()
        self.socket = socket.create_server(("127.0.0.1", port), reuse_port=True)
        self.port = self.socket.getsockname()[1]
        self.url = f"tcp://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        with self.socket, self.socket.accept()[0] as client:
            for _ in itertools.count() if self.endless else range(1):
                try:
                    client.sendall(self.content)
                except OSError:
                    self.closed.set()
                    return
                self.sent += 1


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(live, "_PAUSES", (0.02, 0.05))
    monkeypatch.setattr(live, "_ATTEMPTS", 4)
    yield
    wait_for_the_end()


def times_of(chunks: list[FrameChunk]) -> list[float]:
    return torch.cat([chunk.timestamps for chunk in chunks]).tolist()


def test_a_server_that_is_killed_and_restarted(
    broadcast: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_BUFFER", 1000)
    monkeypatch.setattr(live, "_ATTEMPTS", 10**6)  # until the server is back
    first = Sender(broadcast)
    assert probe(first.url).frames is None, "a probe does not connect"
    frames = open_frames(first.url, chunk_size=1)
    chunks = [next(frames)]
    first.thread.join(PATIENCE)
    Sender(broadcast, port=first.port).thread.join(PATIENCE)
    monkeypatch.setattr(live, "_ATTEMPTS", 4)
    chunks += frames  # ends when no attempt to connect again succeeds
    times = times_of(chunks)
    assert numbers(torch.cat([chunk.frames for chunk in chunks])) == [*range(COUNT), *range(COUNT)]
    assert times == sorted(set(times))
    assert times[COUNT] > times[COUNT - 1]
    assert "reconnecting" in caplog.text
    assert f"{first.url} ended: 4 attempts" in caplog.text


def test_a_slow_consumer_stalls_nobody_and_is_told(
    broadcast: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live, "_LISTED", 5)
    monkeypatch.setattr(live, "_BUFFER", 8)
    content = broadcast * 10  # more than any buffer on the way holds
    sender = Sender(content)
    chunks = open_frames(sender.url, chunk_size=4)
    received = [next(chunks)]
    wait_for_the_end()
    assert sender.sent == 1, "all was sent though nobody read"
    received += chunks
    kept = len(times_of(received))
    assert kept <= 4 + 8 + 4
    lost = [seconds for chunk in received for seconds in chunk.lost]
    assert 0 < len(lost) < COUNT
    count = 10 * COUNT - kept
    assert f"lost {count} frames (they arrived faster than they were read)" in caplog.text
    slow = open_frames(Sender(content).url, FrameSelection(on_damage="error"), chunk_size=1)
    with pytest.raises(DamagedError, match="faster than they were read"):
        read_slowly(slow)


def read_slowly(chunks: Iterator[FrameChunk]) -> None:
    for _ in chunks:
        wait_for_the_end()


def wait_for_the_end() -> None:
    """Wait until everything was received and no attempt to connect again succeeded."""
    for thread in threads():
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_an_endless_source_closes_at_once(broadcast: bytes) -> None:
    sender = Sender(broadcast, endless=True)
    chunks = open_frames(sender.url, chunk_size=4)
    next(chunks)
    (thread,) = threads()
    chunks.close()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert sender.closed.wait(PATIENCE), "the connection is closed"
    ended = list(open_frames(Sender(broadcast, endless=True).url, FrameSelection(max_frames=6)))
    assert sum(len(chunk.frames) for chunk in ended) == 6


def threads() -> Iterator[threading.Thread]:
    return (thread for thread in threading.enumerate() if thread.name == "cosettle-live")


def test_a_live_source_that_is_read_once(broadcast: bytes) -> None:
    chunks = list(open_frames(Sender(broadcast).url, FrameSelection(live=False)))
    assert numbers(torch.cat([chunk.frames for chunk in chunks])) == list(range(COUNT))


def test_a_source_that_cannot_be_opened(broadcast: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_BUFFER", 1000)
    with pytest.raises(FrameError, match=r"tcp://127\.0\.0\.1:1 cannot be read.*refused"):
        next(open_frames("tcp://127.0.0.1:1"))
    with pytest.raises(FrameError, match="ended: 4 attempts to reconnect failed"):
        list(open_frames(Sender(broadcast).url, FrameSelection(on_damage="error")))
