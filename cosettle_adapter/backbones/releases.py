"""Checkpoints that the paper's authors released: backbone and projection together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, snapshot_download

from cosettle_adapter.backbones.downloads import HubOptions, commit_of, hub_file, one_line
from cosettle_adapter.backbones.rows import OFFICIAL_REPOSITORY, BackboneRow
from cosettle_adapter.errors import WeightsUnavailableError

_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin")
_NUMBERS = re.compile(r"\d+")


class ReleasedFile(NamedTuple):
    """A checkpoint of the paper's authors on this machine."""

    path: Path
    origin: str  # for people
    commit: str


def released_checkpoint(row: BackboneRow, options: HubOptions) -> ReleasedFile:
    """Return the checkpoint that the paper's authors released of a row, verified.

    The repository is listed at the wanted revision. Offline, or when the Hub does not answer,
    what an earlier call downloaded is used.
    """
    revision = options.revision
    try:
        if options.offline:
            raise ConnectionError("the Hub was not asked")
        info = HfApi(token=options.token).model_info(OFFICIAL_REPOSITORY, revision=revision)
        listed = [sibling.rfilename for sibling in info.siblings or ()]
    except Exception as error:  # the client's transport, and so its errors, differ by version
        options = dataclasses.replace(options, local_files_only=True)
        try:
            folder = snapshot_download(
                OFFICIAL_REPOSITORY,
                revision=revision,
                cache_dir=options.hub_cache,
                local_files_only=True,
            )
        except OSError:
            raise WeightsUnavailableError(
                f"{OFFICIAL_REPOSITORY} is not in {options.hub_cache} ({one_line(error)})"
            ) from error
        listed = [file.relative_to(folder).as_posix() for file in Path(folder).rglob("*")]
    filename = choose_checkpoint(listed, f"ckpts/ours/{row.release}+ours")
    # By the revision's name, not the commit: the cache then knows what it stood for.
    path = hub_file(OFFICIAL_REPOSITORY, filename, options)
    commit = commit_of(path, filename)
    return ReleasedFile(path, f"{OFFICIAL_REPOSITORY}/{filename} at {commit[:12]}", commit)


def choose_checkpoint(listed: Sequence[str], folder: str) -> str:
    """Pick the checkpoint of a folder, in any case, out of a repository's listing.

    Training codes leave one file an epoch; the last epoch is meant.
    """
    inside = [name for name in listed if name.lower().startswith(folder.lower() + "/")]
    files = [name for name in inside if name.endswith(_SUFFIXES)]
    if not files:
        raise WeightsUnavailableError(
            f"{OFFICIAL_REPOSITORY} lists no checkpoint in {folder}; it lists "
            f"{', '.join((inside or listed)[:10])}"
        )
    return max(files, key=lambda name: [int(digits) for digits in _NUMBERS.findall(name)])


def converted_folder(row: BackboneRow, commit: str, options: HubOptions) -> Path:
    """Folder of the cache that holds what was converted from a released checkpoint."""
    return options.own_cache("released", row.name, commit[:16])
