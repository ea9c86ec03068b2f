from __future__ import annotations

import dataclasses
import re
import runpy
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


def config(backbone: str = "mae-vitb16", **changes: Any) -> ProjectionConfig:
    values = {"fingerprint": "sha256:" + "a" * 64, "layers": (3,), "norm": False}
    return ProjectionConfig(backbone, **{**values, "in_width": 8, "out_width": 8, **changes})


def bundled() -> ProjectionConfig:
    found = bundled_config(REAL)
    assert found is not None
    return found


def licence(card: str) -> dict[str, str]:
    data = ModelCard(card).data.to_dict()
    return {key: value for key, value in data.items() if key.startswith("license")}


def test_the_cards_are_what_the_registry_says() -> None:
    """If this fails, run `python .ci/cards.py`."""
    pages = [path for path in (ROOT / "weights_cards").iterdir() if not path.stem.isupper()]
    assert {path.name: path.read_text(encoding="utf-8") for path in pages} == CARDS
    assert CARDS.keys() == {f"{name}.md" for name in (REAL, *RELEASED)}
    assert len(RELEASED) == 8


@pytest.mark.parametrize("name", [REAL, *RELEASED])
def test_every_card_has_its_licence_and_true_shapes(name: str) -> None:
    card, row = CARDS[f"{name}.md"], lookup(name)
    assert f'"licence": "{row.licence}"' in card
    restricted = name in ("mae-vitb16", "mocov3-vitb16", "ijepa-vitb16")
    assert ("**Restricted: non-commercial use only.**" in card) == restricted
    assert ("not measured here" in card) == (name != REAL)
    snippet = card.partition("## Use")[2]
    assert f'from_pretrained("{name}")' in snippet
    frames = re.search(r"\((\d+), 3, (\d+), (\d+)\)", snippet)
    assert frames is not None
    count, height, width = map(int, frames.groups())
    grid = plan_geometry(height, width, patch=row.patch, stride=row.patch).grid
    read = bundled().in_width if name == REAL else row.width
    shown = re.findall(r"print\(.*\)  # (.*)", snippet)
    assert shown == [str(torch.Size((count, channels, *grid))) for channels in (row.width, read)]


def test_every_measured_figure_stands_beside_its_command() -> None:
    card = CARDS[f"{REAL}.md"]
    for entry in bundled().figures["measured"]:
        assert entry["command"] in card
        for row in entry["rows"]:
            assert len(row) == len(entry["columns"])
            bold = "**" if row[0] == entry.get("highlight") else ""
            cells = ["" if value is None else f"{bold}{value}{bold}" for value in row]
            assert f"| {' | '.join(cells)} |" in card
    for caveat in ("**No figure here is a figure of Meta's DINOv2.**", "not the paper's method"):
        assert caveat in card


def test_a_model_card_is_the_same_card_behind_front_matter() -> None:
    card = ModelCard(model_card(bundled(), repository="user/mine"))
    (result,) = card.data.eval_results or ()
    assert (result.metric_type, result.metric_value) == ("J&F", 70.7)
    assert result.dataset_type == "davis-2016-in-a-coarse-setting"
    assert {k: v for k, v in card.data.to_dict().items() if k != "model-index"} == {
        "license": "mit",
        "library_name": "cosettle-adapter",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["cosettle", "video", "temporal-consistency", "image-feature-extraction"],
    }
    ours = CARDS[f"{REAL}.md"].replace(f"# {REAL}\n", "# user/mine\n", 1)
    ours = ours.replace(f'from_pretrained("{REAL}")', 'from_pretrained("user/mine")')
    assert card.text.strip() == ours.strip()
    data = ModelCard(model_card(config(fit={"datasets": ["owner/clips"]}))).data
    assert data.base_model == "timm/vit_base_patch16_224.mae"
    assert (data.datasets, data.eval_results) == (["owner/clips"], None)


def other(name: str) -> dict[str, str]:
    return {"license": "other", "license_name": name}


DINOV3 = other("dinov3") | {
    "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license"
}


@pytest.mark.parametrize(
    ("backbone", "own", "expected", "words"),
    [
        ("MIT", "", {"license": "mit"}, None),
        ("MIT", "LicenseRef-unstated", {"license": "mit"}, None),
        ("mit", "Apache-2.0", {"license": "apache-2.0"}, None),
        ("MIT", "My own, v2", other("my-own-v2"), "read its terms"),
        ("MIT", "CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}, "This projection is under"),
        ("CC-BY-NC-4.0", "MIT", {"license": "cc-by-nc-4.0"}, "The backbone's weights, from"),
        ("LicenseRef-DINOv3", "MIT", DINOV3, "use under Meta's conditions"),
        ("LicenseRef-DINOv3", "CC-BY-NC-4.0", other("dinov3-and-cc-by-nc-4.0"), "non-commercial"),
        ("unknown", "MIT", {"license": "unknown"}, "no licence is stated"),
        ("LicenseRef-NCSA-Like", "MIT", other("ncsa-like"), "read its terms first"),
    ],
)
def test_a_projections_licence_never_weakens_its_backbones(
    backbone: str,
    own: str,
    expected: dict[str, str],
    words: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is not known to be permissive is restricted."""
    row = dataclasses.replace(TINY, licence=backbone)
    monkeypatch.setitem(registry.REGISTRY, TINY.name, row)
    card = model_card(config(TINY.name, licence=own))
    assert licence(card) == expected
    assert ("**Restricted" in card) == (words is not None)
    assert words is None or words in card


def test_nothing_known_is_nothing_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    card = model_card(config("somebody-elses-vit"))
    assert licence(card) == {"license": "unknown"}
    assert "base_model" not in ModelCard(card).data.to_dict()
    for sentence in (
        "**Restricted: no licence is stated.**",
        "It is not in this version's registry.",
        "Not measured yet.",
        "torch.Size([4, 8, h, w])",
    ):
        assert sentence in card
    card = model_card(config("transformers:my-vit"))
    assert 'from_pretrained("./my-vit", projection="./my-projection")' in card
    assert "The folder `my-vit`, saved by transformers." in card
    monkeypatch.setitem(registry.REGISTRY, TINY.name, TINY)
    card = model_card(config(TINY.name), repository="user/mine")
    assert 'from_pretrained("user/mine", backbone_weights="backbone.safetensors")' in card
    assert "weights from your own file" in card
    card = model_card(config("ibot-vitb16", backbone_revision="c0ffee"))
    assert "weights from yafeng19/Co-Settle at c0ffee" in card
