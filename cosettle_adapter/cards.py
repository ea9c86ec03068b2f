"""Model cards: what a projection is, how it was found, what it was measured to do, its licence.

A card says nothing that its config and its backbone's registry row do not say. Figures come from
``ProjectionConfig.figures``, in which every key is optional:

- ``summary``: one line, which ``cosettle-adapter list`` shows;
- ``about``: paragraphs to read before anything else;
- ``choice``: paragraphs on how the layers and the settings were chosen;
- ``measured``: tables, each ``{"title", "protocol", "command", "columns", "rows", "highlight"}``;
  ``command`` printed the figures, ``rows`` holds one list a row (``null`` for an empty cell), and
  the row whose first cell is ``highlight`` is set in bold; its numbers under the name of a metric
  are the ``eval_results`` of the Hub;
- ``limits``: sentences.

``ProjectionConfig.fit`` is shown as it is, but for ``command`` (which fits it again) and
``overlap_by_block`` (by which the layers were chosen); ``datasets`` names data sets of the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from cosettle_adapter.backbones import BackboneRow, lookup
from cosettle_adapter.backbones.downloads import OFFICIAL_REPOSITORY
from cosettle_adapter.convert import RELEASED
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.licences import binding_licences, hub_licence, restriction
from cosettle_adapter.projection import Projection, ProjectionConfig

PAPER = "https://arxiv.org/abs/2603.26597"

_TASK = "image-feature-extraction"
_TAGS = ["cosettle", "video", "temporal-consistency", _TASK]
_METRICS = ("AJ", "F", "J", "J&F", "OA", "PCK@0.1", "PCK@0.2", "mIoU")
_HUB = "https://huggingface.co"
_AUTHORS = f"[{OFFICIAL_REPOSITORY}]({_HUB}/{OFFICIAL_REPOSITORY})"
_GRID = (20, 35)  # patches of the example's frames
_HEADS = {"affine": "a closed-form projection", "identity": "nothing on top"}
_CLOSED_FORM = (
    "In the method, `mean` is the mean patch token, `S` the covariance by which mutually nearest "
    "patches of neighbouring frames (`gaps` apart) differ, `r` the strength times the mean "
    "eigenvalue of `S`, and `c` gives the features unit variance per channel. Several layers are "
    "first scaled to one variance, and reduced to the width of one in the end."
)
_THEIR_DATA = (
    "Trained by the authors of the paper on Kinetics-400, without labels, with the backbone "
    "frozen. Their checkpoint holds backbone and projection together and is not part of this "
    'package: `CoSettleAdapter.from_pretrained("{name}")` finds it in the listing of {authors} on '
    "the Hub, converts it to safetensors once, and keeps that in the cache."
)
_USE = """import torch
from cosettle_adapter import CoSettleAdapter

adapter = CoSettleAdapter.from_pretrained("{name}"{weights})

frames = torch.randint(0, 256, (4, 3, {height}, {width}), dtype=torch.uint8)  # (T, 3, H, W)
features = adapter(frames)
print(features.shape)  # torch.Size([4, {config.out_width}, {grid}])

raw, features = adapter(frames, return_backbone=True)  # what the projection read, as well
print(raw.shape)  # torch.Size([4, {config.in_width}, {grid}])"""
_CITATION = f"""@inproceedings{{liu2026cosettle,
  title     = {{From Static to Dynamic: Exploring Self-supervised Image-to-Video Representation
               Transfer Learning}},
  author    = {{Liu, Yang and Xu, Qianqian and Wen, Peisong and Dai, Siran and Zhao, Xilin and
               Huang, Qingming}},
  booktitle = {{IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)}},
  year      = {{2026}},
  url       = {{{PAPER}}}
}}"""


def model_card(config: ProjectionConfig, *, repository: str | None = None) -> str:
    """Return the ``README.md`` of a projection's Hub repository.

    Args:
        config: of the projection.
        repository: ``owner/name``, for the title and the example.
    """
    try:
        row = lookup(config.backbone)
    except CosettleError:  # fitted with a registry that had more rows
        row = None
    title = repository or f"A projection for {config.backbone}"
    datasets = config.fit.get("datasets")
    data = ModelCardData(
        **hub_licence(binding_licences(config, row)),
        library_name="cosettle-adapter",
        pipeline_tag=_TASK,
        tags=_TAGS,
        base_model=row.hub.repo if row is not None and row.hub is not None else None,
        datasets=list(datasets) if isinstance(datasets, (list, tuple)) and datasets else None,
        eval_results=_eval_results(config),
        model_name=title,
    )
    released = config.fit.get("method") == RELEASED
    body = _body(config, row, title, repository or "./my-projection", released=released)
    return f"---\n{data.to_yaml().strip()}\n---\n\n{body}"


def weights_card(row: BackboneRow, config: ProjectionConfig | None) -> str:
    """Return the card of a registered model for ``weights_cards/``.

    Args:
        row: the backbone.
        config: of the projection that is part of the package; ``None`` for one that the paper's
            authors published.
    """
    theirs = ProjectionConfig(
        backbone=row.name,
        fingerprint=row.fingerprint or "",
        layers=(row.depth - 1,),
        norm=row.final_norm,
        in_width=row.width,
        out_width=row.width,
        licence=row.licence,
    )
    return _body(config or theirs, row, row.name, row.name, released=config is None)


def _eval_results(config: ProjectionConfig) -> list[EvalResult] | None:
    """The numbers of highlighted rows that stand under the name of a metric."""
    results = [
        EvalResult(
            task_type=_TASK,
            dataset_type=re.sub(r"[^a-z0-9]+", "-", entry["title"].lower()).strip("-"),
            dataset_name=entry["title"],
            metric_type=column,
            metric_value=float(value),
        )
        for entry in config.figures.get("measured") or ()
        for row in entry["rows"]
        if entry.get("title") and row[0] == entry.get("highlight")
        for column, value in zip(entry["columns"], row, strict=False)
        if column in _METRICS and value is not None
    ]
    return results or None


def _body(
    config: ProjectionConfig, row: BackboneRow | None, title: str, name: str, *, released: bool
) -> str:
    """A card without front matter; ``name`` is what ``from_pretrained`` takes."""
    figures, licences = config.figures, binding_licences(config, row)
    head = "the authors' projection" if released else _HEADS.get(config.kind)
    sections = [
        f"# {title}",
        f"Temporally consistent patch features ([Co-Settle]({PAPER})): the frozen encoder "
        f"`{config.backbone}` and {head or 'a trained projection'}.",
        *_texts(figures.get("about")),
        "## Details",
        _details(config, row, licences, released=released),
        restriction(licences, row),
        "## Data",
        *_data(config, name, released=released),
        "## Figures",
        *_reported(row, released=released),
        "### Measured",
        *_measured(figures.get("measured")),
        "## Limits",
        *_limits(figures, released=released),
        "## Use",
        _use(config, row, name),
        "## Citation",
        _code(_CITATION, "bibtex"),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _details(
    config: ProjectionConfig, row: BackboneRow | None, licences: Sequence[str], *, released: bool
) -> str:
    with torch.device("meta"):
        parameters = sum(value.numel() for value in Projection(config).parameters())
    head = config.kind if config.kind in _HEADS else f"{config.kind}, {config.activation}"
    values: dict[str, object] = {"backbone": f"`{config.backbone}`"}
    if row is not None:
        values |= {
            "family": row.family,
            "architecture": f"`{row.architecture}`, {row.depth} layers",
            "patch": f"{row.patch} pixels",
            "width": row.width,
            "weights from": _source(config, row, released=released),
        }
    known = f"`{config.fingerprint}`" if config.fingerprint else ""
    values |= {
        "fingerprint": known or "recorded when the checkpoint is converted",
        "reads": _layers(config, row),
        "final norm": "applied" if config.norm else "not applied",
        "kind": f"{head}, {config.in_width} -> {config.out_width}",
        "parameters": parameters,
        "size": f"{4 * parameters / 1e6:.1f} MB",
        "licence": " AND ".join(licence or "not stated" for licence in licences),
    }
    if row is not None and row.note:
        values["note"] = row.note
    return _table(("", ""), values.items())


def _source(config: ProjectionConfig, row: BackboneRow, *, released: bool) -> str:
    commit = config.backbone_revision
    theirs = released and not commit
    if row.release is not None and (theirs or not (row.hub or row.wheel)):
        return f"`ckpts/ours/{row.release.name}+ours` of {_AUTHORS}"
    if row.hub is not None:
        return f"[{row.hub.repo}]({_HUB}/{row.hub.repo})" + (f" at `{commit}`" if commit else "")
    if row.wheel is not None:
        return f"the wheel `{row.wheel.package}` {row.wheel.version} on the package index"
    return "no public source is registered: give a file as `backbone_weights=PATH`"


def _layers(config: ProjectionConfig, row: BackboneRow | None) -> str:
    plural = "s" if len(config.layers) > 1 else ""
    text = f"layer{plural} {', '.join(map(str, config.layers))} (0-based)"
    stops = row is not None and row.kind == "vit" and max(config.layers) + 1 < row.depth
    return f"{text}; the layers after that are never run" if stops else text


def _data(config: ProjectionConfig, name: str, *, released: bool) -> list[str]:
    if released and not config.fit:
        return [_THEIR_DATA.format(name=name, authors=_AUTHORS)]
    fit = dict(config.fit)
    command, overlap = fit.pop("command", None), fit.pop("overlap_by_block", None)
    recorded = [(key.replace("_", " "), value) for key, value in fit.items() if _cell(value)]
    sections = [_table(("", ""), recorded) if recorded else "Nothing was recorded."]
    if isinstance(overlap, Mapping) and overlap:
        best = max(overlap.values())
        shares = [f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in overlap.values()]
        sections += [_CLOSED_FORM] if config.kind == "affine" else []
        sections.append("How the layers were chosen, each alone and several read together:")
        sections.append(_table(("layers", *overlap), [("overlap", *shares)]))
    if command:
        sections += ["Fitted by", _code(command, "bash")]
    return sections + _texts(config.figures.get("choice"))


def _reported(row: BackboneRow | None, *, released: bool) -> list[str]:
    if row is None or row.release is None or not row.release.reported:
        return []
    whose = "" if released else "; their own projection of this backbone, not this one"
    columns = ("benchmark", "backbone alone (reported)", "with projection (reported)")
    return [
        f"### Reported by the authors (not measured here{whose})",
        _table(columns, [(name, *pair) for name, pair in row.release.reported.items()]),
    ]


def _measured(entries: Iterable[Mapping[str, Any]] | None) -> list[str]:
    sections: list[str] = []
    printed_by = None
    for entry in entries or ():
        command = entry.get("command")
        sections += [f"**{entry['title']}.**"] if entry.get("title") else []
        sections += _texts(entry.get("protocol"))
        if command and command == printed_by:
            sections.append("Printed by the same command.")
        elif command:
            sections += ["Printed by", _code(command, "bash")]
        printed_by = command
        sections.append(_table(entry["columns"], entry["rows"], highlight=entry.get("highlight")))
    return sections or ["None measured here yet."]


def _limits(figures: Mapping[str, Any], *, released: bool) -> list[str]:
    limits = _texts(figures.get("limits"))
    if not figures.get("measured"):
        done = "Not compared with the backbone's own features yet"
        if released:
            done = "The reported figures have not been reproduced here"
        limits.append(f"{done}: compare both on your videos first (`CoSettleAdapter.raw`).")
    limits.append("It fits one set of backbone tensors only; another fingerprint is refused.")
    return ["\n".join(f"- {limit}" for limit in limits)]


def _use(config: ProjectionConfig, row: BackboneRow | None, name: str) -> str:
    patch, grid = (14, "h, w") if row is None else (row.patch, "{}, {}".format(*_GRID))
    public = row is None or row.hub or row.wheel or row.release
    example = _USE.format(
        name=name,
        weights="" if public else ', backbone_weights="backbone.safetensors"',
        height=_GRID[0] * patch,
        width=_GRID[1] * patch,
        grid=grid,
        config=config,
    )
    return _code(example, "python")


def _table(
    columns: Sequence[object], rows: Iterable[Sequence[object]], *, highlight: object = None
) -> str:
    """A table in Markdown; the row whose first cell is ``highlight`` is bold."""
    lines = [" | ".join(map(_cell, columns)), " | ".join("---" for _ in columns)]
    for row in rows:
        mark = "**" if highlight is not None and row[0] == highlight else ""
        lines.append(" | ".join(f"{mark}{_cell(v)}{mark}" if _cell(v) else "" for v in row))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value)
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(str(value).split()))


def _texts(value: object) -> list[str]:
    """One text, or a list of them, as a list; nothing for anything else."""
    if isinstance(value, str):
        return [value]
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else []


def _code(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
