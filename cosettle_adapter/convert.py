"""The authors' checkpoints as ours: a projection, and the backbone it was trained on.

``save_model`` of the official code (``util/misc.py``) writes the whole model, frozen backbone and
head, as ``{'model', 'optimizer', 'epoch', 'scaler', 'args'}``; the head's tensors are called
``adapter.adapter.*`` (``visual.adapter.adapter.*`` for CLIP, in half precision).
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosettle_adapter.backbones import BackboneRow, HubOptions
from cosettle_adapter.backbones.architectures import load_tensors, meta_model
from cosettle_adapter.backbones.checkpoints import Checkpoint, is_whole, read_checkpoint
from cosettle_adapter.backbones.downloads import file_sha256
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.backbones.releases import converted_folder, released_checkpoint
from cosettle_adapter.backbones.weights import (
    BACKBONE_FILE,
    fingerprint,
    load_weights,
    save_tensors,
)
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

RELEASED = "trained by the paper's authors; converted from their checkpoint"  # method, in a config

_ADAPTER = re.compile(r"^(?:module\.)*(?:visual\.)?adapter\.(?P<name>.+)$")
_NORM = "adapter_layer_norm1"
_KINDS: dict[tuple[str, ...], Kind] = {  # ST_adapter.py's matrices, in order
    ("adapter_linear",): "linear",
    ("adapter_linear1", "adapter_linear2"): "mlp2",
    ("adapter_linear1", "adapter_linear2", "adapter_linear3"): "mlp3",
}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A checkpoint of the official code, taken apart."""

    projection: Projection  # float32, with its config
    backbone: dict[str, Tensor]  # that it was trained on, timm's names, float32
    verdict: str  # whether that is the public backbone, in a sentence
    is_public: bool  # whether it is, exactly

    def save(self, folder: str | Path) -> None:
        """Write the projection, and the backbone unless it is the public one.

        A folder with a ``backbone.safetensors`` needs nothing else to be loaded.
        """
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
    """Convert a checkpoint of the official code, and compare its backbone with the public one.

    Args:
        path: the file; nothing in a pickle is run.
        row: the backbone it was trained on.
        options: how to find the public weights; only the cache is searched by default.
        origin: what to call the file in the config; its name by default.
        revision: commit from which the row's sources give this very backbone again.

    Raises:
        WeightsUnavailableError: no such file.
        CorruptWeightsError: not a checkpoint, without a head, or another model's; missing,
            unexpected and misshapen tensors are listed.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    try:
        # Tensor names do not tell one ViT-B/16 from another.
        trained_on = checkpoint.arguments.get("base_model")
        if row.release is not None and trained_on not in (None, row.release):
            raise CorruptWeightsError(
                f"was trained on {trained_on!r}, not on {row.release!r} ({row.name})"
            )
        kind, head, rest = _take_apart(checkpoint.tensors)
        backbone = {name: tensor.float() for name, tensor in to_timm(rest, row).items()}
        load_tensors(meta_model(row), backbone, row.name)
        infinite = [n for n, t in (head | backbone).items() if not bool(t.isfinite().all())]
        if infinite:
            raise CorruptWeightsError(f"{', '.join(infinite[:8])}: values that are not finite")
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
        load_tensors(projection, head, f"a projection for {row.name}")
    except CorruptWeightsError as error:
        raise CorruptWeightsError(f"{path}: {error}") from error
    verdict, public = _compare(backbone, row, options or HubOptions(local_files_only=True))
    projection.config = dataclasses.replace(
        config,
        fit={**config.fit, "backbone": verdict},
        backbone_revision=public or revision,
    )
    return Conversion(
        projection.requires_grad_(False).eval(), backbone, verdict, is_public=public is not None
    )


def released_projection(row: BackboneRow, options: HubOptions) -> Path:
    """Return the folder of a row's released projection, converted once into the cache.

    The backbone in the checkpoint is what the head was trained on, so it is what is used. It is
    compared with the public one if that is in the cache already; nothing is downloaded for it.

    Raises:
        WeightsUnavailableError: neither in the cache nor on the Hub.
        CorruptWeightsError: the file is not what the official code writes; the cache is left as
            it was.
    """
    released = released_checkpoint(row, options)
    folder = converted_folder(row, released.commit, options)
    backbone = folder / BACKBONE_FILE
    complete = (folder / CONFIG_FILE).is_file() and is_whole(folder / WEIGHTS_FILE)
    if complete and (not backbone.is_file() or is_whole(backbone)):
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


def _compare(
    backbone: Mapping[str, Tensor], row: BackboneRow, options: HubOptions
) -> tuple[str, str | None]:
    """Whether a backbone is the public one, in a sentence; if so, the commit of that one."""
    if row.hub is None:
        return "not compared: no public weights of it are registered", None
    try:
        public = load_weights(row, dataclasses.replace(options, revision=None))
        load_tensors(meta_model(row), public.tensors, row.name)
    except (WeightsUnavailableError, CorruptWeightsError) as error:
        logger.info("%s: not compared with public weights: %s", row.name, error)
        return "not compared: its public weights are not at hand", None
    gaps = {
        name: float((tensor.float() - backbone[name]).abs().max())
        for name, tensor in public.tensors.items()
        if not torch.equal(tensor.float(), backbone[name])
    }
    if gaps:
        return (
            f"not the same model as {public.origin}: {len(gaps)} of {len(public.tensors)} tensors "
            f"differ, by up to {max(gaps.values()):.3g} (first: {next(iter(gaps))})"
        ), None
    same = f"the same model as {public.origin}: all {len(public.tensors)} tensors are equal"
    return same, public.revision


def _take_apart(tensors: Mapping[str, Tensor]) -> tuple[Kind, dict[str, Tensor], dict[str, Tensor]]:
    """Kind of the head, its tensors under our names in float32, and all others as they are."""
    adapter = {name: match["name"] for name in tensors if (match := _ADAPTER.match(name))}
    official = {
        name: inner.removeprefix("adapter.")
        for name, inner in adapter.items()
        if inner.startswith("adapter.")
    }
    if not official:
        raise CorruptWeightsError(
            "it holds no projection: no tensor is called adapter.adapter.* (it holds "
            f"{', '.join(list(tensors)[:5])}, ...). If it is the backbone alone, give it as "
            "backbone_weights=PATH"
        )
    modules = sorted({name.partition(".")[0] for name in official.values()} - {_NORM})
    kind = _KINDS.get(tuple(modules))
    if kind is None:
        raise CorruptWeightsError(
            "it holds a head that the official code does not write, of "
            f"{', '.join(modules) or 'a norm alone'}; "
            f"expected {' or '.join('/'.join(known) for known in _KINDS)}"
        )
    ours = {module: f"linears.{index}" for index, module in enumerate(modules)} | {_NORM: "norm"}
    head = {}
    for name in adapter:  # what is not the head's keeps its name, and is reported by it
        module, _, parameter = official.get(name, "").partition(".")
        head[f"{ours[module]}.{parameter}" if module else name] = tensors[name].float().contiguous()
    return kind, head, {name: t for name, t in tensors.items() if name not in adapter}


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
        "cosettle_adapter": __version__,
    }
