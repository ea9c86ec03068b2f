"""The authors' checkpoints as ours: projection and config, and the frozen backbone riding along.

``save_model`` of the official code (``util/misc.py``) writes the whole model, frozen backbone and
head, as ``{'model', 'optimizer', 'epoch', 'scaler', 'args'}``; the head's tensors are called
``adapter.adapter.*`` (``visual.adapter.adapter.*`` for CLIP, in half precision).
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosettle_adapter.backbones import BackboneRow, HubOptions
from cosettle_adapter.backbones.architectures import check_tensors, meta_model
from cosettle_adapter.backbones.blobs import check_blob
from cosettle_adapter.backbones.checkpoints import Checkpoint, is_whole, read_checkpoint
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.backbones.released import (
    BACKBONE_FILE,
    converted_folder,
    released_checkpoint,
)
from cosettle_adapter.backbones.weights import (
    LoadedWeights,
    fingerprint,
    load_weights,
    save_tensors,
)
from cosettle_adapter.backbones.wheels import file_sha256
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError
from cosettle_adapter.projection import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Kind,
    Projection,
    ProjectionConfig,
)
from cosettle_adapter.version import __version__

logger = logging.getLogger(__name__)

RELEASED = "trained by the paper's authors; converted from their checkpoint"  # how, in a config

_HEAD = re.compile(r"^(?:module\.)*(?:visual\.)?adapter\.adapter\.(?P<name>.+)$")
_ADAPTER = re.compile(r"^(?:module\.)*(?:visual\.)?adapter\.")
_KINDS: tuple[tuple[Kind, tuple[str, ...]], ...] = (  # ST_adapter.py's names, in order
    ("linear", ("adapter_linear",)),
    ("mlp2", ("adapter_linear1", "adapter_linear2")),
    ("mlp3", ("adapter_linear1", "adapter_linear2", "adapter_linear3")),
)
_NORM = "adapter_layer_norm1"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The backbone riding in a checkpoint, tensor by tensor against a public one.

    Attributes:
        reference: where the public one came from, for people.
        tensors: how many were compared.
        different: names of those that differ, in float32.
        largest: largest absolute difference of any value.
    """

    reference: str
    tensors: int
    different: tuple[str, ...]
    largest: float

    @property
    def same(self) -> bool:
        """Whether it is the same model, exactly."""
        return not self.different

    def __str__(self) -> str:
        if self.same:
            return f"the same model as {self.reference}: all {self.tensors} tensors are equal"
        return (
            f"not the same model as {self.reference}: {len(self.different)} of {self.tensors} "
            f"tensors differ, by up to {self.largest:.3g} (first: {self.different[0]})"
        )


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A checkpoint of the official code, taken apart.

    Attributes:
        projection: the head, float32, with its config.
        backbone: the frozen backbone that rode along, timm's names, float32.
        comparison: against the public weights; ``None`` where there are none, or none at hand.
    """

    projection: Projection
    backbone: dict[str, Tensor]
    comparison: Comparison | None = None

    @property
    def verdict(self) -> str:
        """Whether the backbone is the public one, in a sentence."""
        if self.comparison is None:
            return "not compared: no public weights of it, or none at hand"
        return str(self.comparison)

    def compared_with(self, reference: LoadedWeights | None) -> Conversion:
        """Return the same conversion with the backbone compared to public weights.

        Where they are equal, the config points at the public commit. ``None`` changes nothing.
        """
        if reference is None:
            return self
        comparison = compare(self.backbone, reference)
        projection = copy.copy(self.projection)
        projection.config = dataclasses.replace(
            projection.config,
            backbone_revision=reference.revision
            if comparison.same
            else projection.config.backbone_revision,
            fit={**projection.config.fit, "backbone": str(comparison)},
        )
        return dataclasses.replace(self, projection=projection, comparison=comparison)

    def save(self, folder: str | Path) -> None:
        """Write the projection, and the backbone unless it is publicly the same.

        A folder with a ``backbone.safetensors`` needs nothing else to be loaded.
        """
        folder = Path(folder)
        if self.comparison is None or not self.comparison.same:
            save_tensors(self.backbone, folder / BACKBONE_FILE)
        else:
            (folder / BACKBONE_FILE).unlink(missing_ok=True)
        self.projection.save(folder)


def convert_checkpoint(
    path: str | Path,
    row: BackboneRow,
    *,
    origin: str | None = None,
    revision: str | None = None,
) -> Conversion:
    """Convert a checkpoint of the official code.

    Args:
        path: the file; pickles are read without running anything in them.
        row: the backbone it was trained on.
        origin: what to call the file in the config; its name by default.
        revision: commit from which the row's sources give this very backbone again.

    Raises:
        WeightsUnavailableError: no such file.
        CorruptWeightsError: not a checkpoint, without a head, or another model's; missing,
            unexpected and misshapen tensors are listed.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    trained_on = checkpoint.arguments.get("base_model")  # names alone tell no ViT-B/16 from another
    if row.release is not None and trained_on not in (None, row.release.name):
        raise CorruptWeightsError(
            f"{path} was trained on {trained_on!r}, not on {row.release.name!r} ({row.name})"
        )
    head = _head(checkpoint.tensors, row, path)
    rest = {name: t for name, t in checkpoint.tensors.items() if _HEAD.match(name) is None}
    try:
        backbone = {name: tensor.float() for name, tensor in to_timm(rest, row).items()}
        check_tensors(meta_model(row), backbone, row)
        _check_values(backbone)
    except CorruptWeightsError as error:
        raise CorruptWeightsError(f"{path}: {error}") from error
    kind = _kind(head, path)
    config = ProjectionConfig(
        backbone=row.name,
        fingerprint=fingerprint(backbone),
        layers=(row.depth - 1,),
        norm=row.final_norm,
        in_width=row.width,
        out_width=row.width,
        kind=kind,
        activation="tanh",
        licence=row.licence,
        backbone_revision=revision,
        fit=_record(checkpoint, origin or path.name, path),
    )
    with torch.device("meta"):
        projection = Projection(config)
    projection.load_state_dict(_rename(head, kind), strict=True, assign=True)
    return Conversion(projection.requires_grad_(False).eval(), backbone)


def released_projection(row: BackboneRow, options: HubOptions) -> Path:
    """Return the folder of a row's released projection, converted once into the cache.

    The backbone that rides along is compared with the public one if that is in the cache already;
    nothing more is downloaded for it. It is what the head was trained on, so it is what is used.

    Raises:
        WeightsUnavailableError: it is neither cached nor to be had from the Hub.
        CorruptWeightsError: the file is not what the official code writes; the cache is left as
            it was.
    """
    released = released_checkpoint(row, options)
    folder = converted_folder(row, released.commit, options)
    if _is_complete(folder):
        return folder
    check_blob(released.path, what=released.filename)
    reference = public_weights(row, dataclasses.replace(options, local_files_only=True))
    conversion = convert_checkpoint(
        released.path,
        row,
        origin=released.origin,
        revision=released.commit if row.hub is None else None,
    ).compared_with(reference)
    logger.info("%s: the backbone of %s is %s", row.name, released.origin, conversion.verdict)
    conversion.save(folder)
    return folder


def public_weights(row: BackboneRow, options: HubOptions) -> LoadedWeights | None:
    """Return the public weights of a row that are not the release itself, if they can be had."""
    if row.hub is None:
        return None
    try:
        return load_weights(row, dataclasses.replace(options, revision=None))
    except WeightsUnavailableError as error:
        logger.info("%s: not compared with public weights: %s", row.name, error)
        return None


def compare(tensors: Mapping[str, Tensor], reference: LoadedWeights) -> Comparison:
    """Compare a backbone tensor by tensor with another, in float32."""
    different: list[str] = []
    largest = 0.0
    for name in sorted(tensors.keys() | reference.tensors.keys()):
        ours, theirs = tensors.get(name), reference.tensors.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            different.append(name)
            largest = float("inf")
            continue
        gap = float((ours.float() - theirs.float()).abs().max())
        if gap != 0.0:
            different.append(name)
            largest = max(largest, gap)
    return Comparison(reference.origin, len(reference.tensors), tuple(different), largest)


def _head(tensors: Mapping[str, Tensor], row: BackboneRow, path: Path) -> dict[str, Tensor]:
    """The head's tensors by their own names, float32."""
    matches = {name: _HEAD.match(name) for name in tensors}
    head = {match["name"]: tensors[name].float() for name, match in matches.items() if match}
    strangers = [name for name in tensors if _ADAPTER.match(name) and not matches[name]]
    if not head:
        names = ", ".join(list(tensors)[:5])
        raise CorruptWeightsError(
            f"{path} holds no projection: no tensor is called adapter.adapter.* (it holds "
            f"{names}, ...). If it is the backbone alone, give it as backbone_weights=PATH"
        )
    width = (row.width,)
    faults = [
        f"{name} is {tuple(tensor.shape)}, expected {shape}"
        for name, tensor in head.items()
        if tuple(tensor.shape) != (shape := width * (1 + _is_matrix(name)))
    ]
    faults += [f"unexpected {name}" for name in strangers]
    faults += [f"{name} is not finite" for name, t in head.items() if not bool(t.isfinite().all())]
    if faults:
        raise CorruptWeightsError(f"{path} holds no projection of {row.name}: {'; '.join(faults)}")
    return head


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise CorruptWeightsError(f"{', '.join(broken[:8])} hold values that are not finite")


def _is_complete(folder: Path) -> bool:
    """Whether a conversion in the cache is all there; the config is written last."""
    backbone = folder / BACKBONE_FILE
    return (
        (folder / CONFIG_FILE).is_file()
        and is_whole(folder / WEIGHTS_FILE)
        and (not backbone.is_file() or is_whole(backbone))
    )


def _is_matrix(name: str) -> bool:
    return name.endswith(".weight") and not name.startswith(_NORM)


def _names(linears: tuple[str, ...]) -> dict[str, str]:
    """Official name to ours, for a head of these linear layers."""
    modules = {official: f"linears.{index}" for index, official in enumerate(linears)}
    modules[_NORM] = "norm"
    return {
        f"{official}.{parameter}": f"{ours}.{parameter}"
        for official, ours in modules.items()
        for parameter in ("weight", "bias")
    }


def _kind(head: Mapping[str, Tensor], path: Path) -> Kind:
    for kind, linears in _KINDS:
        if head.keys() == _names(linears).keys():
            return kind
    expected = _names(_KINDS[0][1]).keys()
    raise CorruptWeightsError(
        f"{path} holds a head that the official code does not write: missing "
        f"{sorted(expected - head.keys()) or 'nothing'}, unexpected "
        f"{sorted(head.keys() - expected) or 'nothing'}"
    )


def _rename(head: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    names = _names(dict(_KINDS)[kind])
    return {ours: head[official].contiguous() for official, ours in names.items()}


def _record(checkpoint: Checkpoint, origin: str, path: Path) -> dict[str, Any]:
    return {
        "method": RELEASED,
        "source": origin,
        "source_sha256": file_sha256(path),
        "epoch": checkpoint.epoch,
        "settings": {
            name: value
            for name, value in checkpoint.arguments.items()
            if not isinstance(value, str) or "/" not in value  # no folders of somebody's machine
        },
        "backbone": "not compared",
        "cosettle_adapter": __version__,
    }
