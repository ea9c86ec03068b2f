"""What a second buys: J&F and drift against frames/s, over frame sizes, strides, layers and fusion.

    python tests/benchmarks/trade.py --data DAVIS@3 MORE -o trade.json [--plot trade.png]

Every folder is a part in DAVIS's layout (`@3`: every third frame), `--frames` of each clip.
Frames/s are of one frame at a time on this machine; all settings are interleaved, so that other
load falls on all of them. Results that are in the JSON are not computed again.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from bench import clip, interleaved

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.correspondence import TemporalFusion
from cosettle_adapter.evaluation import davis_protocol, evaluate
from cosettle_adapter.evaluation.run import mean
from cosettle_adapter.evaluation.tables import paired_interval
from cosettle_adapter.evaluation.variants import ADAPTED, feature_variants
from cosettle_adapter.video import FrameSelection

MODEL, FUSED = "dinov2-vits14-pypi", f"{ADAPTED}, fused"
# (stride, height, width); 9:16 rounded to whole patches
SETTINGS = (
    (14, 196, 350), (14, 280, 490), (14, 392, 700), (14, 518, 924), (14, 700, 1246),
    (7, 196, 350), (7, 280, 490),
)  # fmt: skip
START = SETTINGS[1]  # that others are compared with
LAYERS = (5, 7, 9)  # alone, centred by the clip's mean


def quality(
    adapter: CoSettleAdapter, size: tuple[int, int], data: list[str], frames: int
) -> dict[str, Any]:
    """J&F of every clip, and drift at 1, 4 and 8 frames, by variant of features."""
    variants = [
        variant
        for variant in feature_variants(adapter, baseline_layers=LAYERS, fusion="symmetric")
        if variant.name in _names()
    ]
    roots = [Path(root.partition("@")[0]) for root in data]
    select = [
        FrameSelection(every=int(root.partition("@")[2] or 1), max_frames=frames) for root in data
    ]
    result = evaluate(davis_protocol(*roots, select=select), adapter, variants, size=size)
    return {
        variant.name: {
            "J&F": {clip: 100 * value for clip, value in result.first(variant.name).items()},
            "drift": [100 * result.total[variant.name][f"drift@{gap}"] for gap in (1, 4, 8)],
        }
        for variant in variants
    }


def _names() -> tuple[str, ...]:
    return (ADAPTED, FUSED, *(f"centred layer {layer}" for layer in LAYERS))


def speeds(data: dict[str, Any], rounds: int) -> None:
    """Fill in quartiles of the frames/s of all settings, interleaved in one run."""
    sides: dict[str, Any] = {}
    for stride, *size in SETTINGS:
        adapter = CoSettleAdapter.from_pretrained(MODEL, stride=stride)
        frame = clip(1, (size[0], size[1]))
        images = adapter.preprocess(frame)
        fusion = TemporalFusion("symmetric")
        key = _key(stride, *size)

        def fused(adapter: Any = adapter, images: Any = images, fusion: Any = fusion) -> None:
            tokens, features, _ = adapter._encode_images(images)
            fusion.push(features, adapter._guide(tokens))

        sides[f"{key} {ADAPTED}"] = functools.partial(adapter, frame)
        sides[f"{key} {FUSED}"] = fused
        for layer in LAYERS:
            sides[f"{key} centred layer {layer}"] = functools.partial(
                adapter.backbone.patch_tokens, images, layer=layer
            )
    with torch.inference_mode():
        times = interleaved(sides, rounds=rounds)
    data["frames/s"] = {
        name: statistics.quantiles([1 / taken for taken in values], n=4, method="inclusive")
        for name, values in times.items()
    }


def _key(stride: int, *size: int) -> str:
    return f"{size[0]} x {size[1]}, stride {stride}"


def report(data: dict[str, Any]) -> None:
    start = data["quality"][_key(*START)][ADAPTED]["J&F"]
    parts = list(dict.fromkeys(clip.partition("/")[0] for clip in start))
    heads = [f"J&F, {part} | against {_key(*START)}" for part in parts]
    print("| frame, stride | features | frames/s |", " | ".join(heads), "| drift, % |")
    print("|---" * (4 + 2 * len(parts)) + "|")
    for key, rows in data["quality"].items():
        for name, row in rows.items():
            cells = []
            for part in parts:
                scores = [(v, start[c]) for c, v in row["J&F"].items() if c.startswith(part + "/")]
                gains = [value - other for value, other in scores]
                low, high = paired_interval(gains)
                cells.append(f"{mean(value for value, _ in scores):.1f}")
                cells.append(f"{mean(gains):+.1f} [{low:+.1f}, {high:+.1f}]")
            drift = " / ".join(f"{value:.1f}" for value in row["drift"])
            low, middle, high = data["frames/s"][f"{key} {name}"]
            cells.insert(0, f"{middle:.1f} ({low:.1f} to {high:.1f})")
            print(f"| {key} | {name} |", " | ".join(cells), f"| {drift} |")


def plot(data: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    for number, name in enumerate(_names()):
        for stride, style in (("14", "o-"), ("7", "s")):
            keys = [key for key in data["quality"] if key.split()[-1] == stride]
            rows = [data["quality"][key][name] for key in keys]
            rate = [data["frames/s"][f"{key} {name}"][1] for key in keys]
            how = {"color": f"C{number}", "label": name if stride == "14" else None}
            left.plot(rate, [mean(row["J&F"].values()) for row in rows], style, **how)
            right.plot(rate, [row["drift"][1] for row in rows], style, **how)
    for axes, title in ((left, "J&F (squares: stride 7)"), (right, "drift 4 frames apart, %")):
        axes.set(xscale="log", xlabel="frames/s", title=title)
        axes.set_xticks([0.2, 0.5, 1, 2, 5, 10], labels=["0.2", "0.5", "1", "2", "5", "10"])
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    data: dict[str, Any] = {"quality": {}}
    if options.output.is_file():
        data = json.loads(options.output.read_text(encoding="utf-8"))
    for stride, *size in SETTINGS:
        if (key := _key(stride, *size)) not in data["quality"]:
            adapter = CoSettleAdapter.from_pretrained(MODEL, stride=stride)
            data["quality"][key] = quality(
                adapter, (size[0], size[1]), options.data, options.frames
            )
            options.output.write_text(json.dumps(data, indent=1), encoding="utf-8")
    if "frames/s" not in data:
        speeds(data, options.rounds)
        options.output.write_text(json.dumps(data, indent=1), encoding="utf-8")
    report(data)
    if options.plot is not None:
        plot(data, options.plot)


if __name__ == "__main__":
    main()
