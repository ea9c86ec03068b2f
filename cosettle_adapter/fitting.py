"""Fit a projection for any backbone on the starter corpus, with core dependencies only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.closed_form import TokenStatistics, centre, solve_layers
from cosettle_adapter.errors import GeometryError, StatisticsError
from cosettle_adapter.projection import RECIPE, Projection, ProjectionConfig
from cosettle_adapter.starter import CLIPS, FRAMES, known_correspondences, starter_clips
from cosettle_adapter.version import __version__
from cosettle_adapter.video import RenderedClip

_SIDE = 252  # pixels, rounded to whole patches; 18 x 18 patches of 14
_SELECTION_CLIPS = 12  # by which the layers are chosen
_BEST = 0.97  # of the best match rate: as good as the best
_GOOD = 2 / 3  # of the best match rate: read as well
_AVERAGING = 0.2  # ``averaging`` of the projection's config
_MIN_VARIANCE = 1e-8  # of tokens, relative to their mean square


def read_layers(backbone: Backbone, clips: Iterable[RenderedClip]) -> tuple[int, ...]:
    """Choose the layers to read by how well they match the first and last frames of clips."""
    layers = range(backbone.depth)
    rates = torch.zeros(backbone.depth, dtype=torch.float64)
    for clip in clips:
        maps = _encoded(clip.frames[[0, -1]], backbone, layers)
        for layer, tokens in zip(layers, maps, strict=True):
            rates[layer] += _match_rate(tokens, clip)
    # Of equally good layers the last one is the most semantic.
    best = int((rates >= _BEST * rates.max()).nonzero()[-1])
    step = max(1, round(backbone.depth / 6))
    near = [layer for layer in (best - step, best, best + step) if layer in layers]
    return tuple(layer for layer in near if rates[layer] >= _GOOD * rates[best])


def _match_rate(tokens: Tensor, clip: RenderedClip) -> float:
    """Share of patches of two frames ``(2, C, h, w)`` that match within one patch of the truth."""
    height, width = tokens.shape[-2:]
    centred = tokens.double() - reduce(tokens.double(), "t c h w -> 1 c 1 1", "mean")
    first, last = F.normalize(rearrange(centred, "t c h w -> t (h w) c"), dim=-1)
    here, there = known_correspondences(clip, len(clip.frames) - 1, (height, width))
    nearest = (first[here] @ last.T).argmax(1)
    rows = (nearest // width - there // width).abs()
    columns = (nearest % width - there % width).abs()
    return float((torch.maximum(rows, columns) <= 1).double().mean()) if len(here) else 0.0


@torch.no_grad()
def fit_starter(
    backbone: Backbone,
    *,
    start: TokenStatistics | None = None,
    on_clip: Callable[[TokenStatistics], None] | None = None,
) -> Projection:
    """Fit a projection on the starter corpus, deterministically.

    ``start`` are statistics of the first clips, from an interrupted fit; ``on_clip`` is called
    after each clip with the statistics so far.
    """
    row = backbone.row
    if backbone.dtype != torch.float32 or backbone.stride != backbone.patch:
        raise ValueError(
            f"expected {row.name} in torch.float32 at stride {backbone.patch} to fit a projection, "
            f"got {backbone.dtype} at stride {backbone.stride}: load it without dtype and stride"
        )
    size = (_side(backbone),) * 2
    layers = read_layers(backbone, itertools.islice(starter_clips(size), _SELECTION_CLIPS))
    widths = [backbone.widths[layer] for layer in layers]
    statistics = start
    if statistics is None or statistics.width != sum(widths):  # those of other layers
        statistics = TokenStatistics(sum(widths))
    for clip in starter_clips(size, skip=statistics.clips):
        _collect(statistics, clip, backbone, layers)
        if on_clip is not None:
            on_clip(statistics)
    variances = torch.split(statistics.covariance.diagonal(), widths)
    squares = torch.split(statistics.mean.square(), widths)
    for variance, square in zip(variances, squares, strict=True):
        if not float(variance.sum()) > _MIN_VARIANCE * float(square.sum()):
            raise StatisticsError(
                f"no projection can be fitted for {row.name}: its features are equal for all "
                "patches or not finite. Check that these are the right weights"
            )
    affine = solve_layers(statistics, widths, centre, out_width=max(widths))
    # The sign of an axis is arbitrary: its largest weight is made positive.
    largest = affine.weight.gather(1, affine.weight.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    config = ProjectionConfig(
        backbone=row.name,
        fingerprint=backbone.fingerprint,
        layers=layers,
        norm=False,
        in_width=sum(widths),
        out_width=max(widths),
        kind="affine",
        backbone_revision=backbone.revision,
        fit={
            "method": "fitted on first use: layers centred, each divided by its own deviation, "
            "concatenated, principal axes; then each patch averaged with its most similar "
            "neighbours",
            "data": "clips rendered from the package's own photographs (NOTICE)",
            "clips": CLIPS,
            "frames": CLIPS * FRAMES,
            "size": list(size),
            "cosettle_adapter": __version__,
        },
        licence=row.licence,
        recipe=RECIPE,
        averaging=_AVERAGING,
    )
    weight, bias = (sign * affine.weight).float(), (sign[:, 0] * affine.bias).float()
    with torch.device("meta"):  # draws no random numbers
        projection = Projection(config)
    projection.load_state_dict({"linears.0.weight": weight, "linears.0.bias": bias}, assign=True)
    return projection.requires_grad_(False).eval()


def _side(backbone: Backbone) -> int:
    """:data:`_SIDE` rounded to whole patches; the native size if the backbone accepts no other."""
    unit = backbone.patch if backbone.row.kind == "vit" else math.lcm(backbone.patch, 32)
    side = max(1, round(_SIDE / unit)) * unit
    try:
        backbone.patch_tokens(torch.zeros(1, 3, side, side, device=backbone.device), layer=0)
    except GeometryError:
        return backbone.row.image_size
    return side


def _encoded(frames: Tensor, backbone: Backbone, layers: Sequence[int]) -> list[Tensor]:
    mean, std = (
        rearrange(torch.tensor(values), "c -> c 1 1")
        for values in (backbone.row.mean, backbone.row.std)
    )
    images = ((frames / 255 - mean) / std).to(backbone.device)
    return [maps.cpu() for maps in backbone.intermediate_tokens(images, layers, norm=False)]


def _collect(
    statistics: TokenStatistics, clip: RenderedClip, backbone: Backbone, layers: Sequence[int]
) -> None:
    maps = torch.cat(_encoded(clip.frames, backbone, layers), dim=1)
    statistics.add_tokens(rearrange(maps, "t c h w -> (t h w) c"))
    statistics.end_clip()
