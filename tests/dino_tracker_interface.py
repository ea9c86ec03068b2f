"""A checkout and a clip as DINO-Tracker has them, and what it does with features.

Written from its documented interface, for tests; nothing here is its code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import BackboneRow, build_backbone
from cosettle_adapter.backbones.weights import fingerprint

from helpers import tiny_state

PREPROCESSING = """\
# --- OF trajectories config ---
video_resh: 476
video_resw: 854
min_trajectory_length: 2
threshold: 1.5
filter_using_direct_flow: true
direct_flow_threshold: 2.5

dino_layer: 15\x20
dino_stride: 7
mask_dino_stride: 7
fg_mask_threshold: 0.6
dino_bb_iou_threshold: 0.2 # for NMS
"""
TRAIN = """\
video_resw: 854
video_resh: 476
lambda_angle: 0.0001
###### DINO backbone ######
stride: 7
dino_patch_size: 14
"""
SCRIPTS = (
    "train.py",
    "inference_grid.py",
    "preprocessing/extract_trajectories.py",
    "preprocessing_dino_bb/main_dino_bb_preprocessing.py",
)


def make_checkout(folder: Path) -> Path:
    """The files by which a checkout is known."""
    for name in SCRIPTS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("raise SystemExit('for the tests of another package')\n")
    (folder / "config").mkdir()
    (folder / "config" / "preprocessing.yaml").write_text(PREPROCESSING)
    (folder / "config" / "train.yaml").write_text(TRAIN)
    return folder


def make_clip(folder: Path, frames: list[Tensor], *, masks: bool = True) -> Path:
    """``(3, H, W)`` uint8 frames, and masks, as PNG files."""
    for name, wanted in (("video", True), ("masks", masks)):
        if wanted:
            (folder / name).mkdir(parents=True)
            for index, frame in enumerate(frames):
                pixels = frame if name == "video" else 255 * (frame > 128).to(torch.uint8)
                image = Image.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().numpy())
                image.save(folder / name / f"{index:05d}.png", compress_level=1)
    return folder


def flat(grey: int = 110, height: int = 476, width: int = 854) -> Tensor:
    """A frame of one colour."""
    return torch.full((3, height, width), grey, dtype=torch.uint8)


def with_dot(x: int, y: int, side: int = 14) -> Tensor:
    """A flat frame with a square whose centre is at pixel (x, y)."""
    frame = flat()
    frame[:, y - side // 2 : y + side // 2, x - side // 2 : x + side // 2] = 250
    return frame


def small_adapter(patch: int, stride: int | None = None, width: int = 48) -> CoSettleAdapter:
    """A random transformer of two blocks."""
    row = BackboneRow(
        name=f"small-vit{patch}",
        family="random",
        architecture="vit_tiny_patch16_224",
        patch=patch,
        width=width,
        depth=2,
        image_size=16 * patch,
        licence="Apache-2.0",
        options={
            "patch_size": patch,
            "img_size": 16 * patch,
            "embed_dim": width,
            "depth": 2,
            "num_heads": 1,
        },
    )
    state = tiny_state(row)
    backbone = build_backbone(
        row, state, fingerprint=fingerprint(state), origin="random", stride=stride
    )
    # before the final norm: lengths that tell something
    return CoSettleAdapter.raw(backbone, norm=False)


def coordinates(stride: int) -> Tensor:
    """Pixels (x, y) of cells as its best buddies have them, ``(h * w, 2)``, row by row."""
    x = torch.arange(7, 854, stride).float()
    y = torch.arange(7, 476, stride).float()
    yy, xx = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((xx.flatten(), yy.flatten()), dim=-1)


def best_buddies(features: Tensor, source: int, target: int, stride: int) -> tuple[Tensor, Tensor]:
    """Mutual nearest neighbours of two frames by cosine, as pixels (x, y)."""
    cells = F.normalize(rearrange(features, "t c h w -> t (h w) c"), dim=-1)
    affinity = cells[source] @ cells[target].T
    forward, backward = affinity.argmax(dim=1), affinity.argmax(dim=0)
    mutual = torch.arange(len(affinity)) == backward[forward]
    return coordinates(stride)[mutual], coordinates(stride)[forward[mutual]]


def refined(features: Tensor, stride: int) -> Tensor:
    """Features and a residual of 1024 channels that a network read at the cells' centres."""
    network = torch.zeros(len(features), 1024, 60, 107)
    points = coordinates(stride).to(features.dtype) / torch.tensor([854.0, 476.0]) * 2 - 1
    points = rearrange(points, "(h w) xy -> 1 h w xy", w=features.shape[-1])
    grid = points.expand(len(features), -1, -1, -1)
    return features + F.grid_sample(network, grid, align_corners=True)
