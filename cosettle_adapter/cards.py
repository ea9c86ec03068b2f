"""Model cards, generated from a projection's config and its backbone's registry row.

Figures come from ``ProjectionConfig.figures``, in which every key is optional: ``about``,
``choice`` (of layers and settings) and ``limits`` are lists of texts, ``measured`` is a list of
tables, ``{"title", "protocol", "command", "columns", "rows", "highlight"}``. ``command`` printed
the figures. The row whose first cell is ``highlight`` is bold; its values in columns named after a
metric become the Hub's ``eval_results``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from cosettle_adapter.backbones import BackboneRow, lookup
from cosettle_adapter.backbones.registry import TRANSFORMERS
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.hub import weights_source
from cosettle_adapter.projection import ProjectionConfig

PAPER = "https://arxiv.org/abs/2603.26597"

_TASK = "image-feature-extraction"
_METRICS = ("AJ", "F", "J", "J&F", "OA", "PCK@0.1", "PCK@0.2", "mIoU")
_GRID = (20, 35)  # patches of the example's frames
_USE = """```python
import torch
from cosettle_adapter import CoSettleAdapter

adapter = CoSettleAdapter.from_pretrained({source})

frames = torch.randint(0, 256, (4, 3, {height}, {width}), dtype=torch.uint8)  # (T, 3, H, W)
features = adapter(frames)
print(features.shape)  # torch.Size([4, {config.out_width}, {grid}])

raw, features = adapter(frames, return_backbone=True)  # also the tokens before the projection
print(raw.shape)  # torch.Size([4, {config.in_width}, {grid}])
```"""
_CITATION = f"""```bibtex
@inproceedings{{liu2026cosettle,
  title     = {{From Static to Dynamic: Exploring Self-supervised Image-to-Video Representation
               Transfer Learning}},
  author    = {{Liu, Yang and Xu, Qianqian and Wen, Peisong and Dai, Siran and Zhao, Xilin and
               Huang, Qingming}},
  booktitle = {{IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)}},
  year      = {{2026}},
  url       = {{{PAPER}}}
}}
```"""

# SPDX identifiers; a card calls every other licence restricted.
_PERMISSIVE = (
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-4.0", "CC0-1.0", "ISC", "MIT",
)  # fmt: skip
_CC = "https://creativecommons.org/licenses"
_DINOV3 = "https://ai.meta.com/resources/models-and-libraries/dinov3-license"
_APPLE = "https://github.com/apple/ml-mobileclip/blob/main/LICENSE_weights_data"
_RESTRICTED = {  # identifier: permitted use, URL
    "CC-BY-NC-4.0": ("non-commercial use only", f"{_CC}/by-nc/4.0/"),
    "CC-BY-NC-SA-4.0": ("non-commercial use only, share alike", f"{_CC}/by-nc-sa/4.0/"),
    "LicenseRef-DINOv3": ("use under Meta's conditions", _DINOV3),
    "LicenseRef-Apple-AMLR": ("research use only", _APPLE),
    "LicenseRef-Apple-ASCL": ("use under Apple's conditions", ""),
    "LicenseRef-FAIR-Noncommercial-Research": ("non-commercial research use only", ""),
}
_KNOWN = {name.lower().removeprefix("licenseref-"): name for name in (*_PERMISSIVE, *_RESTRICTED)}


def model_card(config: ProjectionConfig, *, repository: str | None = None) -> str:
    """Return the model card of a projection; ``repository`` is ``owner/name`` on the Hub."""
    try:
        row = lookup(config.backbone)
    except CosettleError:  # fitted by a version with more registered backbones
        row = None
    title = repository or f"A projection for {config.backbone}"
    results = [
        EvalResult(_TASK, _slug(entry["title"]), entry["title"], column, float(value))
        for entry in config.figures.get("measured", ())
        for cells in entry["rows"]
        if cells[0] == entry.get("highlight")
        for column, value in zip(entry["columns"], cells, strict=True)
        if column in _METRICS and value is not None
    ]
    data = ModelCardData(
        **_hub_licence(_binding_licences(config, row)),
        library_name="cosettle-adapter",
        pipeline_tag=_TASK,
        tags=["cosettle", "video", "temporal-consistency", _TASK],
        base_model=row.hub.repo if row is not None and row.hub is not None else None,
        datasets=list(config.fit.get("datasets") or ()) or None,
        eval_results=results or None,
        model_name=title,
    )
    text = card_text(config, row, title=title, name=repository or "./my-projection")
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _slug(text: str, allowed: str = "a-z0-9") -> str:
    return re.sub(f"[^{allowed}]+", "-", text.lower()).strip("-")


def card_text(config: ProjectionConfig, row: BackboneRow | None, *, title: str, name: str) -> str:
    """Return a card without front matter; ``name`` is what ``from_pretrained`` takes."""
    figures, licences = config.figures, _binding_licences(config, row)
    limits = list(figures.get("limits", ()))
    if not figures.get("measured"):
        limits.append(
            "Not yet compared with the backbone's own features (`CoSettleAdapter.raw`): compare "
            "both on your videos first."
        )
    limits.append("It fits one set of backbone tensors only; another fingerprint is refused.")
    settings = json.loads(config.to_json())
    del settings["figures"]
    patch = 14 if row is None else row.patch
    source, backbone = f'"{name}"', "It is not in this version's registry."
    if config.backbone.startswith(TRANSFORMERS):
        model = config.backbone.removeprefix(TRANSFORMERS)
        backbone = f"The folder `{model}`, saved by transformers."
        source = f'"./{model}", projection="./my-projection"'  # only local folders combine
    elif row is not None and not (row.hub or row.wheel or row.release):
        source += ', backbone_weights="backbone.safetensors"'
    example = _USE.format(
        source=source,
        height=_GRID[0] * patch,
        width=_GRID[1] * patch,
        grid="h, w" if row is None else f"{_GRID[0]}, {_GRID[1]}",
        config=config,
    )
    if row is not None:
        commit = f" at {config.backbone_revision}" if config.backbone_revision else ""
        backbone = (
            f"{row.family}: `{row.architecture}`, {row.depth} layers, patches of {row.patch} "
            f"pixels, {row.width} channels; weights from {weights_source(row)}{commit}"
            f"{'; ' if row.note else ''}{row.note}."
        )
    sections = [
        f"# {title}",
        f"Temporally consistent patch features ([Co-Settle]({PAPER})): the frozen encoder "
        f"`{config.backbone}` and a projection of kind `{config.kind}`.",
        *figures.get("about", ()),
        "## Backbone",
        backbone,
        "## Licence",
        *(_terms(licence, row) for licence in licences),
        "## Config",
        f"```json\n{json.dumps(settings, indent=2)}\n```",
        *figures.get("choice", ()),
        "## Figures",
        *(_measured(figures.get("measured", ())) or ["Not measured yet."]),
        "## Limits",
        "\n".join(f"- {limit}" for limit in limits),
        "## Use",
        example,
        "## Citation",
        _CITATION,
    ]
    return "\n\n".join(sections) + "\n"


def _measured(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    sections = []
    for entry in entries:
        sections.append(f"**{entry['title']}.** {entry.get('protocol', '')}".strip())
        if "command" in entry:
            sections.append(f"Printed by\n\n```bash\n{entry['command']}\n```")
        lines = [entry["columns"], ["---"] * len(entry["columns"])]
        for row in entry["rows"]:
            mark = "**" if row[0] == entry.get("highlight") else ""
            lines.append(["" if cell is None else f"{mark}{cell}{mark}" for cell in row])
        sections.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return sections


def _binding_licences(config: ProjectionConfig, row: BackboneRow | None) -> list[str]:
    """Licences that restrict projection or backbone, else the projection's; ``""`` if unstated."""
    licences = [_spdx(row.licence)] if row is not None else []
    licences += [_spdx(config.licence)] if _spdx(config.licence) else []
    restricted = [licence for licence in dict.fromkeys(licences) if licence not in _PERMISSIVE]
    return restricted or licences[-1:] or [""]


def _spdx(licence: str) -> str:
    """SPDX identifier of a licence in any spelling; empty if the licence is unstated."""
    known = licence.lower().removeprefix("licenseref-").removesuffix("-license")
    return "" if known in ("", "unknown", "unstated") else _KNOWN.get(known, licence)


def _hub_licence(licences: Sequence[str]) -> dict[str, Any]:
    """The Hub's ``license`` fields; ``other``, a name and a URL for licences it does not list."""
    if "" in licences:
        return {"license": "unknown"}
    licence = " AND ".join(licences)
    if licence in _KNOWN.values() and not licence.startswith("LicenseRef-"):
        return {"license": licence.lower()}
    name = _slug(licence.replace("LicenseRef-", ""), "a-z0-9.")
    _, page = _RESTRICTED.get(licence, ("", ""))
    return {"license": "other", "license_name": name} | ({"license_link": page} if page else {})


def _terms(licence: str, row: BackboneRow | None) -> str:
    """One sentence on the terms of a binding licence."""
    if licence in _PERMISSIVE:
        return f"{licence}."
    if not licence:
        return "**Restricted: no licence is stated.**"
    allowed, page = _RESTRICTED.get(licence, ("read its terms first", ""))
    is_own = row is None or licence != _spdx(row.licence)
    subject = "This projection is"
    if not is_own:
        subject = "The backbone's weights, from which it derives, are"
    return f"**Restricted: {allowed}.** {subject} under {licence}{page and f' ({page})'}."
