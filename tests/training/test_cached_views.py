from __future__ import annotations

import errno
import json
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
from safetensors.torch import load_file
from torch import nn

from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.errors import FrameError, MissingExtraError
from cosettle_adapter.io import exclusive
from cosettle_adapter.training import cached_views
from cosettle_adapter.training.cached_views import CachedViews
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.data import TrainingPairs, load_batches
from cosettle_adapter.training.encoding import draw_offsets, encode_views
from cosettle_adapter.training.errors import DiskFullError, TrainingError, TrainingInterrupted
from cosettle_adapter.training.losses import objective
from cosettle_adapter.training.settings import ObjectiveSettings

SETTINGS = ObjectiveSettings(pea="sample", pool=1)
CHOSEN: dict[str, Any] = {"layers": (1,), "norm": False, "views": 3, "batch_size": 4}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> TrainingPairs:
    root = tmp_path_factory.mktemp("videos")
    for number in range(5):
        encode_numbered(root / f"{number}.mp4", 12 + number)
    (root / "1b.mp4").write_bytes((root / "1.mp4").read_bytes()[:-500])
    return TrainingPairs(Corpus.open(root), size=32, pairs_per_clip=2, seed=1)


def build(folder: Path, pairs: TrainingPairs, backbone: Any, **changes: Any) -> CachedViews:
    options = {**CHOSEN, **changes}
    settings = options.pop("settings", SETTINGS)
    return CachedViews.build(folder, pairs, backbone, settings, **options)


@pytest.fixture(scope="module")
def complete(
    tiny_backbone: VisionTransformerBackbone,
    pairs: TrainingPairs,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("views") / "made" / "here"
    build(folder, pairs, tiny_backbone)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_views_are_what_encoding_the_drawn_pairs_gives(
    complete: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone
) -> None:
    views = build(complete, pairs, tiny_backbone)
    assert len(pickle.dumps(views)) < 10_000, "the tokens stay on disk"
    assert [name for name, _ in views.skipped] == ["1b.mp4"]
    assert (views.clips, len(views)) == (5, 10)
    assert [views.name(index) for index in (0, 3, 4, 9)] == ["0.mp4", "1.mp4", "2.mp4", "4.mp4"]
    # 0.mp4, 1.mp4, (1b.mp4,) 2.mp4 and so on
    for place, clip in ((0, 0), (1, 1), (2, 3), (4, 5)):
        for visit in range(7):
            epoch, turn = divmod(visit, 2)
            sample = views[epoch, 2 * place + turn]
            (drawn,) = pairs.draw(clip, [visit % 3])
            assert sample.seed == drawn.seed
            seeds = torch.tensor([drawn.seed])
            offsets = draw_offsets(SETTINGS, seed=0, step=0, sample_seeds=seeds)
            expected = encode_views(
                tiny_backbone, drawn.frames[None], layers=(1,), norm=False,
                settings=SETTINGS, offsets=offsets,
            )  # fmt: skip
            found = views.collate([sample]).views
            assert found is not None
            assert found.grid == expected.grid == (2, 2)
            for mine, theirs in zip(found[:2], expected[:2], strict=True):
                assert mine.dtype == torch.float16
                torch.testing.assert_close(mine.float(), theirs, atol=2e-3, rtol=2e-3)
            assert not torch.equal(found.backward[:, 0], found.forward[:, 0])
    with pytest.raises(IndexError, match="an epoch has 10"):
        views[0, 10]


def test_batches_are_what_the_objective_takes(
    complete: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone
) -> None:
    views = build(complete, pairs, tiny_backbone)
    keys = [[(0, index) for index in range(4)]] * 2
    for batch in load_batches(views, keys, collate=views.collate, workers=2):
        assert batch.views is not None
        assert batch.views.forward.shape == (4, 2, 4, 192)
        assert torch.equal(batch.views.forward[3], views[0, 3].tokens[:2])
        assert batch.seeds.dtype == torch.int64
        assert bool(objective(nn.Identity(), batch.views, SETTINGS).total.isfinite())


def test_without_perturbation_nothing_is_kept_twice(
    tmp_path: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone
) -> None:
    off = ObjectiveSettings(pea="off", pool=1)
    views = build(tmp_path, pairs, tiny_backbone, settings=off)
    batch = views.collate([views[0, 0]])
    assert batch.views is not None
    assert torch.equal(batch.views.backward, batch.views.forward[:, :1])
    assert load_file(tmp_path / "0000000.safetensors")["tokens"].shape == (3, 2, 4, 192)


def test_several_layers_and_frames(
    tmp_path: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone
) -> None:
    three = TrainingPairs(pairs.corpus, size=32, frames=3, pairs_per_clip=1)
    views = build(tmp_path, three, tiny_backbone, layers=(0, 2), views=1, workers=1)
    batch = views.collate([views[5, 0]])
    assert batch.views is not None
    assert batch.views.forward.shape == (1, 3, 4, 384)
    assert batch.views.backward.shape == (1, 2, 4, 384)


# Resuming -------------------------------------------------------------------------------------


def test_a_complete_folder_is_used_as_it_is(
    complete: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cached_views, "encode_views", None)
    monkeypatch.setattr(TrainingPairs, "draw", None)
    before = contents(complete)
    with exclusive(complete, refusal=TrainingError("the test holds it")):
        views = build(complete, pairs, tiny_backbone)  # who only reads needs no lock
    assert contents(complete) == before
    assert views.digest == build(complete, pairs, tiny_backbone).digest


def test_an_interruption_costs_what_was_being_encoded(
    tmp_path: Path, complete: Path, pairs: TrainingPairs,
    tiny_backbone: VisionTransformerBackbone, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted, match=r"views of 4 of 6 clips are kept .* continue"):
        build(tmp_path, pairs, tiny_backbone, on_sample=interrupt)
    assert len(contents(tmp_path)) == 1 + 4
    build(tmp_path, pairs, tiny_backbone, on_sample=interrupt)
    assert seen == [(6, 18), (12, 18), (18, 18)]
    assert contents(tmp_path) == contents(complete), "to the last bit"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes to fork here")
def test_killed_in_the_middle_of_a_write(
    tmp_path: Path, complete: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone
) -> None:
    def kill(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        if (tmp_path / "0000001.safetensors").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        save(tensors, path)

    save = cached_views.save_file

    def encode() -> None:
        torch.set_num_threads(1)  # the threads of the parent are not here
        cached_views.save_file = kill  # type: ignore[attr-defined,assignment]
        build(tmp_path, pairs, tiny_backbone)

    process = multiprocessing.get_context("fork").Process(target=encode)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    build(tmp_path, pairs, tiny_backbone)
    whole = contents(complete)
    assert {name: c for name, c in contents(tmp_path).items() if name in whole} == whole


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (2,)}, r"layers \[1\] \(now \[2\]\)"),
        ({"views": 4}, r"views 3 \(now 4\)"),
        ({"autocast": torch.bfloat16}, r"precision float32 \(now bfloat16\)"),
        ({"settings": ObjectiveSettings(pea="off")}, r"pea on \(now off\), pea_ratio 10\.0"),
        ({"pairs": {"size": 48}}, r"size 32 \(now 48\)"),
        ({"pairs": {"seed": 2}}, r"seed 1 \(now 2\)"),
        ({"pairs": {"squash": True}}, r"squash False \(now True\)"),
        ({"pairs": {"frames": 3}}, r"frames 2 \(now 3\)"),
    ],
)
def test_views_of_something_else_are_refused(
    changes: dict[str, Any], message: str, complete: Path, pairs: TrainingPairs,
    tiny_backbone: VisionTransformerBackbone,
) -> None:  # fmt: skip
    others = {"size": 32, "frames": 2, "seed": 1, **changes.get("pairs", {})}
    wanted = TrainingPairs(pairs.corpus, pairs_per_clip=2, **others)
    changes = {name: value for name, value in changes.items() if name != "pairs"}
    with pytest.raises(TrainingError, match=rf"were made with {message}.*; use another folder"):
        build(complete, wanted, tiny_backbone, **changes)


def test_what_does_not_matter(
    complete: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone
) -> None:
    other = ObjectiveSettings(pea="batch", temperatures=(0.1,), separability_weight=1)
    more = TrainingPairs(pairs.corpus, size=32, pairs_per_clip=7, seed=1)
    views = build(complete, more, tiny_backbone, settings=other, layers=(-11,), workers=3)
    assert len(views) == 35


def test_other_videos_and_damaged_folders_are_refused(
    tmp_path: Path, complete: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone
) -> None:
    fewer = TrainingPairs(Corpus(pairs.corpus.videos[1:]), size=32, seed=1)
    with pytest.raises(TrainingError, match="were made from other videos: some were added"):
        build(complete, fewer, tiny_backbone)
    for content in ("", "{}", "[]", json.dumps({"format": "cosettle-views", "version": 1})):
        (tmp_path / "views.json").write_text(content)
        with pytest.raises(TrainingError, match=r"views\.json cannot be read .* or delete"):
            build(tmp_path, pairs, tiny_backbone)
    shutil.copytree(complete, tmp_path / "copy")
    (tmp_path / "copy" / "0000000.safetensors").write_bytes(b"1234")
    with pytest.raises(TrainingError, match=r"0000000\.safetensors cannot be read .*; delete it"):
        build(tmp_path / "copy", pairs, tiny_backbone)[0, 0]


def test_a_folder_that_another_run_is_building(
    tmp_path: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone
) -> None:
    with exclusive(tmp_path, refusal=TrainingError("the test holds it")):
        with pytest.raises(TrainingError, match=r"another run is encoding views into .*: wait"):
            build(tmp_path, pairs, tiny_backbone)
        assert not (tmp_path / "views.json").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_library_is_named(
    workers: int, tmp_path: Path, pairs: TrainingPairs,
    tiny_backbone: VisionTransformerBackbone, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: Any) -> None:
        raise MissingExtraError("reading video files needs av")

    monkeypatch.setattr(TrainingPairs, "draw", fail)
    with pytest.raises(MissingExtraError, match=r"^reading video files needs av$"):
        build(tmp_path, pairs, tiny_backbone, workers=workers)


def test_no_readable_video(tmp_path: Path, tiny_backbone: VisionTransformerBackbone) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"no video")
    broken = TrainingPairs(Corpus.open(tmp_path), size=32)
    for _ in range(2):
        with pytest.raises(FrameError, match=r"none of the 2 videos can be read; .* a\.mp4"):
            build(tmp_path / "views", broken, tiny_backbone)


def test_tokens_that_float16_cannot_hold(
    tmp_path: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def large(*arguments: Any, **options: Any) -> Any:
        views = encode_views(*arguments, **options)
        return views._replace(forward=views.forward * 1e6)

    monkeypatch.setattr(cached_views, "encode_views", large)
    with pytest.raises(TrainingError, match=r"layers \[1\] are not finite in float16; encode in"):
        build(tmp_path, pairs, tiny_backbone)


def test_room_is_checked_before_and_missed_later(
    tmp_path: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    usage = namedtuple("usage", "total used free")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 80_000))
        with pytest.raises(
            DiskFullError, match=r"views of 6 clips take 0\.000 GB, and .* free; keep"
        ):
            build(tmp_path / "new", pairs, tiny_backbone)
    with monkeypatch.context() as patch:
        patch.setattr(cached_views, "save_file", full)
        with pytest.raises(DiskFullError, match=r"those that are complete are kept\. Make room"):
            build(tmp_path, pairs, tiny_backbone)
    assert build(tmp_path, pairs, tiny_backbone).clips == 5
