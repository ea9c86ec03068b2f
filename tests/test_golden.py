"""What the package computed on the day the values in ``golden/`` were written.

    pytest tests/test_golden.py              compares, to 1e-4 of each group's largest value
    COSETTLE_GOLDEN_RTOL=1e-6 pytest ...     for one machine, before and after a restructuring
    python tests/test_golden.py [CASE ...]   writes the values anew, all cases by default

Floats are compared by that tolerance, everything else exactly; metrics are strings, so exact. The
projection folders in ``golden/`` are files of an earlier version: they are kept, never rewritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from golden_inputs import describe, described, exact, lossless, moving, tiny_weights, write_clips
from official import ENCODERS, random_state, save_checkpoint
from safetensors.torch import load_file

# Everything of the package that this file knows, in one place.
import cosettle_adapter
from cosettle_adapter import CoSettleAdapter, evaluation
from cosettle_adapter.backbones import REGISTRY
from cosettle_adapter.cli import main as command_line
from cosettle_adapter.training.fit import FitSettings

GOLDEN = Path(__file__).with_name("golden")
FORMATS = ("format1", "format2")  # projection folders in GOLDEN
RTOL = float(os.environ.get("COSETTLE_GOLDEN_RTOL", "1e-4"))
REAL, TINY = "dinov2-vits14-pypi", "timm:test_vit.r160_in1k"


def real(folder: Path) -> dict[str, Any]:
    adapter = CoSettleAdapter.from_pretrained(REAL)
    small, large = moving("chelsea", 6, 98, 126), moving("red_panda", 6, 150, 210)
    path = lossless(folder / "clip.mkv", small)
    found: dict[str, Any] = {"fingerprint": adapter.backbone.fingerprint}
    for name, frames, size in (("small", small, None), ("large", large, (140, 196))):
        raw, features = adapter(frames, size=size, return_backbone=True)
        found |= described({f"{name}, raw": raw, f"{name}, adapted": features})
    found["padded"] = describe(adapter(large[:2], fit="pad", normalize=True))
    found["last layer"] = describe(CoSettleAdapter.raw(adapter.backbone)(small))
    found["settled"] = describe(adapter.settle(path)(small))
    streams: dict[str, dict[str, Any]] = {
        "streamed": {},
        "streamed, settled": {"settle": True},
        "fused": {"temporal_fusion": "symmetric"},
        "fused, causal": {"temporal_fusion": "causal"},
    }
    for name, options in streams.items():
        chunks = list(adapter.stream(path, batch_size=3, **options))
        assert [chunk.start for chunk in chunks] == [0, 3]
        found[name] = describe(torch.cat([chunk.features for chunk in chunks]))
    found["timestamps"] = torch.cat([chunk.timestamps for chunk in chunks]).tolist()
    for fit in ("resize", "pad"):
        found[f"centres, {fit}"] = describe(adapter.geometry(150, 210, fit=fit).cell_centers())
    return found


def stored(folder: Path) -> dict[str, Any]:
    """Projection folders as they were written once, on the tiny backbone."""
    weights, frames = tiny_weights(folder), moving("chelsea", 3, 96, 128)
    backbone = cosettle_adapter.load_backbone(TINY, weights=weights)
    found: dict[str, Any] = {"fingerprint": backbone.fingerprint}
    for name in FORMATS:
        adapter = CoSettleAdapter.from_pretrained(GOLDEN / name, backbone_weights=weights)
        found[name] = describe(adapter(frames))
        adapter.save_pretrained(folder / name)
        again = CoSettleAdapter.from_pretrained(folder / name, backbone_weights=weights, stride=8)
        found[f"{name}, saved again, stride 8"] = describe(again(frames))
    return found


def converted(folder: Path) -> dict[str, Any]:
    """Checkpoints in the layout of the paper's authors, with fewer blocks."""
    found, frames = {}, moving("chelsea", 2, 96, 128)
    for name, encoder in ENCODERS.items():
        options = {**REGISTRY[name].options, "embed_dim": 96, "depth": 2}
        row = dataclasses.replace(REGISTRY[name], options=options, width=96, depth=2, hub=None)
        state = random_state(encoder, width=96, depth=2)
        file = save_checkpoint(folder / f"{name}.pth", state)
        with mock.patch.dict(REGISTRY, {name: row}):
            words = ["convert", str(file), "--backbone", name, "-o", str(folder / name)]
            assert command_line([*words, "--offline"]) == 0
            found[name] = describe(CoSettleAdapter.from_pretrained(folder / name)(frames))
    return found


def first_use(folder: Path) -> dict[str, Any]:
    """The projection that the first call fits on the package's photographs."""
    adapter = CoSettleAdapter.from_pretrained(
        TINY, backbone_weights=tiny_weights(folder), cache_dir=folder, local_files_only=True
    )
    config, frames = adapter.config, moving("chelsea", 3, 96, 128)
    state = adapter.projection.state_dict()
    weight, bias = state["linears.0.weight"].double(), state["linears.0.bias"].double()
    return {  # late axes have nearly equal variances, and turn with the last bits of a processor
        "config": [config.kind, list(config.layers), config.recipe, repr(config.averaging)],
        "data": [config.fit["clips"], config.fit["frames"], config.fit["size"]],
        "features": describe(adapter(frames)),
        "axes": describe(torch.column_stack([weight, bias])[:8]),
        "space": describe(weight.T @ weight),
    }


def fitted(folder: Path) -> dict[str, Any]:
    backbone = cosettle_adapter.load_backbone(TINY, weights=tiny_weights(folder))
    settings = FitSettings(layers=(3, 5), size=64, pairs=2, rendered=1)
    adapter = cosettle_adapter.fit(backbone, write_clips(folder / "clips"), settings)
    record = adapter.config.fit
    return {
        "chosen": [adapter.config.kind, list(adapter.config.layers)],
        "statistics": [record["clips"], record["tokens"], record["pairs"]],
        "overlap": list(record["overlap_by_block"].values()),
        **described(adapter.projection.state_dict()),
    }


def trained(folder: Path) -> dict[str, Any]:
    """Three steps of two samples; losses of each, and the weights after them."""
    words = f"""train --backbone {TINY} --backbone-weights {tiny_weights(folder)} --offline
        --data {write_clips(folder / "clips")} -o {folder / "out"} --device cpu --seed 3 --size 64
        --epochs 1 --pairs-per-clip 2 --batch-size 2 --base-lr 0.05"""
    assert command_line(words.split()) == 0
    lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    names = ("loss", "cycle", "separability", "accuracy", "lr", "grad_norm")
    weights = described(load_file(folder / "out/projection.safetensors"))
    return {name: [float(line[name]) for line in lines] for name in names} | weights


def metrics(folder: Path) -> dict[str, Any]:
    random = np.random.RandomState(0)
    y, x, t = np.ogrid[:60, :80, :6]
    discs = [(y - a - 2 * t) ** 2 + (x - b - 3 * t) ** 2 < 300 for a, b in ((20, 25), (22, 28))]
    gt, pred = (disc.transpose(2, 0, 1) for disc in discs)
    pred = pred ^ (random.rand(6, 60, 80) < 0.02)
    frames = [(gt[t], pred[t], void) for t, void in enumerate(random.rand(6, 60, 80) < 0.05)][1:-1]
    j, f = (
        tuple(measure(truth, guess, void=void) for truth, guess, void in frames)
        for measure in (evaluation.region_similarity, evaluation.boundary_f)
    )
    summaries = evaluation.summarise(j), evaluation.summarise(f)
    truth = random.rand(9, 12, 2) * 256
    guess = truth + random.randn(9, 12, 2) * random.rand(9, 12, 1) * 40
    visible = random.rand(9, 12) < 0.8
    joints = evaluation.pck(truth, guess, visible=visible)
    animal = evaluation.badja_accuracy(truth, guess, visible, random.randint(400, 4000, 9))
    tracks, occluded = truth.transpose(1, 0, 2), ~visible.T
    found = {"j and f": [j, f, (summaries[0].mean + summaries[1].mean) / 2, *summaries]}
    found |= {"pck": [joints.correct, joints.total, joints.mean], "badja": animal}
    videos = []
    for mode in ("first", "strided"):
        queries = getattr(evaluation, f"queries_{mode}")(occluded, tracks)
        moved = queries.tracks + random.randn(*queries.tracks.shape) * 4
        hidden = queries.occluded ^ (random.rand(*queries.occluded.shape) < 0.1)
        given = (queries.points, queries.occluded, queries.tracks, hidden, moved)
        videos.append(evaluation.tapvid_metrics(*given, mode=mode))
        found[mode] = [queries.points, videos[-1]]
    figures = zip(*(video[:3] for video in videos), strict=True)
    by_threshold = [
        {t: sum(video[field][t] for video in videos) / len(videos) for t in videos[0][field]}
        for field in (3, 4)
    ]
    means = [*(sum(each) / len(videos) for each in figures), *by_threshold]
    return exact(found | {"mean over videos": means})


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    each.__name__: each for each in (real, stored, converted, first_use, fitted, trained, metrics)
}


def check(found: Any, kept: Any, where: str) -> None:
    """Lists of floats to ``RTOL`` of their largest absolute value, all else exactly."""
    if isinstance(kept, dict):
        assert list(found) == list(kept), where
        for name, value in kept.items():
            check(found[name], value, f"{where}: {name}")
    elif isinstance(kept, list) and kept and all(isinstance(each, float) for each in kept):
        assert len(found) == len(kept), where
        largest = max(map(abs, kept))
        away = max(abs(a - b) for a, b in zip(found, kept, strict=True))
        relative = away / largest if largest else away
        assert relative <= RTOL, f"{where} is off by {relative:.2g} of the largest"
    else:
        assert found == kept, where


def computed(case: str, folder: Path) -> dict[str, Any]:
    return json.loads(json.dumps(CASES[case](folder)))


def golden(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{case}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_results_are_what_they_were(
    case: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if case == "real":
        request.getfixturevalue("real_backbone")  # skips where it cannot be had
    check(computed(case, tmp_path), golden(case), case)


@pytest.mark.parametrize("change", ["one element", "a thousandth"])
def test_a_change_is_noticed(change: str) -> None:
    tensor = torch.from_numpy(np.random.RandomState(1).randn(3, 64, 6, 8))
    kept = describe(tensor)
    if change == "one element":
        tensor[1, 20, 3, 4] += 0.1
    else:
        tensor *= 1.001
    with pytest.raises(AssertionError, match="off by"):
        check(describe(tensor), kept, "map")


def write(cases: list[str]) -> None:
    torch.set_num_threads(1)  # as conftest does
    for case in cases:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            text = json.dumps(computed(case, Path(folder)), indent=1)
        (GOLDEN / f"{case}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1:] or list(CASES))
