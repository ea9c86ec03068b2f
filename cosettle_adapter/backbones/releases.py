"""Checkpoints that the paper's authors released: backbone and projection together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import HfApi, snapshot_download

from cosettle_adapter.backbones.downloads import HubOptions, commit_of, hub_file, one_line
from cosettle_adapter.backbones.rows import OFFICIAL_REPOSITORY, BackboneRow
from cosettle_adapter.errors import WeightsUnavailableError

_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin")
_EPOCH = re.compile(r"(\d+)\D*$")


class ReleasedFile(NamedTuple):
    """A checkpoint of the paper's authors on this machine."""

    path: Path
    origin: str  # for people
    commit: str


def released_checkpoint(row: BackboneRow, options: HubOptions) -> ReleasedFile:
    """Return the checkpoint that the paper's authors released of a row, verified.

    The repository is listed at the wanted revision. Offline, or when the Hub does not answer,
    what an earlier call downloaded is used.

    Raises:
        WeightsUnavailableError: the Hub cannot be reached and nothing is cached, or the listing
            has no file, or several with nothing to choose between them.
        CorruptWeightsError: the file is damaged.
    """
    revision, reason = options.revision, "the Hub was not asked"
    try:
        if options.offline:
            raise ConnectionError(reason)
        api = HfApi(token=options.token)
        listed = api.list_repo_files(OFFICIAL_REPOSITORY, revision=revision)
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

    Raises:
        WeightsUnavailableError: none, or several that are not numbered; all are named.
    """
    inside = [name for name in listed if name.lower().startswith(folder.lower() + "/")]
    files = [name for name in inside if name.endswith(_SUFFIXES)]
    if not files:
        raise WeightsUnavailableError(
            f"{OFFICIAL_REPOSITORY} lists no checkpoint in {folder}; it lists "
            f"{', '.join((inside or listed)[:10])}"
        )
    epochs = {name: _EPOCH.search(PurePosixPath(name).stem) for name in files}
    if len(files) > 1 and None in epochs.values():
        raise WeightsUnavailableError(
            f"{OFFICIAL_REPOSITORY} lists several checkpoints in {folder} ({', '.join(files)}), "
            "and which is meant cannot be told: download one and use `cosettle-adapter convert`"
        )
    return max(files, key=lambda name: int(match[1]) if (match := epochs[name]) else 0)


def converted_folder(row: BackboneRow, commit: str, options: HubOptions) -> Path:
    """Folder of the cache that holds what was converted from a released checkpoint."""
    return options.own_cache("released", row.name, commit[:16])
