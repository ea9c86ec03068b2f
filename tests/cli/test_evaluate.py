from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from einops import rearrange
from PIL import Image

from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.cli import main
from cosettle_adapter.video.synthetic import photographs, render_clip

from helpers import shared_data, write_video

Run = Callable[..., str]
SMALL = ["--size", "84x112"]
TASKS = (
    *("davis", "folder", "vip", "jhmdb", "badja", "tapvid", "rendered"),
    *("representation", "classification", "retrieval", "localisation"),
)
KINDS = ["raw last layer", "raw same layer", "centred", "adapted"]


@pytest.fixture
def run(real_backbone: VisionTransformerBackbone, capsys: pytest.CaptureFixture[str]) -> Run:
    """Evaluate, check the status and return what was printed."""

    def evaluate(*arguments: Any, status: int = 0) -> str:
        assert main(["evaluate", *map(str, arguments)]) == status
        printed = capsys.readouterr()
        return printed.out + printed.err

    return evaluate


def save_frames(folder: Path, frames: Any, suffix: str = "png") -> None:
    folder.mkdir(parents=True)
    for t, frame in enumerate(frames):
        pixels = rearrange(frame, "c h w -> h w c").numpy()
        Image.fromarray(pixels).save(folder / f"{t:05d}.{suffix}", quality=95)


@pytest.fixture(scope="module")
def davis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rendered clips of a moving cut-out, laid out as DAVIS."""
    root = tmp_path_factory.mktemp("davis")
    (root / "ImageSets" / "2016").mkdir(parents=True)
    (root / "ImageSets" / "2016" / "val.txt").write_text("astronaut\nchelsea\n")
    photos = photographs()
    for seed, name in enumerate(("astronaut", "chelsea")):
        motion = {"motion": "mixed", "amount": 0.3, "seed": seed}
        clip = render_clip(
            photos[name], cutout=photos["coffee"], frames=4, size=(84, 112), **motion
        )
        assert clip.object_mask is not None
        save_frames(root / "JPEGImages" / "480p" / name, clip.frames, "jpg")
        folder = root / "Annotations" / "480p" / name
        folder.mkdir(parents=True)
        for t, mask in enumerate(clip.object_mask):
            Image.fromarray(mask.numpy().astype(np.uint8)).save(folder / f"{t:05d}.png")
    return root


def test_davis_ends_with_raw_centred_and_adapted_side_by_side(
    run: Run, davis: Path, tmp_path: Path
) -> None:
    output, predictions = tmp_path / "r.json", tmp_path / "p"
    command = ["davis", "--data", davis, *SMALL, "-o", output]
    printed = run(*command, "--save-predictions", predictions)
    stored = json.loads(output.read_text())
    kinds = list(stored["total"])
    assert [kind for kind in kinds if " layer " not in kind] == KINDS
    texts = ["astronaut", "chelsea", "all: J&F", "all: J recall", "all: F decay", "drift: "]
    for text in (*texts, "frames encoded at 84 x 112", "protocol crw"):
        assert text in printed
    assert re.search(r"best layer: centred[ \w]*; chosen on these clips", printed)
    for number, kind in enumerate(kinds, 1):
        cells = re.search(rf"^ *{number} +{re.escape(kind)} +([\d.]+) +(.*)$", printed, re.M)
        assert cells is not None
        assert float(cells[1]) == pytest.approx(100 * stored["total"][kind]["J&F"], abs=0.051)
        assert re.match(r"[+-][\d.]+ \[-?[\d.]+, -?[\d.]+\] +[+-][\d.]+ +", cells[2])
        assert cells[2].strip().endswith(f"{100 * stored['total'][kind]['drift@1']:.1f}/-/-")
    assert len(list(predictions.rglob("*.png"))) == len(kinds) * 2 * 4
    run(*command)  # a second run continues the first


def test_parts_baselines_and_fusion(run: Run, davis: Path, tmp_path: Path) -> None:
    same, second = tmp_path / "same", tmp_path / "second"
    same.symlink_to(davis)
    shutil.copytree(davis, second)
    assert "different names" in run("davis", "--data", davis, same, *SMALL, status=1)
    more = ["--baseline-layers", 4, 6, "--temporal-fusion", "causal", "--centre", "--every", 1]
    printed = run("davis", "--data", davis, second, "--clips", "chelsea", *SMALL, *more)
    fused = ("centred layer 4", "centred layer 6", "adapted")
    expected = ["second/chelsea", f"{davis.name}/chelsea", "of the other parts", "adapted, centred"]
    for text in (*expected, *(f"{kind}, fused causally" for kind in fused)):
        assert text in printed
    assert "astronaut" not in printed


def test_a_clip_that_failed_is_named_and_is_the_status(
    run: Run, davis: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "davis"
    shutil.copytree(davis, broken)
    (broken / "Annotations" / "480p" / "chelsea" / "00001.png").unlink()
    raw = ["--raw", "--layer", 3, "--protocol", "dino"]
    printed = run("davis", "--data", broken, *SMALL, *raw, status=1)
    for text in ("layers [3]", "protocol dino", "not scored: chelsea: ", "00001.png", "astronaut"):
        assert text in printed
    assert "adapted" not in printed


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        *(([task, "--data", "nowhere"], 1, "nowhere") for task in TASKS),
        (["rendered", "--size", "224"], 1, "write HEIGHTxWIDTH"),
        (["rendered", "--baselines", "a/x", "b/x"], 1, "several baselines of one name"),
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
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = run(*arguments, status=status)
    assert message in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    rows = ["video,start,end,label"]
    for label, noisy in (("square", False), ("noise", True)):
        (root / label).mkdir()
        for number in range(3):
            path = root / label / f"{label}{number}.mp4"
            write_video(path, frames=6 + number, height=56, width=84, noisy=noisy)
            rows += [f"{label}/{path.name},0,1,{label}"] if number < 2 else []
    (root / "segments.csv").write_text("\n".join(rows))
    return root


def test_classification_retrieval_and_localisation(run: Run, classes: Path, tmp_path: Path) -> None:
    common, output = ["--data", classes, "--size", 56, "--ks", 1], tmp_path / "c.json"
    printed = run("classification", *common, "--frames", 2, "-o", output)
    assert "1-NN" in printed
    assert "linear probe" in printed
    stored = json.loads(output.read_text())
    assert stored["total"]["adapted"]["1-NN"] == 1.0, "noise is told from a square"
    assert stored["details"]["adapted"]["1-NN"] == {"noise": [1, 1], "square": [1, 1]}
    printed = run("retrieval", *common, 3, "--frames", 2)
    for text in ("R@1", "R@3", "mAP", "adapted", "6 queries over 6 videos"):
        assert text in printed
    assert "adapted" not in run("retrieval", *common, "--frames", 2, "--raw")
    assert "frames, 1 neighbours" in run("localisation", *common, "--rate", 12)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "empty.mp4").touch()  # which is told without reading it
    printed = run("classification", "--data", tmp_path, status=1)
    assert "a single readable video of 'alone'" in printed


def test_representation_writes_its_page(run: Run, davis: Path, tmp_path: Path) -> None:
    results, page, long = tmp_path / "davis.json", tmp_path / "page.html", tmp_path / "clips"
    run("davis", "--data", davis, *SMALL, "-o", results)
    for name in ("astronaut", "chelsea"):
        clip = render_clip(photographs()[name], frames=9, size=(84, 84), motion="pan", amount=0.3)
        save_frames(long / name, clip.frames)
    command = ["representation", "--data", long, "--size", 56, "--report", page]
    printed = run(*command, "--results", results)
    measures = ("D_intra", "D_inter", "margin D", "effective rank", "cycle accuracy", "Spearman")
    for measure in measures:
        assert measure in printed
    text = page.read_text(encoding="utf-8")
    assert "J&amp;F on davis by clip" in text
    assert text.count("<svg") >= 3
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "chelsea" not in run(*command, "--clips", "astronaut")
    results.write_text("[]")
    assert "is not a results file" in run(*command, "--results", results, status=1)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("task", "data", "options", "first", "floor"),
    [
        ("davis", "davis_dev", "--clips blackswan --max-frames 6 --size 140x252", "J&F", 50),
        ("badja", "badja", "--clips cows --davis {}/davis_dev --size 112x196", "delta_seg", 25),
        ("jhmdb", "jhmdb", "--size 112x112", "PCK@0.2", 15),
        ("folder", "multi_object", "--clips stefan --late-labels void --size 84x126", "J&F", 10),
    ],
)
def test_on_real_clips(
    task: str, data: str, options: str, first: str, floor: float, run: Run
) -> None:
    """Better than a guess, on real video: what the whole chain is for."""
    printed = run(task, "--data", shared_data() / data, *options.format(shared_data()).split())
    cells = re.search(rf"^all: {re.escape(first)} +(.*)$", printed, re.M)
    assert cells is not None
    assert float(cells[1].split()[-1]) > floor


def test_a_label_that_comes_late_is_told_with_the_way_out(run: Run, tmp_path: Path) -> None:
    for kind in ("frames", "masks"):
        (tmp_path / "mine" / kind).mkdir(parents=True)
    for t in range(4):
        mask = np.zeros((84, 112), dtype=np.uint8)
        mask[20:60, 20:60] = 1
        mask[70:, 70:] = 2 * (t > 1)
        Image.fromarray(mask).save(tmp_path / "mine" / "masks" / f"{t}.png")
        Image.fromarray(80 * mask).convert("RGB").save(tmp_path / "mine" / "frames" / f"{t}.png")
    message = run("folder", "--data", tmp_path, *SMALL, status=1)
    assert "2.png of 'mine' has label(s) 2" in message
    assert "--late-labels void" in message
    run("folder", "--data", tmp_path, *SMALL, "--late-labels", "void")
