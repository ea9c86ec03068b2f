from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_hub import READER, TOKEN, FakeHub, Request
from huggingface_hub import ModelCard, constants

from cosettle_adapter import CoSettleAdapter, Projection
from cosettle_adapter.backbones import HubOptions, VisionTransformerBackbone
from cosettle_adapter.cli import main
from cosettle_adapter.errors import (
    CosettleError,
    ProjectionFormatError,
    UnknownModelError,
    WeightsUnavailableError,
)
from cosettle_adapter.hub import bundled_folder, find_projection, is_published
from cosettle_adapter.upload import HubUploadError, push

from helpers import REAL, TINY, projection_for

REPO = "user/mine"
WEIGHTS = "projection.safetensors"
FILES = {"config.json", WEIGHTS, "README.md"}


pytestmark = pytest.mark.usefixtures("tiny_registered")


@pytest.fixture
def first(tiny_backbone: VisionTransformerBackbone) -> Projection:
    return projection_for(tiny_backbone, licence="Apache-2.0")


@pytest.fixture
def second(tiny_backbone: VisionTransformerBackbone) -> Projection:
    return projection_for(tiny_backbone, seed=1, licence="Apache-2.0")


def loaded(name: str = REPO, **options: str | bool | None) -> Projection:
    return Projection.load(find_projection(name, HubOptions(**options)))  # type: ignore[arg-type]


def same(projection: Projection, other: Projection) -> bool:
    tensors, others = projection.state_dict(), other.state_dict()
    return tensors.keys() == others.keys() and all(
        torch.equal(tensors[name], others[name]) for name in tensors
    )


def test_a_registered_name_comes_before_a_folder_and_the_hub(
    hub: FakeHub, first: Projection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (REAL, REPO):
        first.save(tmp_path / name)
    assert find_projection(REAL, HubOptions()) == bundled_folder(REAL)
    assert find_projection(f"./{REAL}", HubOptions()) == Path(REAL)
    assert same(loaded(REPO), first), "a folder comes before a repository"
    assert hub.requests == []
    assert is_published(REAL)
    assert is_published("mae-vitb16")
    assert not is_published(TINY.name)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (TINY.name, UnknownModelError, "no projection is published for tiny-vit16"),
        ("./nowhere", ProjectionFormatError, "nowhere is not a folder"),
        (Path("nowhere"), ProjectionFormatError, "nowhere is not a folder"),
        ("mae-vitb61", UnknownModelError, "neither a registered model.*Did you mean 'mae-vitb16'"),
        ("us er/a", UnknownModelError, "neither a registered model"),
        ("user/nothing", WeightsUnavailableError, r"config\.json of the Hub repository"),
    ],
)
def test_names_that_lead_nowhere(
    hub: FakeHub, name: str | Path, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        find_projection(name, HubOptions())


def test_what_is_pushed_comes_back(hub: FakeHub, first: Projection, tiny_file: Path) -> None:
    pushed = push(first, REPO, token=TOKEN, commit_message="Better")
    assert pushed.url == f"{hub.url}/{REPO}/commit/{pushed.commit}"
    assert [(c.oid, c.title) for c in hub.history(REPO)] == [(pushed.commit, "Better")]
    assert hub.files(REPO).keys() == FILES
    adapter = CoSettleAdapter.from_pretrained(REPO, backbone_weights=tiny_file)
    assert same(adapter.projection, first)
    assert adapter.config == first.config
    assert adapter(torch.zeros(1, 3, 32, 48)).shape == (1, 192, 2, 3)
    hub.requests.clear()
    assert same(loaded(local_files_only=True), first)
    assert hub.requests == []


def test_commits_branches_and_pull_requests(
    hub: FakeHub, first: Projection, second: Projection
) -> None:
    pinned = push(first, REPO, token=TOKEN).commit
    push(second, REPO, token=TOKEN, revision="next")
    proposed = push(second, REPO, token=READER, create_pr=True)  # a stranger can propose
    assert proposed.pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert len(hub.history(REPO)) == 1
    assert same(loaded(), first)
    assert same(loaded(revision="next"), second)
    assert same(loaded(revision="refs/pr/1"), second)
    push(second, REPO, token=TOKEN)
    assert same(loaded(), second)
    assert same(loaded(revision=pinned), first)


def test_a_usable_config_first_then_the_weights_of_the_same_commit(
    hub: FakeHub, first: Projection, second: Projection
) -> None:
    push(first, REPO, token=TOKEN)
    hub.requests.clear()
    pending = [second]

    def push_meanwhile(request: Request) -> None:
        if request.path.endswith(f"/{WEIGHTS}") and pending:
            push(pending.pop(), REPO, token=TOKEN)

    hub.on_request = push_meanwhile
    assert same(loaded(), first)
    asked = [path.rpartition("/")[2] for path in hub.asked() if "/resolve/" in path]
    assert asked[0] == "config.json"
    assert same(loaded(), second)
    config = hub.files(REPO)["config.json"].replace(b'"format_version": 2', b'"format_version": 9')
    hub.put(REPO, "config.json", config)
    hub.requests.clear()
    with pytest.raises(ProjectionFormatError, match="format_version 9"):
        loaded()
    assert not [path for path in hub.asked() if WEIGHTS in path]


def test_a_pickle_is_never_fetched(hub: FakeHub, first: Projection) -> None:
    hub.put("user/old", "pytorch_model.bin", b"\x80\x04pickle")
    hub.put("user/old", "config.json", first.config.to_json().encode())
    with pytest.raises(WeightsUnavailableError, match=f"{WEIGHTS} of the Hub repository"):
        loaded("user/old")
    assert not [path for path in hub.asked() if path.endswith(".bin")]


def test_a_broken_download_is_refused_and_the_next_one_heals(
    hub: FakeHub, first: Projection
) -> None:
    push(first, REPO, token=TOKEN)
    hub.spoil[WEIGHTS] = lambda data: data[:-1] + bytes([data[-1] ^ 255])
    with pytest.raises(CosettleError, match=WEIGHTS):
        loaded()
    hub.spoil.clear()
    assert same(loaded(), first)


def test_a_private_repository_needs_a_token(
    hub: FakeHub, first: Projection, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(first, REPO, token=TOKEN, private=True)
    for token in (None, False, READER):
        with pytest.raises(WeightsUnavailableError, match=r"private or gated repo.* authenticated"):
            loaded(token=token)
    assert same(loaded(token=TOKEN), first)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert same(loaded(token=True), first)
    assert hub.repositories[REPO].private
    hub.create("user/public")
    with pytest.raises(HubUploadError, match="exists and is public"):
        push(first, "user/public", private=True)
    assert hub.history("user/public") == []


def test_the_card_shows_shapes_that_are_real(
    hub: FakeHub,
    first: Projection,
    tiny_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    push(first, REPO, token=TOKEN)
    text = hub.files(REPO)["README.md"].decode()
    assert ModelCard(text).data.license == "apache-2.0"
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tiny_file.parent)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"# (torch\.Size.*)", snippet)


def test_only_a_card_that_somebody_edited_is_kept(
    hub: FakeHub, first: Projection, second: Projection, caplog: pytest.LogCaptureFixture
) -> None:
    hub.put(REPO, "README.md", b"---\nlicense: mit\n---\n")  # front matter alone is no card
    assert not push(first, REPO, token=TOKEN).kept_card
    hub.put(REPO, "README.md", hub.files(REPO)["README.md"].replace(b"\n", b"\r\n"))
    assert not push(first, REPO, token=TOKEN, card="# Mine\n\nTwo.\n").kept_card
    assert b"Two." in hub.files(REPO)["README.md"]
    edited = hub.files(REPO)["README.md"] + b"\nWe like it.\n"
    hub.put(REPO, "README.md", edited)
    assert push(second, REPO, token=TOKEN).kept_card
    assert "overwrite_card=True replaces it" in caplog.text
    assert hub.files(REPO)["README.md"] == edited
    assert not push(second, REPO, token=TOKEN, overwrite_card=True).kept_card
    assert b"We like it" not in hub.files(REPO)["README.md"]


def test_a_card_edited_in_between_is_not_lost(hub: FakeHub, first: Projection) -> None:
    push(first, REPO, token=TOKEN)

    def edit(request: Request) -> None:
        if "/commit/" in request.path:
            hub.put(REPO, "README.md", b"# Edited\n")

    hub.on_request = edit
    with pytest.raises(HubUploadError, match=r"changed during the upload; push again\. Nothing"):
        push(first, REPO, token=TOKEN, card="# Another\n")
    assert hub.files(REPO)["README.md"] == b"# Edited\n"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"extra_files": {"config.json": Path(__file__)}}, ValueError, "another name than config"),
        ({"extra_files": {"other.md": Path("nowhere.md")}}, ValueError, "must exist"),
        ({"token": None}, HubUploadError, r"needs an access token.*`hf auth login`.*token="),
        ({"token": False}, HubUploadError, "needs an access token"),
        ({"repo_id": "mine"}, UnknownModelError, "is not a valid Hub repository: expected owner/n"),
        ({"repo_id": "user/a--b"}, UnknownModelError, "is not a valid Hub repository"),
    ],
)
def test_what_cannot_be_pushed_is_not_asked_for(
    hub: FakeHub,
    first: Projection,
    options: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        push(first, **{"repo_id": REPO, "token": TOKEN, **options})  # type: ignore[arg-type]
    assert hub.requests == []


def unreachable(request: Request) -> None:
    raise OSError("no route to host")


FAILURES: dict[str, tuple[Callable[[FakeHub], None], dict[str, str]]] = {
    "no write permission": (lambda hub: hub.fail("POST", "/commit/", 403), {}),
    "cannot read it": (lambda hub: hub.fail("POST", "/commit/", 404), {}),
    "rejected": (lambda hub: hub.fail("POST", "/commit/", 500), {}),
    "rejects this token; log in": (lambda hub: None, {"token": "hf_wrong"}),
    "license.*must be one of": (
        lambda hub: None,
        {"card": "---\nlicense: none-of-yours\n---\n# Mine\n"},
    ),
    "check the network": (lambda hub: setattr(hub, "on_request", unreachable), {}),
}


@pytest.mark.parametrize("message", FAILURES)
def test_a_push_that_fails_says_why_and_commits_nothing(
    hub: FakeHub, first: Projection, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create(REPO)
    prepare, options = FAILURES[message]
    prepare(hub)
    with pytest.raises(HubUploadError, match=message) as caught:
        push(first, REPO, **{"token": TOKEN, **options})  # type: ignore[arg-type]
    assert "Nothing was committed" in str(caught.value)
    assert hub.history(REPO) == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUploadError, match="HF_HUB_OFFLINE is set; unset it"):
        push(first, REPO, token=TOKEN)


def test_the_command(
    hub: FakeHub,
    first: Projection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first.save(tmp_path / "fitted")
    (tmp_path / "fitted" / "backbone.safetensors").write_bytes(b"what convert writes")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    command = ["push", str(tmp_path / "fitted"), REPO]
    assert main([*command, "--message", "First"]) == 0
    (commit,) = hub.history(REPO)
    assert commit.title == "First"
    assert commit.files.keys() == {*FILES, "backbone.safetensors"}
    printed = capsys.readouterr().out
    assert f"{hub.url}/{REPO}/commit/{commit.oid}" in printed
    assert f"from_pretrained('{REPO}', revision='{commit.oid}')" in printed
    hub.put(REPO, "README.md", b"# Ours\n")
    assert main([*command, "--private"]) == 1
    assert main(command) == 0
    assert "--overwrite-card replaces it" in capsys.readouterr().out
    (tmp_path / "card.md").write_text("# Another\n")
    assert main([*command, "--card", str(tmp_path / "card.md"), "--overwrite-card"]) == 0
    assert hub.files(REPO)["README.md"].startswith(b"# Another\n")
    assert main([*command, "--create-pr"]) == 0
    assert f"{hub.url}/{REPO}/discussions/1" in capsys.readouterr().out
