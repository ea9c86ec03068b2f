from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console

from cosettle_adapter import Projection, ProjectionConfig
from cosettle_adapter.backbones import REGISTRY, BackboneRow, lookup, registry
from cosettle_adapter.cards import model_card, weights_card, weights_cards
from cosettle_adapter.cli import cards as cards_command
from cosettle_adapter.published import bundled_folder
from cosettle_adapter.video.geometry import plan_geometry

from helpers import REAL, TINY

FOLDER = Path(__file__).parents[1] / "weights_cards"
RELEASED = [name for name, row in REGISTRY.items() if row.release is not None]
HEADINGS = ["Details", "Data", "Figures", "Limits", "Use", "Citation"]


def config(backbone: str = "mae-vitb16", **changes: Any) -> ProjectionConfig:
    values = {"fingerprint": "sha256:" + "a" * 64, "layers": (3,), "norm": False}
    return ProjectionConfig(backbone, **{**values, "in_width": 8, "out_width": 8, **changes})


def bundled() -> ProjectionConfig:
    folder = bundled_folder(REAL)
    assert folder is not None
    return Projection.load(folder).config


def section(card: str, heading: str) -> str:
    return re.split(r"^## ", card, flags=re.MULTILINE)[1 + HEADINGS.index(heading)]


def test_the_cards_are_what_the_registry_says() -> None:
    """If this fails, run `cosettle-adapter cards`."""
    cards = [path for path in FOLDER.iterdir() if not path.stem.isupper()]  # TRAIN.md is a study
    written = {path.name: path.read_text(encoding="utf-8") for path in cards}
    assert written == weights_cards()


def test_there_is_a_card_for_every_published_projection() -> None:
    assert len(RELEASED) == 8
    published = {name for name in REGISTRY if name in RELEASED or bundled_folder(name) is not None}
    assert {REAL, *RELEASED} <= published
    assert weights_cards().keys() == {f"{name}.md" for name in published}


@pytest.mark.parametrize("name", [REAL, *RELEASED])
def test_every_card_has_its_sections_and_licence(name: str) -> None:
    card = weights_cards()[f"{name}.md"]
    assert re.findall(r"^## (.*)$", card, flags=re.MULTILINE) == HEADINGS
    assert f"| licence | {lookup(name).licence} |" in card
    assert ("commercial purposes" in card) == ("-NC" in lookup(name).licence)


def test_the_non_commercial_ones_are_the_three_that_are() -> None:
    marked = {n for n in RELEASED if "**Non-commercial.**" in weights_card(lookup(n), None)}
    assert marked == {"mae-vitb16", "mocov3-vitb16", "ijepa-vitb16"}


@pytest.mark.parametrize("name", [REAL, *RELEASED])
def test_the_shapes_are_those_of_the_model(name: str) -> None:
    row = lookup(name)
    (snippet,) = re.findall(r"```python\n(.*?)```", weights_cards()[f"{name}.md"], re.DOTALL)
    assert f'from_pretrained("{name}")' in snippet
    frames = re.search(r"\((\d+), 3, (\d+), (\d+)\)", snippet)
    assert frames is not None
    count, height, width = map(int, frames.groups())
    grid = plan_geometry(height, width, patch=row.patch, stride=row.patch).grid
    shown = re.findall(r"print\(.*\)  # (.*)", snippet)
    projection = bundled_folder(name)
    read = row.width if projection is None else Projection.load(projection).config.in_width
    assert shown == [str(torch.Size((count, width, *grid))) for width in (row.width, read)]


@pytest.mark.parametrize("name", RELEASED)
def test_reported_figures_are_marked_and_never_measured(name: str) -> None:
    row = lookup(name)
    assert row.release is not None
    figures = section(weights_card(row, None), "Figures")
    assert "### Reported by the authors (not measured here)" in figures
    for benchmark, (alone, ours) in row.release.reported.items():
        assert f"| {benchmark} | {alone} | {ours} |" in figures
    assert figures.partition("### Measured")[2].strip() == "None measured here yet."


def test_a_released_projection_tells_where_it_comes_from() -> None:
    card = weights_card(lookup("ijepa-vitb16"), None)
    assert "`ckpts/ours/ijepa+ours` of [yafeng19/Co-Settle]" in card
    assert "| final norm | not applied |" in card
    assert "| parameters | 592,128 |" in card


def test_every_measured_figure_stands_beside_its_command() -> None:
    measured = bundled().figures["measured"]
    figures = section(weights_card(lookup(REAL), bundled()), "Figures")
    for entry in measured:
        assert entry["command"] in figures
        assert {len(row) for row in entry["rows"]} == {len(entry["columns"])}
        for row in entry["rows"]:
            cells = ["" if value is None else str(value) for value in row]
            bold = entry.get("highlight") == row[0]
            cells = [f"**{cell}**" if bold and cell else cell for cell in cells]
            assert re.sub(r"\| +(?=\|)", "| ", f"| {' | '.join(cells)} |") in figures


def test_the_shipped_card_keeps_its_caveats() -> None:
    card = weights_card(lookup(REAL), bundled())
    assert "**No figure here is a figure of Meta's DINOv2.**" in card
    assert "It is not the paper's method." in card
    assert "Recipe and fusion were chosen on these clips" in card
    assert "an interval that includes zero" in section(card, "Limits")


def test_a_model_card_is_the_same_card_behind_front_matter() -> None:
    card = ModelCard(model_card(bundled(), repository="user/mine"))
    assert card.data.to_dict() == {
        "license": "mit",
        "library_name": "cosettle-adapter",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["cosettle", "video", "temporal-consistency", "image-feature-extraction"],
    }
    ours = weights_card(lookup(REAL), bundled())
    assert (
        card.text.strip()
        == ours.replace(f"# {REAL}\n", "# user/mine\n", 1)
        .replace(f'from_pretrained("{REAL}")', 'from_pretrained("user/mine")')
        .strip()
    )


def test_front_matter_names_base_model_and_data_sets() -> None:
    data = ModelCard(model_card(config(fit={"datasets": ["owner/clips"]}))).data
    assert data.base_model == "timm/vit_base_patch16_224.mae"
    assert data.datasets == ["owner/clips"]
    assert data.license == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("BSD-3-Clause", {"license": "bsd-3-clause"}),
        ("LicenseRef-DINOv3", {"license": "other", "license_name": "dinov3"}),
        ("My own, v2", {"license": "other", "license_name": "my-own-v2"}),
        ("", {"license": "apache-2.0"}),
        ("LicenseRef-unstated", {"license": "apache-2.0"}),
    ],
)
def test_licences_in_the_words_of_the_hub(licence: str, expected: dict[str, str]) -> None:
    data = ModelCard(model_card(config("dinov2-vits14", licence=licence))).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected


def test_nothing_known_is_nothing_claimed() -> None:
    card = model_card(config("somebody-elses-vit"))
    data = ModelCard(card).data.to_dict()
    assert data["license"] == "unknown"
    assert "base_model" not in data
    assert "Nothing was recorded." in section(card, "Data")
    assert section(card, "Figures").endswith("None measured here yet.\n\n")
    assert "compare both on your videos first" in section(card, "Limits")
    assert "torch.Size([4, 8, h, w])" in card


def test_what_somebody_just_fitted() -> None:
    fit = {
        "method": "centre | damp",
        "clips": 12345,
        "skipped": [],
        "settings": {"ridge": None, "size": 280},
        "overlap_by_block": {"4": 0.7, "5": 0.81},
        "command": "cosettle-adapter fit --data clips",
    }
    data = section(model_card(config(kind="affine", fit=fit)), "Data")
    assert r"| method | centre \| damp |" in data
    assert "| clips | 12,345 |" in data
    assert "skipped" not in data
    assert "| blocks | 4 | 5 |\n|---|---|---|\n| overlap | 0.700 | **0.810** |" in data
    assert "```bash\ncosettle-adapter fit --data clips\n```" in data


def test_the_authors_figures_are_not_somebody_elses() -> None:
    figures = section(model_card(config()), "Figures")
    assert "their own projection of this backbone, not this one" in figures


def test_a_converted_release_is_the_authors(tmp_path: Path) -> None:
    fit = {"method": "trained by the paper's authors; converted from their checkpoint"}
    card = model_card(config(fit=fit))
    assert "and the authors' projection." in card
    assert "### Reported by the authors (not measured here)\n" in card
    assert "| method | trained by the paper's authors" in section(card, "Data")


def test_a_backbone_without_a_source_is_given_as_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.REGISTRY, TINY.name, TINY)
    card = model_card(config(TINY.name, layers=(2, 10)), repository="user/mine")
    assert 'from_pretrained("user/mine", backbone_weights="backbone.safetensors")' in card
    assert "| weights from | no public source is registered" in card
    assert "| reads | blocks 2, 10 (0-based); block 11 is never run |" in card


def test_rows_of_feature_maps() -> None:
    card = model_card(config("resnet50", in_width=1024, out_width=64))
    assert "torch.randint(0, 256, (4, 3, 320, 560)" in card
    assert "torch.Size([4, 64, 20, 35])" in card
    assert "torch.Size([4, 1024, 20, 35])" in card


@pytest.mark.parametrize("kind", ["linear", "mlp2", "mlp3", "affine", "identity"])
def test_parameters_are_counted(kind: Any) -> None:
    counted = {"linear": 88, "mlp2": 160, "mlp3": 232, "affine": 72, "identity": 0}
    assert f"| parameters | {counted[kind]} |" in model_card(config(kind=kind))


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cards_command.add_arguments(parser)
    return cards_command.run(parser.parse_args(arguments), Console())


def test_the_command_writes_and_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    folder = ("-o", str(tmp_path))
    assert run("--check", *folder) == 1
    assert not list(tmp_path.iterdir())
    assert run(*folder) == run("--check", *folder) == 0
    assert {path.name for path in tmp_path.iterdir()} == weights_cards().keys()
    capsys.readouterr()
    (tmp_path / f"{REAL}.md").write_text("stale")
    (tmp_path / "gone.md").write_text("orphan")
    assert run("--check", *folder) == 1
    told = capsys.readouterr().out
    assert f"stale: {tmp_path / REAL}.md" in told
    assert f"no such model, delete: {tmp_path / 'gone.md'}" in told
    assert run("--check", "-o", str(FOLDER)) == 0


def test_a_row_of_its_own_needs_no_note() -> None:
    bare: BackboneRow = dataclasses.replace(lookup("dino-vitb16"), note="")
    assert "| note |" not in weights_card(bare, None)
