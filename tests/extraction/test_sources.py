"""Many sources: which are meant, what their outputs are called, what becomes of each."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path, PurePosixPath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import FrameError
from cosettle_adapter.extraction import (
    FORMATS,
    Job,
    Shard,
    Source,
    extract_many,
    find_sources,
    plan_jobs,
)
from cosettle_adapter.extraction.record import RunRecord
from cosettle_adapter.extraction.settings import ExtractionError, FormatError

from helpers import write_video


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_what_folders_files_and_patterns_mean(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.jpg", "images/2.jpg", "clip.mp4", "both/a.mp4", "both/1.png")
    touch(tmp_path, "videos/a2.mp4", "videos/a10.mp4", "videos/b/c.MOV", "videos/.hidden.mp4")
    touch(tmp_path, "videos/notes.txt", "videos/thumbs/c.jpg", "empty/notes.txt")
    touch(tmp_path, "davis/bear/0.jpg", "davis/camel/0.jpg", "davis/camel/1.jpg")

    def found(*given: str) -> list[tuple[str, str]]:
        sources = find_sources([tmp_path / each for each in given])
        return [(source.kind, str(source.name)) for source in sources]

    assert found("clip.mp4", "clip.mp4") == [("video", "clip.mp4")]
    assert found("images") == [("images", "images")]
    assert found("images/*.jpg") == [("images", "images")]
    videos = [("video", "a2.mp4"), ("video", "a10.mp4"), ("video", "b/c.MOV")]
    assert found("videos") == videos
    assert found("videos/*.mp4") == videos[:2]
    assert found("davis") == [("images", "bear"), ("images", "camel")]
    assert found("vid*") == videos
    for given_, message in {
        "both": r"expected only one kind\. Give .*/\*\.png' for the images",
        "empty": "holds neither videos",
        "*.mkv": "matches nothing",
        "none.mp4": "does not exist",
        "empty/*.txt": r"matches .*notes\.txt, but neither videos",
    }.items():
        with pytest.raises(FrameError, match=message):
            found(given_)


def video(path: str, root: str = "") -> Source:
    name = PurePosixPath(path).relative_to(root or str(PurePosixPath(path).parent))
    return Source(path, "video", name)


def url(address: str) -> Source:
    return Source(address, "video", PurePosixPath("a.mp4"))


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        ([video("/d/a.mp4"), video("/d/b.mp4")], ["a", "b"]),
        ([video("/d/a.mp4"), video("/d/a.mkv")], ["a.mp4", "a.mkv"]),
        ([video("/x/a.mp4"), video("/y/a.mp4")], ["x/a", "y/a"]),
        ([video("/x/m/a.mp4"), video("/y/m/a.mp4")], ["x/m/a", "y/m/a"]),
        ([video("/x/a.mp4"), video("/x/a.mkv"), video("/y/a.mp4")], ["x/a", "a.mkv", "y/a"]),
        ([video("/d/s/a.mp4", "/d"), video("/d/t/a.mp4", "/d")], ["s/a", "t/a"]),
        ([video("/d/Clip.mp4"), video("/d/clip.mp4")], ["Clip-1", "clip-2"]),
        ([url("https://me:secret@m/a.mp4?key=b/c"), url("https://n/a.mp4")], ["m/a", "n/a"]),
        ([Source("/d/v1.0", "images", PurePosixPath("v1.0"))], ["v1.0"]),
    ],
)  # fmt: skip
def test_names_are_kept_and_told_apart(sources: list[Source], names: list[str]) -> None:
    jobs = plan_jobs(sources, Path("out"), FORMATS["npy-memmap"])
    assert [job.output for job in jobs] == [Path("out", f"{name}.npy") for name in names]


@given(count=st.integers(0, 50), shards=st.integers(1, 7))
def test_shards_share_everything_and_nothing_twice(count: int, shards: int) -> None:
    parts = [Shard(index, shards).of(range(count)) for index in range(shards)]
    assert sorted(itertools.chain(*parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shards_are_told_by_hand_or_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Shard.parse("1/4").index, Shard.parse("1/4").count) == (1, 4)
    for text in ("4/4", "1", "a/b", "0/0"):
        with pytest.raises(ExtractionError, match="0/"):
            Shard.parse(text)
    assert Shard.from_environment({}) == Shard()
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0"}
    assert Shard.from_environment(torchrun) == Shard(5, 8, 1, "RANK")
    slurm = {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0"}
    assert Shard.from_environment(slurm) == Shard(2, 3, 0, "SLURM_PROCID")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Shard(i, 4, i).device("cuda") for i in range(4)] == ["cuda:0", "cuda:1"] * 2
    assert Shard(1, 2).device("cpu") == "cpu"
    assert Shard(1, 2, 1).device("cuda:0") == "cuda:0"
    assert Shard().device("cuda") == "cuda"


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    (tmp_path / "v").mkdir()
    for name in ("a", "c"):
        write_video(tmp_path / "v" / f"{name}.mp4", frames=6, height=48, width=64)
    (tmp_path / "v" / "b.mp4").write_bytes(b"no video")
    return plan_jobs(find_sources([tmp_path / "v"]), tmp_path / "out", FORMATS["safetensors"])


def test_a_video_that_fails_harms_no_other(
    small_adapter: CoSettleAdapter, tmp_path: Path, jobs: list[Job]
) -> None:
    outcomes = list(extract_many(small_adapter, jobs))
    assert [outcome.job.output.name[0] for outcome in outcomes] == ["a", "b", "c"]
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]
    assert "cannot be read as a video" in str(outcomes[1].error)
    assert not outcomes[1].transient
    again = list(extract_many(small_adapter, jobs))
    assert [outcome.skipped for outcome in again] == [True, False, True]
    anew = list(extract_many(small_adapter, jobs, overwrite=True))
    assert not any(outcome.skipped for outcome in anew)
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [f"{n}.safetensors{s}" for n in "ac" for s in ("", ".json")]


def test_what_may_succeed_another_time_is_told_and_what_stops_all_is_raised(
    small_adapter: CoSettleAdapter, jobs: list[Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unfit = [Job(job.source, job.output.with_suffix(".npy")) for job in jobs]
    with pytest.raises(FormatError, match="bfloat16 goes into safetensors"):
        list(extract_many(small_adapter, unfit, storage=torch.bfloat16))
    assert not (tmp_path / "out").exists()
    errors = iter([RuntimeError("CUDA out of memory"), OSError(errno.ENOSPC, "No space left")])

    def unlucky(*_: object) -> None:
        raise next(errors)

    monkeypatch.setattr(RunRecord, "append", unlucky)
    done = extract_many(small_adapter, [jobs[0], jobs[2]])
    assert next(done).transient
    with pytest.raises(OSError, match="No space left"):
        next(done)
