from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cosettle_adapter.files import atomic_path


def test_a_finished_file_replaces_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "new" / "file.txt"
    for text in ("one", "two"):
        with atomic_path(final) as path:
            assert path.suffix == ".txt"
            path.write_text(text)
    assert final.read_text() == "two"
    assert [path.name for path in final.parent.iterdir()] == ["file.txt"]
    assert stat.S_IMODE(final.stat().st_mode) & stat.S_IRUSR


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, error: BaseException) -> None:
    final = tmp_path / "file.txt"
    final.write_text("old")

    def write() -> None:
        with atomic_path(final) as path:
            path.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert final.read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]
