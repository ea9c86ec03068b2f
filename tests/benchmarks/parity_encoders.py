"""Our rows beside the makers' own encoders with random weights: relative differences of tokens.

    python tests/benchmarks/parity_encoders.py FRANCA TIMETUNING NECO

The arguments are checkouts of valeoai/Franca, SMSD75/Timetuning and vpariza/NeCo. MoSiC saves
timm's own models.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from cosettle_adapter.backbones import load_backbone

Read = Callable[[Any, torch.Tensor], torch.Tensor]


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.ndim == 1 else 0.03
            parameter.copy_(torch.randn(parameter.shape) * scale)
    return model.eval()


def compare(name: str, model: Any, read: Read, state: dict[str, Any], *grids: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "weights.pth")
        backbone = load_backbone(name, weights=Path(folder) / "weights.pth")
    for h, w in grids:
        images = torch.randn(1, 3, h * backbone.patch, w * backbone.patch)
        with torch.no_grad():
            expected = read(model, images)[:, -h * w :].unflatten(1, (h, w)).movedim(-1, 1)
        difference = (backbone.patch_tokens(images) - expected).abs().max() / expected.abs().max()
        print(f"{name:16} {h} x {w}: {float(difference):.1e}")


def prefixed(prefix: str, model: Any) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def patch_tokens(model: Any, images: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = model.forward_features(images)["x_norm_patchtokens"]
    return tokens


def main(*checkouts: str) -> None:
    os.environ["XFORMERS_DISABLED"] = "1"
    sys.path[:0] = checkouts
    import dino_vision_transformer
    from franca.hub import backbones as franca
    from franca.models import build_model
    from src.models import vit, vit_v2

    for name, arch, side, build in (
        ("franca-vitb14", "vit_base", 518, franca.franca_vitb14),
        ("franca-vitl14", "vit_large", 224, franca.franca_vitl14),
    ):
        chunked, _ = build_model(franca.FrancaConfig(arch), only_teacher=True, img_size=side)
        state = {"teacher": prefixed("module.backbone.", randomised(chunked))}
        with tempfile.NamedTemporaryFile() as file:
            torch.save(state, file.name)
            model = build(local_state_dict=file.name).eval()
        compare(name, model, patch_tokens, state, (side // 14, side // 14), (5, 7))
    model = randomised(dino_vision_transformer.vit_small(patch_size=16))
    state = prefixed("feature_extractor.backbone.", model)
    compare(
        "timet-vits16", model, lambda m, x: m.get_intermediate_layers(x)[0], state, (14, 14), (5, 9)
    )
    for name, registers in (("neco-vits14", 0), ("neco-vits14-reg", 4)):
        model = randomised(vit_v2.vit_small(patch_size=14, num_register_tokens=registers))
        compare(name, model, patch_tokens, model.state_dict(), (37, 37), (5, 7))
    model = randomised(vit.vit_small(patch_size=16))
    state = model.state_dict()
    compare("neco-vits16", model, lambda m, x: m.forward_backbone(x), state, (14, 14), (5, 6))
    for name, architecture in (
        ("mosic-vits16", "vit_small_patch16_224"),
        ("mosic-vits14", "vit_small_patch14_dinov2"),
        ("mosic-vits14-reg", "vit_small_patch14_reg4_dinov2"),
    ):
        model = randomised(timm.create_model(architecture, img_size=224))
        state = prefixed("module.model.", model)
        side = 224 // model.patch_embed.patch_size[0]
        compare(name, model, lambda m, x: m.forward_features(x), state, (side, side))


if __name__ == "__main__":
    main(*sys.argv[1:])
