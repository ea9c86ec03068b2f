"""Train a small head on frozen features to segment an object in a video: a plain PyTorch loop.

Try: python examples/training_loop.py
     python examples/training_loop.py --labelled 1 --steps 400

The encoder is frozen, so each frame is encoded once and the loop runs on stored features, like
those that `cosettle-adapter extract` writes. The head is a 1x1 convolution, trained on the masks of
the first frames of a rendered clip and tested on the last ones, after camera and object have moved.
Encoders stay in eval mode even after `train()`, and their parameters are not optimised.

Expect little from the projection here: a trained head can learn an affine map itself, and late
layers are good at separating objects from the background. Without training, adapted features track
better than those of the last layer (`timm_style_features.py`, `track_points.py`); a single earlier
layer may track as well.
"""

from __future__ import annotations

import argparse

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.video import photographs, render_clip

SIZE = (224, 308)


def main() -> None:
    options = parse_options()
    frames, masks = moving_object(options.frames)
    adapter = CoSettleAdapter.from_pretrained(options.model, device=options.device)
    encoders = {
        "last layer, raw": CoSettleAdapter.raw(adapter.backbone),
        "its layer, raw": adapter.without_projection(),
        "adapted": adapter,
    }
    targets = mask_of_patches(masks, adapter.geometry(*SIZE).grid).to(options.device)
    print(f"{options.labelled} of {options.frames} frames are labelled; IoU of patches in percent:")
    print(f"{'features':20}{'labelled':>10}{'last third':>12}")
    for name, encoder in encoders.items():
        features = encode(encoder, frames)
        head = train(features[: options.labelled], targets[: options.labelled], options)
        predicted = predict(head, features)
        late = options.frames - options.frames // 3
        seen = iou(predicted[: options.labelled], targets[: options.labelled])
        print(f"{name:20}{seen:10.1f}{iou(predicted[late:], targets[late:]):12.1f}", flush=True)


def moving_object(count: int) -> tuple[Tensor, Tensor]:
    """Render a moving object and camera: frames (T, 3, H, W) uint8 and masks (T, H, W) bool."""
    photos = photographs()
    clip = render_clip(photos["coffee"], cutout=photos["chelsea"], frames=count, size=SIZE, seed=7)
    assert clip.object_mask is not None
    return clip.frames, clip.object_mask


def mask_of_patches(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the patches that the object covers at least half of: (T, h, w) bool."""
    share = reduce(masks.float(), "t (h y) (w x) -> t h w", "mean", h=grid[0], w=grid[1])
    return share >= 0.5


@torch.inference_mode()
def encode(encoder: CoSettleAdapter, frames: Tensor) -> Tensor:
    """Encode frames: (T, C, h, w) float32; stored ones are `read_features(path).features`."""
    return encoder(frames).float()


def train(features: Tensor, targets: Tensor, options: argparse.Namespace) -> nn.Module:
    """Train a 1x1 convolution on labelled frames, one frame per step."""
    torch.manual_seed(0)
    scale = features.std()  # makes one learning rate suit all features
    head = nn.Conv2d(features.shape[1], 1, kernel_size=1).to(features.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=options.lr, weight_decay=0.01)
    loader = DataLoader(TensorDataset(features, targets), batch_size=1, shuffle=True)
    step = 0
    while step < options.steps:
        for batch, target in loader:
            logits = rearrange(head(batch / scale), "b 1 h w -> b h w")
            loss = F.binary_cross_entropy_with_logits(logits, target.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    head.weight.data /= scale
    return head.eval()


@torch.inference_mode()
def predict(head: nn.Module, features: Tensor) -> Tensor:
    return rearrange(head(features), "t 1 h w -> t h w") > 0


def iou(predicted: Tensor, true: Tensor) -> float:
    return 100 * float((predicted & true).sum() / (predicted | true).sum().clamp(min=1))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dinov2-vits14-pypi", help="name, repository or folder")
    parser.add_argument("--frames", type=int, default=18, help="frames of the rendered clip")
    parser.add_argument("--labelled", type=int, default=2, help="number of training frames")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
