"""Named protocols of label propagation: one record holds everything that decides a figure.

Figures are comparable only if they come from the same protocol. :data:`LABEL_PROTOCOLS` holds the
settings for DAVIS and for folders of clips; :func:`label_protocol` adapts them to other data sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.adapter import CoSettleAdapter, Size
from cosettle_adapter.backbones.rows import IMAGENET_MEAN, IMAGENET_STD
from cosettle_adapter.correspondence import PROTOCOLS, PropagationProtocol
from cosettle_adapter.evaluation.clips import Clip, Masks
from cosettle_adapter.upsampling import Upsampler, upsample
from cosettle_adapter.video import Geometry, as_frames

ProtocolName = Literal["best", "crw", "dino", "cropmae", "tcore", "cosettle"]
JointRule = Literal["published", "geometric"]

_MULTIPLE = 64  # the side that follows the aspect ratio is rounded down to a multiple of this


@dataclass(frozen=True)
class FrameSize:
    """Size of a clip's frames before they are rounded to whole patches; by default their own."""

    sides: tuple[int, int] | None = None  # (height, width), which may change the aspect ratio
    shorter: int | None = None  # length of the shorter side; the other follows, see _MULTIPLE
    longer: int | None = None  # length of the longer side; the other follows

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) for frames of a size."""
        given = self.shorter or self.longer
        if given is None:
            return self.sides or (height, width)
        # the published loaders set the height of a square frame
        sets_height = height <= width if self.shorter else height >= width
        other, same = (width, height) if sets_height else (height, width)
        other = max(_MULTIPLE, given * other // same // _MULTIPLE * _MULTIPLE)
        return (given, other) if sets_height else (other, given)

    def __str__(self) -> str:
        if given := self.shorter or self.longer:
            side = "shorter" if self.shorter else "longer"
            return f"{side} side {given}, the other a multiple of {_MULTIPLE}"
        return "{} x {}".format(*self.sides) if self.sides else "their own"


@dataclass(frozen=True)
class LabelProtocol(PropagationProtocol):
    """Everything that decides a figure of label propagation, besides features and data."""

    name: str
    source: str  # the code or paper that the values are from
    # how frames are resized: as by ``CoSettleAdapter.preprocess``, or as by OpenCV for arrays of
    # that type, without antialiasing
    frames: Literal["antialiased bicubic", "bilinear, float", "bilinear, 8 bit"]
    mean: tuple[float, ...] | None  # of the colours; None for the backbone's own
    std: tuple[float, ...] | None
    size: FrameSize
    # how the first labels are reduced to the grid: each object's mask bilinearly, or the label map
    # by nearest neighbours
    first_labels: Literal["bilinear", "nearest"]
    # size at which every pixel takes its strongest label: that of the ``masks`` or of the encoded
    # ``frames``; for the latter, a first mask is resized (nearest) before it is reduced bilinearly
    argmax: Literal["masks", "frames"]
    stretch: bool  # whether each label's values are stretched to [0, 1] before that
    nearest: Literal["OpenCV", "Pillow"]  # rule by which label maps are resized to the masks
    joints: JointRule  # how joints become patches; see ``joint_heat_maps``
    strongest: int  # patches whose centroid is a joint's position
    metric: str

    def preprocess(self, adapter: CoSettleAdapter, frames: Tensor, *, size: Size) -> Tensor:
        """Resize and normalise frames ``(T, 3, H, W)`` uint8 for the backbone; float32."""
        if self.frames == "antialiased bicubic":
            return adapter.preprocess(frames, size=size)
        images = F.interpolate(frames.to(adapter.device).float(), size, mode="bilinear")
        images = (images.round() if self.frames == "bilinear, 8 bit" else images) / 255
        row = adapter.backbone.row
        mean, std = (
            rearrange(torch.tensor(values, device=images.device), "c -> c 1 1")
            for values in (self.mean or row.mean, self.std or row.std)
        )
        return (images - mean) / std

    def settings(self, *unused: str) -> dict[str, Any]:
        """Return the fields that a task uses, as results and ``--explain`` show them."""
        fields = {name: value for name, value in vars(self).items() if name not in unused}
        own = {key: "the backbone's" for key in ("mean", "std") if fields[key] is None}
        return {"protocol": fields.pop("name"), **fields, "size": str(self.size), **own}


_CROPMAE = LabelProtocol(
    **vars(PROTOCOLS["best"]),
    name="cropmae",
    source="downstreams/propagation of CropMAE (arXiv 2403.17823), after SiamMAE",
    frames="bilinear, float", mean=IMAGENET_MEAN, std=IMAGENET_STD, size=FrameSize((480, 880)),
    first_labels="bilinear", argmax="frames", stretch=False, nearest="OpenCV",
    joints="published", strongest=5, metric="J&F of davis2017-evaluation",
)  # fmt: skip
_RECORDS = (
    replace(
        _CROPMAE, name="best",
        source="this package: cropmae with better resizing of frames and labels",
        frames="antialiased bicubic", mean=None, std=None, argmax="masks",
    ),
    replace(
        _CROPMAE, **vars(PROTOCOLS["crw"]), name="crw",
        source="code/test.py of videowalk (arXiv 2006.14613) with the options of its README",
        # frames keep their size, which is that of the masks
        size=FrameSize(), argmax="masks", strongest=3,
    ),
    replace(
        _CROPMAE, **vars(PROTOCOLS["dino"]), name="dino",
        source="eval_video_segmentation.py of DINO (arXiv 2104.14294); for DAVIS only",
        # of red 0.228, in its code
        frames="bilinear, 8 bit", std=(0.228, 0.224, 0.225), size=FrameSize(shorter=480),
        first_labels="nearest", stretch=True, nearest="Pillow",
    ),
    _CROPMAE,
    replace(
        _CROPMAE, name="tcore",
        source="downstreams/propagation of T-CoRe (arXiv 2503.15096), that of CropMAE",
    ),
    replace(
        _CROPMAE, name="cosettle",
        source="Co-Settle (arXiv 2603.26597) has not published its evaluation; it follows the code "
        "of its authors' T-CoRe, with ImageNet's mean and std for all backbones",
    ),
)  # fmt: skip
LABEL_PROTOCOLS: dict[str, LabelProtocol] = {record.name: record for record in _RECORDS}

_CHANGES: dict[str, dict[str, Any]] = {  # on other data sets
    "vip": {
        "size": FrameSize(longer=880), "topk": 10, "nearest": "Pillow",
        "metric": "mean IoU of 20 classes over all pixels",
    },
    "jhmdb": {"size": FrameSize((320, 320)), "metric": "PCK of videowalk's eval_pck.py"},
    # 560 is the paper's; the default of test.py is 320
    "crw on vip": {"size": FrameSize((560, 560)), "argmax": "frames"},
}  # fmt: skip


def label_protocol(name: str, data: str = "davis", **changes: Any) -> LabelProtocol:
    """Return a named protocol on a data set: ``davis``, ``folder``, ``vip`` or ``jhmdb``.

    ``changes`` override fields of the record; None keeps a field.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    if name not in LABEL_PROTOCOLS:
        known = ", ".join(get_args(ProtocolName))
        raise ValueError(f"got protocol {name!r}, expected one of {known}")
    fields = _CHANGES.get(data, {}) | _CHANGES.get(f"{name} on {data}", {})
    fields |= {field: value for field, value in changes.items() if value is not None}
    return replace(LABEL_PROTOCOLS[name], **fields)


@dataclass(frozen=True)
class LabelPropagation:
    """How labels are propagated through a clip.

    Attributes:
        protocol: settings of this package (best) or of a published evaluation (the others), which
            the options below override; --explain prints them.
        topk: number of matches that vote for a patch.
        context: number of preceding frames to match with.
        radius: radius of the search for matches, in patches.
    """

    protocol: ProtocolName = "best"
    topk: int | None = None
    context: int | None = None
    radius: float | None = None

    def on(self, data: str, **changes: Any) -> LabelProtocol:
        """Return the record of all settings on a data set; see :func:`label_protocol`."""
        changes |= {"topk": self.topk, "context": self.context, "radius": self.radius}
        return label_protocol(self.protocol, data, **changes)


@dataclass(frozen=True)
class Propagation(LabelPropagation):
    """How masks are propagated through a clip.

    Attributes:
        dense: upsample the features to this multiple of the grid before masks are propagated; the
            radius grows with it, so that it spans the same pixels.
        upsampler: bilinear, or guided by the frames.
    """

    dense: int | None = None
    upsampler: Upsampler | None = None

    def __post_init__(self) -> None:
        if self.upsampler is not None and self.dense is None:
            raise ValueError(f"got upsampler={self.upsampler!r} without dense; give dense=2, say")
        if self.dense is not None and self.dense < 1:
            raise ValueError(f"dense must be at least 1, got {self.dense}")

    def on(self, data: str, **changes: Any) -> LabelProtocol:
        """Return the record of all settings, with the radius in patches of the finer grid."""
        record = super().on(data, **changes)
        return replace(record, radius=record.radius * (self.dense or 1))

    def maps(self, clip: Clip[Masks], features: Tensor, geometry: Geometry) -> Iterator[Tensor]:
        """Yield the maps ``(1, C, h, w)`` by which masks are propagated."""
        for index, coarse in enumerate(torch.split(features, 1)):
            if self.dense is None:
                yield coarse
                continue
            sides = (self.dense * geometry.grid[0], self.dense * geometry.grid[1])
            guided = self.upsampler == "guided"
            frame = as_frames(clip.read_frame(index)[None]) if guided else None
            yield upsample(coarse, geometry, sides, frame, self.upsampler or "bilinear")


DEFAULT = Propagation()
