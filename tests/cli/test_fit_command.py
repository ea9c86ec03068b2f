from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cosettle_adapter import Projection
from cosettle_adapter.backbones import VisionTransformerBackbone

from helpers import write_video


def test_every_option_reaches_the_fit_and_mistakes_are_told(
    tiny_backbone: VisionTransformerBackbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., str],
) -> None:
    monkeypatch.setattr("cosettle_adapter.cli.fit.load_backbone", lambda *_, **__: tiny_backbone)
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", frames=6, height=48, width=64, noisy=True)
    output, candidates = tmp_path / "fitted", tmp_path / "candidates"
    command = ["fit", "--backbone", "tiny", "--data", tmp_path, "-o", output]
    options = "--layers --concatenate 7+9 5+7+9+11 --solver whiten centre --strengths 2 --gap 2 4"
    options += " --correspondences soft --nuisance intra+clips --size 48 --pairs 1 --rendered 1"
    printed = run(*command, *options.split(), "--candidates", candidates)
    assert "5+7+9+11 whiten 2" in printed
    chosen = Projection.load(output)
    settings, tried = chosen.config.fit["settings"], chosen.config.fit["overlap_by_block"]
    assert len(chosen.config.layers) > 1
    assert chosen.config.out_width == 192
    assert (settings["gaps"], settings["correspondences"]) == ([2, 4], "soft")
    assert (settings["nuisance"], settings["strength"]) == ("intra+clips", 2)
    assert tried.keys() == {
        f"{blocks} {solver} 2" for blocks in ("7+9", "5+7+9+11") for solver in ("whiten", "centre")
    }
    written = {folder.name: Projection.load(folder) for folder in candidates.iterdir()}
    assert written.keys() == {name.replace(" ", "-") for name in tried}
    assert any(torch.equal(w.linears[0].weight, chosen.linears[0].weight) for w in written.values())
    assert "unknown solver pca" in run(*command, "--solver", "pca", status=1)
    printed = run(*command, "--concatenate", "5,7", status=2)
    assert "expected layers such as 7+11" in " ".join(printed.split())
