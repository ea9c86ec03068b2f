from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import pickle
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered import encode_numbered
from torch import nn

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.errors import FrameError
from cosettle_adapter.io import exclusive
from cosettle_adapter.training import cached_views
from cosettle_adapter.training.cached_views import CachedViews, build_views
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.data import TrainingPairs, collate, load_batches
from cosettle_adapter.training.encoding import encode
from cosettle_adapter.training.errors import DiskFullError, TrainingError, TrainingInterrupted
from cosettle_adapter.training.losses import objective
from cosettle_adapter.training.settings import TrainSettings

SETTINGS = TrainSettings(
    size=32, pairs_per_clip=2, seed=1, pool=1, layers=(1,), norm=False, cache_views=3
)
Build = Callable[..., CachedViews]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """0.mp4, 1.mp4, 1b.mp4 (broken), 2.mp4."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(3):
        encode_numbered(root / f"{number}.mp4", 12 + number)
    (root / "1b.mp4").write_bytes((root / "1.mp4").read_bytes()[:-500])
    return Corpus.open(root)


@pytest.fixture(scope="module")
def build(corpus: Corpus, backbone: Backbone) -> Build:
    def build(
        folder: Path, on_sample: Any = print, videos: Corpus = corpus, **changes: Any
    ) -> CachedViews:
        pairs = TrainingPairs(videos, dataclasses.replace(SETTINGS, **changes))
        return build_views(folder, pairs, backbone, on_sample)

    return build


@pytest.fixture(scope="module")
def complete(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views") / "made" / "here"
    build(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("pea", ["sample", "off"])
def test_views_are_what_encoding_the_drawn_pairs_gives(
    pea: str, tmp_path: Path, corpus: Corpus, build: Build, backbone: Backbone
) -> None:
    views = build(tmp_path, pea=pea)
    assert len(pickle.dumps(views)) < 10_000, "the tokens stay on disk"
    assert [name for name, _ in views.skipped] == ["1b.mp4"]
    assert (views.clips, len(views)) == (3, 6)
    assert [views.name(index) for index in (0, 3, 4)] == ["0.mp4", "1.mp4", "2.mp4"]
    settings = dataclasses.replace(SETTINGS, pea=pea)  # type: ignore[arg-type]
    pairs = TrainingPairs(corpus, settings)
    for place, clip in enumerate((0, 1, 3)):
        for visit in range(5):
            epoch, turn = divmod(visit, 2)
            sample = views[epoch, 2 * place + turn]
            (drawn,) = pairs.draw(clip, [visit % 3])
            batch = collate([drawn])
            (expected,) = encode(backbone, settings, batch.data, batch.seeds, step=0)
            assert (sample.seed, sample.data.dtype) == (drawn.seed, torch.float16)
            torch.testing.assert_close(sample.data.float(), expected, atol=2e-3, rtol=2e-3)
            assert len(sample.data) == (3 if pea == "sample" else 2)


def test_batches_are_what_the_objective_takes(tmp_path: Path, build: Build) -> None:
    views = build(tmp_path, frames=3, layers=(0, 1), cache_views=1, workers=1)
    (batch,) = load_batches(views, [[(0, index) for index in range(4)]], workers=1)
    assert batch.data.shape == (4, 5, 4, 64)
    assert torch.equal(batch.data[3], views[0, 3].data)
    settings = dataclasses.replace(SETTINGS, frames=3)
    assert bool(objective(nn.Identity(), batch.data, (2, 2), settings).total.isfinite())


def test_a_complete_folder_is_used_as_it_is(
    complete: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_views, "encode", None)
    monkeypatch.setattr(TrainingPairs, "draw", None)
    before = contents(complete)
    with exclusive(complete, refusal=TrainingError("the test holds it")):
        views = build(complete)  # who only reads needs no lock
    assert contents(complete) == before
    assert views.digest == build(complete).digest
    changes = {"temperatures": (0.1,), "separability_weight": 1, "layers": (-1,), "workers": 3}
    assert len(build(complete, pea="batch", pairs_per_clip=7, **changes)) == 21


def test_an_interruption_costs_what_was_being_encoded(
    tmp_path: Path, complete: Path, build: Build
) -> None:
    seen: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted, match=r"views of 2 of 4 clips are kept .* continue"):
        build(tmp_path, interrupt)
    assert len(contents(tmp_path)) == 1 + 2
    build(tmp_path, interrupt)
    assert seen == [(done, 12) for done in (3, 6, 9, 12)]
    assert contents(tmp_path) == contents(complete), "to the last bit"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes to fork here")
def test_killed_in_the_middle_of_a_write(tmp_path: Path, complete: Path, build: Build) -> None:
    def kill(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        if (tmp_path / "0000001.safetensors").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        save(tensors, path)

    save = cached_views.save_file

    def encode_until_killed() -> None:
        torch.set_num_threads(1)  # the threads of the parent are not here
        cached_views.save_file = kill  # type: ignore[attr-defined,assignment]
        build(tmp_path)

    process = multiprocessing.get_context("fork").Process(target=encode_until_killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    build(tmp_path)
    whole = contents(complete)
    assert {name: c for name, c in contents(tmp_path).items() if name in whole} == whole


def test_views_of_something_else_are_refused(
    tmp_path: Path, complete: Path, build: Build, corpus: Corpus
) -> None:
    was = {"cache_views": 3, "precision": "float32", "seed": 1, "size": 32, "squash": False}
    changes = {"cache_views": 4, "precision": "bfloat16", "seed": 2, "size": 48, "squash": True}
    with pytest.raises(TrainingError, match=r"with other settings: .*; use another folder") as told:
        build(complete, layers=(0,), pea="off", frames=3, **changes)
    for part in (
        *(f"{name} was {was[name]!r}, is {value!r}" for name, value in changes.items()),
        "layers was [1], is [0]", "pea was True, is False", "frames was 2, is 3",
    ):  # fmt: skip
        assert part in str(told.value)
    with pytest.raises(TrainingError, match="with other settings: videos was '"):
        build(complete, videos=Corpus(corpus.videos[1:]))
    with exclusive(tmp_path, refusal=TrainingError("the test holds it")):
        with pytest.raises(TrainingError, match=r"another run is encoding views into .*: wait"):
            build(tmp_path)
        assert not (tmp_path / "views.json").exists()


def test_damaged_folders_and_no_readable_video(
    tmp_path: Path, complete: Path, build: Build
) -> None:
    (tmp_path / "views.json").write_text("{")
    with pytest.raises(TrainingError, match=r"views\.json cannot be read .* or delete"):
        build(tmp_path)
    shutil.copytree(complete, tmp_path / "copy")
    (tmp_path / "copy" / "0000000.safetensors").write_bytes(b"1234")
    for other in ("notes.txt", ".0000003.1f.part.txt"):  # of the user, of a process that was killed
        (tmp_path / "copy" / other).touch()
    with pytest.raises(TrainingError, match=r"0000000\.safetensors cannot be read .*; delete it"):
        build(tmp_path / "copy")[0, 0]
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"no video")
    broken = Corpus.open([tmp_path / "a.mp4", tmp_path / "b.mp4"])
    for _ in range(2):
        with pytest.raises(FrameError, match=r"none of the 2 videos can be read; .* a\.mp4"):
            build(tmp_path / "none", videos=broken)


def test_tokens_that_float16_cannot_hold_and_too_little_room(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(*arguments: Any, **options: Any) -> Any:
        return encode(*arguments, **options) * 1e6

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    usage = namedtuple("usage", "total used free")
    for place, name, value, error, message in (
        (cached_views, "encode", large, TrainingError, r"tokens are not finite in float16; use"),
        (cached_views, "save_file", full, DiskFullError, r"complete ones are kept\. Free some"),
        (shutil, "disk_usage", lambda _: usage(0, 0, 8000), DiskFullError,
         r"views of 4 clips take 0\.000 GB, but .* free; cache"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            with pytest.raises(error, match=message):
                build(tmp_path)
    assert build(tmp_path).clips == 3
