"""A clip made ready for DINO-Tracker: checked, computed, written, and what to run next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.correspondence.fusion import FusionMode
from cosettle_adapter.dino_tracker.cells import CHANNELS, cells
from cosettle_adapter.dino_tracker.commands import Command, remaining_commands, shell_text
from cosettle_adapter.dino_tracker.configs import preprocessing_config, training_config
from cosettle_adapter.dino_tracker.features import BATCH_SIZE, check_adapter, tracker_features
from cosettle_adapter.dino_tracker.folders import (
    FEATURES,
    check_destination,
    check_space,
    copy_inputs,
    open_checkout,
    open_data,
    whole_folder,
)
from cosettle_adapter.dino_tracker.frames import read_frame
from cosettle_adapter.dino_tracker.scale import Scale, choose_scale
from cosettle_adapter.dino_tracker.tensor_file import write_tensor

# DINO-Tracker runs on nothing else, and mixes features with what it put there
LOCATION = "cuda:0"


@dataclass(frozen=True)
class Prepared:
    """A folder for DINO-Tracker.

    Attributes:
        path: the folder; its ``dino_embeddings/dino_embed_video.pt`` holds the features.
        shape: ``(T, 1024, h, w)``, theirs.
        scale: what they were multiplied by, and why.
        commands: what is left to run.
        script: the same as text for a shell.
    """

    path: Path
    shape: tuple[int, ...]
    scale: Scale
    commands: tuple[Command, ...]
    script: str


def prepare(
    adapter: CoSettleAdapter,
    repo: str | Path,
    data: str | Path,
    destination: str | Path,
    *,
    stride: int = 7,
    batch_size: int = BATCH_SIZE,
    rescale: bool = True,
    temporal_fusion: FusionMode | None = None,
    location: str = LOCATION,
    on_frame: Callable[[int, int], None] = lambda done, frames: None,
) -> Prepared:
    """Make a copy of a clip's folder that holds an adapter's features for DINO-Tracker.

    The copy appears whole or not at all; the clip's folder and the checkout are only read.
    Frames and masks are linked, other results (checkpoints among them) stay behind.

    Args:
        adapter: computes the features; see :func:`load_overlapping`.
        repo: a checkout of DINO-Tracker.
        data: the clip: ``video/`` with its frames, perhaps ``masks/``.
        destination: the folder to make.
        stride: 7 (the original) or 14.
        batch_size: frames a forward pass.
        rescale: give features the mean length of the clip's own DINO-Tracker features, if there
            are any, and a usual one otherwise.
        temporal_fusion: as in :meth:`CoSettleAdapter.stream`.
        location: device the features are loaded to. DINO-Tracker needs them on the GPU, and a
            file can say so wherever it was written; ``"cpu"`` makes one that loads without a GPU,
            and adds its conversion to the commands.
        on_frame: called with the frames done and their number.

    Raises:
        DinoTrackerError: a folder that is not what it should be, a destination that exists, or
            features that DINO-Tracker could not use.
        FrameError: a frame that cannot be read.
        OSError: the copy could not be written.
    """
    check_adapter(adapter)
    clip, checkout = open_data(data), open_checkout(repo)
    copy = check_destination(destination, clip)
    configs = preprocessing_config(checkout, stride), training_config(checkout, stride)
    commands = remaining_commands(clip, copy, *configs, location=location)
    grid = cells(stride).grid
    item = (CHANNELS, *grid)
    check_space(copy, 4 * len(clip.frames) * CHANNELS * grid[0] * grid[1])

    scale = Scale(1.0, "left as long as they are")
    frames = (read_frame(path) for path in clip.frames)
    chunks = tracker_features(
        adapter, frames, stride=stride, batch_size=batch_size, temporal_fusion=temporal_fusion
    )
    with whole_folder(copy) as folder:
        copy_inputs(clip, folder)
        for config in configs:
            config.write(folder)
        with write_tensor(folder / FEATURES, item, location=location) as writer:
            on_frame(0, len(clip.frames))
            for features in chunks:
                done = writer.shape[0]
                if rescale and not done:
                    scale = choose_scale(features, clip.path / FEATURES)
                writer.append(scale.factor * features)
                on_frame(done + 1, len(clip.frames))
            shape = writer.shape
    return Prepared(copy, shape, scale, commands, shell_text(checkout, commands))
