"""Use an adapter like `timm.create_model(..., features_only=True)`: a list of feature maps.

Try: python examples/timm_style_features.py
     python examples/timm_style_features.py --blocks 2 5 8 11 --size 280 392

Detection and segmentation code for timm backbones calls `backbone(images)` for a list of maps and
reads their channels and reductions from `backbone.feature_info`; `AdaptedFeatures` has both. The
last map is the adapted one, the others are layers of the frozen encoder from the same pass. All
maps of a ViT have the same reduction, its patch size. Images must be normalised, as by timm's
transforms. As a comparison, the script tracks points of a rendered clip with each map.
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
    """Feature maps of frozen layers and the adapted map, like timm's feature backbones.

    Args:
        adapter: backbone and projection.
        blocks: layers, ascending, whose maps to return before the adapted one.
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
        """Encode normalised images ``(B, 3, H, W)`` of whole patches: maps ``(B, C, h, w)``."""
        config = self.adapter.config
        layers = (*self.blocks, *config.layers)
        # The projection's config decides the norm of its layers; the other layers have none.
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
    images = adapter.preprocess(clip.frames)  # normalises like timm.data.create_transform
    with torch.inference_mode():
        maps = [torch.cat(batches) for batches in zip(*map(backbone, images.split(4)), strict=True)]
    info = backbone.feature_info
    print(f"{'map':12}{'channels':>9}{'reduction':>11}  {'shape':24}tracking error")
    for name, channels, reduction, features in zip(
        info.module_name(), info.channels(), info.reduction(), maps, strict=True
    ):
        error = error_of(adapter, features, clip)
        print(f"{name:12}{channels:9}{reduction:11}  {tuple(features.shape)!s:24}{error:.1f} px")


def error_of(adapter: CoSettleAdapter, features: Tensor, clip: RenderedClip) -> float:
    """Return the mean distance in pixels between tracked and true points."""
    geometry = adapter.geometry(*clip.frames.shape[-2:])
    points = rearrange(geometry.cell_centers()[1::2, 1::2], "h w xy -> (h w) xy")
    return tracking_error(features.float(), geometry, points, *clip.track(points))["mean"]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dinov2-vits14-pypi", help="name, repository or folder")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 5, 11], help="0-based layers")
    parser.add_argument("--frames", type=int, default=12, help="frames of the rendered clip")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 308), metavar=("H", "W"))
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
