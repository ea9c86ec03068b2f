"""A local stand-in for the Hugging Face Hub: real HTTP, the real client, no network.

It answers what ``huggingface_hub`` asks for models: creating repositories and branches, uploading
(preupload, LFS batch, PUT to a second server as to a bucket, one NDJSON commit), listing, and
resolving files at any revision, large ones by a redirect to that second server. History is kept.

    with FakeHub() as hub:
        use_fake_hub(monkeypatch, hub, tmp_path)
        hub.put("owner/name", "config.json", b"{}")
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib
import json
import re
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_writer"  # of "user", who may write to what is hers
READER = "hf_reader"  # of "reader", who may write to nothing of hers

_LARGE = 10_000_000
_LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".tar", ".onnx", ".h5")
_DATE = "2026-01-01T00:00:00.000Z"
_LICENCES = {"apache-2.0", "bsd-3-clause", "cc-by-nc-4.0", "mit", "other", "unknown"}
_REPO = r"(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"


@dataclasses.dataclass
class Request:
    """One request, as it arrived.

    Attributes:
        server: ``hub``, or ``storage`` for the bucket that large files are in.
        method: HTTP method.
        path: without the query.
        token: bearer token, if one came.
        status: of the answer.
    """

    server: str
    method: str
    path: str
    token: str | None
    status: int = 0


@dataclasses.dataclass(frozen=True)
class Commit:
    """One commit: what the repository holds from then on."""

    oid: str
    title: str
    files: Mapping[str, bytes]
    parent: str | None


@dataclasses.dataclass
class Repository:
    """A repository: commits, what branches and pull requests point at, who may see it."""

    owner: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, title: str, files: Mapping[str, bytes], *, ref: str = "main") -> Commit:
        """Add a commit on top of ``ref``."""
        parent = self.refs.get(ref) or self.refs.get("main")
        state = f"{parent} {title} {len(self.commits)}"
        commit = Commit(hashlib.sha1(state.encode()).hexdigest(), title, dict(files), parent)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit

    def at(self, revision: str) -> Commit | None:
        """Commit that a branch, pull request, commit or its first digits stand for."""
        if revision in self.refs:
            return self.commits[self.refs[revision]]
        matching = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        return self.commits[matching[0]] if matching else None


@dataclasses.dataclass
class Answer:
    """What a route returns."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def json(cls, value: object, status: int = 200) -> Answer:
        """JSON, as the API answers."""
        headers = {"Content-Type": "application/json; charset=utf-8"}
        return cls(status, json.dumps(value).encode(), headers)


class RefusalError(Exception):
    """An error answer, with the Hub's error headers."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.answer = Answer.json({"error": message}, status)
        self.answer.headers["X-Error-Message"] = message
        self.answer.headers.update({key.replace("_", "-"): value for key, value in headers.items()})
        if code:
            self.answer.headers["X-Error-Code"] = code


class FakeHub:
    """The Hub and its storage, on two ports of this machine.

    Attributes:
        url: endpoint to give the client.
        storage_url: where large files are uploaded to and redirected to.
        tokens: token to user name.
        read_only: tokens without write permission.
        granted: users who may read gated repositories.
        requests: everything asked so far, in order.
        spoil: path in a repository to what is done to its bytes on the way out; the size and
            checksum that are announced stay those of the real file.
        on_request: called with every request before it is answered.
    """

    def __init__(self) -> None:
        self.tokens = {TOKEN: "user", READER: "reader"}
        self.read_only = {READER}
        self.granted: set[str] = set()
        self.requests: list[Request] = []
        self.spoil: dict[str, Callable[[bytes], bytes]] = {}
        self.on_request: Callable[[Request], None] = lambda request: None
        self._failures: list[tuple[str, re.Pattern[str], int]] = []
        self._repositories: dict[str, Repository] = {}
        self._large: dict[str, bytes] = {}
        self._lock = threading.RLock()
        self._hub = _Server(self, "hub")
        self._storage = _Server(self, "storage")
        self.url, self.storage_url = self._hub.url, self._storage.url

    def __enter__(self) -> FakeHub:
        self._hub.start()
        self._storage.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hub.stop()
        self._storage.stop()
        _drop_connections()

    def create(self, repo: str, *, private: bool = False, gated: bool = False) -> Repository:
        """Create a repository, as the website does, or change who may see it."""
        with self._lock:
            repository = self._repositories.get(repo)
            if repository is None:
                repository = Repository(repo.partition("/")[0])
                repository.commit("initial commit", {".gitattributes": b"*.safetensors lfs\n"})
                self._repositories[repo] = repository
            repository.private, repository.gated = private, gated
            return repository

    def put(self, repo: str, path: str, data: bytes, *, revision: str = "main") -> str:
        """Commit one file, creating the repository if there is none; return the commit."""
        with self._lock:
            repository = self._repositories.get(repo) or self.create(repo)
            commit = repository.at(revision)
            files = {**(commit.files if commit else {}), path: data}
            return repository.commit(f"Upload {path}", files, ref=revision).oid

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds, but for the ``.gitattributes`` every one has."""
        commit = self._repositories[repo].at(revision)
        assert commit is not None, revision
        return {path: data for path, data in commit.files.items() if path != ".gitattributes"}

    def history(self, repo: str, revision: str = "main") -> list[Commit]:
        """Commits of a branch, newest first, but for the initial one."""
        repository = self._repositories[repo]
        commit, commits = repository.at(revision), []
        while commit is not None and commit.parent is not None:
            commits.append(commit)
            commit = repository.commits[commit.parent]
        return commits

    def repository(self, repo: str) -> Repository | None:
        """The repository, if there is one."""
        return self._repositories.get(repo)

    def fail(self, method: str, path: str, status: int) -> None:
        """Answer the next request whose path contains the pattern ``path`` with a bare status."""
        self._failures.append((method, re.compile(path), status))

    def asked(self, *methods: str) -> list[str]:
        """Paths asked for by these methods (``GET`` and ``HEAD`` by default), in order."""
        return [r.path for r in self.requests if r.method in (methods or ("GET", "HEAD"))]

    def answer(
        self, request: Request, query: dict[str, list[str]], body: bytes, part: str = ""
    ) -> Answer:
        """Answer one request."""
        self.on_request(request)
        with self._lock:
            self.requests.append(request)
            try:
                answer = self._route(_Call(self, request, query, body, part))
            except RefusalError as refusal:
                answer = refusal.answer
            request.status = answer.status
            return answer

    def _route(self, call: _Call) -> Answer:
        request = call.request
        for failure in self._failures:
            method, wanted, status = failure
            if method == request.method and wanted.search(request.path):
                self._failures.remove(failure)
                return Answer(status)
        if request.token is not None and request.token not in self.tokens:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        for server, methods, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, request.path)
            if server == request.server and request.method in methods and match:
                parts = {key: unquote(value or "") for key, value in match.groupdict().items()}
                return handle(call, **parts)
        raise RefusalError(404, f"the fake Hub has no {request.method} {request.path}")


@dataclasses.dataclass
class _Call:
    """One request on its way through a route."""

    hub: FakeHub
    request: Request
    query: dict[str, list[str]]
    body: bytes
    range: str

    @property
    def user(self) -> str | None:
        return self.hub.tokens.get(self.request.token or "")

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def repository(self, repo: str, *, write: bool = False, read: bool = False) -> Repository:
        """The repository, if this token may see it, read its files or write to it."""
        repository = self.hub._repositories.get(repo)
        hers = repository is not None and self.user == repository.owner
        if repository is None or (repository.private and not hers):
            # The Hub does not tell strangers whether a private repository exists.
            status, message = (404, "Repository not found") if self.user else (401, _UNKNOWN)
            raise RefusalError(status, message, "RepoNotFound")
        if read and repository.gated and not hers and self.user not in self.hub.granted:
            status = 403 if self.user else 401
            raise RefusalError(status, f"Access to model {repo} is restricted", "GatedRepo")
        if write:
            self.may_write(repository.owner)
        return repository

    def may_write(self, namespace: str) -> None:
        if self.user is None:
            raise RefusalError(401, _UNKNOWN)
        if self.user != namespace or self.request.token in self.hub.read_only:
            raise RefusalError(403, f"Forbidden: you may not write to the namespace {namespace}")

    def commit(self, repository: Repository, revision: str) -> Commit:
        commit = repository.at(revision)
        if commit is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


_UNKNOWN = "Invalid username or password."


def _whoami(call: _Call) -> Answer:
    if call.user is None:
        raise RefusalError(401, _UNKNOWN)
    return Answer.json({"type": "user", "name": call.user, "orgs": [], "auth": {}})


def _create(call: _Call) -> Answer:
    value = call.json
    if call.user is None:
        raise RefusalError(401, _UNKNOWN)
    owner: str = value.get("organization") or call.user
    repo = f"{owner}/{value['name']}"
    url = f"{call.hub.url}/{repo}"
    existing = call.hub.repository(repo)
    if existing is not None and existing.owner == call.user:
        message = "You already created this model repo"
        return Answer.json({"error": message, "url": url, "name": repo}, 409)
    call.may_write(owner)
    private = value.get("visibility") == "private" or value.get("private") is True
    call.hub.create(repo, private=private)
    return Answer.json({"url": url, "name": repo, "id": repo})


def _branch(call: _Call, repo: str, branch: str) -> Answer:
    repository = call.repository(repo, write=True)
    if branch in repository.refs:
        return Answer.json({"error": "Reference already exists"}, 409)
    start = call.json.get("startingPoint") or "main"
    repository.refs[branch] = call.commit(repository, start).oid
    return Answer.json({})


def _refs(call: _Call, repo: str) -> Answer:
    repository = call.repository(repo)
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
        for name, oid in repository.refs.items()
        if not name.startswith("refs/")
    ]
    return Answer.json({"branches": branches, "tags": [], "converts": []})


def _validate(call: _Call) -> Answer:
    """Refuse a card whose licence the Hub does not know."""
    licence = re.search(r"^license: *(\S+)", call.json["content"], flags=re.MULTILINE)
    if licence is not None and licence[1] not in _LICENCES:
        errors = [{"message": f'"license" must be one of {sorted(_LICENCES)}'}]
        return Answer.json({"error": "Invalid metadata", "errors": errors, "warnings": []}, 400)
    return Answer.json({"errors": [], "warnings": []})


def _info(call: _Call, repo: str, revision: str = "") -> Answer:
    repository = call.repository(repo)
    commit = call.commit(repository, revision or "main")
    siblings = []
    for path, data in commit.files.items():
        sibling: dict[str, object] = {"rfilename": path}
        if "blobs" in call.query:
            sibling |= {"size": len(data), "blobId": _git_oid(data)}
            if _is_large(path, data):
                sibling["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 134}
        siblings.append(sibling)
    return Answer.json(
        {
            "_id": "0",
            "id": repo,
            "modelId": repo,
            "author": repository.owner,
            "sha": commit.oid,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": _DATE,
            "createdAt": _DATE,
            "siblings": siblings,
        }
    )


def _tree(call: _Call, repo: str, revision: str, folder: str = "") -> Answer:
    commit = call.commit(call.repository(repo), revision)
    prefix = f"{folder}/" if folder else ""
    inside = {path: data for path, data in commit.files.items() if path.startswith(prefix)}
    if folder and not inside:
        raise RefusalError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    entries: dict[str, dict[str, object]] = {}
    recursive = call.query.get("recursive", ["false"])[0].lower() == "true"
    for path, data in inside.items():
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            name = prefix + "/".join(parts[:depth])
            entries[name] = {"type": "directory", "oid": _git_oid(b""), "size": 0, "path": name}
        if recursive or len(parts) == 1:
            entries[path] = _entry(path, data)
    return Answer.json(list(entries.values()))


def _paths(call: _Call, repo: str, revision: str) -> Answer:
    commit = call.commit(call.repository(repo), revision)
    wanted = parse_qs(call.body.decode()).get("paths", [])
    return Answer.json([_entry(p, commit.files[p]) for p in wanted if p in commit.files])


def _entry(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {
        "type": "file",
        "oid": _git_oid(data),
        "size": len(data),
        "path": path,
    }
    if _is_large(path, data):
        entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 134}
    return entry


def _resolve(call: _Call, repo: str, revision: str, path: str) -> Answer:
    repository = call.repository(repo, read=True)
    commit = call.commit(repository, revision)
    headers = {"X-Repo-Commit": commit.oid}
    if path not in commit.files:
        raise RefusalError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
    data = commit.files[path]
    if not _is_large(path, data):
        headers["ETag"] = f'"{_git_oid(data)}"'
        return Answer(200, _spoiled(call, path, data), headers)
    oid = _sha256(data)
    call.hub._large[oid] = data
    headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "ETag": '"pointer"'}
    headers["Location"] = f"{call.hub.storage_url}/get/{oid}/{path}"
    return Answer(302, b"", headers)


def _preupload(call: _Call, repo: str, revision: str) -> Answer:
    pull_request = "create_pr" in call.query
    repository = call.repository(repo, write=not pull_request)
    commit = call.commit(repository, revision)
    files = []
    for file in call.json["files"]:
        path, large = file["path"], file["size"] > _LARGE
        large = large or file["path"].endswith(_LARGE_SUFFIXES)
        info = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if path in commit.files:
            data = commit.files[path]
            info["oid"] = _sha256(data) if large else _git_oid(data)
        files.append(info)
    return Answer.json({"files": files})


def _lfs_batch(call: _Call, repo: str) -> Answer:
    call.repository(repo)
    if call.user is None:
        raise RefusalError(401, _UNKNOWN)
    objects = []
    for wanted in call.json["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in call.hub._large:
            upload = {"href": f"{call.hub.storage_url}/put/{wanted['oid']}"}
            verify = {"href": f"{call.hub.url}/{repo}.git/info/lfs/objects/verify"}
            entry["actions"] = {"upload": upload, "verify": verify}
        objects.append(entry)
    return Answer.json({"transfer": "basic", "objects": objects})


def _lfs_verify(call: _Call, repo: str) -> Answer:
    data = call.hub._large.get(call.json["oid"])
    if data is None or len(data) != call.json["size"]:
        raise RefusalError(404, "Object does not exist on the server")
    return Answer.json({})


def _commit(call: _Call, repo: str, revision: str) -> Answer:
    pull_request = "create_pr" in call.query
    repository = call.repository(repo, write=not pull_request)
    if call.user is None:
        raise RefusalError(401, _UNKNOWN)
    head = call.commit(repository, revision)
    files, title = dict(head.files), ""
    for line in call.body.splitlines():
        key, value = (item := json.loads(line))["key"], item["value"]
        if key == "header":
            title = value["summary"]
            parent = value.get("parentCommit")
            if parent is not None and not pull_request and not head.oid.startswith(parent):
                raise RefusalError(
                    412, "A commit has happened since. Please refresh and try again."
                )
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in call.hub._large:
                raise RefusalError(
                    400, f"LFS pointer pointed to a file that does not exist: {value}"
                )
            files[value["path"]] = call.hub._large[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]
    ref = revision
    if pull_request:
        number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
        ref = f"refs/pr/{number}"
        repository.refs[ref] = head.oid
    commit = repository.commit(title, files, ref=ref)
    answer = {"success": True, "commitOid": commit.oid, "hookOutput": ""}
    answer["commitUrl"] = f"{call.hub.url}/{repo}/commit/{commit.oid}"
    if pull_request:
        answer["pullRequestUrl"] = f"{call.hub.url}/{repo}/discussions/{ref.rpartition('/')[2]}"
    return Answer.json(answer)


def _storage_put(call: _Call, oid: str) -> Answer:
    if _sha256(call.body) != oid:
        return Answer(400)
    call.hub._large[oid] = call.body
    return Answer(200, headers={"ETag": f'"{oid[:32]}"'})


def _storage_get(call: _Call, oid: str, path: str) -> Answer:
    if oid not in call.hub._large:
        return Answer(404)
    data = _spoiled(call, path, call.hub._large[oid])
    resumed = re.fullmatch(r"bytes=(\d+)-", call.range)
    start = int(resumed[1]) if resumed else 0
    headers = {"ETag": f'"{oid}"'}
    if resumed:
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    return Answer(206 if resumed else 200, data[start:], headers)


def _spoiled(call: _Call, path: str, data: bytes) -> bytes:
    """The bytes that go out; what HEAD tells is always the truth."""
    change = call.hub.spoil.get(path)
    return data if change is None or call.request.method == "HEAD" else change(data)


Route = tuple[str, str, str, Callable[..., Answer]]
_API = rf"/api/models/{_REPO}"
_ROUTES: tuple[Route, ...] = (
    ("hub", "GET", r"/api/whoami-v2", _whoami),
    ("hub", "POST", r"/api/repos/create", _create),
    ("hub", "POST", r"/api/validate-yaml", _validate),
    ("hub", "POST", rf"{_API}/branch/(?P<branch>[^/]+)", _branch),
    ("hub", "GET", rf"{_API}/refs", _refs),
    ("hub", "GET", rf"{_API}(?:/revision/{_REVISION})?", _info),
    ("hub", "GET", rf"{_API}/tree/{_REVISION}(?:/(?P<folder>.*))?", _tree),
    ("hub", "POST", rf"{_API}/paths-info/{_REVISION}", _paths),
    ("hub", "POST", rf"{_API}/preupload/{_REVISION}", _preupload),
    ("hub", "POST", rf"{_API}/commit/{_REVISION}", _commit),
    ("hub", "POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
    ("hub", "POST", rf"/{_REPO}\.git/info/lfs/objects/verify", _lfs_verify),
    ("hub", "GET HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _resolve),
    ("storage", "PUT", r"/put/(?P<oid>[0-9a-f]{64})", _storage_put),
    ("storage", "GET HEAD", r"/get/(?P<oid>[0-9a-f]{64})/(?P<path>.+)", _storage_get),
)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: FakeHub, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.name = hub, name
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the network for its name
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        address = urlsplit(self.path)
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        request = Request(
            self.server.name,
            self.command,
            address.path,
            token if scheme == "Bearer" else None,
        )
        answer = self.server.hub.answer(
            request, parse_qs(address.query), self._body(), self.headers.get("Range", "")
        )
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing; tests read ``hub.requests``."""


def use_fake_hub(
    monkeypatch: pytest.MonkeyPatch, hub: FakeHub, cache: Path, *, token: str | None = None
) -> None:
    """Make ``huggingface_hub`` talk to ``hub`` only, with an empty cache and no stored login.

    Works on every version since 0.25: constants are replaced in each module that holds a copy.
    Names other than this machine's are not resolved while it lasts, so nothing reaches further.

    Args:
        monkeypatch: undoes everything at the end of the test.
        hub: a running fake.
        cache: folder in place of ``HF_HOME``.
        token: what ``HF_TOKEN`` holds.
    """
    for name in ("constants", "file_download", "hf_api", "_commit_api", "lfs", "repocard"):
        importlib.import_module(f"huggingface_hub.{name}")
    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_ENABLE_HF_TRANSFER": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(cache / "hub"),
        "HF_ASSETS_CACHE": str(cache / "assets"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(cache / "agents.json"),
    }
    for module in [m for name, m in sys.modules.items() if name.startswith("huggingface_hub")]:
        for name in values.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, values[name])
    monkeypatch.setattr(sys.modules["huggingface_hub.hf_api"].api, "endpoint", hub.url)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    monkeypatch.setattr(socket, "getaddrinfo", _only_this_machine(socket.getaddrinfo))
    _drop_connections()


def _only_this_machine(resolve: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(host: object, *arguments: Any, **options: Any) -> Any:
        assert host in (None, "", "127.0.0.1", b"127.0.0.1", "localhost"), (
            f"a test with a fake Hub reached for {host!r}"
        )
        return resolve(host, *arguments, **options)

    return guarded


def _drop_connections() -> None:
    """Forget the client's sessions, which know proxies and servers of before."""
    http = importlib.import_module("huggingface_hub.utils._http")
    for name in ("close_session", "reset_sessions"):
        if hasattr(http, name):
            getattr(http, name)()


def _is_large(path: str, data: bytes) -> bool:
    return len(data) > _LARGE or path.endswith(_LARGE_SUFFIXES)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
