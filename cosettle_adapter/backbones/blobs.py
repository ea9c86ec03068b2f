"""Files of the Hub cache, whose large blobs are named by the sha256 they must have."""

from __future__ import annotations

import re
from pathlib import Path

from cosettle_adapter.backbones.wheels import check_sha256
from cosettle_adapter.errors import CorruptWeightsError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_blob(path: Path, *, what: str) -> Path:
    """Return a file of the Hub cache that is what the Hub announced; remove one that is not.

    Args:
        path: the link in a snapshot; small files, whose blobs have other names, pass unchecked.
        what: what to call it in an error.

    Raises:
        CorruptWeightsError: the download was damaged or the file changed. It is gone from the
            cache then, so that the next attempt downloads it again.
    """
    # One link only: the blob may itself be a link into the client's shared store.
    checksum = path.readlink().name if path.is_symlink() else ""
    if _SHA256.fullmatch(checksum):
        try:
            check_sha256(path, checksum, what=f"{what} in the Hub cache")
        except CorruptWeightsError:
            path.resolve().unlink(missing_ok=True)
            path.unlink()
            raise
    return path
