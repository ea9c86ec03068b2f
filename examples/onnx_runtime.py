"""Export an adapter to ONNX, then run it under ONNX Runtime with nothing but NumPy.

Try: python examples/onnx_runtime.py
     python examples/onnx_runtime.py --size 280 490 -o model.onnx

Needs `pip install "cosettle-adapter[export]" onnxruntime` (or onnxruntime-gpu). The model takes
uint8 frames of one size, any number at a time, and normalises them itself; `features_of` is all
that another program needs to run it, neither this package nor PyTorch. Features are of unit length
here, so that a product of two is their cosine.
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
    print(f"checked on the way: {exported.parity}")

    session = onnxruntime.InferenceSession(options.output, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    patch, (rows, columns) = metadata["patch"], json.loads(metadata["grid"])
    print(f"made of {metadata['backbone']}: {rows} x {columns} patches of {patch} pixels\n")

    photos = photographs()
    clip = render_clip(
        photos["coffee"],
        cutout=photos["chelsea"],
        frames=options.frames,
        size=tuple(options.size),
        seed=7,
    )
    frames = clip.frames.numpy()
    features_of(session, frames[:1])  # both are warm before the clock starts
    began = time.perf_counter()
    features = features_of(session, frames)
    by_onnx = time.perf_counter() - began
    began = time.perf_counter()
    with torch.inference_mode():
        expected = adapter(clip.frames, batch_size=4, normalize=True).numpy()
    by_torch = time.perf_counter() - began
    per_frame = 1000 / len(frames)
    print(f"ONNX Runtime {by_onnx * per_frame:.0f} ms a frame, PyTorch {by_torch * per_frame:.0f}")
    largest = np.abs(features - expected).max()
    print(f"largest difference of {features.size:,} numbers: {largest:.1e}")

    assert clip.object_mask is not None
    y, x = clip.object_mask[0].float().nonzero().double().mean(0).tolist()
    side = int(patch)
    query = features[0, :, int(y) // side, int(x) // side]
    similarity = np.einsum("c,tchw->thw", query, features)
    hits = 0
    for index, one in enumerate(similarity):
        row, column = np.unravel_index(one.argmax(), one.shape)
        centre = [int((cell + 0.5) * side) for cell in (row, column)]
        hits += bool(clip.object_mask[index, centre[0], centre[1]])
    print(
        f"the object's middle patch is most like a patch on the object in {hits} of {len(frames)}"
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dinov2-vits14-pypi", help="name, repository or folder")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 308), metavar=("H", "W"))
    parser.add_argument("--frames", type=int, default=16, help="of the rendered clip")
    parser.add_argument("-o", "--output", type=Path, default=Path("adapted.onnx"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
