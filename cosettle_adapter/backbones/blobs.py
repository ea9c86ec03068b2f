# shim: removed at integration
"""Old place of what is now in ``downloads.py``: ``hub_file`` downloads and verifies."""

from pathlib import Path

from huggingface_hub import constants, hf_hub_download

from cosettle_adapter.backbones import downloads
from cosettle_adapter.errors import CorruptWeightsError


def check_blob(path: Path, *, what: str) -> Path:
    """Return a file of the Hub cache that is what the Hub announced, downloaded again if not."""
    try:
        return downloads.check_blob(path, what=what)
    except CorruptWeightsError:
        snapshots = next(parent for parent in path.parents if parent.name == "snapshots")
        commit, *parts = path.relative_to(snapshots).parts
        if constants.HF_HUB_OFFLINE:
            raise
        repo = snapshots.parent.name.removeprefix("models--").replace("--", "/")
        cache = snapshots.parent.parent
        hf_hub_download(
            repo, "/".join(parts), revision=commit, cache_dir=cache, force_download=True
        )
        return downloads.check_blob(path, what=what)


__all__ = ["check_blob"]
