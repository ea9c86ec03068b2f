"""Which models there are, and where projections come from: a folder, the wheel, or the Hub."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from cosettle_adapter.backbones import REGISTRY, HubOptions
from cosettle_adapter.errors import (
    ProjectionFormatError,
    ProjectionUnavailableError,
    UnknownModelError,
    WeightsUnavailableError,
    did_you_mean,
)
from cosettle_adapter.projection import CONFIG_FILE, WEIGHTS_FILE, ProjectionConfig

_BUNDLED = Path(__file__).parent / "projections"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_PATH_PREFIXES = ("./", "../", "~", ".\\", "..\\")


@dataclasses.dataclass(frozen=True)
class PublishedProjection:
    """A projection on this machine, ready to load.

    Attributes:
        folder: holds ``config.json`` and ``projection.safetensors``.
        alias: the registered name that was asked for, or ``None`` for a folder or repository.
    """

    folder: Path
    alias: str | None = None


def bundled_folder(name: str) -> Path | None:
    """Return the folder of the projection that travels in the wheel, or ``None``."""
    folder = _BUNDLED / name
    return folder if (folder / CONFIG_FILE).is_file() else None


def find_projection(name: str | Path, options: HubOptions) -> PublishedProjection:
    """Turn what a user typed into a projection folder.

    A registered name always means that model, even where a folder of the same name exists; a
    folder is named by a path (``./name``, an absolute path, or anything that is not a registered
    name and is a directory); ``owner/name`` is otherwise a Hub repository.

    Raises:
        ProjectionUnavailableError: a registered backbone without a published projection.
        UnknownModelError: none of the three.
        WeightsUnavailableError: the Hub could not deliver the repository's files.
        ProjectionFormatError: a folder without a projection in it.
    """
    if isinstance(name, str) and name in REGISTRY:
        folder = bundled_folder(name)
        if folder is None:
            raise ProjectionUnavailableError(_unpublished(name))
        return PublishedProjection(folder, alias=name)
    path = Path(name).expanduser()
    written_as_path = (
        isinstance(name, os.PathLike) or path.is_absolute() or name.startswith(_PATH_PREFIXES)
    )
    if path.is_dir():
        return PublishedProjection(path)
    if written_as_path:
        raise ProjectionFormatError(
            f"{path} is not a folder; a projection is loaded from the folder that "
            f"save_pretrained wrote ({CONFIG_FILE} and {WEIGHTS_FILE})"
        )
    if _REPOSITORY.fullmatch(str(name)):
        return PublishedProjection(_download(str(name), options))
    raise UnknownModelError(
        f"{str(name)!r} is neither a registered model, a folder, nor a Hub repository "
        f"(owner/name).{did_you_mean(str(name), REGISTRY)} "
        f"`cosettle-adapter list` shows the {len(REGISTRY)} registered models."
    )


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """One line of :func:`list_models`.

    Attributes:
        name: what ``from_pretrained`` takes.
        family: pre-training method of the backbone.
        patch: side of a patch in pixels.
        width: channels of a patch token.
        licence: licence of the backbone's weights.
        projection: where the projection comes from, or ``"none published"``.
        figures: measured figures of the projection.
        note: what to know before choosing it.
    """

    name: str
    family: str
    patch: int
    width: int
    licence: str
    projection: str
    figures: Mapping[str, Any]
    note: str


def list_models() -> list[ModelInfo]:
    """Return every registered model, those with a projection first."""
    models = []
    for row in REGISTRY.values():
        folder = bundled_folder(row.name)
        figures: Mapping[str, Any] = {}
        if folder is not None:
            text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
            figures = ProjectionConfig.from_json(text, source=str(folder / CONFIG_FILE)).figures
        models.append(
            ModelInfo(
                name=row.name,
                family=row.family,
                patch=row.patch,
                width=row.width,
                licence=row.licence,
                projection="in the package" if folder else "none published",
                figures=figures,
                note=row.note,
            )
        )
    return sorted(models, key=lambda model: model.projection == "none published")


def _unpublished(name: str) -> str:
    published = [other for other in REGISTRY if bundled_folder(other)]
    return (
        f"no projection has been published for {name}, and an untrained one is never returned. "
        "Fit one on a folder of your own videos, in minutes on a CPU:\n"
        f"  cosettle-adapter fit --backbone {name} --data clips/ -o {name}-projection\n"
        f"then load it with from_pretrained('./{name}-projection'). "
        f"Published: {', '.join(published)}."
    )


def _download(repository: str, options: HubOptions) -> Path:
    folder: Path | None = None
    for filename in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            file = hf_hub_download(
                repository,
                filename,
                cache_dir=options.hub_cache,
                revision=options.revision,
                token=options.token,
                local_files_only=options.offline,
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            how = "the Hub cache only" if options.offline else "the Hub cache, then the Hub"
            raise WeightsUnavailableError(
                f"no {filename} from the Hub repository {repository} (tried {how}): "
                f"{type(error).__name__}: {' '.join(str(error).split())}. "
                "A local folder is given as a path, for example ./my-projection"
            ) from error
        folder = Path(file).parent
    if folder is None:
        raise WeightsUnavailableError(f"the Hub repository {repository} delivered no files")
    return folder
