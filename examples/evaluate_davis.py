"""Video object segmentation on DAVIS: what a projection changes, beside what needs none.

    python examples/evaluate_davis.py --data DAVIS --model dinov2-vits14-pypi --every 3

All columns come from one encoder pass a frame. Figures depend on frame size, on --every and on the
propagation protocol: compare columns of one run. Published tables use every frame and 480 x 880
(patch 16); with patch 14, 476 x 882 comes nearest to it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from einops import rearrange, reduce
from torch import Tensor

from cosettle_adapter import CoSettleAdapter, FrameSelection, evaluation

RAW = "last raw"


@torch.inference_mode()
def main() -> None:
    options = parse_options()
    adapter = CoSettleAdapter.from_pretrained(options.model, device=options.device)
    variants = make_variants(adapter)
    select = FrameSelection(every=options.every, max_frames=options.max_frames)
    clips = evaluation.davis_clips(
        options.data, year=options.year, clips=options.clips, select=select
    )
    print(f"{options.model}, projection of {adapter.config.layers}; frames at {options.size}")
    print(f"protocol {options.protocol}, every {options.every} frame(s), J&F in percent\n")
    print(f"{'':24}" + "".join(f"{name:>21}" for name in variants))

    results = {name: [] for name in variants}
    for clip in clips:
        last, tokens = encode(adapter, clip, tuple(options.size))
        masks = clip.read_annotations()
        for name, variant in variants.items():
            features = variant(last, tokens)
            scores = evaluation.evaluate_sequence(features, masks, protocol=options.protocol)
            results[name].append(scores)
        print_row(clip.name, [results[name][-1].j_and_f for name in variants])

    columns = list(results.values())
    raw = [scores.j_and_f for scores in results[RAW]]
    gains = [[mine.j_and_f - its for mine, its in zip(each, raw, strict=True)] for each in columns]
    print()
    print_row("mean over objects", [evaluation.mean_over_objects(each) for each in columns])
    print_row("mean - raw, clips", [sum(gain) / len(gain) for gain in gains])
    print_row("worst clip - raw", [min(gain) for gain in gains])


def encode(adapter: CoSettleAdapter, clip: evaluation.Clip, size: tuple[int, int]):
    """A clip's tokens, each (T, C, h, w): of the last block, of those that the projection reads."""
    layers = adapter.config.layers
    last_block = adapter.backbone.depth - 1
    # None: the last block with the final norm that the registry gives it, others without
    norm = adapter.config.norm if last_block in layers else adapter.config.norm or None
    last, tokens = [], []
    for index in range(len(clip)):
        images = adapter.preprocess(clip.read_frame(index), size=size)
        *read, final = adapter.backbone.intermediate_tokens(images, (*layers, -1), norm=norm)
        last.append(final.float())
        tokens.append(torch.cat(read, dim=1).float())
    return torch.cat(last), torch.cat(tokens)


def make_variants(adapter: CoSettleAdapter) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Columns of the table: what each makes of both tokens, for the adapted one to beat."""
    variants = {
        RAW: lambda last, tokens: last,
        "last - clip mean": lambda last, tokens: without_mean(last),
        "block raw": lambda last, tokens: tokens,
        "block - clip mean": lambda last, tokens: without_mean(tokens),
        "adapted": lambda last, tokens: torch.cat([*map(adapter.projection, tokens.split(8))]),
    }
    if adapter.config.kind == "affine" and adapter.config.in_width == adapter.config.out_width:
        mean = stored_mean(adapter)
        variants["block - stored mean"] = lambda last, tokens: tokens - mean
    return variants


def without_mean(tokens: Tensor) -> Tensor:
    return tokens - reduce(tokens, "t c h w -> c 1 1", "mean")


def stored_mean(adapter: CoSettleAdapter) -> Tensor:
    """Return the token that an affine projection sends to zero: the mean it subtracts."""
    linear = adapter.projection.linears[0]
    mean = torch.linalg.lstsq(linear.weight.double(), -linear.bias.double()[:, None]).solution
    return rearrange(mean.float().detach(), "c 1 -> c 1 1")


def print_row(name: str, values: list[float]) -> None:
    print(f"{name:24}" + "".join(f"{100 * value:21.1f}" for value in values), flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with JPEGImages and Annotations")
    parser.add_argument("--model", default="dinov2-vits14-pypi", help="name, repository or folder")
    parser.add_argument("--size", type=int, nargs=2, default=(476, 882), metavar=("H", "W"))
    parser.add_argument("--every", type=int, default=1, help="keep every n-th frame")
    parser.add_argument("--max-frames", type=int, help="keep at most this many frames of a clip")
    parser.add_argument(
        "--clips", "--sequences", nargs="+", help="clips to take; all of val by default"
    )
    parser.add_argument("--year", choices=("2016", "2017"), help="by default the newest there is")
    parser.add_argument("--protocol", choices=("crw", "dino"), default="crw")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
