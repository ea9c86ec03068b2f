from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_fakes import SMALL_VIT

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone, registry
from cosettle_adapter.cli import main
from cosettle_adapter.cli.train import TrainingProgress
from cosettle_adapter.training.checkpoint import StepReport, read_metrics
from cosettle_adapter.training.corpus import Corpus

from helpers import tiny_state, write_video

START: dict[str, str] = {
    "--backbone": SMALL_VIT.name, "--backbone-weights": "weights.safetensors", "--data": "clips",
    "-o": "out", "--device": "cpu", "--epochs": "2", "--batch-size": "4", "--pairs-per-clip": "4",
    "--size": "64",
}  # fmt: skip


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three clips and the weights of a small registered encoder."""
    monkeypatch.setitem(registry.REGISTRY, SMALL_VIT.name, SMALL_VIT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    save_file(tiny_state(SMALL_VIT), tmp_path / "weights.safetensors")
    (tmp_path / "clips").mkdir()
    for name in ("a", "b", "c"):
        write_video(
            tmp_path / "clips" / f"{name}.mp4", frames=10, height=72, width=96, noisy=name != "a"
        )
    return tmp_path


def train(*arguments: str) -> int:
    start = [word for name in START if name not in arguments for word in (name, START[name])]
    return main(["train", *start, *arguments])


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C when the progress bar shows a step."""
    stepped = TrainingProgress.stepped

    def pressed(self: TrainingProgress, report: StepReport) -> None:
        stepped(self, report)
        if report.step == steps:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainingProgress, "stepped", pressed)


def test_a_folder_of_videos_becomes_an_adapter(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "clips" / "broken.mp4").write_bytes(b"not a video")
    assert train("--about-data", "squares", "--workers", "1") == 0
    printed = capsys.readouterr().out
    assert "16 samples an epoch; the first step is under way" in printed
    assert "step 8 of 8, epoch 2: loss" in printed
    assert "clips/s" in printed
    assert "skipped broken.mp4: " in printed
    assert "from_pretrained('./out')" in printed
    adapter = CoSettleAdapter.from_pretrained("out", backbone_weights="weights.safetensors")
    assert adapter(torch.zeros(2, 3, 64, 64)).shape == (2, 32, 4, 4)
    fit = adapter.config.fit
    assert (fit["data"], fit["clips"], fit["skipped_clips"]) == ("squares", 4, ["broken.mp4"])
    assert fit["command"].startswith("cosettle-adapter train --backbone small-vit16")
    assert adapter.config.licence == "Apache-2.0"


def test_ctrl_c_then_resume_is_as_if_nothing_had_happened(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train() == 0
    Path("out").rename("whole")
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        assert train() == 130
    printed = capsys.readouterr()
    said = "interrupted; stopped after step 2 of 6, which is saved; continue with --resume out"
    assert said in printed.err
    assert "Traceback" not in printed.err
    (workplace / "elsewhere").mkdir()
    monkeypatch.chdir(workplace / "elsewhere")  # --data was relative
    assert main(["train", "--resume", "../out", "--log-every", "2"]) == 0
    monkeypatch.chdir(workplace)
    assert "step 6 of 6" in capsys.readouterr().out
    whole, resumed = (
        load_file(Path(folder) / "projection.safetensors") for folder in ("whole", "out")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    configs = [
        json.loads((Path(folder) / "config.json").read_text()) for folder in ("whole", "out")
    ]
    assert configs[0]["fit"]["command"] == configs[1]["fit"]["command"]
    assert [line["step"] for line in read_metrics(Path("out"))] == [1, 2, 4, 6]
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        assert train("--overwrite", "--init", "whole") == 130
    monkeypatch.chdir(workplace / "elsewhere")  # --init was relative, too
    assert main(["train", "--resume", "../out"]) == 0


def test_a_run_is_not_resumed_with_other_settings(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        assert train() == 130
    assert main(["train", "--resume", "out", "--kl-weight", "1"]) == 1
    assert "settings.separability_weight was 3.0, is 1.0" in capsys.readouterr().err
    assert main(["train", "--resume", "out", "--epochs=5"]) == 1
    assert "settings.epochs was 2, is 5" in capsys.readouterr().err, "also if 5 is the default"
    for other in (
        "--seed=1",
        "--batch_size 2",
        "--layer 0",
        "--data clips/a.mp4",
        "--validation clips",
    ):
        assert main(["train", "--resume", "out", *other.split()]) == 1
        assert "out holds a different run: " in capsys.readouterr().err, other
    assert main(["train", "--resume", "out", "elsewhere"]) == 2
    assert "--resume takes one folder, got 2" in capsys.readouterr().err
    assert train("--resume", "elsewhere") == 1
    assert "give --resume the folder of the run" in capsys.readouterr().err
    assert train() == 1
    assert "continue with --resume out" in capsys.readouterr().err
    assert train("--overwrite", "--kl-weight", "1") == 0
    assert train("--resume", "--overwrite", "--kl-weight", "1") == 1
    assert "and --overwrite, which removes it: give only one" in capsys.readouterr().err
    assert main(["train", "--backbone", "dino-vitb16"]) == 1
    assert "missing --data, -o: a new run needs all three" in capsys.readouterr().err


def test_options_given_on_resuming_stay(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        assert train() == 130
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        assert main(["train", "--resume", "out", "--licence", "MIT", "--log-every", "2"]) == 130
    assert main(["train", "--resume", "out"]) == 0
    config = json.loads((workplace / "out" / "config.json").read_text())
    assert config["licence"] == "MIT"
    assert "--licence" not in config["fit"]["command"], "it is that of the run's start"
    assert [line["step"] for line in read_metrics(workplace / "out")] == [1, 2, 4, 6]


def test_verbose_shows_the_traceback_of_a_worker(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "bad.mp4").write_bytes(b"not a video")
    arguments = ["--data", "bad.mp4", "--workers", "1"]
    assert train(*arguments) == 1
    printed = capsys.readouterr().err
    assert "bad.mp4" in printed
    assert "Traceback" not in printed
    assert train(*arguments, "-v") == 1
    assert re.search(r'corpus\.py", line \d+, in length', capsys.readouterr().err)


def test_validation_chooses_the_best(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = ["--head", "mlp2", "--layer", "0", "--init", "identity"]
    assert train("--validation", "clips", *head) == 0
    printed = capsys.readouterr().out
    for name in ("raw", "first", "last", "chosen"):
        assert name in printed
    config = json.loads((workplace / "out" / "config.json").read_text())
    overlap = {name: row["overlap"] for name, row in config["fit"]["validation"].items()}
    lines = [line for line in read_metrics(workplace / "out") if "validation/overlap" in line]
    assert [line["step"] for line in lines] == [0, 3, 6]
    best = max(lines, key=lambda line: float(line["validation/overlap"]))
    assert overlap["chosen"] == pytest.approx(best["validation/overlap"], abs=1e-4)
    assert config["fit"]["chosen_step"] == best["step"]
    assert config["layers"] == [0]
    assert config["kind"] == "mlp2"


def test_views_are_encoded_once_by_a_compiled_encoder(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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

    arguments = ["--cache-views", "4", "--views-folder", "views", "--compile"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", compile_module)
        patch.setattr(Backbone, "intermediate_tokens", encode)
        patch.setattr(TrainingProgress, "encoded", pressed)
        assert train(*arguments) == 130
    assert at_first[0] == len(compiled) == SMALL_VIT.depth
    said = "the views of 1 of 3 clips are kept in views; run the same command again to continue"
    assert said in capsys.readouterr().err
    arguments.remove("--compile")
    assert train(*arguments) == 0
    assert "encoded 12 of 12 views" in capsys.readouterr().out
    first = load_file("out/projection.safetensors")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the encoder ran again")

    monkeypatch.setattr("cosettle_adapter.backbones.Backbone.intermediate_tokens", never)
    assert train(*arguments, "--overwrite") == 0
    again = load_file("out/projection.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--data", "empty"], "empty"),
        (["--data", "damaged"], "none of the 2 videos that were tried can be read; "),
        (["--validation", "damaged"], "none of the 2 validation clips can be read"),
        (["--backbone", "dinov2-vitb41"], "Did you mean"),
        (["--init", "nowhere"], "projection folder, got 'nowhere'"),
        (["--size", "60"], "height 60 does not fit patch 16"),
        (["--layer", "9"], "has layers 0 to 1"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--temperature", "0"], "temperatures must be"),
        (["--resume"], "holds no checkpoint, so there is no run to resume"),
        (["--device", "xpu"], "--device xpu is not available; use --device cpu"),
    ],
)
def test_a_mistake_is_a_sentence(
    arguments: list[str], message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "empty").mkdir()
    (workplace / "damaged").mkdir()
    for name in ("x.mp4", "y.mp4"):
        (workplace / "damaged" / name).write_bytes(b"not a video")
    assert train(*arguments) in (1, 2)
    printed = capsys.readouterr()
    assert message in " ".join(printed.err.split())
    assert "Traceback" not in printed.err
    assert "under way" not in printed.out or "--data" in arguments, "settings are checked first"
    assert not (workplace / "out" / "projection.safetensors").exists()


def test_a_corpus_is_prepared_and_trained_on(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(23):
        (workplace / "clips" / f"bad{number:02d}.mp4").write_bytes(b"[bold]no video")
    words = [
        "prepare",
        "--data",
        "clips",
        "-o",
        "frames",
        "--size",
        "64",
        "--every",
        "2",
        "--workers",
        "1",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("skipped bad") == 20
    assert "and 3 more; all 23 are in frames/skipped.txt" in printed
    assert "frames: the frames of 3 videos\n" in printed
    assert "cosettle-adapter train --data ./frames" in printed
    assert [video.length() for video in Corpus.open("frames").videos] == [5, 5, 5]
    assert main(words) == 0
    assert "the frames of 3 videos, 3 of them extracted before" in capsys.readouterr().out
    assert train("--data", "frames", "--epochs", "1") == 0
    for wrong, message in {
        "--data .": "choose a folder outside",
        "--data clips --quality 0": "quality must be at least 1",
    }.items():
        assert main(["prepare", "-o", "other", *wrong.split()]) in (1, 2)
        assert message in " ".join(capsys.readouterr().err.split())
        assert not Path("other").exists()
