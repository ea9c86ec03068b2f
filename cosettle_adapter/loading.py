"""From a name to a backbone and its projection: published, cached, fitted now, or none at all."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

from cosettle_adapter.backbones import Backbone, HubOptions, load_backbone
from cosettle_adapter.fitting_cache import check_recipe, fitted_projection
from cosettle_adapter.hub import bundled_folder, find_projection, is_published, stored_backbone
from cosettle_adapter.projection import Projection, ProjectionConfig

RAW = "none: the backbone's own tokens"


class Parts(NamedTuple):
    """What an adapter is made of; the projection is on the CPU."""

    backbone: Backbone
    projection: Projection
    backbone_file: Path | None = None  # came with the projection and has no other public source


def load_parts(
    name: str | Path,
    projection: str | Path | None,
    *,
    recipe: int | None,
    weights: str | Path | None,
    options: HubOptions,
    **loading: Any,
) -> Parts:
    """Load what ``CoSettleAdapter.from_pretrained`` asks for, which documents the arguments."""
    check_recipe(recipe)  # before anything is downloaded
    load = functools.partial(load_backbone, str(name), weights=weights, options=options)
    if projection == "settle":
        backbone = load(**loading)
        method = f"{RAW}, settled on each clip as it comes"
        return Parts(backbone, identity_projection(backbone, method=method))
    if projection == "fit" or (projection is None and not is_published(name)):
        backbone = load(**loading)
        native = functools.partial(load, device=backbone.device)
        return Parts(backbone, fitted_projection(backbone, options, native=native))
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
    return Parts(backbone, stored, beside if is_only_source else None)


def load_named_backbone(
    name: str,
    *,
    backbone_weights: str | Path | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **loading: Any,
) -> Backbone:
    """Load a backbone by the keywords of ``CoSettleAdapter.from_pretrained``."""
    options = HubOptions(cache_dir, revision, token, local_files_only)
    return load_backbone(name, weights=backbone_weights, options=options, **loading)


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
