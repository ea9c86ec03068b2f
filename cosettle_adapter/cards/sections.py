"""The sections of a card, in order; the same for the Hub and for ``weights_cards/``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from cosettle_adapter.backbones import BackboneRow
from cosettle_adapter.backbones.released import OFFICIAL_REPOSITORY
from cosettle_adapter.cards.licences import binding_licence, is_non_commercial
from cosettle_adapter.cards.markdown import bullets, cell, code, paragraphs, table
from cosettle_adapter.projection import Projection, ProjectionConfig

PAPER = "https://arxiv.org/abs/2603.26597"

_HUB = "https://huggingface.co"
_AUTHORS = f"[{OFFICIAL_REPOSITORY}]({_HUB}/{OFFICIAL_REPOSITORY})"
_GRID = (20, 35)  # cells of the example's frames
_HEADS = {"affine": "a closed-form projection", "identity": "nothing on top"}
_UNKNOWN = "recorded when the checkpoint is converted"
_CLOSED_FORM = (
    "In the method, `mean` is the mean patch token, `S` the covariance by which mutually nearest "
    "patches of neighbouring frames (`gaps` apart) differ, `r` the strength times the mean "
    "eigenvalue of `S`, and `c` gives the features unit variance per channel. Several blocks are "
    "first scaled to one variance, and reduced to the width of one in the end."
)
_LABELS = {"cosettle_adapter": "cosettle-adapter", "source_sha256": "sha256 of the source"}
_CITATION = f"""@inproceedings{{liu2026cosettle,
  title     = {{From Static to Dynamic: Exploring Self-supervised Image-to-Video Representation
               Transfer Learning}},
  author    = {{Liu, Yang and Xu, Qianqian and Wen, Peisong and Dai, Siran and Zhao, Xilin and
               Huang, Qingming}},
  booktitle = {{IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)}},
  year      = {{2026}},
  url       = {{{PAPER}}}
}}"""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        config: of the projection.
        row: of its backbone; ``None`` if this version does not know it.
        title: first line.
        name: what ``from_pretrained`` takes.
        released: it is the projection that the paper's authors published.
    """

    config: ProjectionConfig
    row: BackboneRow | None
    title: str
    name: str
    released: bool = False


def render(subject: Subject) -> str:
    """Return the card, without front matter."""
    config, row = subject.config, subject.row
    head = "the authors' projection" if subject.released else _HEADS.get(config.kind)
    sections = [
        f"# {subject.title}",
        f"Patch features that hold still over time ([Co-Settle]({PAPER})): the frozen encoder "
        f"`{config.backbone}` and {head or 'a trained projection'}.",
        *paragraphs(config.figures.get("about")),
        "## Details",
        _details(subject),
        *_non_commercial(binding_licence(config, row)),
        "## Data",
        *_data(subject),
        "## Figures",
        *_reported(subject),
        "### Measured",
        *_measured(config.figures.get("measured")),
        "## Limits",
        bullets(_limits(subject)),
        "## Use",
        _snippet(subject),
        "## Citation",
        code(_CITATION, "bibtex"),
    ]
    return "\n\n".join(sections) + "\n"


def _details(subject: Subject) -> str:
    config, row = subject.config, subject.row
    with torch.device("meta"):
        parameters = sum(value.numel() for value in Projection(config).parameters())
    head = config.kind if config.kind in _HEADS else f"{config.kind}, {config.activation}"
    rows: list[tuple[str, object]] = [("backbone", f"`{config.backbone}`")]
    if row is not None:
        rows += [
            ("family", row.family),
            ("architecture", f"`{row.architecture}`, {row.depth} blocks"),
            ("patch", f"{row.patch} pixels"),
            ("width", row.width),
            ("weights from", _source(subject, row)),
        ]
    rows += [
        ("fingerprint", f"`{config.fingerprint}`" if config.fingerprint else _UNKNOWN),
        ("reads", _blocks(config, row)),
        ("final norm", "applied" if config.norm else "not applied"),
        ("kind", f"{head}, {config.in_width} -> {config.out_width}"),
        ("parameters", parameters),
        ("size", f"{4 * parameters / 1e6:.1f} MB"),
        ("licence", binding_licence(config, row) or "not stated"),
    ]
    if row is not None and row.note:
        rows.append(("note", row.note))
    return table(("", ""), rows)


def _source(subject: Subject, row: BackboneRow) -> str:
    commit = subject.config.backbone_revision
    theirs = subject.released and not commit
    if row.release is not None and (theirs or not (row.hub or row.wheel)):
        return f"`ckpts/ours/{row.release.name}+ours` of {_AUTHORS}"
    if row.hub is not None:
        return f"[{row.hub.repo}]({_HUB}/{row.hub.repo})" + (f" at `{commit}`" if commit else "")
    if row.wheel is not None:
        return f"the wheel `{row.wheel.package}` {row.wheel.version} on the package index"
    return "no public source is registered: give a file as `backbone_weights=PATH`"


def _blocks(config: ProjectionConfig, row: BackboneRow | None) -> str:
    plural = "s" if len(config.layers) > 1 else ""
    text = f"block{plural} {', '.join(map(str, config.layers))} (0-based)"
    first = max(config.layers) + 1
    if row is None or row.kind != "vit" or first >= row.depth:
        return text
    if first == row.depth - 1:
        return f"{text}; block {first} is never run"
    return f"{text}; blocks {first} to {row.depth - 1} are never run"


def _non_commercial(licence: str) -> list[str]:
    if not is_non_commercial(licence):
        return []
    return [
        f"**Non-commercial.** The backbone's weights are under {licence}, and this projection "
        "derives from them: neither may be used for commercial purposes."
    ]


def _data(subject: Subject) -> list[str]:
    if not subject.released or subject.config.fit:
        return _fit(subject.config)
    return [
        "Trained by the authors of the paper on Kinetics-400, without labels, with the backbone "
        "frozen. Their checkpoint holds backbone and projection together and is not part of this "
        f'package: `CoSettleAdapter.from_pretrained("{subject.name}")` finds it in the listing of '
        f"{_AUTHORS} on the Hub, converts it to safetensors once, and keeps "
        "that in the cache."
    ]


def _fit(config: ProjectionConfig) -> list[str]:
    fit = dict(config.fit)
    command, overlap = fit.pop("command", None), fit.pop("overlap_by_block", None)
    recorded = [
        (_LABELS.get(key, key.replace("_", " ")), value)
        for key, value in fit.items()
        if cell(value)
    ]
    sections = [table(("", ""), recorded) if recorded else "Nothing was recorded."]
    if isinstance(overlap, Mapping) and overlap:
        best = max(overlap.values())
        shares = [f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in overlap.values()]
        sections += [_CLOSED_FORM] if config.kind == "affine" else []
        sections.append("What the blocks were chosen by, for each and for several read together:")
        sections.append(table(("blocks", *overlap), [("overlap", *shares)]))
    if command:
        sections += ["Fitted by", code(command, "bash")]
    return sections + paragraphs(config.figures.get("choice"))


def _reported(subject: Subject) -> list[str]:
    row = subject.row
    if row is None or row.release is None or not row.release.reported:
        return []
    whose = "" if subject.released else "; their own projection of this backbone, not this one"
    return [
        f"### Reported by the authors (not measured here{whose})",
        table(
            ("benchmark", "backbone alone (reported)", "with projection (reported)"),
            [(name, *pair) for name, pair in row.release.reported.items()],
        ),
    ]


def _measured(entries: object) -> list[str]:
    sections: list[str] = []
    printed_by = None
    for entry in entries if isinstance(entries, (list, tuple)) else ():
        command, rows = entry.get("command"), entry.get("rows") or []
        sections += [f"**{entry['title']}.**"] if entry.get("title") else []
        sections += paragraphs(entry.get("protocol"))
        if command and command == printed_by:
            sections.append("Printed by the same command.")
        elif command:
            sections += ["Printed by", code(command, "bash")]
        printed_by = command
        columns = entry.get("columns") or [""] * max(map(len, rows), default=1)
        sections.append(table(columns, rows, highlight=entry.get("highlight")))
    return sections or ["None measured here yet."]


def _limits(subject: Subject) -> list[str]:
    limits = paragraphs(subject.config.figures.get("limits"))
    if not subject.config.figures.get("measured"):
        done = (
            "The reported figures have not been reproduced here"
            if subject.released
            else ("Not compared with the backbone's own features yet")
        )
        limits.append(f"{done}: compare both on your videos first (`CoSettleAdapter.raw`).")
    return [*limits, "It fits one set of backbone tensors only; another fingerprint is refused."]


def _snippet(subject: Subject) -> str:
    config, row = subject.config, subject.row
    height, width, grid = 280, 490, "h, w"
    if row is not None:
        height, width, grid = _GRID[0] * row.patch, _GRID[1] * row.patch, "{}, {}".format(*_GRID)
    public = row is None or row.hub or row.wheel or row.release
    weights = "" if public else ', backbone_weights="backbone.safetensors"'
    return code(
        f"""import torch
from cosettle_adapter import CoSettleAdapter

adapter = CoSettleAdapter.from_pretrained("{subject.name}"{weights})

frames = torch.randint(0, 256, (4, 3, {height}, {width}), dtype=torch.uint8)  # (T, 3, H, W)
features = adapter(frames)
print(features.shape)  # torch.Size([4, {config.out_width}, {grid}])

raw, features = adapter(frames, return_backbone=True)  # what the projection read, as well
print(raw.shape)  # torch.Size([4, {config.in_width}, {grid}])""",
        "python",
    )
