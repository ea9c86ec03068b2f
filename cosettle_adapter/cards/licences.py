"""Which licence binds the user of a projection, and what the Hub calls it."""

from __future__ import annotations

import re
from typing import Any

from cosettle_adapter.backbones import BackboneRow
from cosettle_adapter.projection import ProjectionConfig

_UNSTATED = ("", "unstated", "LicenseRef-unstated")
_SPDX_ON_HUB = (
    "apache-2.0",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "cc-by-sa-4.0",
    "cc0-1.0",
    "mit",
)


def binding_licence(config: ProjectionConfig, row: BackboneRow | None) -> str:
    """Return the licence to state: a projection of a non-commercial backbone is so as well."""
    backbone = row.licence if row is not None else ""
    if config.licence in _UNSTATED:
        return backbone
    if is_non_commercial(backbone) and not is_non_commercial(config.licence):
        return backbone
    return config.licence


def is_non_commercial(licence: str) -> bool:
    """Whether an SPDX identifier has the NC clause."""
    return "NC" in licence.upper().split("-")


def hub_licence(licence: str) -> dict[str, Any]:
    """Return the Hub's ``license`` of an SPDX identifier; ``other`` and a name for the rest."""
    if licence in _UNSTATED:
        return {"license": "unknown"}
    if licence.lower() in _SPDX_ON_HUB:
        return {"license": licence.lower()}
    name = re.sub(r"[^a-z0-9.]+", "-", licence.removeprefix("LicenseRef-").lower()).strip("-")
    return {"license": "other", "license_name": name}
