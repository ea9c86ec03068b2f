from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cosettle_adapter import CoSettleAdapter, Projection
from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.cli import main

from helpers import write_video


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for name in "ab":
        write_video(tmp_path / "clips" / f"{name}.mp4", frames=12, height=48, width=64, noisy=True)
    return tmp_path / "clips"


def test_every_option_reaches_the_fit(
    tiny_backbone: VisionTransformerBackbone,
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("cosettle_adapter.cli.fit.load_backbone", lambda *_, **__: tiny_backbone)
    output = tmp_path / "fitted"
    command = f"fit --backbone tiny --data {clips} -o {output} --layers --concatenate 7+9 5+7+9+11"
    command += " --solver whiten centre --strengths 2 --gap 2 4 --correspondences soft"
    command += f" --nuisance intra+clips --size 48 --pairs 1 --rendered 1 --candidates {output}s"
    assert main(command.split()) == 0
    chosen = Projection.load(output)
    config = chosen.config
    assert len(config.layers) > 1
    assert config.out_width == 192
    settings = config.fit["settings"]
    assert (settings["gaps"], settings["correspondences"]) == ([2, 4], "soft")
    assert (settings["nuisance"], settings["strength"]) == ("intra+clips", 2)
    tried = config.fit["overlap_by_block"]
    assert tried.keys() == {
        f"{blocks} {solver} 2" for blocks in ("7+9", "5+7+9+11") for solver in ("whiten", "centre")
    }
    written = {folder.name: Projection.load(folder) for folder in Path(f"{output}s").iterdir()}
    assert written.keys() == {name.replace(" ", "-") for name in tried}
    assert any(torch.equal(w.linears[0].weight, chosen.linears[0].weight) for w in written.values())
    printed = capsys.readouterr().out
    assert "5+7+9+11 whiten 2" in printed
    CoSettleAdapter(tiny_backbone, Projection.load(output))


def test_an_unknown_solver_is_an_error(
    tiny_backbone: VisionTransformerBackbone,
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("cosettle_adapter.cli.fit.load_backbone", lambda *_, **__: tiny_backbone)
    command = f"fit --backbone tiny --data {clips} -o {tmp_path / 'no'}"
    assert main(f"{command} --solver pca".split()) == 1
    assert "unknown solver pca" in " ".join(capsys.readouterr().err.split())
    assert main(f"{command} --concatenate 5,7".split()) == 2
    assert "expected layers such as 7+11" in " ".join(capsys.readouterr().err.split())
