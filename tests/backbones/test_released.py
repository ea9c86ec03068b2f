from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import TOKEN, FakeHub, use_fake_hub
from official import ENCODERS, features, random_state, save_checkpoint
from safetensors.torch import save

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import REGISTRY, BackboneRow, HubOptions, load_backbone, registry
from cosettle_adapter.backbones.released import (
    OFFICIAL_REPOSITORY,
    choose_checkpoint,
    released_checkpoint,
)
from cosettle_adapter.backbones.row import HubFile
from cosettle_adapter.backbones.weights import load_weights
from cosettle_adapter.cli import main
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError

WIDTH, DEPTH = 96, 2
FOLDER = "ckpts/ours/ibot+ours"
PUBLIC = "timm/tiny_ibot"


@pytest.mark.parametrize(
    ("listed", "chosen"),
    [
        ([f"{FOLDER}/model.pth"], "model.pth"),
        ([f"{FOLDER}/checkpoint-0.pth", f"{FOLDER}/checkpoint-4.pth"], "checkpoint-4.pth"),
        ([f"{FOLDER}/checkpoint-4.pth", f"{FOLDER}/checkpoint-10.pth"], "checkpoint-10.pth"),
        ([f"{FOLDER}/log.txt", f"{FOLDER}/checkpoint-4.pth", "README.md"], "checkpoint-4.pth"),
        ([f"{FOLDER}2/checkpoint-9.pth", f"{FOLDER}/c.safetensors"], "c.safetensors"),
        ([f"{FOLDER}/deeper/checkpoint-4.pth"], "deeper/checkpoint-4.pth"),
    ],
)
def test_the_last_epoch_of_the_folder_is_meant(listed: list[str], chosen: str) -> None:
    assert choose_checkpoint(listed, FOLDER) == f"{FOLDER}/{chosen}"


def test_the_folder_is_found_in_any_spelling() -> None:
    assert choose_checkpoint(["ckpts/ours/iBOT+ours/a.pth"], FOLDER) == "ckpts/ours/iBOT+ours/a.pth"


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([], "lists no checkpoint"),
        (["README.md", "ckpts/ours/mae+ours/a.pth"], r"it lists README.md, ckpts/ours/mae"),
        ([f"{FOLDER}/notes.txt"], "it lists .*notes.txt"),
        (
            [f"{FOLDER}/best.pth", f"{FOLDER}/last.pth"],
            "best.pth, .*last.pth.*adapter convert",
        ),
    ],
)
def test_nothing_is_guessed(listed: list[str], message: str) -> None:
    with pytest.raises(WeightsUnavailableError, match=message):
        choose_checkpoint(listed, FOLDER)


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    return random_state(ENCODERS["ibot-vitb16"], width=WIDTH, depth=DEPTH, seed=seed)


def checkpoint(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": state(seed), "epoch": 4}, buffer)
    return buffer.getvalue()


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> BackboneRow:
    row = dataclasses.replace(
        REGISTRY["ibot-vitb16"],
        options={"embed_dim": WIDTH, "depth": DEPTH},
        width=WIDTH,
        depth=DEPTH,
    )
    monkeypatch.setitem(registry.REGISTRY, row.name, row)
    return row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, row: BackboneRow) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        use_fake_hub(monkeypatch, hub, tmp_path / "home")
        yield hub


@pytest.fixture
def released(hub: FakeHub) -> FakeHub:
    hub.put(OFFICIAL_REPOSITORY, f"{FOLDER}/checkpoint-0.pth", checkpoint(seed=1))
    hub.put(OFFICIAL_REPOSITORY, f"{FOLDER}/checkpoint-4.pth", checkpoint())
    hub.put(OFFICIAL_REPOSITORY, "ckpts/ours/mae+ours/checkpoint-4.pth", b"somebody else's")
    return hub


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def converted(tmp_path: Path) -> set[str]:
    folders = list((tmp_path / "home").rglob("cosettle-adapter"))
    return {Path(name).name for folder in folders for name in files(folder)}


def test_a_name_finds_the_authors_checkpoint_and_equals_them(
    released: FakeHub, row: BackboneRow, tmp_path: Path
) -> None:
    adapter = CoSettleAdapter.from_pretrained(row.name)
    frames = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    expected = features(state(), frames, ENCODERS[row.name], DEPTH)
    torch.testing.assert_close(adapter(frames), expected, rtol=1e-4, atol=1e-4)
    commit = released.history(OFFICIAL_REPOSITORY)[0].oid
    assert f"checkpoint-4.pth at {commit[:12]}" in adapter.config.fit["source"]
    assert converted(tmp_path) == {
        "backbone.safetensors",
        "config.json",
        "projection.safetensors",
    }
    assert not any("checkpoint-0" in path for path in released.asked("GET", "HEAD"))
    assert not any("mae" in path for path in released.asked("GET", "HEAD"))


def test_it_is_downloaded_and_converted_once(released: FakeHub, row: BackboneRow) -> None:
    first = CoSettleAdapter.from_pretrained(row.name)
    downloads = [path for path in released.asked("GET") if path.endswith(".pth")]
    again = CoSettleAdapter.from_pretrained(row.name)
    assert [path for path in released.asked("GET") if path.endswith(".pth")] == downloads
    assert again.config == first.config


def test_offline_uses_what_is_there(
    released: FakeHub, row: BackboneRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = CoSettleAdapter.from_pretrained(row.name)
    asked = len(released.asked("GET", "HEAD", "POST"))
    offline = CoSettleAdapter.from_pretrained(row.name, local_files_only=True)
    assert len(released.asked("GET", "HEAD", "POST")) == asked
    assert offline.config == online.config
    released.fail("GET", "/api/models/", 503)
    lost = CoSettleAdapter.from_pretrained(row.name)
    assert lost.config == online.config, "a Hub that does not answer is as good as offline"


def test_a_revision_is_the_authors_commit(released: FakeHub, row: BackboneRow) -> None:
    first = released.history(OFFICIAL_REPOSITORY)[0].oid
    released.put(OFFICIAL_REPOSITORY, f"{FOLDER}/checkpoint-9.pth", checkpoint(seed=9))
    latest = CoSettleAdapter.from_pretrained(row.name)
    pinned = CoSettleAdapter.from_pretrained(row.name, revision=first)
    assert "checkpoint-9" in latest.config.fit["source"]
    assert "checkpoint-4" in pinned.config.fit["source"]
    assert latest.config.fingerprint != pinned.config.fingerprint


def test_the_backbone_alone_comes_from_the_same_file(
    released: FakeHub, row: BackboneRow, tmp_path: Path
) -> None:
    backbone = load_backbone(row.name)
    assert OFFICIAL_REPOSITORY in backbone.origin
    assert backbone.revision == released.history(OFFICIAL_REPOSITORY)[0].oid
    assert converted(tmp_path) == {"backbone.safetensors"}
    adapter = CoSettleAdapter.from_pretrained(row.name)
    assert adapter.backbone.fingerprint == backbone.fingerprint
    assert load_backbone(row.name, options=HubOptions(local_files_only=True)).fingerprint


def test_without_network_or_cache_the_way_out_is_told(hub: FakeHub, row: BackboneRow) -> None:
    with pytest.raises(WeightsUnavailableError) as caught:
        CoSettleAdapter.from_pretrained(row.name, local_files_only=True)
    for part in ("cosettle-adapter convert FILE", 'projection="fit"'):
        assert part in str(caught.value)


def test_a_repository_without_the_folder_says_what_it_lists(hub: FakeHub, row: BackboneRow) -> None:
    hub.put(OFFICIAL_REPOSITORY, "ckpts/base/x.pth", b"x")
    with pytest.raises(WeightsUnavailableError, match=r"lists no checkpoint in .*ckpts/base/x.pth"):
        released_checkpoint(row, HubOptions())


WRONG = {
    "truncated": checkpoint()[:5000],
    "another model": None,
    "text": b"404 not found",
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("what", ["adapter", "backbone"])
def test_a_wrong_file_is_an_error_and_nothing_is_converted(
    fault: str, what: str, hub: FakeHub, row: BackboneRow, tmp_path: Path
) -> None:
    content = WRONG[fault]
    if content is None:
        other = random_state(ENCODERS["dinov2-vitb16-in1k"], width=WIDTH, depth=DEPTH)
        content = save_checkpoint(tmp_path / "other.pth", other).read_bytes()
    hub.put(OFFICIAL_REPOSITORY, f"{FOLDER}/checkpoint-4.pth", content)
    load = CoSettleAdapter.from_pretrained if what == "adapter" else load_backbone
    with pytest.raises(
        (CorruptWeightsError, WeightsUnavailableError), match=r"checkpoint-4.pth|not the weights"
    ):
        load(row.name)
    assert converted(tmp_path) == set()


def test_the_public_tag_is_compared_when_it_is_at_hand(
    released: FakeHub,
    row: BackboneRow,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Equal to the public tag: nothing is stored twice, and the config pins the public commit."""
    backbone = {name: t for name, t in state().items() if "adapter" not in name}
    commit = released.put(PUBLIC, "model.safetensors", save(backbone))
    public = dataclasses.replace(row, hub=HubFile(PUBLIC))
    monkeypatch.setitem(registry.REGISTRY, row.name, public)
    load_weights(public, HubOptions())
    with caplog.at_level(logging.INFO, "cosettle_adapter"):
        adapter = CoSettleAdapter.from_pretrained(row.name)
    assert "the same model as timm/tiny_ibot" in caplog.text
    assert converted(tmp_path) == {"config.json", "projection.safetensors"}
    assert adapter.config.backbone_revision == commit
    frames = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    expected = features(state(), frames, ENCODERS[row.name], DEPTH)
    torch.testing.assert_close(adapter(frames), expected, rtol=1e-4, atol=1e-4)


def test_a_public_tag_that_differs_is_not_used(
    released: FakeHub,
    row: BackboneRow,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backbone = {name: t for name, t in state(seed=5).items() if "adapter" not in name}
    released.put(PUBLIC, "model.safetensors", save(backbone))
    public = dataclasses.replace(row, hub=HubFile(PUBLIC))
    monkeypatch.setitem(registry.REGISTRY, row.name, public)
    load_weights(public, HubOptions())
    with caplog.at_level(logging.INFO, "cosettle_adapter"):
        adapter = CoSettleAdapter.from_pretrained(row.name)
    assert "not the same model as timm/tiny_ibot" in caplog.text
    assert "backbone.safetensors" in converted(tmp_path)
    frames = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    expected = features(state(), frames, ENCODERS[row.name], DEPTH)
    torch.testing.assert_close(adapter(frames), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def public(released: FakeHub, row: BackboneRow, monkeypatch: pytest.MonkeyPatch) -> BackboneRow:
    """A row whose public weights are not those that the release was trained on."""
    backbone = {name: t for name, t in state(seed=5).items() if "adapter" not in name}
    released.put(PUBLIC, "model.safetensors", save(backbone))
    row = dataclasses.replace(row, hub=HubFile(PUBLIC))
    monkeypatch.setitem(registry.REGISTRY, row.name, row)
    return row


FRAMES = torch.randint(
    0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def test_a_release_on_its_own_backbone_survives_saving(public: BackboneRow, tmp_path: Path) -> None:
    adapter = CoSettleAdapter.from_pretrained(public.name)
    adapter.save_pretrained(tmp_path / "saved")
    again = CoSettleAdapter.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert torch.equal(again(FRAMES), adapter(FRAMES))
    again.save_pretrained(tmp_path / "saved again")
    third = CoSettleAdapter.from_pretrained(tmp_path / "saved again", local_files_only=True)
    assert torch.equal(third(FRAMES), adapter(FRAMES))
    third.save_pretrained(tmp_path / "saved again")
    assert (tmp_path / "saved again" / "backbone.safetensors").stat().st_size > 1000


def test_a_release_on_its_own_backbone_survives_the_hub(
    released: FakeHub, public: BackboneRow
) -> None:
    adapter = CoSettleAdapter.from_pretrained(public.name)
    pushed = adapter.push_to_hub("user/settled", token=TOKEN)
    assert "backbone.safetensors" in released.files("user/settled")
    again = CoSettleAdapter.from_pretrained("user/settled", revision=pushed.commit)
    assert torch.equal(again(FRAMES), adapter(FRAMES))


def test_a_saved_release_is_pinned_to_the_authors_commit(
    released: FakeHub, row: BackboneRow, tmp_path: Path
) -> None:
    adapter = CoSettleAdapter.from_pretrained(row.name)
    assert adapter.config.backbone_revision == released.history(OFFICIAL_REPOSITORY)[0].oid
    adapter.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "backbone.safetensors").exists(), "it can be had again"
    released.put(OFFICIAL_REPOSITORY, f"{FOLDER}/checkpoint-9.pth", checkpoint(seed=9))
    again = CoSettleAdapter.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(FRAMES), adapter(FRAMES))


def test_raw_features_pin_the_backbone_they_come_from(released: FakeHub, row: BackboneRow) -> None:
    commit = released.history(OFFICIAL_REPOSITORY)[0].oid
    assert CoSettleAdapter.raw(row.name).config.backbone_revision == commit


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("what", ["adapter", "backbone"])
def test_a_damaged_download_is_refused_and_the_next_one_heals(
    what: str, released: FakeHub, row: BackboneRow, tmp_path: Path
) -> None:
    load = CoSettleAdapter.from_pretrained if what == "adapter" else load_backbone
    released.spoil[f"{FOLDER}/checkpoint-4.pth"] = flipped
    with pytest.raises((CorruptWeightsError, WeightsUnavailableError), match="sha256"):
        load(row.name)
    assert converted(tmp_path) == set()
    released.spoil.clear()
    load(row.name)


@pytest.mark.parametrize("file", ["backbone.safetensors", "projection.safetensors"])
def test_a_conversion_that_was_cut_is_made_again(
    file: str, released: FakeHub, row: BackboneRow, tmp_path: Path
) -> None:
    expected = CoSettleAdapter.from_pretrained(row.name)(FRAMES)
    path = next((tmp_path / "home").rglob(file))
    path.write_bytes(path.read_bytes()[:-100])
    assert torch.equal(CoSettleAdapter.from_pretrained(row.name)(FRAMES), expected)


def test_download_makes_a_released_model_work_offline(
    released: FakeHub, public: BackboneRow
) -> None:
    assert main(["download", public.name]) == 0
    CoSettleAdapter.from_pretrained(public.name, local_files_only=True)
