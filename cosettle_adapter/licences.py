"""Which licences bind the user of a projection, what they restrict, and what the Hub calls them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cosettle_adapter.backbones import BackboneRow
from cosettle_adapter.projection import ProjectionConfig

# SPDX identifiers. What is not in this list restricts what may be done, and a card says so.
_PERMISSIVE = (
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC-BY-4.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unlicense",
)
_RESTRICTED = {  # identifier: what it allows, its page
    "CC-BY-NC-4.0": ("non-commercial use only", "https://creativecommons.org/licenses/by-nc/4.0/"),
    "CC-BY-NC-SA-4.0": (
        "non-commercial use only, derivatives under the same licence",
        "https://creativecommons.org/licenses/by-nc-sa/4.0/",
    ),
    "LicenseRef-DINOv3": (
        "use under Meta's conditions",
        "https://ai.meta.com/resources/models-and-libraries/dinov3-license",
    ),
    "LicenseRef-Apple-AMLR": (
        "research use only",
        "https://github.com/apple/ml-mobileclip/blob/main/LICENSE_weights_data",
    ),
    "LicenseRef-Apple-ASCL": ("use under Apple's conditions", ""),
    "LicenseRef-FAIR-Noncommercial-Research": ("non-commercial research use only", ""),
}
_KNOWN = {
    known.lower().removeprefix("licenseref-"): known for known in (*_PERMISSIVE, *_RESTRICTED)
}
_UNSTATED = ("", "unknown", "unstated")


def binding_licences(config: ProjectionConfig, row: BackboneRow | None) -> list[str]:
    """Return the licences that bind the user of a projection; ``""`` for one that is not stated.

    Those that restrict, the backbone's first: a projection's licence never weakens it. Where none
    does, the projection's own. A backbone without a stated licence permits nothing.
    """
    licences = [_spdx(config.licence)] if _spdx(config.licence) else []
    if row is not None:
        licences.insert(0, _spdx(row.licence))
    restricted = [licence for licence in dict.fromkeys(licences) if licence not in _PERMISSIVE]
    return restricted or licences[-1:] or [""]


def _spdx(licence: str) -> str:
    """The identifier of a licence in any spelling, timm's too; empty for one that says nothing."""
    known = licence.lower().removeprefix("licenseref-").removesuffix("-license")
    return "" if known in _UNSTATED else _KNOWN.get(known, licence)


def hub_licence(licences: Sequence[str]) -> dict[str, Any]:
    """Return the Hub's ``license`` fields: ``other`` with a name and a page for what it lacks."""
    if "" in licences:
        return {"license": "unknown"}
    licence = " AND ".join(licences)
    if licence in _KNOWN.values() and not licence.startswith("LicenseRef-"):
        return {"license": licence.lower()}
    name = re.sub(r"[^a-z0-9.]+", "-", licence.replace("LicenseRef-", "").lower()).strip("-")
    _, page = _RESTRICTED.get(licence, ("", ""))
    return {"license": "other", "license_name": name} | ({"license_link": page} if page else {})


def restriction(licences: Sequence[str], row: BackboneRow | None) -> str:
    """Return a paragraph on what licences restrict; empty where they are permissive."""
    if licences[0] in _PERMISSIVE:
        return ""
    terms, sentences = [], []
    for licence in licences:
        allowed, page = _RESTRICTED.get(licence, ("read its terms first", ""))
        under = f"under [{licence}]({page})" if page else f"under {licence}"
        if not licence:
            allowed, under = "no licence is stated", "without a stated licence"
        terms.append(allowed)
        if row is not None and licence == _spdx(row.licence):
            sentences.append(
                f"The backbone's weights are {under}, and this projection derives from them."
            )
        else:
            sentences.append(f"This projection is {under}.")
    return f"**Restricted: {'; '.join(terms)}.** {' '.join(sentences)}"
