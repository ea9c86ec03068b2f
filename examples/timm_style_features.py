"""An adapter in place of `timm.create_model(..., features_only=True)`: a list of feature maps.

Try: python examples/timm_style_features.py
     python examples/timm_style_features.py --blocks 2 5 8 11 --size 280 392

Detection and segmentation code that takes timm backbones calls `backbone(images)` for a list of
maps and asks `backbone.feature_info` for their channels and reductions; `AdaptedFeatures` has both.
The last map is the adapted one, the others are blocks of the frozen encoder from the same pass. All
of a ViT's maps have one reduction, its patch. Images come normalised, as timm's transforms make
them. To show what the maps are good for, points of a rendered clip are tracked by each.
"""

from __future__ import annotations

import argparse

import torch
from einops import rearrange
from timm.models import FeatureInfo
from torch import Tensor, nn

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.evaluation.drift import tracking_error
from cosettle_adapter.video import RenderedClip, photographs, render_clip


class AdaptedFeatures(nn.Module):
    """Maps of several frozen blocks and the adapted one, as timm's feature backbones return them.

    Args:
        adapter: backbone and projection.
        blocks: whose tokens to return as well, ascending, before the adapted map.
    """

    def __init__(self, adapter: CoSettleAdapter, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.adapter = adapter
        self.blocks = tuple(adapter.backbone.block(block) for block in blocks)
        maps = [(adapter.backbone.widths[block], f"blocks.{block}") for block in self.blocks]
        maps.append((adapter.width, "projection"))
        self.feature_info = FeatureInfo(
            [
                {"num_chs": width, "reduction": adapter.backbone.stride, "module": module}
                for width, module in maps
            ],
            out_indices=tuple(range(len(maps))),
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images ``(B, 3, H, W)``, whole patches, to maps ``(B, C, h, w)``."""
        config = self.adapter.config
        layers = (*self.blocks, *config.layers)
        # The projection says with what norm its blocks are read; the others come without.
        norms = [False] * len(self.blocks) + [config.norm] * len(config.layers)
        maps = self.adapter.backbone.intermediate_tokens(images, layers, norm=norms)
        read = torch.cat(maps[len(self.blocks) :], dim=1)
        return [*maps[: len(self.blocks)], self.adapter.projection(read)]


def main() -> None:
    options = parse_options()
    adapter = CoSettleAdapter.from_pretrained(options.model, device=options.device)
    backbone = AdaptedFeatures(adapter, tuple(options.blocks))
    photos = photographs()
    clip = render_clip(
        photos["coffee"],
        cutout=photos["chelsea"],
        frames=options.frames,
        size=tuple(options.size),
        seed=7,
    )
    images = adapter.preprocess(clip.frames)  # what timm.data.create_transform would make
    with torch.inference_mode():
        maps = [torch.cat(batches) for batches in zip(*map(backbone, images.split(4)), strict=True)]
    info = backbone.feature_info
    print(f"{'map':12}{'channels':>9}{'reduction':>11}  {'shape':24}tracking error")
    for name, channels, reduction, cells in zip(
        info.module_name(), info.channels(), info.reduction(), maps, strict=True
    ):
        error = error_of(adapter, cells, clip)
        print(f"{name:12}{channels:9}{reduction:11}  {tuple(cells.shape)!s:24}{error:.1f} px")


def error_of(adapter: CoSettleAdapter, cells: Tensor, clip: RenderedClip) -> float:
    """Mean distance in pixels between where points are and where the features find them."""
    geometry = adapter.geometry(*clip.frames.shape[-2:])
    points = rearrange(geometry.cell_centers()[1::2, 1::2], "h w xy -> (h w) xy")
    return tracking_error(cells.float(), geometry, points, *clip.track(points))["mean"]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dinov2-vits14-pypi", help="name, repository or folder")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 5, 11])
    parser.add_argument("--frames", type=int, default=12, help="of the rendered clip")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 308), metavar=("H", "W"))
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
