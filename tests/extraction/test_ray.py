"""The same extraction over a Ray cluster, of one machine here."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import pytest
from extraction_processes import ill_fated_adapter, small_adapter

from cosettle_adapter.errors import MissingExtraError
from cosettle_adapter.extraction import (
    FORMATS,
    Job,
    RayOptions,
    extract_many,
    extract_with_ray,
    find_sources,
    plan_jobs,
)

from helpers import write_video

TESTS = Path(__file__).parents[1]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"cosettle-adapter\[ray\]"):
        list(extract_with_ray(small_adapter, [Job("a.mp4", Path("a.npy"))], how=RayOptions()))


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # other work here is not its affair
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_workers_do_everything_though_one_is_killed(tmp_path: Path, count: int) -> None:
    assert list(extract_with_ray(small_adapter, [], how=RayOptions(workers=count))) == []
    (tmp_path / "v").mkdir()
    for index in range(count + 1):
        write_video(tmp_path / "v" / f"{index}.mp4", frames=60, height=48, width=64)
    (tmp_path / "v" / "bad.mp4").write_bytes(b"no video")
    sources = find_sources(["v"])
    jobs = plan_jobs(sources, Path("out"), FORMATS["npy-memmap"])
    outcomes = list(
        extract_with_ray(
            functools.partial(ill_fated_adapter, tmp_path), jobs, batch_size=4,
            how=RayOptions(workers=count),
        )
    )  # fmt: skip
    assert (tmp_path / "killed").exists()
    assert (tmp_path / "failed").exists()
    by_name = {Path(outcome.job.source).name: outcome for outcome in outcomes}
    assert sorted(by_name) == [*(f"{index}.mp4" for index in range(count + 1)), "bad.mp4"]
    assert all(outcome.job in jobs for outcome in outcomes)
    assert "cannot be read as a video" in str(by_name.pop("bad.mp4").error)
    assert not any(outcome.error for outcome in by_name.values())
    found = [outcome.extraction.found for outcome in by_name.values() if outcome.extraction]
    assert sum(bool(frames) for frames in found) == 2, "resumed after the kill and the failure"
    alone = plan_jobs(sources, tmp_path / "alone", FORMATS["npy-memmap"])
    list(extract_many(small_adapter(), alone, batch_size=4))
    for ours, theirs in zip(jobs, alone, strict=True):
        if "bad" not in ours.source:
            assert ours.output.read_bytes() == theirs.output.read_bytes()
    assert not list(Path("out").glob(".*"))


def deadly_adapter() -> None:
    os._exit(1)


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_what_kills_every_worker_is_given_up(tmp_path: Path) -> None:
    jobs = [Job("a.mp4", tmp_path / "a.npy"), Job("b.mp4", tmp_path / "b.npy")]
    outcomes = list(extract_with_ray(deadly_adapter, jobs, how=RayOptions(retries=0)))  # type: ignore[arg-type]
    assert [outcome.error is not None and "died" in outcome.error for outcome in outcomes] == [
        True, True,
    ]  # fmt: skip
