"""The paper's own checkpoints in its Hub repository, found by listing and never by a guess."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from cosettle_adapter.backbones.hub_options import HubOptions, one_line
from cosettle_adapter.backbones.row import BackboneRow
from cosettle_adapter.errors import WeightsUnavailableError

logger = logging.getLogger(__name__)

OFFICIAL_REPOSITORY = "yafeng19/Co-Settle"
BACKBONE_FILE = "backbone.safetensors"

_FOLDER = "ckpts/ours"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin")
_EPOCH = re.compile(r"(\d+)(?=\D*$)")


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
    """Return the released checkpoint of a row, from the Hub cache or from the Hub.

    The repository is listed at the wanted revision, ``main`` by default. Offline, or when the Hub
    does not answer, what an earlier call downloaded is used.

    Raises:
        WeightsUnavailableError: the row has no release, the Hub cannot be reached and nothing is
            cached, or the listing has no file, or several with nothing to choose between them.
    """
    if row.release is None:
        raise WeightsUnavailableError(f"the paper's authors released no {row.name}")
    folder = f"{_FOLDER}/{row.release.name}+ours"
    if options.offline:
        return _cached(folder, options)
    try:
        filename = choose_checkpoint(_listing(options), folder)
        # By the revision's name, not the commit: the cache then knows what the name stood for.
        path = Path(
            hf_hub_download(
                OFFICIAL_REPOSITORY,
                filename,
                revision=options.revision,
                cache_dir=options.hub_cache,
                token=options.token,
            )
        )
    except (_NotListedError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        try:
            return _cached(folder, options)
        except WeightsUnavailableError:
            raise WeightsUnavailableError(str(error)) from error
    return ReleasedFile(path, filename, path.parents[len(Path(filename).parts) - 1].name)


class _NotListedError(Exception):
    """The Hub could not be asked for a listing."""


def _listing(options: HubOptions) -> list[str]:
    """The files of the repository."""
    try:
        info = HfApi(token=options.token).model_info(OFFICIAL_REPOSITORY, revision=options.revision)
    except Exception as error:  # the client's transport, and so its errors, differ by version
        raise _NotListedError(one_line(error)) from error
    return [sibling.rfilename for sibling in info.siblings or ()]


def choose_checkpoint(listed: Sequence[str], folder: str) -> str:
    """Pick the checkpoint of a folder out of a repository's listing.

    Training codes leave one file an epoch; the last epoch is meant.

    Args:
        listed: paths of all files in the repository.
        folder: folder inside it, compared without regard to case.

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
    if len(files) == 1:
        return files[0]
    epochs = {name: _EPOCH.search(PurePosixPath(name).stem) for name in files}
    if any(epoch is None for epoch in epochs.values()):
        raise WeightsUnavailableError(
            f"{OFFICIAL_REPOSITORY} lists several checkpoints in {folder} ({_some(files)}), and "
            "which is meant cannot be told: download one and use `cosettle-adapter convert`"
        )
    return max(files, key=lambda name: int(epochs[name].group(1)))  # type: ignore[union-attr]


def _cached(folder: str, options: HubOptions) -> ReleasedFile:
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
            f"{OFFICIAL_REPOSITORY} is not in {options.hub_cache}, and the Hub was not asked"
        ) from error
    files = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*")]
    filename = choose_checkpoint(files, folder)
    return ReleasedFile(snapshot / filename, filename, snapshot.name)


def converted_folder(row: BackboneRow, commit: str, options: HubOptions) -> Path:
    """Folder of the cache that holds what was converted from a released checkpoint."""
    return options.own_cache("released", row.name, commit[:16])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
