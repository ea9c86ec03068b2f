"""Convert checkpoints of the official code into a projection and the backbone it was trained on.

``save_model`` of the official code (``util/misc.py``) writes the whole model, frozen backbone and
head, as ``{'model', 'optimizer', 'epoch', 'scaler', 'args'}``; the head's tensors are called
``adapter.adapter.*`` (``visual.adapter.adapter.*`` for CLIP, in half precision).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cosettle_adapter.backbones import BackboneRow, HubOptions
from cosettle_adapter.backbones.architectures import load_tensors, meta_model
from cosettle_adapter.backbones.checkpoints import read_checkpoint, save_tensors
from cosettle_adapter.backbones.downloads import file_sha256
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.backbones.weights import (
    BACKBONE_FILE,
    fingerprint,
    load_weights,
    released_checkpoint,
)
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError
from cosettle_adapter.projection import CONFIG_FILE, Kind, Projection, ProjectionConfig
from cosettle_adapter.version import __version__

logger = logging.getLogger(__name__)

_ADAPTER = re.compile(r"(?:module\.)*(?:visual\.)?adapter\.(?:adapter\.)?(?P<name>.+)")
_LINEAR = re.compile(r"^adapter_linear(\d?)\.")  # unnumbered in heads with one matrix
_NORM = re.compile(r"^adapter_layer_norm1\.")
_KINDS: tuple[Kind, ...] = ("linear", "mlp2", "mlp3")  # by number of matrices


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A converted checkpoint of the official code."""

    projection: Projection  # float32, with its config
    backbone: dict[str, Tensor]  # the one it was trained on, timm's names, float32
    verdict: str  # how the backbone compares with the public one
    is_public: bool  # whether the backbone equals the public one

    def save(self, folder: str | Path) -> None:
        """Write the projection, and ``backbone.safetensors`` unless the backbone is public."""
        backbone = Path(folder) / BACKBONE_FILE
        if self.is_public:
            backbone.unlink(missing_ok=True)
        else:
            save_tensors(self.backbone, backbone)
        self.projection.save(folder)


def convert_checkpoint(
    path: str | Path,
    row: BackboneRow,
    *,
    options: HubOptions | None = None,
    origin: str | None = None,
    revision: str | None = None,
) -> Conversion:
    """Convert a checkpoint of the official code and compare its backbone with the public one.

    Args:
        path: the checkpoint; pickles are read without executing code.
        row: the backbone it was trained on.
        options: where to look for the public weights; default: the cache only.
        origin: source to record in the config; default: the file's name.
        revision: commit at which the row's source provides this backbone.

    Raises:
        WeightsUnavailableError: the file does not exist.
        CorruptWeightsError: the file is damaged or of another model.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    try:
        # All ViT-B/16 share the same tensor names.
        trained_on = checkpoint.arguments.get("base_model")
        if row.release is not None and trained_on not in (None, row.release):
            raise CorruptWeightsError(
                f"the checkpoint was trained on {trained_on!r}, expected {row.release!r} "
                f"({row.name}); convert it for the backbone that it was trained on"
            )
        kind, head, rest = _split_checkpoint(checkpoint.tensors)
        backbone = {name: tensor.float() for name, tensor in to_timm(rest, row).items()}
        load_tensors(meta_model(row), backbone, row.name)
        nonfinite = [n for n, t in (head | backbone).items() if not bool(t.isfinite().all())]
        if nonfinite:
            raise CorruptWeightsError(f"{', '.join(nonfinite[:8])}: values that are not finite")
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
            fit={
                "method": "trained by the paper's authors; converted from their checkpoint",
                "source": origin or path.name,
                "source_sha256": file_sha256(path),
                "epoch": checkpoint.epoch,
                "settings": {  # paths of the training machine are left out
                    name: value
                    for name, value in checkpoint.arguments.items()
                    if not isinstance(value, str) or "/" not in value
                },
                "cosettle_adapter": __version__,
            },
        )
        with torch.device("meta"):
            projection = Projection(config)
        load_tensors(projection, head, f"a projection for {row.name}")
    except CorruptWeightsError as error:
        raise CorruptWeightsError(f"{path}: {error}") from error
    public = None
    if row.hub is not None:
        options = dataclasses.replace(options or HubOptions(local_files_only=True), revision=None)
        with contextlib.suppress(WeightsUnavailableError, CorruptWeightsError):
            public = load_weights(row, options)
    is_public = False
    if public is None:
        verdict = "not compared: no public weights are available"
    elif public.fingerprint == config.fingerprint:
        is_public, revision = True, public.revision
        verdict = f"the same model as {public.origin}"
    else:
        verdict = f"not the same model as {public.origin}"
    projection.config = dataclasses.replace(
        config, fit={**config.fit, "backbone": verdict}, backbone_revision=revision
    )
    return Conversion(projection.requires_grad_(False).eval(), backbone, verdict, is_public)


def released_projection(row: BackboneRow, options: HubOptions) -> Path:
    """Return the folder of a row's released projection, converted into the cache on first use."""
    released = released_checkpoint(row, options)
    folder = released.folder
    if (folder / CONFIG_FILE).is_file():  # written last
        return folder
    conversion = convert_checkpoint(
        released.path,
        row,
        options=dataclasses.replace(options, local_files_only=True),
        origin=released.origin,
        revision=released.commit if row.hub is None else None,
    )
    logger.info("%s: the backbone of %s is %s", row.name, released.origin, conversion.verdict)
    conversion.save(folder)
    return folder


def _split_checkpoint(
    tensors: Mapping[str, Tensor],
) -> tuple[Kind, dict[str, Tensor], dict[str, Tensor]]:
    """Kind of the head, its tensors in float32 under our names, and all other tensors unchanged."""
    head, rest = {}, {}
    for name, tensor in tensors.items():
        if match := _ADAPTER.fullmatch(name):
            ours = _LINEAR.sub(lambda m: f"linears.{int(m[1] or 1) - 1}.", match["name"])
            head[_NORM.sub("norm.", ours)] = tensor.float().contiguous()
        else:
            rest[name] = tensor
    matrices = [name for name in head if re.fullmatch(r"linears\.\d\.weight", name)]
    if not 1 <= len(matrices) <= len(_KINDS):
        raise CorruptWeightsError(
            "the checkpoint holds no projection: expected one to three matrices "
            f"adapter.adapter.adapter_linear*, got {', '.join(list(tensors)[:5])}, ... Pass a "
            "checkpoint of the backbone alone as backbone_weights=PATH"
        )
    return _KINDS[len(matrices) - 1], head, rest
