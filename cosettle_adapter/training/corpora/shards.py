"""WebDataset shards: tar archives whose members are video files, read where they lie."""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.files import VIDEO_SUFFIXES
from cosettle_adapter.video.streams import FileRange

SHARD_SUFFIX = ".tar"


def index_shard(path: Path) -> tuple[list[FileRange], str]:
    """Find the videos in a shard; only the headers between its members are read.

    Args:
        path: an uncompressed tar archive.

    Returns:
        Where each video lies, in the order of the archive, and what is wrong with the archive or
        an empty string. One that was cut off gives the videos before the cut.

    Raises:
        FrameError: not a tar archive, or no video in it.
    """
    videos: list[FileRange] = []
    others: list[str] = []
    problem = ""
    try:
        length = path.stat().st_size
        # "r:" and not "r": members of a compressed archive lie nowhere
        with tarfile.open(path, "r:") as archive:
            while not problem and (member := _next_member(archive)) is not None:
                if isinstance(member, str):
                    problem = member
                    break
                name = PurePosixPath(member.name)
                if not member.isreg() or name.name.startswith("."):
                    continue
                if name.suffix.lower() not in VIDEO_SUFFIXES:
                    others.append(name.name)
                elif member.offset_data + member.size > length:
                    problem = f"it is cut off within {member.name}"
                else:
                    videos.append(FileRange(path, member.offset_data, member.size, member.name))
    except tarfile.TarError as error:
        raise FrameError(
            f"{path} is no uncompressed tar archive ({error}); unpack a compressed one"
        ) from error
    except OSError as error:
        raise FrameError(f"{path} cannot be read ({error.strerror or error})") from error
    if not videos:
        held = ", ".join(others[:3]) or "nothing"
        raise FrameError(
            f"{path} holds no video files ({', '.join(VIDEO_SUFFIXES)}); it holds {held}"
            + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            + (f", and {problem}" if problem else "")
        )
    return videos, problem


def _next_member(archive: tarfile.TarFile) -> tarfile.TarInfo | str | None:
    """Return the next member, None at the end, or what is wrong."""
    archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
    try:
        return archive.next()
    except tarfile.TarError as error:
        return f"it is damaged ({error})"
