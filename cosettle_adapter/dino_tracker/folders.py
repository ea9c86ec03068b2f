"""The folders DINO-Tracker works in: what must be there, and a copy that leaves them alone."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosettle_adapter.dino_tracker.errors import DinoTrackerError
from cosettle_adapter.dino_tracker.frames import image_files

FEATURES = Path("dino_embeddings", "dino_embed_video.pt")
TRAJECTORIES = Path("of_trajectories")
VIDEO, MASKS = Path("video"), Path("masks")
_CHECKPOINTS = Path("models", "dino_tracker")
_IN_CHECKOUT = (
    "train.py",
    "inference_grid.py",
    "config/preprocessing.yaml",
    "config/train.yaml",
    "preprocessing/extract_trajectories.py",
    "preprocessing_dino_bb/main_dino_bb_preprocessing.py",
)


@dataclass(frozen=True)
class DataFolder:
    """A clip as DINO-Tracker wants it.

    Attributes:
        path: the folder.
        frames: images of ``video/``, in its order.
        has_masks: whether there are foreground masks.
    """

    path: Path
    frames: tuple[Path, ...]
    has_masks: bool


def open_checkout(path: str | Path) -> Path:
    """Return the absolute path of a DINO-Tracker checkout.

    Raises:
        DinoTrackerError: something else is there.
    """
    repo = Path(path).expanduser().resolve()
    missing = [name for name in _IN_CHECKOUT if not (repo / name).is_file()]
    if missing:
        raise DinoTrackerError(
            f"{repo} is no checkout of DINO-Tracker: it lacks {', '.join(missing)}; "
            "git clone https://github.com/AssafSinger94/dino-tracker"
        )
    return repo


def open_data(path: str | Path) -> DataFolder:
    """Find the frames and masks of a clip.

    Raises:
        DinoTrackerError: no frames, or masks that are not one a frame.
    """
    folder = Path(path).expanduser().resolve()
    frames = image_files(folder / VIDEO)
    if not frames:
        raise DinoTrackerError(
            f"{folder / VIDEO} holds no .jpg or .png frames; DINO-Tracker wants a folder with "
            "video/00000.jpg, video/00001.jpg, ... (and masks/ of the same, if there are any). "
            "Its preprocessing/mp4_to_frames.py makes one of a film"
        )
    if len(frames) < 2:
        raise DinoTrackerError(f"{folder / VIDEO} holds a single frame; tracking needs two")
    masks = image_files(folder / MASKS)
    if masks and len(masks) != len(frames):
        raise DinoTrackerError(
            f"{folder} holds {len(frames)} frames in video/ and {len(masks)} masks in masks/; "
            "DINO-Tracker wants one mask a frame, or no masks/ at all"
        )
    if not masks and (folder / MASKS).exists():
        raise DinoTrackerError(
            f"{folder / MASKS} holds no .jpg or .png; DINO-Tracker makes masks of its own only "
            "where there is no masks/: fill or remove it"
        )
    return DataFolder(folder, tuple(frames), bool(masks))


def check_destination(path: str | Path, data: DataFolder) -> Path:
    """Return the absolute path of the folder to make.

    Raises:
        DinoTrackerError: it exists, or lies in the data folder.
    """
    destination = Path(path).expanduser().resolve()
    if destination == data.path:
        raise DinoTrackerError(
            f"{destination} is the data folder itself, which is left as it is; name another "
            "folder for the copy"
        )
    if data.path in destination.parents:
        raise DinoTrackerError(
            f"{destination} lies in the data folder, which is left as it is; name a folder "
            "beside it"
        )
    checkpoints = destination / _CHECKPOINTS
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        raise DinoTrackerError(
            f"{checkpoints} holds checkpoints, from which DINO-Tracker's training would go on as "
            "if the features were still the same; name another folder, or delete that one"
        )
    if destination.exists():
        raise DinoTrackerError(f"{destination} exists already; name another folder, or delete it")
    return destination


def check_space(destination: Path, needed: int) -> None:
    """Refuse what will not fit on the disk, before hours are spent on it.

    Raises:
        DinoTrackerError: too little is free.
    """
    existing = next(folder for folder in destination.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DinoTrackerError(
            f"the features take {needed / 1e9:.2f} GB, and {existing} has {free / 1e9:.2f} GB "
            "free; stride 14 takes a quarter of stride 7, or name a folder on another disk"
        )


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``final`` that gets its name when the block succeeds."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=".part"))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_inputs(data: DataFolder, folder: Path) -> None:
    """Link ``video/`` and ``masks/`` into a folder, or copy them where links cannot be made."""
    for name in (VIDEO, MASKS) if data.has_masks else (VIDEO,):
        original = (data.path / name).resolve()
        try:
            (folder / name).symlink_to(original, target_is_directory=True)
        except (OSError, NotImplementedError):
            shutil.copytree(original, folder / name)
