"""Write features of this package for an unmodified checkout of DINO-Tracker.

    git clone https://github.com/AssafSinger94/dino-tracker
    python examples/dino_tracker_features.py \\
        --repo dino-tracker --data dino-tracker/dataset/horsejump

The script copies the clip's folder (frames and masks are links), writes the features to the file
that DINO-Tracker reads, and prints the commands to run in DINO-Tracker's environment. Those need a
GPU; this script does not, and it imports nothing from the checkout. For comparison, `--raw` writes
the frozen tokens that the projection reads, and `--layer` the output of DINO-Tracker's own
`VitExtractor` for that layer: tokens before the final norm, or with `--facet` queries, keys or
values.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
import torch
from PIL import Image
from torch import Tensor

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import CosettleError, FrameError, GeometryError
from cosettle_adapter.extraction import dino_tracker
from cosettle_adapter.extraction.dino_tracker import CHANNELS, FRAME, PATCH, save_tensor
from cosettle_adapter.extraction.settings import DinoTrackerError
from cosettle_adapter.video.arrays import image_to_frame

Facet = Literal["tokens", "queries", "keys", "values"]

CONFIGS = ("config/preprocessing.yaml", "config/train.yaml")
FEATURES = "dino_embeddings/dino_embed_video.pt"
USUAL_NORM = 32.0  # of a token of 1024 channels after a layer norm, as in DINO-Tracker's features

MASKS = """\
# foreground masks from DINO-Tracker's own DINOv2 features
python preprocessing/save_dino_embed_video.py --config "$BEFORE" --data-path "$DATA" --for-mask
python preprocessing/create_fg_mask.py --h {video_resh} --w {video_resw} \\
  --dino-embed-video-path "$DATA/dino_embeddings/dino_embed_video-layer=23.pt" \\
  --mask-path "$DATA/masks" --fg_mask_threshold {fg_mask_threshold}
"""
FLOW = """\
# optical flow
python preprocessing/extract_trajectories.py --frames-path "$DATA/video" \\
  --output-path "$DATA/of_trajectories/trajectories.pt" --threshold {threshold} \\
  --min-trajectory-length {min_trajectory_length} --infer-res-size {video_resh} {video_resw}{direct}
python preprocessing/split_trajectories_to_fg_bg.py --fg_masks_path "$DATA/masks" \\
  --traj_path "$DATA/of_trajectories/trajectories.pt" \\
  --fg_traj_path "$DATA/of_trajectories/fg_trajectories.pt" \\
  --bg_traj_path "$DATA/of_trajectories/bg_trajectories.pt"
"""
DIRECT_FLOW = " --filter-using-direct-flow --direct-flow-threshold {direct_flow_threshold}"
TRACKS = """\
# best buddies (do not run main_preprocessing.py, which would overwrite the features)
python preprocessing_dino_bb/main_dino_bb_preprocessing.py --config "$BEFORE" --data-path "$DATA"
# training
python train.py --config "$AFTER" --data-path "$DATA"
# tracks of a grid of points, and a video of them
python inference_grid.py --config "$AFTER" --data-path "$DATA" --use-segm-mask
python visualization/visualize_rainbow.py --data-path "$DATA" --plot-trails
"""


def main(
    *,
    repo: Path,
    data: Path,
    output: Annotated[Path | None, cyclopts.Parameter(name=("--output", "-o"))] = None,
    stride: Literal[7, 14] = 7,
    model: str = "dinov2-vits14-pypi",
    raw: bool = False,
    layer: int | None = None,
    facet: Facet = "tokens",
    temporal_fusion: Literal["symmetric", "causal"] | None = None,
    device: str | None = None,
    batch_size: int = 4,
    rescale: bool = True,
) -> None:
    """Write features for DINO-Tracker, and print the remaining commands.

    Args:
        repo: checkout of DINO-Tracker; read only.
        data: folder of the clip with video/ (frames) and optionally masks/; read only.
        output: new folder; by default the clip's name with -cosettle or -raw.
        stride: pixels between patches; 14 takes a quarter of the disk space.
        model: registered name, Hub repository or folder.
        raw: write the frozen tokens that the projection reads.
        layer: write the tokens of this layer of the frozen backbone, before its final norm.
        facet: with --layer, the part of the transformer block to write.
        temporal_fusion: average patches with their matches in neighbouring frames.
        device: torch device; by default a GPU if available.
        batch_size: frames per forward pass.
        rescale: scale features to the usual norm, because DINO-Tracker adds a residual to them.
    """
    repo, data = repo.expanduser().resolve(), data.expanduser().resolve()
    if facet != "tokens" and layer is None:
        raise DinoTrackerError(f"--facet {facet} needs a --layer to read it from")
    kind = "raw" if raw or layer is not None else "cosettle"
    copy = (output or Path(f"{data.name}-{kind}")).expanduser().resolve()
    frames, masks = find_inputs(data, copy)
    configs = tracker_configs(repo, stride)
    make = partial(CoSettleAdapter.from_pretrained, model)
    if layer is not None:
        make = partial(CoSettleAdapter.raw, model, layer=layer, norm=False)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        adapter = make(device=device, stride=stride)  # patches overlap where they can
    except GeometryError:  # the stride of feature maps is fixed; they are interpolated
        adapter = make(device=device)
    adapter = adapter.without_projection() if raw else adapter
    if facet != "tokens":
        read_facet(adapter, facet)
    dino_tracker.check_adapter(adapter)
    h, w = dino_tracker.cells(stride).grid
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=copy.parent, prefix=f".{copy.name}.") as temporary:
        folder = Path(temporary, "folder")  # renamed when complete
        (folder / FEATURES).parent.mkdir(parents=True)
        for name in ("video", "masks") if masks else ("video",):
            link(data / name, folder / name)
        for name, text in configs.items():
            if text != read_text(repo / name):
                (folder / "config").mkdir(exist_ok=True)
                (folder / name).write_bytes(text.encode())
        chunks = adapter.stream(
            read_frames(frames), batch_size=batch_size, temporal_fusion=temporal_fusion
        )
        factor = 1.0
        numbers = Path(temporary, "numbers")
        with numbers.open("wb") as file:
            for chunk in chunks:
                features = dino_tracker.arrange(
                    chunk.features, chunk.geometry, stride=stride, first=chunk.start
                )
                if rescale and not chunk.start:
                    factor = USUAL_NORM / float(features[0].norm(dim=0).mean())
                file.write((factor * features).cpu().numpy().tobytes())
        save_tensor(numbers, folder / FEATURES, (len(frames), CHANNELS, h, w))
        folder.rename(copy)
    print(f"{copy}: features ({len(frames)}, {CHANNELS}, {h}, {w}), scaled by {factor:.3g}")
    print("\n# To run in DINO-Tracker's environment:\n")
    print(commands(repo, data, copy, configs, bool(masks)), end="")


class FacetBlock(torch.nn.Module):
    """A transformer block that returns its queries, keys or values of all heads."""

    def __init__(self, block: Any, facet: Facet) -> None:
        super().__init__()
        self.norm, self.qkv = block.norm1, block.attn.qkv
        self.part = ("queries", "keys", "values").index(facet)

    def forward(self, tokens: Tensor, **_: Any) -> Tensor:
        return self.qkv(self.norm(tokens)).chunk(3, dim=-1)[self.part]


def read_facet(adapter: CoSettleAdapter, facet: Facet) -> None:
    """Replace the block that an adapter without projection reads."""
    (layer,) = adapter.config.layers
    try:
        blocks: Any = adapter.backbone.vit.blocks
        blocks[layer] = FacetBlock(blocks[layer], facet)
    except AttributeError as error:
        raise DinoTrackerError(
            f"{adapter.backbone.row.name} does not compute its {facet} in one qkv layer, as "
            "DINO-Tracker expects; use a plain vision transformer, or leave --facet out"
        ) from error


def find_inputs(data: Path, copy: Path) -> tuple[list[Path], list[Path]]:
    """List frames and masks as DINO-Tracker does: `.jpg` and `.png`, sorted by path."""
    if copy == data or data in copy.parents or copy.exists():
        raise DinoTrackerError(f"{copy} exists or lies inside --data; choose another folder")
    frames, masks = (
        sorted([*(data / name).glob("*.jpg"), *(data / name).glob("*.png")])
        for name in ("video", "masks")
    )
    if len(frames) < 2:
        raise DinoTrackerError(
            f"{data / 'video'} holds {len(frames)} .jpg or .png frames, but tracking needs at "
            "least 2; extract them with DINO-Tracker's preprocessing/mp4_to_frames.py"
        )
    if (data / "masks").exists() and len(masks) != len(frames):
        raise DinoTrackerError(
            f"{data} holds {len(frames)} frames in video/ and {len(masks)} masks in masks/; "
            "DINO-Tracker expects one mask per frame, or no masks/, in which case it makes them"
        )
    return frames, masks


def tracker_configs(repo: Path, stride: int) -> dict[str, str]:
    """Adapt DINO-Tracker's two configs to features at `stride`; all other bytes are unchanged."""
    if not all((repo / name).is_file() for name in CONFIGS):
        raise DinoTrackerError(
            f"{repo} is not a checkout of DINO-Tracker: expected {' and '.join(CONFIGS)}; get it "
            "with git clone https://github.com/AssafSinger94/dino-tracker"
        )
    size = {"video_resh": FRAME[0], "video_resw": FRAME[1]}
    before = {**size, "dino_stride": stride}
    after = {**size, "stride": stride, "dino_patch_size": PATCH}
    texts = {name: read_text(repo / name) for name in CONFIGS}
    for name, changes in zip(CONFIGS, (before, after), strict=True):
        for key, value in changes.items():
            begin, end = find_value(texts[name], key).span("value")
            texts[name] = f"{texts[name][:begin]}{value}{texts[name][end:]}"
    return texts


def read_text(path: Path) -> str:
    return path.read_bytes().decode()  # keeps line ends


def find_value(text: str, key: str) -> re.Match[str]:
    pattern = rf"^{key}[ \t]*:[ \t]*(?P<value>[^\s#]+)[ \t]*(?:#.*)?\r?$"
    found = list(re.finditer(pattern, text, flags=re.MULTILINE))
    if len(found) != 1:
        raise DinoTrackerError(
            f"a config has {len(found)} lines '{key}: ...'; expected 1, as in DINO-Tracker of "
            "November 2024, so check out that version"
        )
    return found[0]


def link(original: Path, copy: Path) -> None:
    try:
        copy.symlink_to(original.resolve(), target_is_directory=True)
    except (OSError, NotImplementedError):
        shutil.copytree(original, copy)


def read_frames(paths: list[Path]) -> Iterator[Tensor]:
    """Read frames `(3, 476, 854)` uint8 as DINO-Tracker does: Lanczos, EXIF rotation ignored."""
    for number, path in enumerate(paths, 1):
        try:
            with Image.open(path) as image:
                if image.mode != "RGB":
                    raise FrameError(
                        f"{path} is an image of mode {image.mode}, but DINO-Tracker accepts only "
                        "RGB; convert the frames first, for example with image.convert('RGB')"
                    )
                yield image_to_frame(image.resize(FRAME[::-1], Image.Resampling.LANCZOS))
        except (OSError, SyntaxError) as error:
            raise FrameError(f"{path} cannot be read as an image: {error}") from error
        print(f"\r{number} of {len(paths)} frames", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def commands(repo: Path, data: Path, copy: Path, configs: dict[str, str], has_masks: bool) -> str:
    """Return the shell commands that turn features into tracks."""
    used = [
        (repo if text == read_text(repo / name) else copy) / name for name, text in configs.items()
    ]
    quoted = [shlex.quote(str(path)) for path in (repo, copy, *used)]
    script = 'cd {}\nexport PYTHONPATH="$PWD" DATA={} BEFORE={} AFTER={}\n'.format(*quoted)
    values = dict(re.findall(r"(?m)^(\w+)[ \t]*:[ \t]*([^\s#]+)", configs[CONFIGS[0]]))
    flow = data / "of_trajectories"
    if not has_masks:
        script += MASKS.format(**values)
    if has_masks and all((flow / f"{half}_trajectories.pt").is_file() for half in ("fg", "bg")):
        script += "# optical flow, which does not depend on the features\n"
        script += f'cp -R {shlex.quote(str(flow))} "$DATA/of_trajectories"\n'
    else:
        filtered = values["filter_using_direct_flow"].lower() in ("true", "yes", "on")
        script += FLOW.format(direct=DIRECT_FLOW.format(**values) if filtered else "", **values)
    return script + TRACKS


if __name__ == "__main__":
    try:
        cyclopts.run(main)
    except (CosettleError, OSError) as problem:
        sys.exit(f"error: {problem}")
