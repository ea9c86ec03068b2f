from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from einops import rearrange
from export_fakes import small_adapter
from PIL import Image

from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.cli import main
from cosettle_adapter.cli.common import ModelOptions
from cosettle_adapter.video.synthetic import photographs, render_clip

from helpers import shared_data, write_video

pytestmark = pytest.mark.usefixtures("real_backbone")
Run = Callable[..., str]
SMALL = ["--size", "84"]  # the shorter side
TASKS = (
    *("davis", "folder", "vip", "jhmdb", "badja", "tapvid", "rendered"),
    *("representation", "classification", "retrieval", "localisation"),
)
KINDS = ["raw last layer", "raw same layer", "centred", "adapted"]


def save_frames(folder: Path, frames: Any, suffix: str = "png") -> None:
    folder.mkdir(parents=True)
    for t, frame in enumerate(frames):
        pixels = np.ascontiguousarray(rearrange(frame, "... h w -> h w ...").numpy())
        Image.fromarray(pixels).save(folder / f"{t:05d}.{suffix}", quality=95)


@pytest.fixture(scope="module")
def davis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rendered clips of a moving cut-out, laid out as DAVIS."""
    root, photos = tmp_path_factory.mktemp("davis"), photographs()
    (root / "ImageSets" / "2016").mkdir(parents=True)
    (root / "ImageSets" / "2016" / "val.txt").write_text("astronaut\nchelsea\n")
    for seed, name in enumerate(("astronaut", "chelsea")):
        motion = {"motion": "mixed", "amount": 0.3, "seed": seed}
        clip = render_clip(
            photos[name], cutout=photos["coffee"], frames=4, size=(84, 112), **motion
        )
        assert clip.object_mask is not None
        save_frames(root / "JPEGImages" / "480p" / name, clip.frames, "jpg")
        save_frames(root / "Annotations" / "480p" / name, clip.object_mask.byte())
    return root


@pytest.fixture(scope="module")
def scored(
    real_backbone: VisionTransformerBackbone, davis: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """What an evaluation printed, and the folder of its results and predictions."""
    folder, printed = tmp_path_factory.mktemp("scored"), io.StringIO()
    words = ["davis", "--data", davis, *SMALL, "-o", folder / "r.json"]
    with contextlib.redirect_stdout(printed):
        words += ["--save-predictions", folder / "predictions"]
        assert main(["evaluate", *map(str, words)]) == 0
    return printed.getvalue(), folder


def test_davis_ends_with_raw_centred_and_adapted_side_by_side(scored: tuple[str, Path]) -> None:
    printed, folder = scored
    total = json.loads((folder / "r.json").read_text())["total"]
    assert [kind for kind in total if " layer " not in kind] == KINDS
    texts = ["astronaut", "chelsea", "all: J&F", "all: J recall", "all: F decay", "drift: "]
    for text in (*texts, "frames encoded at 84 x 112", "protocol best"):
        assert text in printed
    row = r"^ *\d+ +[a-z].*? +([\d.]+) +[+-][\d.]+ \[.* ([\d.]+)/-/- *$"
    expected = [(f"{100 * f['J&F']:.1f}", f"{100 * f['drift@1']:.1f}") for f in total.values()]
    assert re.findall(row, printed, re.M) == expected
    assert re.search(r"best layer: centred[ \w]*; chosen on these clips", printed)
    assert len(list((folder / "predictions").rglob("*.png"))) == len(total) * 2 * 4


def test_parts_baselines_and_fusion(run: Run, davis: Path, tmp_path: Path) -> None:
    same, second = tmp_path / "same", tmp_path / "second"
    same.symlink_to(davis)
    shutil.copytree(davis, second)
    command = ["evaluate", "davis", *SMALL, "--data", davis]
    assert "different names" in run(*command, same, status=1)
    more = ["--baseline-layers", 4, 6, "--temporal-fusion", "causal", "--centre", "--every", 1]
    more += ["--dense", 2, "--upsampler", "guided"]
    printed = run(*command, second, "--clips", "chelsea", *more)
    fused = ("centred layer 4", "centred layer 6", "adapted")
    expected = ["dense 2, upsampler guided", "of the other parts", "adapted, centred"]
    expected += ["second/chelsea", f"{davis.name}/chelsea"]
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
    printed = run("evaluate", "davis", "--data", broken, *SMALL, *raw, status=1)
    for text in ("layers [3]", "protocol dino", "not scored: chelsea: ", "00001.png", "astronaut"):
        assert text in printed
    assert "adapted" not in printed


def test_mistakes_are_a_sentence(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, status, message in (
        *((f"{task} --data nowhere", 1, "nowhere") for task in TASKS),
        *((task, 1, "--data is missing") for task in TASKS[:6]),
        ("rendered --size 22x4x1", 2, "expected 476 or 476x882"),
        ("rendered --baselines a/x b/x", 1, "several baselines of one name"),
        ("jhmdb --data . --year 2017", 2, "--year"),
        ("retrieval --data . --every 2", 2, "--every"),
        ("davis --protocol cropma", 2, "cropmae"),
        ("vip --data . elsewhere", 2, "elsewhere"),
    ):
        assert message in run("evaluate", *words.split(), status=status)
    assert not list(tmp_path.iterdir())


def test_classification_retrieval_and_localisation(run: Run, tmp_path: Path) -> None:
    root, rows = tmp_path / "classes", ["video,start,end,label", "gone.mp4,0,1,square"]
    for label in ("square", "noise"):
        (root / label).mkdir(parents=True)
        for number in range(3):
            path = root / label / f"{label}{number}.mp4"
            write_video(path, frames=6 + number, height=56, width=84, noisy=label == "noise")
            rows += [f"{label}/{path.name},0,1,{label}"] if number < 2 else []
    (root / "segments.csv").write_text("\n".join(rows))
    common, output = ["--data", root, "--size", 56, "--ks", 1], tmp_path / "c.json"
    printed = run("evaluate", "classification", *common, "--frames", 2, "-o", output)
    assert "1-NN" in printed
    assert "linear probe" in printed
    stored = json.loads(output.read_text())
    assert stored["total"]["adapted"]["1-NN"] == 1.0, "noise is told from a square"
    assert stored["details"]["adapted"]["1-NN"] == {"noise": [1, 1], "square": [1, 1]}
    printed = run("evaluate", "retrieval", *common, 3, "--frames", 2)
    for text in ("R@1", "R@3", "mAP", "adapted", "6 queries over 6 videos"):
        assert text in printed
    printed = run("evaluate", "localisation", *common, "--rate", 12, "--raw", status=1)
    assert "skipped gone.mp4: " in printed
    assert "frames, 1 neighbours" in printed
    assert "adapted" not in printed
    (tmp_path / "few" / "alone").mkdir(parents=True)
    (tmp_path / "few" / "alone" / "empty.mp4").touch()  # which is told without reading it
    printed = run("evaluate", "classification", "--data", tmp_path / "few", status=1)
    assert "a single readable video of 'alone'" in printed


def test_representation_writes_its_page(
    run: Run, scored: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelOptions, "load", lambda *_, **__: small_adapter("vit"))
    page, long = tmp_path / "page.html", tmp_path / "clips"
    for name in ("astronaut", "chelsea"):
        clip = render_clip(photographs()[name], frames=9, size=(84, 84), motion="pan", amount=0.3)
        save_frames(long / name, clip.frames)
    command = ["evaluate", "representation", "--data", long, "--size", 64, "--report", page]
    printed = run(*command, "--results", scored[1] / "r.json")
    measures = ("D_intra", "D_inter", "margin D", "effective rank", "cycle accuracy", "Spearman")
    assert all(measure in printed for measure in measures)
    text = page.read_text(encoding="utf-8")
    assert "J&amp;F on davis by clip" in text
    assert text.count("<svg") >= 3
    assert "chelsea" not in run(*command[:-2], "--clips", "astronaut")
    (tmp_path / "other.json").write_text("[]")
    printed = run(*command, "--results", tmp_path / "other.json", status=1)
    assert "is not a results file" in printed


@pytest.mark.shared
@pytest.mark.parametrize(
    ("task", "options", "floor"),
    [
        ("davis", "{}/davis_dev --clips blackswan --max-frames 6 --size 140x252", 50),
        ("badja", "{}/badja --clips horsejump-high --davis {}/davis_dev --size 84x140", 20),
        pytest.param("jhmdb", "{}/jhmdb --size 112x112", 15, marks=pytest.mark.slow),
    ],
)
def test_on_real_clips(task: str, options: str, floor: float, run: Run) -> None:
    """Better than a guess, on real video: what the whole chain is for."""
    printed = run("evaluate", task, "--data", *options.replace("{}", str(shared_data())).split())
    cells = re.search(r"^all: (?:J&F|delta_seg|PCK@0.2) +(.*)$", printed, re.M)
    assert cells is not None
    assert float(cells[1].split()[-1]) > floor


def test_a_label_that_comes_late_is_told_with_the_way_out(run: Run, tmp_path: Path) -> None:
    masks = np.zeros((3, 84, 112), dtype=np.uint8)
    masks[:, 20:60, 20:60] = 1
    masks[1:, 70:, 70:] = 2
    for kind in ("frames", "masks"):
        (tmp_path / "mine" / kind).mkdir(parents=True)
        for t, mask in enumerate(masks):
            Image.fromarray(mask).save(tmp_path / "mine" / kind / f"{t}.png")
    command = ("evaluate", "folder", "--data", tmp_path, *SMALL)
    message = run(*command, status=1)
    assert "1.png of 'mine' has label(s) 2" in message
    assert "--late-labels keep" in message
    run(*command, "--late-labels", "keep")


def test_a_protocol_is_explained_without_data_or_model(run: Run) -> None:
    for words, expected in (
        (
            "davis --protocol dino",
            ("year +the newest", "dino", "0.228, 0.224", "shorter side 480", "nearest"),
        ),
        ("folder --protocol cropmae --topk 3", ("cropmae", "topk +3", "480 x 880", "bilinear")),
        ("folder --size 84x112", ("best", r"size +\(84, 112\)")),
        ("vip --protocol cosettle", ("has not published", "topk +10", "longer side 880")),
        ("jhmdb --joints geometric", ("best", "joints +geometric", "std +the backbone's")),
        ("badja --query-frames strict", ("query_frames +strict", "size +480 x 880")),
        ("tapvid --protocol chrono", ("Chrono", "raster +256", "size +\\(896, 896")),
    ):
        printed = run("evaluate", *words.split(), "--explain")
        for text in expected:
            assert re.search(text, printed), (text, printed)
