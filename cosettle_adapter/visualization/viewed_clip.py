"""A clip in memory as the page needs it: pictures, features in half precision, PCA colours."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.correspondence.fusion import FusionMode, temporal_fusion
from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.evaluation.variants import FeatureVariant, feature_variants, read_layers
from cosettle_adapter.imports import require
from cosettle_adapter.video import FrameSelection, Geometry, open_frames, prefetch
from cosettle_adapter.video.geometry import resize
from cosettle_adapter.visualization.pca import fit_pca
from cosettle_adapter.visualization.similarity import similarity_maps

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter, Size

logger = logging.getLogger(__name__)

_LONGEST = 960  # pixels of a picture's longer side; panels are hardly ever wider
_QUALITY = 88


@dataclasses.dataclass(frozen=True, eq=False)
class ViewedClip:
    """What the page shows of a clip.

    Attributes:
        name: of the clip.
        facts: a few words on the model and how the clip was encoded, by what they are about.
        pictures: a JPEG for every frame.
        times: ``(T,)`` float64 seconds.
        geometry: how the original frames became the grid of all features.
        features: kind of features to ``(T, C, h, w)`` float16, in the order to offer them.
        colours: kind of features to their PCA colours ``(T, 3, h, w)`` uint8.
    """

    name: str
    facts: Mapping[str, str]
    pictures: Sequence[bytes]
    times: Tensor
    geometry: Geometry
    features: Mapping[str, Tensor]
    colours: Mapping[str, Tensor]

    def similarity(self, kind: str, frame: int, point: tuple[float, float]) -> Tensor:
        """Compare all cells with a point (x, y) of a frame: ``(T, h, w)`` float32 cosines.

        Raises:
            FrameError: no such frame.
            GeometryError: a point outside the frame.
        """
        return similarity_maps(self.features[kind], self.geometry, point, frame=frame)


@torch.inference_mode()
def view_clip(
    adapter: CoSettleAdapter,
    source: str | os.PathLike[str],
    *,
    size: Size | None = None,
    select: FrameSelection | None = None,
    batch_size: int = 4,
    fusion: FusionMode | None = None,
    on_frames: Callable[[int], None] = lambda done: None,
) -> ViewedClip:
    """Encode a clip for the page, all kinds of features from one pass of the backbone.

    Args:
        adapter: backbone and projection.
        source: a video file, or a folder or glob of images.
        size: what frames are resized to, as in the adapter's ``forward``.
        select: which frames; all by default.
        batch_size: frames a forward pass.
        fusion: show the adapter's own features fused over time as well.
        on_frames: called with the number of frames done, after each pass.

    Returns:
        The clip; of a video that breaks off, what could be read of it.

    Raises:
        FrameError: nothing to read, or frames that cannot be used.
        MissingExtraError: Pillow or numpy is not installed.
    """
    kinds = feature_variants(adapter)
    pictures: list[bytes] = []
    times: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {kind.name: [] for kind in kinds}
    guides: list[Tensor] = []
    geometry: Geometry | None = None
    chunks = open_frames(source, select, chunk_size=batch_size)
    try:
        for chunk in prefetch(chunks):
            geometry = adapter.geometry(*chunk.frames.shape[-2:], size=size)
            images = adapter.preprocess(chunk.frames, size=size)
            tokens = read_layers(adapter.backbone, images, [kind.reads for kind in kinds])
            for kind in kinds:
                found = kind.of_frames(tokens[kind.reads])
                parts[kind.name].append(_halved(found, kind))
            # of the last kind, which is what the adapter returns
            if fusion is not None:
                guides.append(adapter._guide(tokens[kind.reads]).to("cpu", torch.float16))
            pictures.extend(_pictures(chunk.frames))
            times.append(chunk.timestamps)
            on_frames(len(pictures))
    except TruncatedVideoError as error:
        if not pictures:
            raise
        logger.warning("showing the readable part of the clip: %s", error)
    if geometry is None:
        raise FrameError(f"{source} holds no frames")
    features = {kind.name: _finished(kind, parts.pop(kind.name)) for kind in kinds}
    if fusion is not None:
        own = kinds[-1].name
        features[f"{own}, fused"] = temporal_fusion(features[own], torch.cat(guides), mode=fusion)
    return ViewedClip(
        name=Path(source).name,
        facts=_facts(adapter, geometry),
        pictures=pictures,
        times=torch.cat(times),
        geometry=geometry,
        features=features,
        colours=_colours(features),
    )


def _halved(features: Tensor, kind: FeatureVariant) -> Tensor:
    half = features.to("cpu", torch.float16)
    if not half.isfinite().all():
        raise FrameError(
            f"features ({kind.name}) are not finite in half precision; look at this model with "
            "another --dtype or on other frames"
        )
    return half


def _finished(kind: FeatureVariant, parts: list[Tensor]) -> Tensor:
    clip = torch.cat(parts)
    return clip if kind.finish is None else kind.finish(clip.float()).half()


def _colours(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PCA colours of every kind, those of the first being the ones that others are turned to."""
    colours: dict[str, Tensor] = {}
    reference: Tensor | None = None
    for name, clip in features.items():
        basis = fit_pca(clip, align_to=reference)
        if reference is None:
            reference = basis.scores(clip)
        painted = torch.cat([basis.colours(frame) for frame in torch.split(clip, 1)])
        colours[name] = (255 * painted).round().to(torch.uint8)
    return colours


def _facts(adapter: CoSettleAdapter, geometry: Geometry) -> dict[str, str]:
    config = adapter.config
    h, w = geometry.grid
    kind = "tokens" if config.kind == "identity" else f"{config.kind} projection"
    read = "block" if len(config.layers) == 1 else "blocks"
    return {
        "backbone": config.backbone,
        "projection": f"{kind} of {read} {', '.join(map(str, config.layers))}",
        "encoded at": f"{geometry.padded[1]} x {geometry.padded[0]} pixels, {w} x {h} patches",
    }


def _pictures(frames: Tensor) -> list[bytes]:
    height, width = frames.shape[-2:]
    longest = max(height, width)
    if longest > _LONGEST:
        sides = (
            max(1, round(height * _LONGEST / longest)),
            max(1, round(width * _LONGEST / longest)),
        )
        frames = resize(frames, sides).round().to(torch.uint8)
    return [_jpeg(frame) for frame in frames]


def _jpeg(frame: Tensor) -> bytes:
    image_module: Any = require("PIL.Image", extra="viz", purpose="showing frames in a page")
    require("numpy", extra="viz", purpose="showing frames in a page")
    written = io.BytesIO()
    array = rearrange(frame, "c h w -> h w c").contiguous().cpu().numpy()
    image_module.fromarray(array).save(written, format="JPEG", quality=_QUALITY)
    return written.getvalue()
