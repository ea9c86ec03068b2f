from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import pickle
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered import encode_numbered
from torch import nn

from cosettle_adapter.backbones import VisionTransformerBackbone
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("videos")
    for number in range(5):
        encode_numbered(root / f"{number}.mp4", 12 + number)
    (root / "1b.mp4").write_bytes((root / "1.mp4").read_bytes()[:-500])
    return Corpus.open(root)


def build(
    folder: Path, corpus: Corpus, backbone: Any, on_sample: Any = print, **changes: Any
) -> CachedViews:
    pairs = TrainingPairs(corpus, dataclasses.replace(SETTINGS, **changes))
    return build_views(folder, pairs, backbone, on_sample)


@pytest.fixture(scope="module")
def complete(
    tiny_backbone: VisionTransformerBackbone,
    corpus: Corpus,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("views") / "made" / "here"
    build(folder, corpus, tiny_backbone)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("pea", ["sample", "off"])
def test_views_are_what_encoding_the_drawn_pairs_gives(
    pea: str, tmp_path: Path, corpus: Corpus, tiny_backbone: VisionTransformerBackbone
) -> None:
    views = build(tmp_path, corpus, tiny_backbone, pea=pea)
    assert len(pickle.dumps(views)) < 10_000, "the tokens stay on disk"
    assert [name for name, _ in views.skipped] == ["1b.mp4"]
    assert (views.clips, len(views)) == (5, 10)
    assert [views.name(index) for index in (0, 3, 4, 9)] == ["0.mp4", "1.mp4", "2.mp4", "4.mp4"]
    settings = dataclasses.replace(SETTINGS, pea=pea)  # type: ignore[arg-type]
    pairs = TrainingPairs(corpus, settings)
    # 0.mp4, 1.mp4, (1b.mp4,) 2.mp4 and so on
    for place, clip in ((0, 0), (1, 1), (2, 3), (4, 5)):
        for visit in range(7):
            epoch, turn = divmod(visit, 2)
            sample = views[epoch, 2 * place + turn]
            (drawn,) = pairs.draw(clip, [visit % 3])
            batch = collate([drawn])
            (expected,) = encode(tiny_backbone, settings, batch.data, batch.seeds, step=0)
            assert (sample.seed, sample.data.dtype) == (drawn.seed, torch.float16)
            torch.testing.assert_close(sample.data.float(), expected, atol=2e-3, rtol=2e-3)
            assert len(sample.data) == (3 if pea == "sample" else 2)


def test_batches_are_what_the_objective_takes(
    tmp_path: Path, corpus: Corpus, tiny_backbone: VisionTransformerBackbone
) -> None:
    views = build(
        tmp_path, corpus, tiny_backbone, frames=3, layers=(0, 2), cache_views=1, workers=1
    )
    keys = [[(0, index) for index in range(4)]] * 2
    for batch in load_batches(views, keys, workers=2):
        assert batch.data.shape == (4, 5, 4, 384)
        assert torch.equal(batch.data[3], views[0, 3].data)
        settings = dataclasses.replace(SETTINGS, frames=3)
        assert bool(objective(nn.Identity(), batch.data, (2, 2), settings).total.isfinite())


def test_a_complete_folder_is_used_as_it_is(
    complete: Path, corpus: Corpus, tiny_backbone: VisionTransformerBackbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cached_views, "encode", None)
    monkeypatch.setattr(TrainingPairs, "draw", None)
    before = contents(complete)
    with exclusive(complete, refusal=TrainingError("the test holds it")):
        views = build(complete, corpus, tiny_backbone)  # who only reads needs no lock
    assert contents(complete) == before
    assert views.digest == build(complete, corpus, tiny_backbone).digest
    changes = {"temperatures": (0.1,), "separability_weight": 1, "layers": (-11,), "workers": 3}
    others = build(complete, corpus, tiny_backbone, pea="batch", pairs_per_clip=7, **changes)
    assert len(others) == 35


def test_an_interruption_costs_what_was_being_encoded(
    tmp_path: Path, complete: Path, corpus: Corpus, tiny_backbone: VisionTransformerBackbone
) -> None:
    seen: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted, match=r"views of 4 of 6 clips are kept .* continue"):
        build(tmp_path, corpus, tiny_backbone, interrupt)
    assert len(contents(tmp_path)) == 1 + 4
    build(tmp_path, corpus, tiny_backbone, interrupt)
    assert seen == [(done, 18) for done in (3, 6, 9, 12, 15, 18)]
    assert contents(tmp_path) == contents(complete), "to the last bit"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes to fork here")
def test_killed_in_the_middle_of_a_write(
    tmp_path: Path, complete: Path, corpus: Corpus, tiny_backbone: VisionTransformerBackbone
) -> None:
    def kill(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        if (tmp_path / "0000001.safetensors").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        save(tensors, path)

    save = cached_views.save_file

    def encode_until_killed() -> None:
        torch.set_num_threads(1)  # the threads of the parent are not here
        cached_views.save_file = kill  # type: ignore[attr-defined,assignment]
        build(tmp_path, corpus, tiny_backbone)

    process = multiprocessing.get_context("fork").Process(target=encode_until_killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    build(tmp_path, corpus, tiny_backbone)
    whole = contents(complete)
    assert {name: c for name, c in contents(tmp_path).items() if name in whole} == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (2,)}, r"layers was \[1\], is \[2\]"),
        ({"cache_views": 4}, r"cache_views was 3, is 4"),
        ({"precision": "bfloat16"}, r"precision was 'float32', is 'bfloat16'"),
        ({"pea": "off"}, r"pea was True, is False"),
        ({"size": 48, "seed": 2}, r"seed was 1, is 2; size was 32, is 48"),
        ({"squash": True}, r"squash was False, is True"),
        ({"frames": 3}, r"frames was 2, is 3"),
    ],
)
def test_views_of_something_else_are_refused(
    changes: dict[str, Any], message: str, complete: Path, corpus: Corpus,
    tiny_backbone: VisionTransformerBackbone,
) -> None:  # fmt: skip
    with pytest.raises(TrainingError, match=rf"with other settings: {message}; use another folder"):
        build(complete, corpus, tiny_backbone, **changes)


def test_other_videos_damage_and_another_run_are_refused(
    tmp_path: Path, complete: Path, corpus: Corpus, tiny_backbone: VisionTransformerBackbone
) -> None:
    with pytest.raises(TrainingError, match="with other settings: videos was '"):
        build(complete, Corpus(corpus.videos[1:]), tiny_backbone)
    with exclusive(tmp_path, refusal=TrainingError("the test holds it")):
        with pytest.raises(TrainingError, match=r"another run is encoding views into .*: wait"):
            build(tmp_path, corpus, tiny_backbone)
        assert not (tmp_path / "views.json").exists()
    (tmp_path / "views.json").write_text("{")
    with pytest.raises(TrainingError, match=r"views\.json cannot be read .* or delete"):
        build(tmp_path, corpus, tiny_backbone)
    shutil.copytree(complete, tmp_path / "copy")
    (tmp_path / "copy" / "0000000.safetensors").write_bytes(b"1234")
    for other in ("notes.txt", ".0000003.1f.part.txt"):  # of the user, of a process that was killed
        (tmp_path / "copy" / other).touch()
    with pytest.raises(TrainingError, match=r"0000000\.safetensors cannot be read .*; delete it"):
        build(tmp_path / "copy", corpus, tiny_backbone)[0, 0]


def test_no_readable_video(tmp_path: Path, tiny_backbone: VisionTransformerBackbone) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"no video")
    broken = Corpus.open(tmp_path)
    for _ in range(2):
        with pytest.raises(FrameError, match=r"none of the 2 videos can be read; .* a\.mp4"):
            build(tmp_path / "views", broken, tiny_backbone)


def test_tokens_that_float16_cannot_hold_and_too_little_room(
    tmp_path: Path, corpus: Corpus, tiny_backbone: VisionTransformerBackbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def large(*arguments: Any, **options: Any) -> Any:
        return encode(*arguments, **options) * 1e6

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cached_views, "encode", large)
        with pytest.raises(TrainingError, match=r"tokens are not finite in float16; use"):
            build(tmp_path, corpus, tiny_backbone)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 80_000))
        with pytest.raises(
            DiskFullError, match=r"views of 6 clips take 0\.000 GB, but .* free; cache"
        ):
            build(tmp_path / "new", corpus, tiny_backbone)
    with monkeypatch.context() as patch:
        patch.setattr(cached_views, "save_file", full)
        with pytest.raises(DiskFullError, match=r"complete ones are kept\. Free some space"):
            build(tmp_path, corpus, tiny_backbone)
    assert build(tmp_path, corpus, tiny_backbone).clips == 5
