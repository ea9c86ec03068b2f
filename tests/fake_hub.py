"""A stand-in for the Hugging Face Hub, behind its real client: every request is answered here.

It answers what ``huggingface_hub`` asks for models: creating repositories and branches, one commit
of many files, listing, and resolving files at any revision. History is kept.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

TOKEN = "hf_writer"  # of "user", who may write to what is hers
READER = "hf_reader"  # of "reader", who may write to nothing of hers

_USERS = {TOKEN: "user", READER: "reader"}
_LARGE = (".safetensors", ".bin", ".pth")  # named by their sha256
_LICENCES = {"apache-2.0", "bsd-3-clause", "cc-by-nc-4.0", "mit", "other", "unknown"}


class Request(NamedTuple):
    """One request, as it arrived: ``path`` is without the query."""

    method: str
    path: str
    query: str
    token: str | None
    body: bytes


class Commit(NamedTuple):
    """One commit: what the repository holds from then on."""

    oid: str
    title: str
    files: Mapping[str, bytes]
    parent: str | None


class Refusal(Exception):  # noqa: N818
    """An answer that is an error: status, message, the Hub's code for it."""


@dataclasses.dataclass
class Repository:
    """A repository: commits, what branches and pull requests point at, who may see it."""

    owner: str
    private: bool = False
    commits: dict[str, Commit] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, title: str, files: Mapping[str, bytes], *, ref: str = "main") -> Commit:
        """Add a commit on top of ``ref``."""
        parent = self.refs.get(ref) or self.refs.get("main")
        oid = hashlib.sha1(f"{parent} {title} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, dict(files), parent)
        self.refs[ref] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        """Commit that a branch, a pull request or a commit's id stands for."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


class FakeHub:
    """The Hub; ``requests`` is everything asked so far.

    ``spoil`` maps a path to what is done to its bytes on the way out, and ``on_request`` is called
    before a request is answered.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.spoil: dict[str, Callable[[bytes], bytes]] = {}
        self.on_request: Callable[[Request], None] = lambda request: None
        self.repositories: dict[str, Repository] = {}
        self._failures: list[tuple[str, str, int]] = []
        self._lock = threading.RLock()
        self.url = constants.ENDPOINT

    def client(self) -> Any:
        """What ``huggingface_hub`` sends its requests with: an httpx client that ends here."""
        library: Any = getattr(_http, "httpx2", None) or _http.httpx  # by version

        def handle(request: Any) -> Any:
            token = request.headers.get("Authorization", "").removeprefix("Bearer ") or None
            path, _, query = request.url.raw_path.decode().partition("?")
            asked = Request(request.method, path, query, token, request.read())
            status, headers, body = self._answer(asked)
            headers["Content-Length"] = str(len(body))
            body = b"" if request.method == "HEAD" else body
            return library.Response(status, headers=headers, content=body)

        return library.Client(transport=library.MockTransport(handle), follow_redirects=True)

    def create(self, repo: str, *, private: bool = False) -> Repository:
        if repo not in self.repositories:
            self.repositories[repo] = Repository(repo.partition("/")[0], private)
            self.repositories[repo].commit("initial commit", {})
        return self.repositories[repo]

    def put(self, repo: str, path: str, data: bytes) -> str:
        """Commit one file, creating the repository if there is none; return the commit."""
        repository = self.create(repo)
        return repository.commit(f"Upload {path}", {**repository.at("main").files, path: data}).oid

    def files(self, repo: str) -> Mapping[str, bytes]:
        return self.repositories[repo].at("main").files

    def history(self, repo: str) -> list[Commit]:
        """Commits, newest first, but for the initial one."""
        repository, commits = self.repositories[repo], []
        commit = repository.at("main")
        while commit.parent is not None:
            commits.append(commit)
            commit = repository.at(commit.parent)
        return commits

    def fail(self, method: str, path: str, status: int) -> None:
        """Answer the next request whose path contains ``path`` with a bare status."""
        self._failures.append((method, path, status))

    def asked(self) -> list[str]:
        """Paths of files asked for, in order."""
        return [each.path for each in self.requests if each.method in ("GET", "HEAD")]

    def _answer(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        self.on_request(request)
        with self._lock:
            self.requests.append(request)
            try:
                headers, body = self._route(request)
            except Refusal as refusal:
                status, message, code = (*refusal.args, "", "")[:3]
                told = {"url": f"{self.url}/{message}", "errors": [{"message": message}]}
                body = json.dumps({"error": message, **told}).encode()
                return status, {"X-Error-Code": code, "X-Error-Message": message}, body
        if isinstance(body, bytes):
            return 200, headers, body
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()

    def _route(self, request: Request) -> tuple[dict[str, str], Any]:
        for failure in self._failures:
            if failure[0] == request.method and failure[1] in request.path:
                self._failures.remove(failure)
                raise Refusal(failure[2])
        if request.token is not None and request.token not in _USERS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if request.path == "/api/repos/create":
            return {}, self._create(request)
        if request.path == "/api/validate-yaml":
            licence = re.search(r"^license: *(\S+)", json.loads(request.body)["content"], re.M)
            if licence is not None and licence[1] not in _LICENCES:
                raise Refusal(400, f'"license" must be one of {sorted(_LICENCES)}')
            return {}, {"errors": [], "warnings": []}
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", request.path)
        if match:
            return self._resolve(request, *map(unquote, match.groups()))
        match = re.fullmatch(
            r"/api/models/([^/]+/[^/]+?)(?:/(revision|branch|preupload|commit)/([^/]+))?",
            request.path,
        )
        if match is None:
            raise Refusal(404, f"the fake Hub has no {request.method} {request.path}")
        repo, verb, revision = (unquote(part or "") for part in match.groups())
        repository = self._visible(request, repo)
        if verb in ("branch", "preupload", "commit") and "create_pr" not in request.query:
            self._may_write(request, repository.owner)
        if verb == "branch":
            if revision in repository.refs:
                raise Refusal(409, "Reference already exists")
            repository.refs[revision] = repository.refs["main"]
            return {}, {}
        commit = repository.at(revision or "main")
        if verb == "preupload":
            paths = [file["path"] for file in json.loads(request.body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return {}, {"files": [{"path": path, **how} for path in paths]}
        if verb == "commit":
            return {}, self._commit(request, repo, repository, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        found = {"id": repo, "sha": commit.oid, "private": repository.private}
        return {}, {**found, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}

    def _visible(self, request: Request, repo: str) -> Repository:
        repository, user = self.repositories.get(repo), _USERS.get(request.token or "")
        if repository is None or (repository.private and user != repository.owner):
            # The Hub does not tell strangers whether a private repository exists.
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def _may_write(self, request: Request, owner: str) -> None:
        if request.token is None:
            raise Refusal(401, "Invalid username or password.")
        if _USERS[request.token] != owner:
            raise Refusal(403, f"Forbidden: you may not write to the namespace {owner}")

    def _create(self, request: Request) -> dict[str, str]:
        value = json.loads(request.body)
        owner = value.get("organization") or _USERS[request.token or ""]
        repo = f"{owner}/{value['name']}"
        self._may_write(request, owner)
        if repo in self.repositories:
            raise Refusal(409, repo)
        private = value.get("visibility") == "private" or value.get("private") is True
        self.create(repo, private=private)
        return {"url": f"{self.url}/{repo}", "name": repo, "id": repo}

    def _resolve(
        self, request: Request, repo: str, revision: str, path: str
    ) -> tuple[dict[str, str], bytes]:
        commit = self._visible(request, repo).at(revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = commit.files[path]
        digest = hashlib.sha256 if path.endswith(_LARGE) else hashlib.sha1
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{digest(data).hexdigest()}"'}
        if request.method == "GET":  # what HEAD tells is always the truth
            data = self.spoil.get(path, bytes)(data)
        return headers, data

    def _commit(
        self, request: Request, repo: str, repository: Repository, ref: str
    ) -> dict[str, object]:
        head, title, proposed = repository.at(ref), "", "create_pr" in request.query
        files = dict(head.files)
        for line in request.body.splitlines():
            value = json.loads(line)["value"]
            if "summary" in value:
                title = value["summary"]
                if not proposed and value.get("parentCommit") not in (None, head.oid):
                    raise Refusal(412, "A commit has happened since.")
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        answer: dict[str, object] = {"success": True}
        if proposed:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.url}/{repo}/discussions/{number}"
        oid = repository.commit(title, files, ref=ref).oid
        return answer | {"commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"}


def fake_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """The only Hub that ``huggingface_hub`` talks to, with an empty cache and no stored login."""
    hub = FakeHub()
    values = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_ASSETS_CACHE": str(cache / "assets"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(cache / "agents.json"),
    }
    for module in [m for name, m in sys.modules.items() if name.startswith("huggingface_hub")]:
        for name in values.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, values[name])
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", hub.client)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT", None)
    yield hub
    _http.close_session()
