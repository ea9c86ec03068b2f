from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import READER, TOKEN, FakeHub, Request, use_fake_hub
from huggingface_hub import ModelCard
from rich.console import Console
from safetensors.torch import save_file

from cosettle_adapter import CoSettleAdapter, Projection
from cosettle_adapter.backbones import BackboneRow, VisionTransformerBackbone, registry
from cosettle_adapter.cli import push as push_command
from cosettle_adapter.errors import (
    CosettleError,
    ProjectionFormatError,
    UnknownModelError,
    WeightsUnavailableError,
)
from cosettle_adapter.hub import HubUploadError, push

from helpers import TINY, projection_for, tiny_state

REPO = "user/mine"
FILES = {"config.json", "projection.safetensors", "README.md"}


@pytest.fixture
def hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_registered: BackboneRow
) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        use_fake_hub(monkeypatch, hub, tmp_path / "home")
        yield hub


@pytest.fixture
def first(tiny_backbone: VisionTransformerBackbone) -> Projection:
    return projection_for(tiny_backbone, licence="Apache-2.0")


@pytest.fixture
def second(tiny_backbone: VisionTransformerBackbone) -> Projection:
    return projection_for(tiny_backbone, seed=1, licence="Apache-2.0")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_file(tiny_state(), path)
    return path


Load = Callable[..., CoSettleAdapter]


@pytest.fixture
def load(weights: Path) -> Load:
    def load(name: str = REPO, **options: object) -> CoSettleAdapter:
        return CoSettleAdapter.from_pretrained(name, backbone_weights=weights, **options)  # type: ignore[arg-type]

    return load


def same(projection: Projection, other: Projection) -> bool:
    tensors, others = projection.state_dict(), other.state_dict()
    return tensors.keys() == others.keys() and all(
        torch.equal(tensors[name], others[name]) for name in tensors
    )


def test_what_is_pushed_comes_back(hub: FakeHub, first: Projection, load: Load) -> None:
    pushed = push(first, REPO, token=TOKEN)
    assert pushed.url == f"{hub.url}/{REPO}/commit/{pushed.commit}"
    adapter = load()
    assert same(adapter.projection, first)
    assert adapter.config == first.config
    assert adapter(torch.zeros(1, 3, 32, 48)).shape == (1, 192, 2, 3)


def test_a_push_is_one_commit_of_everything(hub: FakeHub, first: Projection) -> None:
    pushed = push(first, REPO, token=TOKEN, commit_message="Better")
    assert [(c.oid, c.title) for c in hub.history(REPO)] == [(pushed.commit, "Better")]
    assert hub.files(REPO).keys() == FILES
    assert len([path for path in hub.asked("POST") if "/commit/" in path]) == 1


def test_a_commit_is_loaded_by_its_id(
    hub: FakeHub, first: Projection, second: Projection, load: Load
) -> None:
    pinned = push(first, REPO, token=TOKEN).commit
    assert push(second, REPO, token=TOKEN).commit != pinned
    assert len(hub.history(REPO)) == 2
    assert same(load(revision=pinned).projection, first)
    assert same(load().projection, second)


def test_a_branch_and_a_pull_request_leave_main_alone(
    hub: FakeHub, first: Projection, second: Projection, load: Load
) -> None:
    push(first, REPO, token=TOKEN)
    push(second, REPO, token=TOKEN, revision="next")
    proposed = push(second, REPO, token=TOKEN, create_pr=True)
    assert proposed.pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert same(load().projection, first)
    assert same(load(revision="next").projection, second)
    assert same(load(revision="refs/pr/1").projection, second)


def test_a_stranger_can_propose(hub: FakeHub, first: Projection, second: Projection) -> None:
    push(first, REPO, token=TOKEN)
    with pytest.raises(HubUploadError, match="may not write to user"):
        push(second, REPO, token=READER)
    assert push(second, REPO, token=READER, create_pr=True).pull_request is not None
    assert len(hub.history(REPO)) == 1


def test_the_config_is_asked_for_before_the_weights(
    hub: FakeHub, first: Projection, load: Load
) -> None:
    push(first, REPO, token=TOKEN)
    hub.requests.clear()
    load()
    asked = [path.rpartition("/")[2] for path in hub.asked()]
    assert set(asked) == {"config.json", "projection.safetensors"}
    assert asked.index("projection.safetensors") > max(
        index for index, name in enumerate(asked) if name == "config.json"
    )


@pytest.mark.parametrize("config", [False, True])
def test_a_pickle_is_never_fetched(
    hub: FakeHub, first: Projection, load: Load, config: bool
) -> None:
    hub.put("user/old", "projection.bin", b"\x80\x04pickle")
    hub.put("user/old", "pytorch_model.bin", b"\x80\x04pickle")
    if config:
        hub.put("user/old", "config.json", first.config.to_json().encode())
    missing = "projection.safetensors" if config else "config.json"
    with pytest.raises(WeightsUnavailableError, match=f"no {missing} from the Hub repository"):
        load("user/old")
    assert not [path for path in hub.asked() if path.endswith(".bin")]


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 0xFF])


def no_header(data: bytes) -> bytes:
    return b"\xff" * 16 + data[16:]


@pytest.mark.parametrize("spoil", [truncated, flipped, no_header])
def test_a_broken_download_is_an_error_and_leaves_nothing(
    hub: FakeHub, first: Projection, load: Load, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    push(first, REPO, token=TOKEN)
    hub.spoil["projection.safetensors"] = spoil
    with pytest.raises(CosettleError, match=r"projection\.safetensors"):
        load()
    assert not list((tmp_path / "home").rglob("*projection.safetensors*"))
    hub.spoil.clear()
    assert same(load().projection, first)


def test_the_weights_belong_to_the_commit_of_the_config(
    hub: FakeHub, first: Projection, second: Projection, load: Load
) -> None:
    push(first, REPO, token=TOKEN)
    pending = [second]

    def push_meanwhile(request: Request) -> None:
        if request.path.endswith("/projection.safetensors") and pending:
            push(pending.pop(), REPO, token=TOKEN)

    hub.on_request = push_meanwhile
    assert same(load().projection, first)


def test_a_config_that_cannot_be_used_ends_it_before_the_weights(
    hub: FakeHub, first: Projection, load: Load
) -> None:
    push(first, REPO, token=TOKEN)
    config = hub.files(REPO)["config.json"].replace(b'"format_version": 2', b'"format_version": 9')
    hub.put(REPO, "config.json", config)
    with pytest.raises(ProjectionFormatError, match="format_version 9"):
        load()
    assert not [path for path in hub.asked() if "projection.safetensors" in path]


def test_a_private_repository_needs_a_token(
    hub: FakeHub, first: Projection, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(first, REPO, token=TOKEN, private=True)
    hub.requests.clear()
    for token in (None, False, READER):
        with pytest.raises(WeightsUnavailableError, match=r"private or gated repo.* authenticated"):
            load(token=token)
    assert same(load(token=TOKEN).projection, first)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert same(load(token=True).projection, first)
    assert {request.token for request in hub.requests} == {None, READER, TOKEN}


def test_a_gated_repository_needs_its_owners_leave(
    hub: FakeHub, first: Projection, load: Load
) -> None:
    push(first, REPO, token=TOKEN)
    hub.create(REPO, gated=True)
    with pytest.raises(WeightsUnavailableError, match="restricted"):
        load(token=READER)
    hub.granted.add("reader")
    assert same(load(token=READER).projection, first)


def test_tokens_stay_with_the_hub(hub: FakeHub, first: Projection, load: Load) -> None:
    push(first, REPO, token=TOKEN, private=True)
    load(token=TOKEN)
    stored = [request for request in hub.requests if request.server == "storage"]
    assert {request.method for request in stored} == {"PUT", "GET"}
    assert {request.token for request in stored} == {None}


def test_what_is_cached_needs_no_request(hub: FakeHub, first: Projection, load: Load) -> None:
    push(first, REPO, token=TOKEN)
    load()
    hub.requests.clear()
    assert same(load(local_files_only=True).projection, first)
    assert hub.requests == []


def test_the_card_shows_the_licence_and_shapes_that_are_real(
    hub: FakeHub,
    first: Projection,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    push(first, REPO, token=TOKEN)
    text = hub.files(REPO)["README.md"].decode()
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "cosettle-adapter"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert {"cosettle", "video"} <= set(card.data.tags or ())
    assert "| licence | Apache-2.0 |" in card.content
    assert first.config.fingerprint in card.content
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert f'from_pretrained("{REPO}"' in snippet
    monkeypatch.chdir(weights.parent)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"# (torch\.Size.*)", snippet)


@pytest.mark.parametrize("stated", ["", "MIT", "CC-BY-NC-4.0"])
def test_a_non_commercial_backbone_makes_it_non_commercial(
    hub: FakeHub, first: Projection, monkeypatch: pytest.MonkeyPatch, stated: str
) -> None:
    row = dataclasses.replace(TINY, licence="CC-BY-NC-4.0")
    monkeypatch.setitem(registry.REGISTRY, TINY.name, row)
    first.config = dataclasses.replace(first.config, licence=stated)
    push(first, REPO, token=TOKEN)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.license == "cc-by-nc-4.0"
    assert "neither may be used for commercial purposes" in card.content


def test_a_licence_that_the_hub_does_not_know_is_named(hub: FakeHub, first: Projection) -> None:
    first.config = dataclasses.replace(first.config, licence="LicenseRef-DINOv3")
    push(first, REPO, token=TOKEN)
    data = ModelCard(hub.files(REPO)["README.md"].decode()).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "dinov3")


def test_a_card_somebody_edited_is_kept(
    hub: FakeHub, first: Projection, second: Projection, caplog: pytest.LogCaptureFixture
) -> None:
    push(first, REPO, token=TOKEN)
    generated = hub.files(REPO)["README.md"]
    edited = generated + b"\nWe like it.\n"
    hub.put(REPO, "README.md", edited)
    pushed = push(second, REPO, token=TOKEN)
    assert pushed.kept_card
    assert "overwrite_card=True replaces it" in caplog.text
    assert hub.files(REPO)["README.md"] == edited
    assert not push(second, REPO, token=TOKEN, overwrite_card=True).kept_card
    assert b"We like it" not in hub.files(REPO)["README.md"]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_card_nobody_edited_is_replaced(hub: FakeHub, first: Projection, newline: bytes) -> None:
    push(first, REPO, token=TOKEN, card="# Mine\n\nOne.\n")
    hub.put(REPO, "README.md", hub.files(REPO)["README.md"].replace(b"\n", newline))
    assert not push(first, REPO, token=TOKEN, card="# Mine\n\nTwo.\n").kept_card
    assert b"Two." in hub.files(REPO)["README.md"]


def test_front_matter_alone_is_no_card(hub: FakeHub, first: Projection) -> None:
    hub.put(REPO, "README.md", b"---\nlicense: mit\n---\n")
    assert not push(first, REPO, token=TOKEN).kept_card


def test_a_card_edited_in_between_is_not_lost(hub: FakeHub, first: Projection) -> None:
    push(first, REPO, token=TOKEN)

    def edit(request: Request) -> None:
        if "/commit/" in request.path:
            hub.put(REPO, "README.md", b"# Edited\n")

    hub.on_request = edit
    with pytest.raises(HubUploadError, match=r"changed at the same moment; push again\. Nothing"):
        push(first, REPO, token=TOKEN, card="# Another\n")
    assert hub.files(REPO)["README.md"] == b"# Edited\n"


def test_extra_files_are_in_the_same_commit(
    hub: FakeHub, first: Projection, tmp_path: Path
) -> None:
    (tmp_path / "films.md").write_text("film")
    push(first, REPO, token=TOKEN, extra_files={"docs/films.md": tmp_path / "films.md"})
    assert hub.files(REPO).keys() == {*FILES, "docs/films.md"}
    assert len(hub.history(REPO)) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "would replace the projection's own"),
        ("model.pth", "looks like a pickle"),
        ("other.md", "is not a file"),
    ],
)
def test_extra_files_that_are_refused(
    hub: FakeHub, first: Projection, tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        push(first, REPO, token=TOKEN, extra_files={name: tmp_path / "nowhere.md"})
    assert hub.requests == []


@pytest.mark.parametrize("token", [None, True, False])
def test_without_a_token_nothing_is_asked(
    hub: FakeHub, first: Projection, token: bool | None
) -> None:
    with pytest.raises(HubUploadError, match=r"needs an access token.*`hf auth login`.*token="):
        push(first, REPO, token=token)
    assert hub.requests == []


def test_the_stored_token_is_used(
    hub: FakeHub, first: Projection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(first, REPO)
    assert hub.files(REPO).keys() == FILES


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_wrong", "does not know this token; log in"), (READER, "may not write to user; use one")],
)
def test_a_token_that_may_not(hub: FakeHub, first: Projection, token: str, message: str) -> None:
    with pytest.raises(HubUploadError, match=message):
        push(first, REPO, token=token)
    assert hub.repository(REPO) is None


@pytest.mark.parametrize("name", ["mine", "a/b/c", "user/", "user/a--b", "user/a..b", "us er/a"])
def test_names_that_cannot_be(hub: FakeHub, first: Projection, name: str) -> None:
    with pytest.raises(UnknownModelError, match="cannot be a Hub repository: expected owner/name"):
        push(first, name, token=TOKEN)
    assert hub.requests == []


def test_a_commit_cannot_be_pushed_to(hub: FakeHub, first: Projection) -> None:
    with pytest.raises(ValueError, match="is a commit; name the branch"):
        push(first, REPO, token=TOKEN, revision="0" * 40)


@pytest.mark.parametrize(("method", "path"), [("PUT", "/put/"), ("POST", "/commit/")])
def test_a_push_that_fails_commits_nothing(
    hub: FakeHub, first: Projection, method: str, path: str
) -> None:
    hub.fail(method, path, 403)
    with pytest.raises(HubUploadError, match="Nothing was committed"):
        push(first, REPO, token=TOKEN)
    assert hub.history(REPO) == []
    push(first, REPO, token=TOKEN)
    assert hub.files(REPO).keys() == FILES


def test_a_card_the_hub_refuses_is_told(hub: FakeHub, first: Projection) -> None:
    with pytest.raises(HubUploadError, match=r"the Hub refused it\..*license.*must be one of"):
        push(first, REPO, token=TOKEN, card="---\nlicense: none-of-yours\n---\n# Mine\n")
    assert hub.history(REPO) == []


def test_private_is_never_public(hub: FakeHub, first: Projection) -> None:
    hub.create(REPO)
    with pytest.raises(HubUploadError, match="exists and is public"):
        push(first, REPO, token=TOKEN, private=True)
    assert hub.history(REPO) == []
    push(first, "user/secret", token=TOKEN, private=True)
    repository = hub.repository("user/secret")
    assert repository is not None
    assert repository.private


def test_no_network(hub: FakeHub, first: Projection, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub() as gone:
        url = gone.url
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.hf_api, "ENDPOINT", url, raising=False)
    with pytest.raises(HubUploadError, match="is there a network"):
        push(first, REPO, token=TOKEN)


def test_offline(hub: FakeHub, first: Projection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUploadError, match="HF_HUB_OFFLINE is set; unset it"):
        push(first, REPO, token=TOKEN)
    assert hub.requests == []


def test_the_command(
    hub: FakeHub,
    first: Projection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first.save(tmp_path / "fitted")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("COLUMNS", "400")
    parser = argparse.ArgumentParser()
    push_command.add_arguments(parser)
    options = parser.parse_args([str(tmp_path / "fitted"), REPO, "--message", "First"])
    assert push_command.run(options, Console()) == 0
    (commit,) = hub.history(REPO)
    assert commit.title == "First"
    printed = capsys.readouterr().out
    assert f"{hub.url}/{REPO}/commit/{commit.oid}" in printed
    assert f"from_pretrained('{REPO}', revision='{commit.oid}')" in printed


def test_the_fake_lists_what_was_seeded(hub: FakeHub) -> None:
    path = "ckpts/ours/mae+ours/checkpoint-4.pth"
    old = hub.put("yafeng19/Co-Settle", path, b"old")
    hub.put("yafeng19/Co-Settle", path, b"new")
    api = huggingface_hub.HfApi()
    assert path in api.list_repo_files("yafeng19/Co-Settle")
    (file,) = api.get_paths_info("yafeng19/Co-Settle", [path], expand=False)
    assert file.path == path
    tree = api.list_repo_tree("yafeng19/Co-Settle", "ckpts", recursive=True)
    assert [entry.path for entry in tree][-1] == path
    for revision, content in ((old, b"old"), ("main", b"new")):
        found = huggingface_hub.hf_hub_download("yafeng19/Co-Settle", path, revision=revision)
        assert Path(found).read_bytes() == content
    with pytest.raises(AssertionError, match=r"reached for 'huggingface\.co'"):
        huggingface_hub.utils.get_session().get("http://huggingface.co/")
