"""What is left to run in DINO-Tracker's own environment, as text for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosettle_adapter.dino_tracker.configs import Config
from cosettle_adapter.dino_tracker.folders import FEATURES, MASKS, TRAJECTORIES, VIDEO, DataFolder


@dataclass(frozen=True)
class Command:
    """One step.

    Attributes:
        purpose: what it is for.
        arguments: program and arguments, not quoted.
    """

    purpose: str
    arguments: tuple[str, ...]


def remaining_commands(
    data: DataFolder, copy: Path, preprocessing: Config, training: Config, *, location: str
) -> tuple[Command, ...]:
    """Return what turns features into tracks; all but the step that would overwrite them.

    Args:
        data: the original folder.
        copy: the folder with our features.
        preprocessing: its config for preprocessing.
        training: its config for training.
        location: device the features are loaded to.
    """
    before, after = str(preprocessing.path(copy)), str(training.path(copy))
    commands = [
        *_conversion(copy, location),
        *(() if data.has_masks else _masks(copy, before, preprocessing)),
        *_flow(data, copy, preprocessing),
        Command(
            "best buddies, from the new features (preprocessing/main_preprocessing.py would "
            "overwrite them: do not run it)",
            _python(
                "preprocessing_dino_bb/main_dino_bb_preprocessing.py",
                *("--config", before, "--data-path", str(copy)),
            ),
        ),
        Command("training", _python("train.py", "--config", after, "--data-path", str(copy))),
        Command(
            "tracks of a grid of points, and a film of them",
            _python(
                "inference_grid.py",
                *("--config", after, "--data-path", str(copy), "--use-segm-mask"),
            ),
        ),
        Command(
            "",
            _python(
                "visualization/visualize_rainbow.py", "--data-path", str(copy), "--plot-trails"
            ),
        ),
    ]
    return tuple(commands)


def shell_text(repo: Path, commands: tuple[Command, ...]) -> str:
    """Return commands as lines for a POSIX shell, in the checkout and with its modules."""
    lines = [shlex.join(("cd", str(repo))), 'export PYTHONPATH="$PWD"']
    for command in commands:
        if command.purpose:
            lines.append(f"# {command.purpose}")
        lines.append(shlex.join(command.arguments))
    return "\n".join(lines) + "\n"


def _python(script: str, *arguments: str) -> tuple[str, ...]:
    return ("python", script, *arguments)


def _conversion(copy: Path, location: str) -> Iterator[Command]:
    if location.startswith("cuda"):
        return
    path = str(copy / FEATURES)
    yield Command(
        "the features, onto the GPU: they are loaded to where they were saved",
        ("python", "-c", f"import torch; p = {path!r}; torch.save(torch.load(p).cuda(), p)"),
    )


def _masks(copy: Path, config: str, values: Config) -> Iterator[Command]:
    features = copy / FEATURES.with_name(f"{FEATURES.stem}-layer=23.pt")
    yield Command(
        "foreground masks, which DINO-Tracker makes from a file of its own DINOv2 features",
        _python(
            "preprocessing/save_dino_embed_video.py",
            *("--config", config, "--data-path", str(copy), "--for-mask"),
        ),
    )
    yield Command(
        "",
        _python(
            "preprocessing/create_fg_mask.py",
            *("--dino-embed-video-path", str(features)),
            *("--h", values.value("video_resh"), "--w", values.value("video_resw")),
            *("--mask-path", str(copy / MASKS)),
            *("--fg_mask_threshold", values.value("fg_mask_threshold")),
        ),
    )


def _flow(data: DataFolder, copy: Path, values: Config) -> Iterator[Command]:
    folder = copy / TRAJECTORIES
    halves = [f"{half}_trajectories.pt" for half in ("fg", "bg")]
    if data.has_masks and all((data.path / TRAJECTORIES / half).is_file() for half in halves):
        yield Command(
            "optical flow, which the features do not change, from the original folder",
            ("cp", "-R", str(data.path / TRAJECTORIES), str(folder)),
        )
        return
    trajectories = str(folder / "trajectories.pt")
    direct: tuple[str, ...] = ()
    if values.value("filter_using_direct_flow").lower() in ("true", "yes", "on"):
        threshold = values.value("direct_flow_threshold")
        direct = ("--filter-using-direct-flow", "--direct-flow-threshold", threshold)
    yield Command(
        "optical flow",
        _python(
            "preprocessing/extract_trajectories.py",
            *("--frames-path", str(copy / VIDEO), "--output-path", trajectories),
            *("--min-trajectory-length", values.value("min_trajectory_length")),
            *("--threshold", values.value("threshold")),
            *("--infer-res-size", values.value("video_resh"), values.value("video_resw")),
            *direct,
        ),
    )
    yield Command(
        "",
        _python(
            "preprocessing/split_trajectories_to_fg_bg.py",
            *("--traj_path", trajectories, "--fg_masks_path", str(copy / MASKS)),
            *("--fg_traj_path", str(folder / halves[0])),
            *("--bg_traj_path", str(folder / halves[1])),
        ),
    )
