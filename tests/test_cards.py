from __future__ import annotations

import dataclasses
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from cosettle_adapter import ProjectionConfig
from cosettle_adapter.backbones import REGISTRY, lookup, registry
from cosettle_adapter.cards import model_card
from cosettle_adapter.hub import bundled_config
from cosettle_adapter.video.geometry import plan_geometry

from helpers import REAL, TINY

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / ".ci" / "cards.py"), run_name="cards")
CARDS: dict[str, str] = SCRIPT["weights_cards"]()
RELEASED = [name for name, row in REGISTRY.items() if row.release is not None]
HEADINGS = ["Details", "Data", "Figures", "Limits", "Use", "Citation"]


def config(backbone: str = "mae-vitb16", **changes: Any) -> ProjectionConfig:
    values = {"fingerprint": "sha256:" + "a" * 64, "layers": (3,), "norm": False}
    return ProjectionConfig(backbone, **{**values, "in_width": 8, "out_width": 8, **changes})


def bundled() -> ProjectionConfig:
    found = bundled_config(REAL)
    assert found is not None
    return found


def section(card: str, heading: str) -> str:
    return re.split(r"^## ", card, flags=re.MULTILINE)[1 + HEADINGS.index(heading)]


def licence(card: str) -> dict[str, str]:
    data = ModelCard(card).data.to_dict()
    return {key: value for key, value in data.items() if key.startswith("license")}


def test_the_cards_are_what_the_registry_says() -> None:
    """If this fails, run `python .ci/cards.py`."""
    pages = [path for path in (ROOT / "weights_cards").iterdir() if not path.stem.isupper()]
    assert {path.name: path.read_text(encoding="utf-8") for path in pages} == CARDS
    assert len(RELEASED) == 8
    assert CARDS.keys() == {f"{name}.md" for name in (REAL, *RELEASED)}


@pytest.mark.parametrize("name", [REAL, *RELEASED])
def test_every_card_has_its_sections_licence_and_true_shapes(name: str) -> None:
    card, row = CARDS[f"{name}.md"], lookup(name)
    assert re.findall(r"^## (.*)$", card, flags=re.MULTILINE) == HEADINGS
    assert f"| licence | {row.licence} |" in card
    restricted = name in ("mae-vitb16", "mocov3-vitb16", "ijepa-vitb16")
    assert ("**Restricted: non-commercial use only.**" in card) == restricted
    snippet = section(card, "Use")
    assert f'from_pretrained("{name}")' in snippet
    frames = re.search(r"\((\d+), 3, (\d+), (\d+)\)", snippet)
    assert frames is not None
    count, height, width = map(int, frames.groups())
    grid = plan_geometry(height, width, patch=row.patch, stride=row.patch).grid
    read = bundled().in_width if name == REAL else row.width
    shown = re.findall(r"print\(.*\)  # (.*)", snippet)
    assert shown == [str(torch.Size((count, channels, *grid))) for channels in (row.width, read)]


@pytest.mark.parametrize("name", RELEASED)
def test_reported_figures_are_marked_and_never_measured(name: str) -> None:
    release = lookup(name).release
    assert release is not None
    card = CARDS[f"{name}.md"]
    assert f"`ckpts/ours/{release.name}+ours` of [yafeng19/Co-Settle]" in card
    assert "| parameters | 592,128 |" in card
    figures = section(card, "Figures")
    assert "### Reported by the authors (not measured here)" in figures
    for benchmark, (alone, ours) in release.reported.items():
        assert f"| {benchmark} | {alone} | {ours} |" in figures
    assert figures.partition("### Measured")[2].strip() == "None measured here yet."


def test_every_measured_figure_stands_beside_its_command() -> None:
    card = CARDS[f"{REAL}.md"]
    figures = section(card, "Figures")
    for entry in bundled().figures["measured"]:
        assert entry["command"] in figures
        for row in entry["rows"]:
            assert len(row) == len(entry["columns"])
            bold = "**" if row[0] == entry.get("highlight") else ""
            cells = ["" if value is None else f"{bold}{value}{bold}" for value in row]
            assert f"| {' | '.join(cells)} |" in figures
    for caveat in (
        "**No figure here is a figure of Meta's DINOv2.**",
        "It is not the paper's method.",
        "Recipe and fusion were chosen on these clips",
        "an interval that includes zero",
    ):
        assert caveat in card


def test_a_model_card_is_the_same_card_behind_front_matter() -> None:
    card = ModelCard(model_card(bundled(), repository="user/mine"))
    (result,) = card.data.eval_results or ()
    assert (result.metric_type, result.metric_value) == ("J&F", 70.7)
    assert result.dataset_name == "DAVIS-2016, in a coarse setting"
    assert {k: v for k, v in card.data.to_dict().items() if k != "model-index"} == {
        "license": "mit",
        "library_name": "cosettle-adapter",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["cosettle", "video", "temporal-consistency", "image-feature-extraction"],
    }
    ours = CARDS[f"{REAL}.md"].replace(f"# {REAL}\n", "# user/mine\n", 1)
    ours = ours.replace(f'from_pretrained("{REAL}")', 'from_pretrained("user/mine")')
    assert card.text.strip() == ours.strip()


def test_front_matter_names_base_model_and_data_sets() -> None:
    data = ModelCard(model_card(config(fit={"datasets": ["owner/clips"]}))).data
    assert data.base_model == "timm/vit_base_patch16_224.mae"
    assert data.datasets == ["owner/clips"]
    assert data.eval_results is None


DINOV3 = {
    "license": "other",
    "license_name": "dinov3",
    "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license",
}


@pytest.mark.parametrize(
    ("backbone", "own", "expected"),
    [
        ("MIT", "", {"license": "mit"}),
        ("MIT", "LicenseRef-unstated", {"license": "mit"}),
        ("mit", "Apache-2.0", {"license": "apache-2.0"}),
        ("MIT", "My own, v2", {"license": "other", "license_name": "my-own-v2"}),
        ("MIT", "CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
        ("CC-BY-NC-4.0", "MIT", {"license": "cc-by-nc-4.0"}),
        ("LicenseRef-DINOv3", "MIT", DINOV3),
        ("dinov3-license", "", DINOV3),
        ("LicenseRef-DINOv3", "LicenseRef-DINOv3", DINOV3),
        (
            "LicenseRef-DINOv3",
            "CC-BY-NC-4.0",
            {"license": "other", "license_name": "dinov3-and-cc-by-nc-4.0"},
        ),
        ("unknown", "MIT", {"license": "unknown"}),
    ],
)
def test_a_projections_licence_never_weakens_its_backbones(
    backbone: str, own: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = dataclasses.replace(TINY, licence=backbone)
    monkeypatch.setitem(registry.REGISTRY, TINY.name, row)
    card = model_card(config(TINY.name, licence=own))
    assert licence(card) == expected
    free = expected["license"] in ("mit", "apache-2.0")
    assert ("**Restricted" in card) != free


@pytest.mark.parametrize(
    ("stated", "name", "words"),
    [
        ("LicenseRef-Apple-AMLR", "apple-amlr", "**Restricted: research use only.**"),
        ("apple-amlr", "apple-amlr", "research use only"),
        ("apple-ascl", "apple-ascl", "use under Apple's conditions"),
        ("fair-noncommercial-research-license", "fair-noncommercial-research", "non-commercial"),
        ("gemma", "gemma", "read its terms first"),
        ("LicenseRef-NCSA-Like", "ncsa-like", "read its terms first"),
    ],
)
def test_what_is_not_known_to_be_permissive_is_restricted(
    stated: str, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.REGISTRY, TINY.name, dataclasses.replace(TINY, licence=stated))
    card = model_card(config(TINY.name, licence="MIT"))
    assert licence(card)["license_name"] == name
    assert words in card
    assert "The backbone's weights are under" in card


def test_nothing_known_is_nothing_claimed() -> None:
    card = model_card(config("somebody-elses-vit"))
    assert licence(card) == {"license": "unknown"}
    assert "**Restricted: no licence is stated.**" in card
    assert "base_model" not in ModelCard(card).data.to_dict()
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
    card = model_card(config(kind="affine", fit=fit))
    data = section(card, "Data")
    assert r"| method | centre \| damp |" in data
    assert "| clips | 12,345 |" in data
    assert "skipped" not in data
    assert "| layers | 4 | 5 |\n| --- | --- | --- |\n| overlap | 0.700 | **0.810** |" in data
    assert "```bash\ncosettle-adapter fit --data clips\n```" in data
    assert "their own projection of this backbone, not this one" in section(card, "Figures")


def test_a_converted_release_is_the_authors() -> None:
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
    assert "| reads | layers 2, 10 (0-based); the layers after that are never run |" in card
    assert "| note |" not in card


def test_rows_of_feature_maps() -> None:
    card = model_card(config("resnet50", in_width=1024, out_width=64))
    assert "torch.randint(0, 256, (4, 3, 320, 560)" in card
    assert "torch.Size([4, 64, 20, 35])" in card
    assert "torch.Size([4, 1024, 20, 35])" in card


@pytest.mark.parametrize(
    ("kind", "count"),
    [("linear", 88), ("mlp2", 160), ("mlp3", 232), ("affine", 72), ("identity", 0)],
)
def test_parameters_are_counted(kind: str, count: int) -> None:
    assert f"| parameters | {count} |" in model_card(config(kind=kind))


def test_the_script_writes_and_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["cards.py", *arguments])
        status: int = SCRIPT["main"]()
        return status

    folder = ("-o", str(tmp_path))
    assert run("--check", *folder) == 1
    assert not list(tmp_path.iterdir())
    assert run(*folder) == run("--check", *folder) == run("--check") == 0
    (tmp_path / f"{REAL}.md").write_text("stale")
    (tmp_path / "gone.md").write_text("orphan")
    capsys.readouterr()
    assert run("--check", *folder) == 1
    told = capsys.readouterr().out
    assert f"stale: {REAL}.md" in told
    assert "no such model, delete: gone.md" in told
    assert "python .ci/cards.py" in told
