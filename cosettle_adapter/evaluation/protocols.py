"""Named protocols of label propagation: records of all settings that affect the scores.

Scores are comparable only within a protocol. :data:`LABEL_PROTOCOLS` holds the settings for DAVIS
and for folders of clips; :func:`label_protocol` adapts them to other data sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

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
    """Size of encoded frames before rounding to whole patches; by default that of the clip."""

    sides: tuple[int, int] | None = None  # (height, width), which may change the aspect ratio
    shorter: int | None = None  # length of the shorter side; see _MULTIPLE for the other
    longer: int | None = None  # length of the longer side

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) for a clip's frame size."""
        length = self.shorter or self.longer
        if length is None:
            return self.sides or (height, width)
        # the published loaders set the height of a square frame
        sets_height = height <= width if self.shorter else height >= width
        other, same = (width, height) if sets_height else (height, width)
        other = max(_MULTIPLE, length * other // same // _MULTIPLE * _MULTIPLE)
        return (length, other) if sets_height else (other, length)

    def __str__(self) -> str:
        if length := self.shorter or self.longer:
            side = "shorter" if self.shorter else "longer"
            return f"{side} side {length}, the other a multiple of {_MULTIPLE}"
        return "{} x {}".format(*self.sides) if self.sides else "their own"


@dataclass(frozen=True)
class LabelProtocol(PropagationProtocol):
    """All settings of a label-propagation evaluation besides features and data."""

    name: str
    source: str  # the code or paper that the values are from
    # resizing of frames: that of ``CoSettleAdapter.preprocess``, or that of OpenCV for arrays of
    # this type, without antialiasing
    frames: Literal["antialiased bicubic", "bilinear, float", "bilinear, 8 bit"]
    mean: tuple[float, ...] | None  # of the colours; None for the backbone's own
    std: tuple[float, ...] | None
    size: FrameSize
    # reduction of the first labels to the grid: of each object's mask, or of the label map
    first_labels: Literal["bilinear", "nearest"]
    # size at which every pixel takes its strongest label: that of the masks, or of the encoded
    # frames, to which the first mask is then resized (nearest) before it is reduced bilinearly
    argmax: Literal["masks", "frames"]
    stretch: bool  # whether each label's values are first stretched to [0, 1]
    nearest: Literal["OpenCV", "Pillow"]  # resizing of label maps
    joints: JointRule  # assignment of joints to patches; see ``joint_heat_maps``
    strongest: int  # patches whose centroid is a joint's position
    metric: str

    def frame_size(self, clip: Clip[Any]) -> tuple[int, int]:
        """Return the (height, width) of a clip's encoded frames."""
        return self.size.of(*clip.read_frame(0).shape[:2])

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
        """Return the fields for results and ``--explain``, except those unused by a task."""
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
        # frames keep the size of the masks
        size=FrameSize(), argmax="masks", strongest=3,
    ),
    replace(
        _CROPMAE, **vars(PROTOCOLS["dino"]), name="dino",
        source="eval_video_segmentation.py of DINO (arXiv 2104.14294); for DAVIS only",
        # 0.228 for red, as in its code
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
    # 560 as in the paper; the default of test.py is 320
    "crw on vip": {"size": FrameSize((560, 560)), "argmax": "frames"},
}  # fmt: skip


def label_protocol(name: str, data: str = "davis", **changes: Any) -> LabelProtocol:
    """Return a protocol for ``davis``, ``folder``, ``vip`` or ``jhmdb``; None changes no field."""
    if name not in LABEL_PROTOCOLS:
        raise ValueError(f"got protocol {name!r}, expected one of {', '.join(LABEL_PROTOCOLS)}")
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
        """Return the record of all settings for a data set; see :func:`label_protocol`."""
        changes |= {"topk": self.topk, "context": self.context, "radius": self.radius}
        return label_protocol(self.protocol, data, **changes)


@dataclass(frozen=True)
class Propagation(LabelPropagation):
    """How masks are propagated through a clip.

    Attributes:
        dense: upsample the features to this multiple of the grid before propagation; the radius
            covers the same pixels.
        upsampler: bilinear, or guided by the frames.
    """

    dense: int | None = None
    upsampler: Upsampler | None = None

    def __post_init__(self) -> None:
        if self.upsampler is not None and self.dense is None:
            raise ValueError(f"got upsampler={self.upsampler!r} without dense; give dense=2")
        if self.dense is not None and self.dense < 1:
            raise ValueError(f"dense must be at least 1, got {self.dense}")

    def on(self, data: str, **changes: Any) -> LabelProtocol:
        """Return the record of all settings, with the radius in patches of the upsampled grid."""
        record = super().on(data, **changes)
        return replace(record, radius=record.radius * (self.dense or 1))

    def maps(self, clip: Clip[Masks], features: Tensor, geometry: Geometry) -> Iterator[Tensor]:
        """Yield the features ``(1, C, h, w)`` for propagation, upsampled if ``dense``."""
        for index, coarse in enumerate(torch.split(features, 1)):
            if self.dense is None:
                yield coarse
                continue
            sides = (self.dense * geometry.grid[0], self.dense * geometry.grid[1])
            guided = self.upsampler == "guided"
            frame = as_frames(clip.read_frame(index)[None]) if guided else None
            yield upsample(coarse, geometry, sides, frame, self.upsampler or "bilinear")


DEFAULT = Propagation()
