"""Ways to encode a video faster: speed against label propagation and drift.

    python tests/benchmarks/faster.py --data DAVIS MORE [--frames 24] [--only every ...]

Each way is compared with the eager float32 encoder on every frame:

- `compiled`, `bfloat16`, `channels last`, `int8`, `ONNX Runtime`: other ways to run the encoder.
- `every n, layer s`: the encoder runs on every n-th frame. Between those, only its layers up to s
  run, and every patch takes the features of the patches of the last whole frame that are most
  similar in layer s.
- `gate r`: the share r of tokens whose patch changed most since it was last computed runs through
  the encoder; keys, values and results of the others are kept (after Eventful Transformers, Dutson,
  Li & Gupta, ICCV 2023, with one gate at the input).

Every folder of DAVIS is a part. Speeds are ratios of frames/s on the first clip, interleaved.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import Figure, figure, interleaved, ratios
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.evaluation import davis_clips, evaluate_sequence
from cosettle_adapter.evaluation.drift import GAPS, drift_by_gap, mutual_correspondences
from cosettle_adapter.evaluation.run import mean
from cosettle_adapter.evaluation.tables import paired_interval
from cosettle_adapter.video import FrameSelection

MODEL, SIZE, GUIDE = "dinov2-vits14-pypi", (280, 490), 8
WHOLE = "eager"
MATCHES, TEMPERATURE = 5, 0.1


def frame_by_frame(mode: str, adapter: CoSettleAdapter, images: Tensor) -> Tensor:
    run = _encoder(mode)
    return torch.cat([run(image).float() for image in images.split(1)])


@functools.cache
def _encoder(mode: str) -> Callable[[Tensor], Tensor]:
    dtype = torch.bfloat16 if "bfloat16" in mode else torch.float32
    adapter = CoSettleAdapter.from_pretrained(MODEL, dtype=dtype)
    if mode == "ONNX Runtime":
        return _onnx(adapter)
    if mode == "channels last":
        adapter.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    elif "torchao" in mode:
        from torchao import quantization

        weights = quantization.Int8DynamicActivationInt8WeightConfig()
        quantization.quantize_(adapter.backbone, weights)
    elif mode == "int8, FBGEMM":
        torch.ao.quantization.quantize_dynamic(adapter.backbone, {nn.Linear}, inplace=True)
    encode = functools.partial(_encoded, adapter)
    return torch.compile(encode, dynamic=False) if "compiled" in mode else encode


def _encoded(adapter: CoSettleAdapter, images: Tensor) -> Tensor:
    return adapter._encode_images(images)[1]


def _onnx(adapter: CoSettleAdapter) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    from cosettle_adapter.export import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.onnx"
        to_onnx(adapter, path, size=SIZE, preprocessing=False)
        session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def carried(adapter: CoSettleAdapter, images: Tensor, *, every: int, layer: int) -> Tensor:
    layers = [layer, *adapter.config.layers]
    features: list[Tensor] = []
    key_guide = key_features = images
    for t, image in enumerate(images.split(1)):
        if t % every == 0:
            shallow, *read = adapter.backbone.intermediate_tokens(image, layers, norm=False)
            key_guide = _patches(shallow)
            key_features = adapter.projection(torch.cat(read, dim=1))
            features.append(key_features)
            continue
        (shallow,) = adapter.backbone.intermediate_tokens(image, (layer,), norm=False)
        cosine, index = (_patches(shallow) @ key_guide.T).topk(MATCHES, dim=1)
        weights = (cosine / TEMPERATURE).softmax(1)
        patches = rearrange(key_features[0], "c h w -> (h w) c")[index]
        mixed = (rearrange(weights, "n k -> n k 1") * patches).sum(1)
        features.append(rearrange(mixed, "(h w) c -> 1 c h w", h=shallow.shape[-2]))
    return torch.cat(features)


def _patches(tokens: Tensor) -> Tensor:
    """Unit patches `(h w, C)` minus their mean."""
    flat = rearrange(tokens[0], "c h w -> (h w) c")
    return F.normalize(flat - flat.mean(0), dim=1)


def gated(adapter: CoSettleAdapter, images: Tensor, *, share: float) -> Tensor:
    vit: Any = adapter.backbone.vit
    deepest = max(adapter.config.layers)
    grid = adapter.backbone.grid(*images.shape[-2:])
    given = keys = values = outputs = None
    features = []
    for image in images.split(1):
        tokens = vit._pos_embed(vit.patch_embed(image))
        if given is None:
            given = tokens.clone()
            chosen = torch.arange(tokens.shape[1])
            shape = (deepest + 1, 1, vit.blocks[0].attn.num_heads, tokens.shape[1], -1)
            keys = tokens.new_zeros(*shape[:-1], vit.blocks[0].attn.head_dim)
            values = torch.zeros_like(keys)
            outputs = tokens.new_zeros(deepest + 1, *tokens.shape)
        else:
            change = (tokens - given)[0].square().sum(1)
            change[0] = torch.inf  # the class token
            chosen = change.topk(max(1, round(share * len(change)))).indices
            given[:, chosen] = tokens[:, chosen]
        current = tokens[:, chosen]
        for number, block in enumerate(vit.blocks[: deepest + 1]):
            qkv = block.attn.qkv(block.norm1(current))
            query, key, value = rearrange(
                qkv, "b n (three heads d) -> three b heads n d",
                three=3, heads=block.attn.num_heads,
            )  # fmt: skip
            keys[number][:, :, chosen], values[number][:, :, chosen] = key, value
            attended = F.scaled_dot_product_attention(query, keys[number], values[number])
            attended = block.attn.proj(rearrange(attended, "b heads n d -> b n (heads d)"))
            current = current + block.ls1(attended)
            current = current + block.ls2(block.mlp(block.norm2(current)))
            outputs[number][:, chosen] = current
        prefix = vit.num_prefix_tokens
        read = [
            rearrange(outputs[layer][:, prefix:], "b (h w) c -> b c h w", h=grid[0])
            for layer in adapter.config.layers
        ]
        features.append(adapter.projection(torch.cat(read, dim=1)))
    return torch.cat(features)


MODES = (
    WHOLE, "compiled float32", "channels last", "bfloat16", "compiled bfloat16", "int8, FBGEMM",
    "compiled int8, torchao", "ONNX Runtime",
)  # fmt: skip


def ways() -> dict[str, Callable[[CoSettleAdapter, Tensor], Tensor]]:
    modes = {mode: functools.partial(frame_by_frame, mode) for mode in MODES}
    every = {
        f"every {n}, layer {layer}": functools.partial(carried, every=n, layer=layer)
        for n in (2, 3, 4, 8)
        for layer in (0, 1, 2, 3)
    }
    gates = {f"gate {share:g}": functools.partial(gated, share=share) for share in (0.5, 0.3, 0.15)}
    return {**modes, **every, **gates}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, type=Path)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names")
    options = parser.parse_args()
    adapter = CoSettleAdapter.from_pretrained(MODEL)
    chosen = {n: way for n, way in ways().items() if n == WHOLE or n.startswith((*options.only,))}
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in chosen}
    drifts: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    speeds: dict[str, Figure] = {}
    for root in options.data:
        for clip in davis_clips(root, select=FrameSelection(max_frames=options.frames)):
            shown = torch.stack(
                [
                    rearrange(torch.from_numpy(clip.read_frame(i)), "h w c -> c h w")
                    for i in range(len(clip))
                ]
            )
            images = adapter.preprocess(shown, size=SIZE)
            if not speeds:
                sides = {
                    n: functools.partial(way, adapter, images[:9]) for n, way in chosen.items()
                }
                times = interleaved(sides, rounds=options.rounds)
                for name in chosen:
                    speeds[name] = figure(name, ratios(times[WHOLE], times[name]))
            guide = adapter.backbone.patch_tokens(images, layer=GUIDE)
            matches = {gap: mutual_correspondences(guide, gap) for gap in GAPS}
            masks = clip.read_annotations()
            for name, way in chosen.items():
                features = way(adapter, images)
                score = 100 * evaluate_sequence(features, masks).j_and_f
                scores[name].setdefault(root.name, []).append(score)
                drifts[name].append(drift_by_gap(features, matches))
    _print(scores, drifts, speeds)


def _print(
    scores: dict[str, dict[str, list[float]]],
    drifts: dict[str, list[dict[str, float]]],
    speeds: dict[str, Figure],
) -> None:
    parts = list(scores[WHOLE])
    print("| way | speed |", " | ".join(f"J&F, {p} | against eager" for p in parts), "| drift, % |")
    print("|---" * (3 + 2 * len(parts)) + "|")
    for name, by_part in scores.items():
        cells = []
        for part in parts:
            gains = [a - b for a, b in zip(by_part[part], scores[WHOLE][part], strict=True)]
            low, high = paired_interval(gains)
            cells += [f"{mean(by_part[part]):.1f}", f"{mean(gains):+.1f} [{low:+.1f}, {high:+.1f}]"]
        drift = " / ".join(
            f"{100 * mean(row.get(f'drift@{gap}', math.nan) for row in drifts[name]):.1f}"
            for gap in GAPS
        )
        speed = speeds[name]
        spread = f"{speed.median:.2f} x ({speed.low:.2f} to {speed.high:.2f})"
        print(f"| {name} | {spread} |", " | ".join(cells), f"| {drift} |", flush=True)


if __name__ == "__main__":
    main()
