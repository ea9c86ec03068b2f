"""Export an adapter to ONNX and run it in ONNX Runtime with NumPy only.

Try: python examples/onnx_runtime.py
     python examples/onnx_runtime.py --size 280 490 -o model.onnx

Needs `pip install "cosettle-adapter[export]" onnxruntime` (or onnxruntime-gpu). The model takes any
number of uint8 frames of one size and normalises them itself. Another program needs only
`features_of` to run it, neither this package nor PyTorch. Features have unit length here, so the
product of two is their cosine.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.export import to_onnx
from cosettle_adapter.video import photographs, render_clip


def features_of(session: Any, frames: np.ndarray, batch_size: int = 4) -> np.ndarray:
    """Run frames ``(T, 3, H, W)`` uint8 through a session: ``(T, C, h, w)`` float32."""
    batches = np.array_split(frames, range(batch_size, len(frames), batch_size))
    return np.concatenate([session.run(["features"], {"frames": batch})[0] for batch in batches])


def main() -> None:
    options = parse_options()
    import onnxruntime

    adapter = CoSettleAdapter.from_pretrained(options.model)
    exported = to_onnx(adapter, options.output, tuple(options.size), normalize=True)
    print(f"{exported.path}: {exported.input} -> {exported.output}")
    print(f"checked against PyTorch: {exported.parity}")

    session = onnxruntime.InferenceSession(options.output, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    patch, (rows, columns) = metadata["patch"], json.loads(metadata["grid"])
    print(f"backbone {metadata['backbone']}: {rows} x {columns} patches of {patch} pixels\n")

    photos = photographs()
    clip = render_clip(
        photos["coffee"],
        cutout=photos["chelsea"],
        frames=options.frames,
        size=tuple(options.size),
        seed=7,
    )
    frames = clip.frames.numpy()
    features_of(session, frames[:1])  # warm up before timing
    start = time.perf_counter()
    features = features_of(session, frames)
    onnx_seconds = time.perf_counter() - start
    start = time.perf_counter()
    with torch.inference_mode():
        expected = adapter(clip.frames, batch_size=4, normalize=True).numpy()
    torch_seconds = time.perf_counter() - start
    times = [f"{1000 * seconds / len(frames):.0f}" for seconds in (onnx_seconds, torch_seconds)]
    print(f"ONNX Runtime {times[0]} ms per frame, PyTorch {times[1]} ms")
    largest = np.abs(features - expected).max()
    print(f"largest difference of {features.size:,} numbers: {largest:.1e}")

    assert clip.object_mask is not None
    y, x = clip.object_mask[0].float().nonzero().double().mean(0).tolist()
    side = int(patch)
    query = features[0, :, int(y) // side, int(x) // side]
    similarity = np.einsum("c,tchw->thw", query, features)
    hits = 0
    for mask, scores in zip(clip.object_mask, similarity, strict=True):
        row, column = np.unravel_index(scores.argmax(), scores.shape)
        hits += bool(mask[int((row + 0.5) * side), int((column + 0.5) * side)])
    print(
        f"the best match of the central patch lies on the object in {hits} of {len(frames)} frames"
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dinov2-vits14-pypi", help="name, repository or folder")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 308), metavar=("H", "W"))
    parser.add_argument("--frames", type=int, default=16, help="frames of the rendered clip")
    parser.add_argument("-o", "--output", type=Path, default=Path("adapted.onnx"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
