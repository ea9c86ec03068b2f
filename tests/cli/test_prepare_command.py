from __future__ import annotations

from pathlib import Path

import pytest
from numbered import encode_numbered

from cosettle_adapter.cli import main
from cosettle_adapter.training.corpus import Corpus


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    (root / "walk").mkdir()
    encode_numbered(root / "walk" / "a.mp4", 12)
    encode_numbered(root / "walk" / "b.mp4", 8)
    return root


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


def prepare(*arguments: object) -> int:
    return main(["prepare", "--workers", "1", *map(str, arguments)])


def test_a_corpus_is_written_and_named(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "frames"
    assert prepare("--data", videos, "-o", out, "--size", 32, "--every", 2) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 10 frames of 2 videos\n" in printed
    assert f"cosettle-adapter train --data {out}" in printed
    assert [video.length() for video in Corpus.open(out).videos] == [6, 4]
    assert prepare("--data", videos, "-o", out, "--size", 32, "--every", 2) == 0
    assert "10 frames of 2 videos, 2 of them from before" in capsys.readouterr().out


def test_broken_videos_are_listed(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.mp4").write_bytes((videos / "walk" / "a.mp4").read_bytes())
    for number in range(23):
        (tmp_path / "in" / f"bad{number:02d}.mp4").write_bytes(b"[bold]no video")
    assert prepare("--data", tmp_path / "in", "-o", tmp_path / "out", "--max-frames", 3) == 0
    printed = capsys.readouterr().out
    assert printed.count("skipped bad") == 20
    assert f"and 3 more; all 23 are in {tmp_path}/out/skipped.txt" in printed
    assert "3 frames of 1 videos" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere", "-o", "out"], "nowhere does not exist"),
        (["--data", ".", "-o", "out"], "no videos in .: looked for video files"),
        (["--data", "/", "-o", "out"], "choose a folder outside"),
        (["--data", ".", "-o", "out", "--quality", "0"], "quality must be from 1 to 95"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_status(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[1] == ".":
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        arguments = [*arguments[:3], "../out", *arguments[4:]]
    assert prepare(*arguments) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_one_way_of_thinning(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("--data", "x", "-o", "y", "--fps", 2, "--max-frames", 3) != 0
    assert "give only one of every, fps and max_frames" in capsys.readouterr().err
