"""A projection for any backbone, fitted on the starter corpus, with the core dependencies only.

(The module is not called ``fit``, because ``cosettle_adapter.fit`` is the public function.)
"""

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

_SIDE = 252  # pixels, about; 18 x 18 patches of 14
_CLIPS_TO_CHOOSE_BY = 12
_EQUALLY = 0.97
_NEARLY = 2 / 3
_AVERAGING = 0.2  # share for the projection's config
_LEAST_VARIANCE = 1e-8  # of tokens, relative to their mean square


def read_layers(backbone: Backbone, clips: Iterable[RenderedClip]) -> tuple[int, ...]:
    """Choose the layers to read, without labels: by how well they match patches of known motion.

    Of the layers that match best, within 3 %, the latest is read, which is the most semantic; with
    it those a sixth of the depth before and after, if they match two thirds as well. Of each
    rendered clip, the first and the last frame are matched.
    """
    layers = range(backbone.depth)
    matched = torch.zeros(backbone.depth, dtype=torch.float64)
    for clip in clips:
        maps = _encoded(clip.frames[[0, -1]], backbone, layers)
        for layer, tokens in zip(layers, maps, strict=True):
            matched[layer] += _matched(tokens, clip)
    best = int((matched >= _EQUALLY * matched.max()).nonzero()[-1])
    step = max(1, round(backbone.depth / 6))
    near = [layer for layer in (best - step, best, best + step) if layer in layers]
    return tuple(layer for layer in near if matched[layer] >= _NEARLY * matched[best])


def _matched(tokens: Tensor, clip: RenderedClip) -> float:
    """Share of patches of two frames ``(2, C, h, w)`` matched to within one patch of the truth."""
    height, width = tokens.shape[-2:]
    centred = tokens.double() - reduce(tokens.double(), "t c h w -> 1 c 1 1", "mean")
    first, last = F.normalize(rearrange(centred, "t c h w -> t (h w) c"), dim=-1)
    here, there = known_correspondences(clip, len(clip.frames) - 1, (height, width))
    found = (first[here] @ last.T).argmax(1)
    rows = (found // width - there // width).abs()
    columns = (found % width - there % width).abs()
    return float((torch.maximum(rows, columns) <= 1).double().mean()) if len(here) else 0.0


@torch.no_grad()
def fit_starter(
    backbone: Backbone,
    *,
    start: TokenStatistics | None = None,
    on_clip: Callable[[TokenStatistics], None] | None = None,
) -> Projection:
    """Fit a projection on the starter corpus, deterministically.

    The layers of :func:`read_layers` are centred, each divided by its own deviation, concatenated
    and turned to their principal axes; each patch is then averaged with its neighbours.

    Args:
        backbone: in float32 at its native stride.
        start: statistics of the first clips, to resume from; the others are added to them.
        on_clip: called with those so far after each of :data:`~cosettle_adapter.starter.CLIPS`.

    Raises:
        ValueError: another dtype or stride.
        StatisticsError: features that are all equal, or not finite.
    """
    row = backbone.row
    if backbone.dtype != torch.float32 or backbone.stride != backbone.patch:
        raise ValueError(
            f"a projection is fitted in float32 at stride {backbone.patch}, got {row.name} in "
            f"{backbone.dtype} at stride {backbone.stride}: load it with these"
        )
    size = (_side(backbone),) * 2
    layers = read_layers(backbone, itertools.islice(starter_clips(size), _CLIPS_TO_CHOOSE_BY))
    widths = [backbone.widths[layer] for layer in layers]
    statistics = start
    if statistics is None or statistics.width != sum(widths):  # of other layers
        statistics = TokenStatistics(sum(widths))
    for clip in starter_clips(size, skip=statistics.clips):
        _collect(statistics, clip, backbone, layers)
        if on_clip is not None:
            on_clip(statistics)
    variances = torch.split(statistics.covariance.diagonal(), widths)
    squares = torch.split(statistics.mean.square(), widths)
    for spread, square in zip(variances, squares, strict=True):
        if not float(spread.sum()) > _LEAST_VARIANCE * float(square.sum()):
            raise StatisticsError(
                f"no projection can be fitted for {row.name}: its features are the same for all "
                "patches, or not finite. Are these the right weights?"
            )
    affine = solve_layers(statistics, widths, centre, out_width=max(widths))
    # Axes are known up to their sign: the largest weight is made positive.
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
    """About :data:`_SIDE` in whole patches; the backbone's own size if it takes no other."""
    unit = backbone.patch if backbone.row.kind == "vit" else math.lcm(backbone.patch, 32)
    side = max(1, round(_SIDE / unit)) * unit
    try:
        backbone.patch_tokens(torch.zeros(1, 3, side, side, device=backbone.device), layer=0)
    except GeometryError:
        return backbone.row.image_size
    return side


def _encoded(frames: Tensor, backbone: Backbone, layers: Sequence[int]) -> list[Tensor]:
    mean, std = (
        rearrange(torch.tensor(each), "c -> c 1 1")
        for each in (backbone.row.mean, backbone.row.std)
    )
    images = ((frames / 255 - mean) / std).to(backbone.device)
    return [maps.cpu() for maps in backbone.intermediate_tokens(images, layers, norm=False)]


def _collect(
    statistics: TokenStatistics, clip: RenderedClip, backbone: Backbone, layers: Sequence[int]
) -> None:
    maps = torch.cat(_encoded(clip.frames, backbone, layers), dim=1)
    statistics.add_tokens(rearrange(maps, "t c h w -> (t h w) c"))
    statistics.end_clip()
