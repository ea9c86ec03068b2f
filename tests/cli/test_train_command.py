from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_fakes import SMALL_VIT, small_backbone

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.cli.train import TrainingProgress
from cosettle_adapter.training.checkpoint import StepReport, read_metrics
from cosettle_adapter.training.corpus import Corpus

from helpers import projection_for, write_video

Run = Callable[..., str]
START: dict[str, str] = {
    "--backbone": SMALL_VIT.name, "--backbone-weights": "weights.safetensors", "--data": "clips",
    "-o": "out", "--device": "cpu", "--epochs": "2", "--batch-size": "4", "--pairs-per-clip": "4",
    "--size": "64",
}  # fmt: skip


@pytest.fixture
def train(small_encoder: Path, run: Run) -> Run:
    """Train on three clips of the folder."""
    (small_encoder / "clips").mkdir()
    for name in ("a", "b", "c"):
        write_video(
            small_encoder / "clips" / f"{name}.mp4", frames=6, height=72, width=96, noisy=name > "a"
        )

    def train(*words: str, status: int = 0) -> str:
        start = [word for name in START if name not in words for word in (name, START[name])]
        return run("train", *start, *words, status=status)

    return train


def interrupt_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C when the progress bar shows a step."""

    def pressed(self: TrainingProgress, report: StepReport) -> None:
        if report.step == steps:
            signal.raise_signal(signal.SIGINT)

    patch.setattr(TrainingProgress, "stepped", pressed)


def config_in(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "config.json").read_text())


def test_a_folder_of_videos_becomes_an_adapter(train: Run) -> None:
    Path("clips/broken.mp4").write_bytes(b"not a video")
    printed = train("--about-data", "squares", "--workers", "1")
    for text in (
        "16 samples an epoch; the first step is under way", "step 8 of 8, epoch 2: loss", "clips/s",
        "skipped broken.mp4: ", "from_pretrained('./out')",
    ):  # fmt: skip
        assert text in printed
    adapter = CoSettleAdapter.from_pretrained("out", backbone_weights="weights.safetensors")
    assert adapter(torch.zeros(2, 3, 64, 64)).shape == (2, 32, 4, 4)
    fit = adapter.config.fit
    assert (fit["data"], fit["clips"], fit["skipped_clips"]) == ("squares", 4, ["broken.mp4"])
    assert fit["command"].startswith("cosettle-adapter train --backbone small-vit16")
    assert adapter.config.licence == "Apache-2.0"


def test_ctrl_c_then_resume_is_as_if_nothing_had_happened(
    train: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, though --data and --init were relative, with another licence."""
    projection_for(small_backbone(), layers=(1,), norm=True).save(Path("start"))
    train("--init", "start")
    Path("out").rename("whole")
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        printed = train("--init", "start", status=130)
        said = "interrupted; stopped after step 2 of 6, which is saved; continue with --resume out"
        assert said in printed
        Path("elsewhere").mkdir()
        patch.chdir("elsewhere")
        interrupt_after(4, patch)
        words = ("--resume", "../out", "--log-every", "2", "--licence", "MIT")
        run("train", *words, status=130)
    assert "step 6 of 6" in run("train", "--resume", "out")
    whole, resumed = (load_file(f"{folder}/projection.safetensors") for folder in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert config_in("whole")["fit"]["command"] == config_in("out")["fit"]["command"]
    assert config_in("out")["licence"] == "MIT", "options given on resuming stay"
    assert [line["step"] for line in read_metrics(Path("out"))] == [1, 2, 4, 6]


def test_a_run_is_not_resumed_with_other_settings(
    train: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        train(status=130)
    for words, message in {
        "--kl-weight 1": "settings.separability_weight was 3.0, is 1.0",
        "--epochs=5": "settings.epochs was 2, is 5",  # also if 5 is the default
        "--batch_size 2": "out holds a different run: ",
        "--data clips/a.mp4": "out holds a different run: ",
        "--validation clips": "out holds a different run: ",
    }.items():
        assert message in run("train", "--resume", "out", *words.split(), status=1)
    printed = run("train", "--resume", "out", "elsewhere", status=2)
    assert "--resume takes one folder, got 2" in printed
    assert "give --resume the folder of the run" in train("--resume", "elsewhere", status=1)
    assert "continue with --resume out" in train(status=1)
    printed = train("--resume", "--overwrite", status=1)
    assert "and --overwrite, which removes it: give only one" in printed
    train("--overwrite", "--epochs", "1")
    printed = run("train", "--backbone", "dino-vitb16", status=1)
    assert "missing --data, -o: a new run needs all three" in printed


def test_validation_chooses_the_best(train: Run) -> None:
    head = ["--head", "mlp2", "--layer", "0", "--init", "identity"]
    printed = train("--validation", "clips", *head)
    assert all(name in printed for name in ("raw", "first", "last", "chosen"))
    config = config_in("out")
    lines = [line for line in read_metrics(Path("out")) if "validation/overlap" in line]
    assert [line["step"] for line in lines] == [0, 3, 6]
    best = max(lines, key=lambda line: float(line["validation/overlap"]))
    chosen = config["fit"]["validation"]["chosen"]["overlap"]
    assert chosen == pytest.approx(best["validation/overlap"], abs=1e-4)
    assert config["fit"]["chosen_step"] == best["step"]
    assert (config["layers"], config["kind"]) == ([0], "mlp2")


def test_views_are_encoded_once_by_a_compiled_encoder(
    train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.nn.Module] = []
    at_first: list[int] = []
    tokens = Backbone.intermediate_tokens

    def compile_module(self: torch.nn.Module, **_: object) -> None:
        compiled.append(self)
        self._compiled_call_impl = self._call_impl

    def encode(self: Backbone, *arguments: Any, **options: Any) -> Any:
        at_first.append(len(compiled))
        return tokens(self, *arguments, **options)

    def pressed(self: TrainingProgress, done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)

    words = ["--cache-views", "4", "--views-folder", "views"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", compile_module)
        patch.setattr(Backbone, "intermediate_tokens", encode)
        patch.setattr(TrainingProgress, "encoded", pressed)
        printed = train(*words, "--compile", status=130)
    assert at_first[0] == len(compiled) == SMALL_VIT.depth
    said = "the views of 1 of 3 clips are kept in views; run the same command again to continue"
    assert said in printed
    assert "encoded 12 of 12 views" in train(*words)
    first = load_file("out/projection.safetensors")
    monkeypatch.setattr(Backbone, "intermediate_tokens", lambda *_, **__: pytest.fail("ran again"))
    train(*words, "--overwrite")
    again = load_file("out/projection.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data nowhere", "nowhere"),
        ("--data damaged", "none of the 2 videos that were tried can be read; "),
        ("--validation damaged", "none of the 2 validation clips can be read"),
        ("--size 60", "height 60 does not fit patch 16"),
        ("--temperature 0", "temperatures must be"),
        ("--data damaged/x.mp4 --workers 1 -v", "x.mp4"),  # -v: the traceback of a worker
        ("--resume", "holds no checkpoint, so there is no run to resume"),
    ],
)
def test_a_mistake_is_a_sentence(words: str, message: str, train: Run) -> None:
    Path("damaged").mkdir()
    for name in ("x.mp4", "y.mp4"):
        (Path("damaged") / name).write_bytes(b"not a video")
    printed = " ".join(train(*words.split(), status=1).split())
    assert message in printed
    assert not words.endswith("-v") or re.search(r'corpus\.py", line \d+, in length', printed)
    assert "under way" not in printed or "--data" in words, "settings are checked first"
    assert not Path("out/projection.safetensors").exists()


def test_a_corpus_is_prepared_and_trained_on(train: Run, run: Run) -> None:
    for number in range(23):
        Path(f"clips/bad{number:02d}.mp4").write_bytes(b"[bold]no video")
    prepare = "prepare --data clips -o frames --size 64 --every 2 --workers 1"
    printed = run(*prepare.split())
    assert printed.count("skipped bad") == 20
    assert "and 3 more; all 23 are in frames/skipped.txt" in printed
    assert "frames: the frames of 3 videos\n" in printed
    assert "cosettle-adapter train --data ./frames" in printed
    assert [video.length() for video in Corpus.open("frames").videos] == [3, 3, 3]
    assert "the frames of 3 videos, 3 of them extracted before" in run(*prepare.split())
    train("--data", "frames", "--epochs", "1")
    assert "choose a folder outside" in run("prepare", "-o", "other", "--data", ".", status=1)
    assert not Path("other").exists()
