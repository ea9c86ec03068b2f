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
from torch.utils.data import DataLoader

from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.errors import FrameError, MissingExtraError
from cosettle_adapter.locking import exclusive
from cosettle_adapter.training.cached_views import CachedViews
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.data import TrainingPairs
from cosettle_adapter.training.encoding import Views, draw_offsets, encode_views
from cosettle_adapter.training.errors import DiskFullError, TrainingError, TrainingInterrupted
from cosettle_adapter.training.losses import objective
from cosettle_adapter.training.samples import views_writing
from cosettle_adapter.training.settings import ObjectiveSettings

SETTINGS = ObjectiveSettings(pea="sample", pool=1)
CHOSEN: dict[str, Any] = {"layers": (1,), "norm": False, "views": 3}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for number in range(5):
        encode_numbered(root / f"{number}.mp4", 12 + number)
    (root / "1b.mp4").write_bytes((root / "1.mp4").read_bytes()[:-500])
    return root


@pytest.fixture(scope="module")
def pairs(videos: Path) -> TrainingPairs:
    return TrainingPairs(Corpus.open(videos), size=32, pairs_per_clip=2, seed=1)


@pytest.fixture(scope="module")
def complete(
    tiny_backbone: VisionTransformerBackbone,
    pairs: TrainingPairs,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("views") / "made" / "here"
    CachedViews.build(folder, pairs, tiny_backbone, SETTINGS, batch_size=4, **CHOSEN)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(folder: Path, pairs: TrainingPairs, backbone: Any, **changes: Any) -> CachedViews:
    options = {**CHOSEN, **changes}
    settings = options.pop("settings", SETTINGS)
    return CachedViews.build(folder, pairs, backbone, settings, batch_size=4, **options)


class TestTokens:
    def test_the_same_as_encoding_what_is_drawn(
        self, complete: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone
    ) -> None:
        views = read(complete, pairs, tiny_backbone)
        # 0.mp4, 1.mp4, (1b.mp4,) 2.mp4 and so on
        for place, clip in ((0, 0), (1, 1), (2, 3), (4, 5)):
            for visit in range(7):
                epoch, turn = divmod(visit, 2)
                sample = views[epoch, 2 * place + turn]
                drawn = pairs.draw(clip, visit % 3)
                assert sample.seed == drawn.seed
                offsets = draw_offsets(
                    SETTINGS, seed=0, step=0, sample_seeds=torch.tensor([drawn.seed])
                )
                expected = encode_views(
                    tiny_backbone, drawn.frames[None], layers=(1,), norm=False,
                    settings=SETTINGS, offsets=offsets,
                )  # fmt: skip
                assert sample.grid == expected.grid == (2, 2)
                assert sample.forward.dtype == torch.float16
                torch.testing.assert_close(
                    sample.forward.float(), expected.forward[0], atol=2e-3, rtol=2e-3
                )
                torch.testing.assert_close(
                    sample.backward.float(), expected.backward[0], atol=2e-3, rtol=2e-3
                )
                assert not torch.equal(sample.backward[0], sample.forward[0])

    def test_broken_videos_are_left_out(
        self, complete: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone
    ) -> None:
        views = read(complete, pairs, tiny_backbone)
        assert [name for name, _ in views.skipped] == ["1b.mp4"]
        assert "1b.mp4" in views.skipped[0][1]
        assert (views.clips, len(views)) == (5, 10)
        assert [views.name(index) for index in (0, 3, 4, 9)] == [
            "0.mp4", "1.mp4", "2.mp4", "4.mp4",
        ]  # fmt: skip
        with pytest.raises(IndexError, match="an epoch has 10"):
            views[0, 10]

    def test_batches_are_what_the_objective_takes(
        self, complete: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone
    ) -> None:
        views = read(complete, pairs, tiny_backbone)
        batch = views.collate([views[0, index] for index in range(4)])
        assert isinstance(batch.views, Views)
        assert batch.views.forward.shape == (4, 2, 4, 192)
        assert batch.views.backward.shape == (4, 1, 4, 192)
        assert batch.seeds.dtype == torch.int64
        assert batch.skipped == ()
        losses = objective(lambda tokens: tokens, batch.views, SETTINGS)
        assert bool(losses.total.isfinite())

    def test_workers_and_pickling(
        self, complete: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone
    ) -> None:
        views = read(complete, pairs, tiny_backbone)
        here = views[0, 3].forward
        assert len(pickle.dumps(views)) < 10_000, "the tokens stay on disk"
        loader = DataLoader(
            views, batch_sampler=[[(0, 3), (1, 2)]] * 2, num_workers=2, collate_fn=views.collate
        )
        assert all(torch.equal(batch.views.forward[0], here) for batch in loader)

    def test_without_perturbation_nothing_is_kept_twice(
        self, tmp_path: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone
    ) -> None:
        off = ObjectiveSettings(pea="off", pool=1)
        views = read(tmp_path, pairs, tiny_backbone, settings=off)
        sample = views[0, 0]
        assert torch.equal(sample.backward, sample.forward[:1])
        assert (tmp_path / "tokens.f16").stat().st_size == 5 * 3 * 2 * 4 * 192 * 2

    def test_several_layers_and_frames(
        self, tmp_path: Path, videos: Path, tiny_backbone: VisionTransformerBackbone
    ) -> None:
        three = TrainingPairs(Corpus.open(videos), size=32, frames=3, pairs_per_clip=1)
        views = read(tmp_path, three, tiny_backbone, layers=(0, 2), views=1, workers=1)
        sample = views[5, 0]
        assert sample.forward.shape == (3, 4, 384)
        assert sample.backward.shape == (2, 4, 384)


class TestResuming:
    def test_a_complete_folder_is_used_as_it_is(
        self, complete: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(views_writing, "encode_views", None)
        monkeypatch.setattr(TrainingPairs, "draw_all", None)
        before = contents(complete)
        views = read(complete, pairs, tiny_backbone)
        assert contents(complete) == before
        assert views.digest == read(complete, pairs, tiny_backbone).digest

    @pytest.mark.parametrize("fails_after", [1, 2])
    def test_a_stop_costs_the_chunk_it_was_at(
        self, fails_after: int, tmp_path: Path, complete: Path, pairs: TrainingPairs,
        tiny_backbone: VisionTransformerBackbone, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        encode = views_writing._encode
        calls = []

        def interrupt(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) > fails_after:
                raise KeyboardInterrupt
            return encode(*arguments)

        monkeypatch.setattr(views_writing, "_encode", interrupt)
        with pytest.raises(
            TrainingInterrupted, match=rf"views of {2 * fails_after} of 6 clips are kept .* go on"
        ):
            read(tmp_path, pairs, tiny_backbone)
        assert json.loads((tmp_path / "views.json").read_text())["done"] == 2 * fails_after
        with (tmp_path / "tokens.f16").open("ab") as tokens:
            tokens.write(b"half a chunk")
        monkeypatch.setattr(views_writing, "_encode", encode)
        seen = []
        read(
            tmp_path, pairs, tiny_backbone, on_sample=lambda done, total: seen.append((done, total))
        )
        assert seen == [(count, 18) for count in range(6 * fails_after + 6, 19, 6)]
        assert contents(tmp_path) == contents(complete), "to the last bit"

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes to fork here")
    def test_killed_in_the_middle_of_a_write(
        self, tmp_path: Path, complete: Path, pairs: TrainingPairs,
        tiny_backbone: VisionTransformerBackbone,
    ) -> None:  # fmt: skip
        append = views_writing._append

        def kill(file: Any, tokens: Any, chunk: Any, encoded: Any) -> Any:
            if file.done:
                tokens.write(encoded[0].numpy().tobytes()[:1001])
                tokens.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return append(file, tokens, chunk, encoded)

        def build() -> None:
            torch.set_num_threads(1)  # the threads of the parent are not here
            views_writing._append = kill
            read(tmp_path, pairs, tiny_backbone)

        process = multiprocessing.get_context("fork").Process(target=build)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert (tmp_path / "tokens.f16").stat().st_size == 2 * 3 * 3 * 4 * 192 * 2 + 1001
        read(tmp_path, pairs, tiny_backbone)
        assert contents(tmp_path) == contents(complete)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layers": (2,)}, r"layers \[1\] \(now \[2\]\)"),
            ({"norm": None}, r"norm False \(now None\)"),
            ({"views": 4}, r"views 3 \(now 4\)"),
            ({"autocast": torch.bfloat16}, r"precision float32 \(now bfloat16\)"),
            ({"settings": ObjectiveSettings(pea="off")}, r"pea on \(now off\), pea_ratio 10\.0"),
            ({"settings": ObjectiveSettings(pea_ratio=4)}, r"pea_ratio 10\.0 \(now 4\)"),
            ({"pairs": {"size": 48}}, r"size 32 \(now 48\)"),
            ({"pairs": {"seed": 2}}, r"seed 1 \(now 2\)"),
            ({"pairs": {"squash": True}}, r"squash False \(now True\)"),
            ({"pairs": {"frames": 3}}, r"frames 2 \(now 3\)"),
        ],
    )
    def test_views_of_something_else(
        self, changes: dict[str, Any], message: str, complete: Path, pairs: TrainingPairs,
        tiny_backbone: VisionTransformerBackbone,
    ) -> None:  # fmt: skip
        others = {"size": 32, "frames": 2, "seed": 1, **changes.pop("pairs", {})}
        wanted = TrainingPairs(pairs.corpus, pairs_per_clip=2, **others)
        before = contents(complete)
        with pytest.raises(TrainingError, match=rf"were made with {message}.*; use another folder"):
            read(complete, wanted, tiny_backbone, **changes)
        assert contents(complete) == before

    def test_what_does_not_matter(
        self, complete: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone
    ) -> None:
        other = ObjectiveSettings(pea="batch", temperatures=(0.1,), separability_weight=1)
        more = TrainingPairs(pairs.corpus, size=32, pairs_per_clip=7, seed=1)
        views = read(complete, more, tiny_backbone, settings=other, layers=(-11,), workers=3)
        assert len(views) == 35

    def test_other_videos(
        self, tmp_path: Path, complete: Path, videos: Path,
        tiny_backbone: VisionTransformerBackbone,
    ) -> None:  # fmt: skip
        shutil.copytree(videos, tmp_path / "videos")
        (tmp_path / "videos" / "2.mp4").unlink()
        pairs = TrainingPairs(Corpus.open(tmp_path / "videos"), size=32, seed=1)
        with pytest.raises(TrainingError, match="were made from other videos: some were added"):
            read(complete, pairs, tiny_backbone)

    def test_another_backbone(
        self, complete: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(tiny_backbone, "fingerprint", "ff" * 32)
        with pytest.raises(
            TrainingError, match=r"fingerprint sha256:\w{5}\.\.\. \(now ffffffffffff\.\."
        ):
            read(complete, pairs, tiny_backbone)

    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"made_of": 3}'])
    def test_a_damaged_index(
        self, content: str, tmp_path: Path, pairs: TrainingPairs,
        tiny_backbone: VisionTransformerBackbone,
    ) -> None:  # fmt: skip
        (tmp_path / "views.json").write_text(content)
        with pytest.raises(TrainingError, match=r"views\.json cannot be read .* or delete"):
            read(tmp_path, pairs, tiny_backbone)

    def test_tokens_that_vanished(
        self, tmp_path: Path, complete: Path, pairs: TrainingPairs,
        tiny_backbone: VisionTransformerBackbone,
    ) -> None:  # fmt: skip
        shutil.copy(complete / "views.json", tmp_path)
        (tmp_path / "tokens.f16").write_bytes(b"1234")
        with pytest.raises(TrainingError, match=r"is damaged: it has 4 bytes, and its index says"):
            read(tmp_path, pairs, tiny_backbone)

    def test_a_folder_that_another_run_is_building(
        self, tmp_path: Path, complete: Path, pairs: TrainingPairs,
        tiny_backbone: VisionTransformerBackbone,
    ) -> None:  # fmt: skip
        with exclusive(tmp_path, refusal=TrainingError("the test holds it")):
            with pytest.raises(TrainingError, match=r"another run is encoding views into .*: wait"):
                read(tmp_path, pairs, tiny_backbone)
            assert not (tmp_path / "views.json").exists()
        with exclusive(complete, refusal=TrainingError("the test holds it")):
            read(complete, pairs, tiny_backbone)  # who only reads needs no lock

    @pytest.mark.parametrize("workers", [0, 1])
    def test_what_ends_the_run_is_told_in_a_sentence(
        self, workers: int, tmp_path: Path, pairs: TrainingPairs,
        tiny_backbone: VisionTransformerBackbone, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        def fail(*_: Any) -> None:
            raise MissingExtraError("reading video files needs av")

        monkeypatch.setattr(TrainingPairs, "draw_all", fail)
        with pytest.raises(MissingExtraError, match=r"^reading video files needs av$"):
            read(tmp_path, pairs, tiny_backbone, workers=workers)

    def test_no_readable_video(
        self, tmp_path: Path, tiny_backbone: VisionTransformerBackbone
    ) -> None:
        for name in ("a.mp4", "b.mp4"):
            (tmp_path / name).write_bytes(b"no video")
        pairs = TrainingPairs(Corpus.open(tmp_path), size=32)
        for _ in range(2):
            with pytest.raises(FrameError, match=r"none of the 2 videos can be read; .* a\.mp4"):
                read(tmp_path / "views", pairs, tiny_backbone)

    @pytest.mark.parametrize(
        ("scale", "message"), [(1e6, "more than float16 holds"), (float("nan"), "NaN")]
    )
    def test_tokens_that_do_not_fit(
        self, scale: float, message: str, tmp_path: Path, pairs: TrainingPairs,
        tiny_backbone: VisionTransformerBackbone, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        def huge(*arguments: Any, **options: Any) -> Views:
            views = encode_views(*arguments, **options)
            return Views(views.forward * scale, views.backward, views.grid)

        monkeypatch.setattr(views_writing, "encode_views", huge)
        with pytest.raises(TrainingError, match=message):
            read(tmp_path, pairs, tiny_backbone)


class TestRoom:
    def test_what_does_not_fit_is_not_begun(
        self, tmp_path: Path, pairs: TrainingPairs, tiny_backbone: VisionTransformerBackbone,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        usage = namedtuple("usage", "total used free")
        needed = 6 * 3 * 3 * 4 * 192 * 2
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, needed - 1))
        with pytest.raises(DiskFullError, match=r"3 views of 6 clips take 0\.1 MB, and .* 0\.1 MB"):
            read(tmp_path / "views", pairs, tiny_backbone)
        assert not (tmp_path / "views").exists()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, needed))
        read(tmp_path / "views", pairs, tiny_backbone)

    def test_a_disk_that_fills_up(
        self, tmp_path: Path, complete: Path, pairs: TrainingPairs,
        tiny_backbone: VisionTransformerBackbone, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        synchronise = os.fsync
        calls = []

        def fill(handle: int) -> None:
            calls.append(1)
            if len(calls) == 4:  # the first index, tokens, index, tokens
                raise OSError(errno.ENOSPC, "No space left on device")
            synchronise(handle)

        monkeypatch.setattr(os, "fsync", fill)
        with pytest.raises(DiskFullError, match=r"those of 2 of 6 clips are kept\. Make room for"):
            read(tmp_path, pairs, tiny_backbone)
        monkeypatch.setattr(os, "fsync", synchronise)
        assert json.loads((tmp_path / "views.json").read_text())["done"] == 2
        read(tmp_path, pairs, tiny_backbone)
        assert contents(tmp_path) == contents(complete)
