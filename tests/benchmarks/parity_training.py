"""Training beside the official code, on the same weights, frames and crops of positions.

    python tests/benchmarks/parity_training.py CO_SETTLE

CO_SETTLE is a checkout of yafeng19/Co-Settle. Weights are random. Prints the sizes of 20,000 crops
and the total loss of a batch of two clips.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cosettle_adapter import Projection
from cosettle_adapter.backbones import build_backbone, lookup
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.training.data import draw_crop
from cosettle_adapter.training.encoding import draw_offsets, encode
from cosettle_adapter.training.losses import objective
from cosettle_adapter.training.settings import TrainSettings

SEEDS = torch.arange(2)
HEAD = ("linear.weight", "linear.bias", "layer_norm1.weight", "layer_norm1.bias")
MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


def crops() -> None:
    official = importlib.import_module("util.video.image_utils")
    peer = official.SingleRRC((224, 224), (0.5, 1), (3 / 4, 4 / 3))
    image, generator = torch.zeros(3, 224, 224), torch.Generator().manual_seed(0)
    for name, draw in {
        "official": lambda: peer.get_params(image, peer.scale, peer.ratio),
        "ours": lambda: draw_crop(224, 224, generator=generator)[:4],
    }.items():
        sides = torch.tensor([draw()[2:] for _ in range(20_000)])
        whole = (sides == 224).any(dim=1).float().mean()
        print(f"crops, {name}: mean side {sides.float().mean():.1f} px, whole side {whole:.1%}")


def official_loss(model: Any, frames: Tensor, settings: TrainSettings) -> float:
    offset = draw_offsets(settings, step=0, sample_seeds=SEEDS)[0]
    corner = list((offset * 141).long())  # of 14 patches among 154
    frames = (frames - MEAN) / STD
    pairs = [frames[:, [0, 0]], frames[:, [1, 1]]]  # it reads the second of each
    with torch.no_grad(), mock.patch.object(torch, "randint", side_effect=corner):
        return float(model.forward_adapter(pairs, True, 0.03, 10.0, 3.0)[0])


def own_loss(name: str, model: Any, frames: Tensor, settings: TrainSettings) -> float:
    row, state = lookup(name), model.state_dict()
    tensors = to_timm({k: v for k, v in state.items() if "adapter" not in k}, row)
    backbone = build_backbone(row, tensors, fingerprint="sha256:0")
    head = Projection(settings.head_config(backbone))
    values = (state[f"adapter.adapter.adapter_{part}"] for part in HEAD)
    head.load_state_dict(dict(zip(head.state_dict(), values, strict=True)))
    with torch.no_grad():
        tokens = encode(backbone, settings, frames, SEEDS, step=0)
        return float(objective(head.project, tokens, (14, 14), settings).total)


def main(peer: str) -> None:
    sys.path.insert(0, str(Path(peer).resolve()))
    crops()
    frames = torch.rand(2, 2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ijepa = importlib.import_module("models.ijepa.deit").deit_base
    mae = importlib.import_module("models.mae.models_mae").mae_vit_base_patch16
    for name, make, given, changes in (
        ("ijepa-vitb16", ijepa, {}, {}),
        ("ijepa-vitb16", ijepa, {}, {"norm": False}),
        ("mae-vitb16", mae, {"reg_loss": "kl"}, {}),
        ("mae-vitb16", mae, {"reg_loss": "mse"}, {"reg_loss": "mse"}),
    ):
        torch.manual_seed(0)
        model, settings = make(**given).eval(), TrainSettings(pea="batch", **changes)  # type: ignore[arg-type]
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        theirs, ours = (
            official_loss(model, frames, settings), own_loss(name, model, frames, settings)
        )  # fmt: skip
        print(f"loss, {name} {changes or ''}: official {theirs:.5f}, ours {ours:.5f}")


if __name__ == "__main__":
    main(sys.argv[1])
