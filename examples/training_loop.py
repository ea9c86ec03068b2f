"""A plain PyTorch training loop: a small head on frozen features finds an object in a video.

Try: python examples/training_loop.py
     python examples/training_loop.py --labelled 1 --steps 400

The encoder is frozen, so each frame is encoded once and the loop runs on stored features, as it
would on those that `cosettle-adapter extract` writes. The head is one 1x1 convolution; it sees the
mask of the first frames of a rendered clip and is asked about the last ones, where camera and
object have moved on. Encoders stay in eval mode and out of the optimizer whatever `train()` says.

Expect little of the projection here: a head that is trained can learn an affine map by itself, and
telling an object from the ground is what late layers are good at. Where nothing is trained, adapted
features track better than the last layer's (`timm_style_features.py`, `track_points.py`); some
earlier layer may do as well by itself.
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
    """Frames (T, 3, H, W) uint8 of a camera and an object that both move, and masks (T, H, W)."""
    photos = photographs()
    clip = render_clip(photos["coffee"], cutout=photos["chelsea"], frames=count, size=SIZE, seed=7)
    assert clip.object_mask is not None
    return clip.frames, clip.object_mask


def mask_of_patches(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """(T, h, w) bool: the patches that the object covers by half or more."""
    share = reduce(masks.float(), "t (h y) (w x) -> t h w", "mean", h=grid[0], w=grid[1])
    return share >= 0.5


@torch.inference_mode()
def encode(encoder: CoSettleAdapter, frames: Tensor) -> Tensor:
    """(T, C, h, w) float32; from a file it would be `read_features(path).features`."""
    return encoder(frames).float()


def train(features: Tensor, targets: Tensor, options: argparse.Namespace) -> nn.Module:
    """Fit a 1x1 convolution on labelled frames, one frame a step."""
    torch.manual_seed(0)
    scale = features.std()  # so that one learning rate suits all features
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
    parser.add_argument("--frames", type=int, default=18, help="of the rendered clip")
    parser.add_argument("--labelled", type=int, default=2, help="frames the head is trained on")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
