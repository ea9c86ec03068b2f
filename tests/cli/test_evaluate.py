from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.cli import main
from cosettle_adapter.video.synthetic import photographs, render_clip

from helpers import shared_data, write_video

SMALL = ["--size", "84x112"]
TASKS = (
    *("davis", "folder", "vip", "jhmdb", "badja", "tapvid", "rendered"),
    *("representation", "classification", "retrieval", "localisation"),
)
KINDS = ["raw last layer", "raw same layer", "centred", "adapted"]


@pytest.fixture(scope="module")
def davis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rendered clips of a moving cut-out, laid out as DAVIS."""
    root = tmp_path_factory.mktemp("davis")
    (root / "ImageSets" / "2016").mkdir(parents=True)
    (root / "ImageSets" / "2016" / "val.txt").write_text("astronaut\nchelsea\n")
    for seed, name in enumerate(("astronaut", "chelsea")):
        clip = render_clip(
            photographs()[name],
            cutout=photographs()["coffee"],
            frames=4,
            size=(84, 112),
            motion="mixed",
            amount=0.3,
            seed=seed,
        )
        assert clip.object_mask is not None
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / "480p" / name).mkdir(parents=True)
        for t, (frame, mask) in enumerate(zip(clip.frames, clip.object_mask, strict=True)):
            picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
            picture.save(root / "JPEGImages" / "480p" / name / f"{t:05d}.jpg", quality=95)
            labels = Image.fromarray(mask.numpy().astype(np.uint8), mode="P")
            labels.putpalette([0, 0, 0, 255, 255, 255])
            labels.save(root / "Annotations" / "480p" / name / f"{t:05d}.png")
    return root


def test_davis_ends_with_raw_centred_and_adapted_side_by_side(
    real_backbone: VisionTransformerBackbone,
    davis: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    output, predictions = tmp_path / "r.json", tmp_path / "p"
    command = ["evaluate", "davis", "--data", str(davis), *SMALL, "-o", str(output)]
    assert main([*command, "--save-predictions", str(predictions)]) == 0
    printed = capsys.readouterr().out
    stored = json.loads(output.read_text())
    kinds = list(stored["total"])
    assert [kind for kind in kinds if " layer " not in kind] == KINDS
    for text in ("astronaut", "chelsea", "all: J&F", "all: J recall", "all: F decay", "drift: "):
        assert text in printed
    assert re.search(r"best layer: centred[ \w]*; chosen on these clips", printed)
    for number, kind in enumerate(kinds, 1):
        cells = re.search(rf"^ *{number} +{re.escape(kind)} +([\d.]+) +(.*)$", printed, re.M)
        assert cells is not None, "a row a kind fits into 100 columns"
        assert float(cells[1]) == pytest.approx(100 * stored["total"][kind]["J&F"], abs=0.051)
        assert re.match(r"[+-][\d.]+ \[-?[\d.]+, -?[\d.]+\] +[+-][\d.]+ +", cells[2])
        assert cells[2].strip().endswith(f"{100 * stored['total'][kind]['drift@1']:.1f}/-/-")
    assert "frames encoded at 84 x 112" in printed
    assert "protocol crw" in printed
    assert len(list(predictions.rglob("*.png"))) == len(kinds) * 2 * 4
    assert main(command) == 0, "a second run continues the first"


def test_parts_baselines_and_fusion(
    real_backbone: VisionTransformerBackbone,
    davis: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    other = tmp_path / "other"
    other.symlink_to(davis)
    more = ["--baseline-layers", "4", "6", "--temporal-fusion", "causal", "--centre"]
    command = ["evaluate", "davis", "--data", str(davis), str(other), "--every", "1"]
    renamed = tmp_path / "second"
    shutil.copytree(davis, renamed)
    assert main([*command, *SMALL]) == 1, "two names for one folder"
    assert "different names" in capsys.readouterr().err
    command[4] = str(renamed)
    assert main([*command, "--clips", "chelsea", *SMALL, *more]) == 0
    printed = capsys.readouterr().out
    for text in ("second/chelsea", f"{davis.name}/chelsea", "of the other parts"):
        assert text in printed
    fused = ("centred layer 4", "centred layer 6", "adapted")
    for kind in ("adapted, centred", *(f"{kind}, fused causally" for kind in fused)):
        assert kind in printed
    assert "astronaut" not in printed


def test_a_clip_that_failed_is_named_and_is_the_status(
    real_backbone: VisionTransformerBackbone,
    davis: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    broken = tmp_path / "davis"
    shutil.copytree(davis, broken)
    (broken / "Annotations" / "480p" / "chelsea" / "00001.png").unlink()
    raw = ["--raw", "--layer", "3", "--protocol", "dino"]
    assert main(["evaluate", "davis", "--data", str(broken), *SMALL, *raw]) == 1
    printed = capsys.readouterr().out
    assert "adapted" not in printed
    assert "layers [3]" in printed
    assert "protocol dino" in printed
    assert "not scored: chelsea: " in printed
    assert "00001.png" in printed
    assert "astronaut" in printed


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        *(([task, "--data", "nowhere"], 1, "nowhere") for task in TASKS),
        (["rendered", "--layer", "3"], 1, "--layer goes with --raw"),
        (["rendered", "--size", "224"], 1, "write HEIGHTxWIDTH"),
        (["jhmdb", "--data", ".", "--year", "2017"], 2, "--year"),
        (["davis", "--data", ".", "--frames", "3"], 2, "--frames"),
        (["retrieval", "--data", ".", "--every", "2"], 2, "--every"),
        (["davis"], 2, "--data"),
        (["vip", "--data", ".", "elsewhere"], 2, "elsewhere"),
    ],
)
def test_mistakes_are_a_sentence(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments]) == status
    printed = capsys.readouterr()
    assert message in printed.err + printed.out
    assert "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    for label, noisy in (("square", False), ("noise", True)):
        for number in range(3):
            path = root / label / f"{label}{number}.mp4"
            path.parent.mkdir(exist_ok=True)
            write_video(path, frames=6 + number, height=56, width=84, noisy=noisy)
    return root


def test_classification_and_retrieval(
    real_backbone: VisionTransformerBackbone,
    classes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    common = ["--data", str(classes), "--frames", "2", "--size", "56"]
    output = tmp_path / "c.json"
    assert main(["evaluate", "classification", *common, "--ks", "1", "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "1-NN" in printed
    assert "linear probe" in printed
    stored = json.loads(output.read_text())
    assert stored["total"]["adapted"]["1-NN"] == 1.0, "noise is told from a square"
    assert main(["evaluate", "retrieval", *common, "--ks", "1", "3"]) == 0
    printed = capsys.readouterr().out
    for measure in ("R@1", "R@3", "mAP"):
        assert measure in printed
    assert "adapted" in printed
    assert main(["evaluate", "retrieval", *common, "--ks", "1", "--raw"]) == 0
    assert "adapted" not in capsys.readouterr().out


def test_localisation(
    real_backbone: VisionTransformerBackbone, classes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["video,start,end,label"]
    for label in ("square", "noise"):
        rows += [f"{label}/{label}{number}.mp4,0,1,{label}" for number in range(2)]
    (classes / "segments.csv").write_text("\n".join(rows))
    command = ["evaluate", "localisation", "--data", str(classes), "--rate", "12"]
    assert main([*command, "--size", "56", "--ks", "1"]) == 0
    assert "frames, 1 neighbours" in capsys.readouterr().out


def test_representation_writes_its_page(
    real_backbone: VisionTransformerBackbone,
    davis: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    results, page = tmp_path / "davis.json", tmp_path / "page.html"
    assert main(["evaluate", "davis", "--data", str(davis), *SMALL, "-o", str(results)]) == 0
    long = tmp_path / "clips"
    for name in ("astronaut", "chelsea"):
        clip = render_clip(photographs()[name], frames=9, size=(84, 84), motion="pan", amount=0.3)
        for t, frame in enumerate(clip.frames):
            (long / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame.permute(1, 2, 0).numpy()).save(long / name / f"{t:03d}.png")
    command = ["evaluate", "representation", "--data", str(long), "--size", "56"]
    assert main([*command, "--report", str(page), "--results", str(results)]) == 0
    printed = capsys.readouterr().out
    for measure in ("D_intra", "D_inter", "margin D", "effective rank", "cycle accuracy"):
        assert measure in printed
    assert "Spearman" in printed
    text = page.read_text(encoding="utf-8")
    assert "J&amp;F on davis by clip" in text
    assert text.count("<svg") >= 3
    assert "http://" not in text.replace("http://www.w3.org", "")
    results.write_text("[]")
    assert main([*command, "--report", str(page), "--results", str(results)]) == 1
    assert "is not a results file" in capsys.readouterr().err


@pytest.mark.shared
@pytest.mark.parametrize("task", ["davis", "badja", "jhmdb", "folder"])
def test_on_real_clips(
    task: str,
    real_backbone: VisionTransformerBackbone,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Better than a guess, on real video: what the whole chain is for."""
    monkeypatch.setenv("COLUMNS", "160")
    options = {
        "davis": ["davis_dev", "--clips", "blackswan", "--max-frames", "6"],
        "badja": ["badja", "--clips", "cows", "--davis", str(shared_data() / "davis_dev")],
        "jhmdb": ["jhmdb"],
        "folder": ["multi_object", "--clips", "stefan", "--late-labels", "void"],
    }[task]
    data = shared_data() / options[0]
    size = {"davis": "140x252", "badja": "112x196", "jhmdb": "112x112", "folder": "84x126"}[task]
    assert main(["evaluate", task, "--data", str(data), *options[1:], "--size", size]) == 0
    printed = capsys.readouterr().out
    first = {"davis": "J&F", "badja": "delta_seg", "jhmdb": "PCK@0.2", "folder": "J&F"}[task]
    cells = re.search(rf"^all: {re.escape(first)} +(.*)$", printed, re.M)
    assert cells is not None
    floor = {"davis": 50, "badja": 25, "jhmdb": 15, "folder": 10}[task]
    assert float(cells[1].split()[-1]) > floor


def test_a_label_that_comes_late_is_told_with_the_way_out(
    real_backbone: VisionTransformerBackbone,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for kind in ("frames", "masks"):
        (tmp_path / "mine" / kind).mkdir(parents=True)
    for t in range(4):
        mask = np.zeros((84, 112), dtype=np.uint8)
        mask[20:60, 20:60] = 1
        mask[70:, 70:] = 2 * (t > 1)
        Image.fromarray(mask).save(tmp_path / "mine" / "masks" / f"{t}.png")
        Image.fromarray(80 * mask).convert("RGB").save(tmp_path / "mine" / "frames" / f"{t}.png")
    command = ["evaluate", "folder", "--data", str(tmp_path), *SMALL]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert "2.png of 'mine' has label(s) 2" in message
    assert "--late-labels void" in message
    assert main([*command, "--late-labels", "void"]) == 0
