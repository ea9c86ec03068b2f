from __future__ import annotations

from pathlib import Path

import pytest
from training_fakes import small_backbone

from cosettle_adapter import CoSettleAdapter

from helpers import projection_for, write_video


@pytest.fixture
def small_adapter() -> CoSettleAdapter:
    """Two blocks and a projection, so that frames cost next to nothing."""
    backbone = small_backbone()
    return CoSettleAdapter(backbone, projection_for(backbone, layers=(1,)))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4", frames=40, height=48, width=64, fps=20)


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A video that breaks off."""
    whole = write_video(tmp_path / "w.mkv", frames=80, height=48, width=64, fps=20, noisy=True)
    content = whole.read_bytes()
    whole.unlink()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    return tmp_path / "cut.mkv"
