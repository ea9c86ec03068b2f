"""Which frames of a clip make a cycle, and how many cycles a clip gives."""

from __future__ import annotations

import torch

from cosettle_adapter.errors import FrameError

GAP = 0.15
"""Distance between the two frames of a pair, as a share of the clip's frames."""

_SHORT = 4
_PAIRS_AN_EPOCH = 2000


def choose_frames(
    length: int, frames: int = 2, *, generator: torch.Generator, gap: float = GAP
) -> tuple[int, ...]:
    """Draw the frames of a cycle as the paper's code does.

    The distance is always ``g = int(gap * length)``; only the place is drawn, uniformly from 1 on
    (the very first frame is never used). Clips of up to 4 frames, or too short for a distance of
    one frame, give frames drawn independently of each other. More than two frames follow at that
    distance, or at the largest equal distance at which they fit.

    Args:
        length: frames of the clip, at least 1.
        frames: how many to draw, at least 2.
        generator: source of randomness.
        gap: share of the clip between neighbours, in (0, 1).

    Returns:
        0-based indices, rising unless drawn independently.

    Raises:
        FrameError: the clip is empty.
        ValueError: fewer than 2 frames are asked for, or ``gap`` is no share.
    """
    if length < 1:
        raise FrameError("the clip has no frames")
    if frames < 2:
        raise ValueError(f"a cycle has at least 2 frames, got frames={frames}")
    if not 0 < gap < 1:
        raise ValueError(f"gap is a share of the clip between 0 and 1, got {gap}")
    step = int(gap * length)
    if frames > 2:
        step = min(step, (length - 2) // (frames - 1))
    if length <= _SHORT or step < 1:
        drawn: list[int] = torch.randint(length, (frames,), generator=generator).tolist()
        return tuple(drawn)
    last_start = length - 1 - step * (frames - 1)
    # a large gap leaves no place but the first frame
    first_start = min(1, last_start)
    start = int(torch.randint(first_start, last_start + 1, (1,), generator=generator))
    return tuple(start + step * place for place in range(frames))


def automatic_pairs_per_clip(clips: int) -> int:
    """Return how many cycles to draw from each clip so that an epoch has about 2,000.

    Args:
        clips: number of clips, at least 1.

    Returns:
        At least 1; 1 for all corpora of more than about 1,300 clips, as in the paper.
    """
    return max(1, round(_PAIRS_AN_EPOCH / max(1, clips)))
