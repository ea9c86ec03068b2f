from __future__ import annotations

from pathlib import Path

import pytest

from cosettle_adapter.video import find_images, find_videos, is_image, is_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "clip10.mp4", "clip2.MP4", "clip1.ogv", "._clip3.mp4", "a.jpeg", "b.WEBP", "c.TIF",
        ".hidden.png", "notes.txt", "below/deep/clip3.3gp", "below/d.png", ".git/e.mp4",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    return tmp_path


def names(root: Path, paths: list[Path]) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def test_one_rule_says_what_is_found(folder: Path) -> None:
    videos, images = find_videos(folder), find_images(str(folder))
    assert names(folder, videos) == ["clip1.ogv", "clip2.MP4", "clip10.mp4"]
    assert names(folder, images) == ["a.jpeg", "b.WEBP", "c.TIF"]
    deep = folder / "below" / "deep" / "clip3.3gp"
    assert find_videos(folder, recursive=True) == [deep, *videos]
    assert find_images(folder, recursive=True) == [
        *images[:2], folder / "below" / "d.png", images[2],
    ]  # fmt: skip
    assert find_videos(folder / "below") == []


def test_names_alone() -> None:
    assert is_video("clips/A.WMV")
    assert is_image(Path("a.b.JPG"))
    for name in ("mp4", ".a.mp4", "x/._a.png", "a.txt"):
        assert not is_video(name)
        assert not is_image(name)


@pytest.mark.parametrize("recursive", [False, True])
def test_a_missing_folder(tmp_path: Path, recursive: bool) -> None:
    with pytest.raises(FileNotFoundError):
        find_videos(tmp_path / "gone", recursive=recursive)
