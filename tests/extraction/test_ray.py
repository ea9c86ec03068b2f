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
    Outcome,
    extract_many,
    find_sources,
    plan_jobs,
)
from cosettle_adapter.extraction.ray import RayOptions, counted_deaths, extract_with_ray

from helpers import write_video

TESTS = Path(__file__).parents[1]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(MissingExtraError, match=r"cosettle-adapter\[ray\]"):
        list(extract_with_ray(small_adapter, [Job("a.mp4", Path("a.npy"))], how=RayOptions()))


def test_what_kills_workers_is_counted_within_a_run(tmp_path: Path) -> None:
    output = tmp_path / "out" / "clip.npy"
    note = output.with_name(".clip.npy.workers")
    with counted_deaths(output, "run") as before:
        assert before == 0
        left_behind = note.read_text()
    assert not note.exists()
    note.write_text(left_behind)  # as a worker leaves it that is killed
    with counted_deaths(output, "run") as before:
        assert before == 1
    note.write_text(left_behind)
    with counted_deaths(output, "another run") as before:
        assert before == 0


def test_nothing_to_do_starts_nothing() -> None:
    pytest.importorskip("ray.data", reason="ray is not installed")
    assert list(extract_with_ray(small_adapter, [], how=RayOptions(workers=2))) == []


def test_two_workers_do_everything_though_one_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.data", reason="ray is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # other work here is not its affair
    (tmp_path / "v").mkdir()
    for index in range(3):
        write_video(tmp_path / "v" / f"{index}.mp4", frames=60, height=48, width=64)
    (tmp_path / "v" / "bad.mp4").write_bytes(b"no video")
    monkeypatch.chdir(tmp_path)
    sources = find_sources(["v"])
    jobs = plan_jobs(sources, Path("out"), FORMATS["npy-memmap"])
    retried: list[Outcome] = []
    outcomes = list(
        extract_with_ray(
            functools.partial(ill_fated_adapter, tmp_path), jobs, batch_size=4,
            how=RayOptions(workers=2), on_retry=retried.extend,
        )
    )  # fmt: skip
    assert (tmp_path / "killed").exists()
    assert (tmp_path / "failed").exists()
    assert [outcome.error for outcome in retried] == ["out of memory"]
    by_name = {Path(outcome.job.source).name: outcome for outcome in outcomes}
    assert sorted(by_name) == ["0.mp4", "1.mp4", "2.mp4", "bad.mp4"]
    assert [outcome.job in jobs for outcome in outcomes] == [True] * 4
    assert "cannot be read as a video" in str(by_name.pop("bad.mp4").error)
    assert [outcome.error for outcome in by_name.values()] == [None] * 3
    found = [outcome.extraction.found for outcome in by_name.values() if outcome.extraction]
    assert sum(bool(frames) for frames in found) == 2, "resumed after the kill and the failure"
    alone = plan_jobs(sources, tmp_path / "alone", FORMATS["npy-memmap"])
    list(extract_many(small_adapter(), alone, batch_size=4))
    for ours, theirs in zip(jobs, alone, strict=True):
        if "bad" not in ours.source:
            assert ours.output.read_bytes() == theirs.output.read_bytes()
    assert not list(Path("out").glob(".*"))
    again = extract_many(small_adapter(), jobs, batch_size=4)
    assert [outcome.skipped for outcome in again if outcome.error is None] == [True] * 3
