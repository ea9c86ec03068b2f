"""Videos that are not files: over HTTP, by fsspec, through pipes, as file objects."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered import encode_numbered, numbers

from cosettle_adapter.errors import FrameError
from cosettle_adapter.extraction.record import identify
from cosettle_adapter.video import FrameSelection, SourceInfo, decoder, open_frames, probe, sources
from cosettle_adapter.video.sources import as_input, short_name

COUNT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    encode_numbered(folder / "clip.mp4", COUNT, options={"g": "8"})  # its index is at its end
    encode_numbered(folder / "front.mp4", COUNT, muxing={"movflags": "faststart"})
    for name in ("clip.mkv", "clip.ts"):
        encode_numbered(folder / name, COUNT, options={"g": "8"})
    large: dict[str, Any] = {"height": 480, "width": 640, "options": {"qp": "1"}}
    encode_numbered(folder / "large.mp4", COUNT, **large)
    encode_numbered(folder / "large_front.mp4", COUNT, muxing={"movflags": "faststart"}, **large)
    return folder


def read(source: Any, **options: Any) -> tuple[torch.Tensor, list[float]]:
    chunks = list(open_frames(source, FrameSelection(**options)))
    assert not any(chunk.lost for chunk in chunks)
    times = torch.cat([chunk.timestamps for chunk in chunks]).tolist()
    return torch.cat([chunk.frames for chunk in chunks]), times


def same(source: Any, path: Path, **options: Any) -> bool:
    (frames, times), (expected, expected_times) = read(source, **options), read(path, **options)
    return torch.equal(frames, expected) and times == expected_times


class Server(ThreadingHTTPServer):
    """Serves a folder with Range requests; cuts connections after some bytes until it is tired."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.cut_after: int | None = None
        self.cuts = 0
        self.dies = False  # after the first cut, answers no request

    @property
    def url(self) -> str:
        return f"http://user:secret@127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        pass  # clients leave before the end


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.server.folder / self.path.partition("?")[0].strip("/")
        if not path.is_file():
            return self.send_error(404)
        if self.server.dies and self.server.cuts:
            return self.send_error(503)
        content = path.read_bytes()
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        rest = content[start:]
        if self.server.cut_after is not None and len(rest) > self.server.cut_after:
            rest = rest[: self.server.cut_after]
            self.server.cuts += 1
        self.wfile.write(rest)
        self.close_connection = True
        return None


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_no_frame_is_lost_where_a_server_cuts_connections(
    server: Server, folder: Path, name: str
) -> None:
    url = f"{server.url}/{name}?signature=secret"
    assert probe(url) == probe(folder / name)
    assert same(url, folder / name, start=1.2)
    server.cut_after = (folder / name).stat().st_size // 5
    assert same(url, folder / name)
    assert server.cuts > 2


def test_a_server_that_cannot_be_read_is_named_without_passwords(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    for url, message in (
        (f"{server.url}/gone.mp4?token=secret", r"gone\.mp4 .*404 Not Found.*check the name"),
        ("http://user:secret@127.0.0.1:1/a.mp4", r"http://127\.0\.0\.1:1/a\.mp4 .*refused"),
    ):
        with pytest.raises(FrameError, match=message) as caught:
            open_frames(url)
        assert "secret" not in f"{traceback.format_exception(caught.value)}{caplog.text}"


@pytest.mark.parametrize("name", ["front.mp4", "large_front.mp4", "clip.mkv", "clip.ts"])
@pytest.mark.parametrize("returns", [False, True])
def test_a_server_that_dies_drops_no_frame(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, returns: bool
) -> None:
    def reopen(source: Any) -> Any:
        server.dies, server.cut_after = not returns, None
        return sources.open_container(source)

    monkeypatch.setitem(sources._HTTP, "reconnect_delay_max", "0")
    server.cut_after = (folder / name).stat().st_size // 2
    chunks = open_frames(f"{server.url}/{name}", chunk_size=1)
    server.dies = True
    monkeypatch.setattr(decoder, "open_container", reopen)
    received = []
    problem = "paused for too long" if returns else "5XX Server Error"
    message = rf"{name} was interrupted at \d.* s \(.*{problem}"
    with pytest.raises(ConnectionError, match=message) as caught:
        received.extend(chunks)
    assert "secret" not in str(traceback.format_exception(caught.value))
    assert not any(chunk.lost for chunk in received)
    assert numbers(torch.cat([chunk.frames for chunk in received])) == list(range(len(received)))


@pytest.mark.parametrize("name", ["clip.mkv", "clip.ts", "front.mp4"])
def test_a_file_that_is_cut_is_damaged_at_a_url_too(
    server: Server, folder: Path, name: str
) -> None:
    content = (folder / name).read_bytes()
    cut = folder / f"cut_{name}"
    cut.write_bytes(content[: len(content) * 2 // 3])
    served, local = list(open_frames(f"{server.url}/{cut.name}")), list(open_frames(cut))
    lost = [[time for chunk in chunks for time in chunk.lost] for chunks in (served, local)]
    assert lost[0] == lost[1]
    assert [len(chunk.frames) for chunk in served] == [len(chunk.frames) for chunk in local]


def test_a_file_object_that_breaks_off(folder: Path) -> None:
    class Breaking(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 0.7 * len(self.getvalue()):
                raise OSError("the disk is gone")
            return super().read(min(size or 0, 4096))

    received, broken = [], Breaking((folder / "large_front.mp4").read_bytes())
    with pytest.raises(ConnectionError, match=r"Breaking was interrupted at \d.*the disk is gone"):
        received.extend(open_frames(broken, chunk_size=4))
    assert received


def test_what_a_server_says_identifies_a_video(server: Server, folder: Path) -> None:
    url = f"http://127.0.0.1:{server.server_port}/clip.mp4"
    first = identify(url)[0]
    assert first is not None
    assert identify(url)[0] == first
    os.utime(folder / "clip.mp4", (1, 1))
    assert identify(url)[0] != first
    assert identify("http://127.0.0.1:1/clip.mp4") == (None, "")
    assert short_name("s3://bucket/a/clip.mp4?v=1") == "clip.mp4"


def test_fsspec_opens_other_urls(folder: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/videos/clip.mp4", (folder / "clip.mp4").read_bytes())
    url = "memory://videos/clip.mp4"
    assert same(url, folder / "clip.mp4")
    assert probe(url) == probe(folder / "clip.mp4")
    assert identify(url)[0] is not None
    with pytest.raises(FrameError, match=r"memory://videos/gone\.mp4 .*check the name"):
        open_frames("memory://videos/gone.mp4")
    with pytest.raises(FrameError, match=r"nowhere://clip\.mp4 cannot be opened \(.*not known"):
        open_frames("nowhere://clip.mp4")


def test_open_files(folder: Path) -> None:
    content = (folder / "clip.mp4").read_bytes()
    file = io.BytesIO(content)
    for _ in range(2):
        assert same(file, folder / "clip.mp4", start=2)
    with (folder / "clip.mp4").open("rb") as opened:
        assert same(opened, folder / "clip.mp4")
    with pytest.raises(FrameError, match="text file object; open the file with mode 'rb'"):
        open_frames(io.StringIO())

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    assert same(Pipe((folder / "clip.mkv").read_bytes()), folder / "clip.mkv", start=1)
    with pytest.raises(FrameError, match=r"the Pipe cannot be read.*a pipe needs a format"):
        list(open_frames(Pipe((folder / "large.mp4").read_bytes())))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs a list of open files")
def test_a_reader_that_is_not_used_closes_its_file(folder: Path) -> None:
    def is_open() -> bool:
        return any(os.path.realpath(fd) == str(path) for fd in Path("/proc/self/fd").iterdir())

    path = (folder / "clip.mp4").resolve()
    for begin in (decoder.decode_video, open_frames):
        frames = begin(path)
        assert is_open()
        frames.close()
        assert not is_open()


def test_damage_in_a_pipe_is_found_in_one_reading(tmp_path: Path) -> None:
    path = encode_numbered(tmp_path / "clip.ts", COUNT, options={"g": "1"})
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    path.write_bytes(content)
    script = (
        "from cosettle_adapter.video import open_frames, probe; print(probe('-'));"
        "chunks = list(open_frames('-')); print([c.lost for c in chunks if c.lost]);"
        "print([round(float(t), 3) for c in chunks for t in c.timestamps])"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, input=bytes(content), capture_output=True, check=True)
    information, lost, times = done.stdout.decode().splitlines()
    assert information == str(SourceInfo())
    chunks = list(open_frames(path))
    assert lost == str([chunk.lost for chunk in chunks if chunk.lost])
    assert times == str([round(float(time), 3) for c in chunks for time in c.timestamps])
    assert "lost" in done.stderr.decode()


def test_named_pipes_and_cameras(tmp_path: Path, folder: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = (folder / "clip.mkv").read_bytes()
    threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True).start()
    assert numbers(read(str(pipe))[0]) == numbers(read(folder / "clip.mkv")[0])
    camera = as_input(7)
    assert camera is not None
    assert camera.live
    with pytest.raises(FrameError, match="camera 7 cannot be read"):
        list(open_frames(7))
    with pytest.raises(FrameError, match=r"is for URLs, devices and pipes, not for .*clip\.mkv"):
        open_frames(folder / "clip.mkv", FrameSelection(live=True))


def test_a_device_that_cannot_decode_leaves_it_to_the_cpu(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert same(folder / "clip.mp4", folder / "clip.mp4")
    decoded, _ = read(folder / "clip.mp4", decode_on="videotoolbox")
    assert torch.equal(decoded, read(folder / "clip.mp4")[0])
    (record,) = caplog.records
    assert "clip.mp4: decoded on the CPU: videotoolbox cannot" in record.getMessage()
    with pytest.raises(FrameError, match=r"decode_on must be one of .*cuda.*, got 'gpu'"):
        open_frames(folder / "clip.mp4", FrameSelection(decode_on="gpu"))
