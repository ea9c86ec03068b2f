"""Is this the folder of that data set? If not, say what was expected and what is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.video import files


def existing_folder(root: str | Path, what: str) -> Path:
    """Return a folder's path.

    Args:
        root: the path.
        what: what it should be, as ``"the folder of DAVIS"``.

    Raises:
        FrameError: it does not exist or is not a folder.
    """
    path = Path(root).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FrameError(f"{path} is a file, expected {what}")
    near = did_you_mean(path.name, entries(path.parent))
    raise FrameError(f"{path} does not exist, expected {what}.{near}")


def require_entries(root: Path, needed: Sequence[str], what: str) -> None:
    """Check that a folder holds what a data set's folder holds.

    Args:
        root: an existing folder.
        needed: names or relative paths that must be there.
        what: what the folder should be, as ``"the folder of DAVIS"``.

    Raises:
        FrameError: something is missing; says what is there instead, and where it may be.
    """
    missing = [name for name in needed if not (root / name).exists()]
    if missing:
        raise FrameError(
            f"{root} is not {what}: expected {', '.join(missing)} in it, found {found_in(root)}."
            + nearby(root, missing)
        )


def nearby(root: Path, needed: Sequence[str], *, called: str = "") -> str:
    """Return a hint at a folder below or above that has what is needed, or at a near miss.

    Args:
        root: the folder that was given.
        needed: relative paths or glob patterns that the right folder has, all of them.
        called: what the right folder is likely to be called.
    """
    children = [root / name for name in entries(root) if (root / name).is_dir()]
    names = [child.name for child in children]
    if called in names:
        return f" Did you mean {root / called}?"
    for folder in (*children, root.parent):
        if all(any(folder.glob(pattern)) for pattern in needed):
            return f" Did you mean {folder}?"
    return did_you_mean(Path(needed[0]).parts[0], names)


def pick(name: str, known: Iterable[str], what: str) -> None:
    """Check that a name is known.

    Raises:
        FrameError: it is not; names near ones, or the first few.
    """
    listed = list(known)
    if name not in listed:
        raise FrameError(
            f"no {what}." + (did_you_mean(name, listed) or f" It has {len(listed)}: {few(listed)}")
        )


def entries(folder: Path) -> list[str]:
    """Return the names in a folder, sorted, without hidden ones; none if it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def found_in(folder: Path) -> str:
    """Return the first few names in a folder."""
    return few(entries(folder))


def few(names: Sequence[str], limit: int = 9) -> str:
    """Return the first few of some names."""
    return (", ".join(names[:limit]) or "nothing") + (", ..." if len(names) > limit else "")


def images_in(folder: Path) -> tuple[Path, ...]:
    """Return the images of a folder in natural order, ``2.png`` before ``10.png``; maybe none."""
    if not folder.is_dir():
        return ()
    try:
        found = files.resolve(folder)
    except FrameError:
        return ()
    return tuple(found) if isinstance(found, list) else ()
