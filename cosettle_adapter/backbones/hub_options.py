"""How the Hub and the cache are used; the same for a backbone and its projection."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from huggingface_hub import constants

_CACHE_FOLDER = "cosettle-adapter"


@dataclasses.dataclass(frozen=True)
class HubOptions:
    """How the Hub and the cache are used.

    Attributes:
        cache_dir: cache to use in place of the Hugging Face one.
        revision: branch, tag or commit to use in place of the registered one.
        token: access token for private or gated repositories; ``None`` uses the stored one.
        local_files_only: never touch the network; ``HF_HUB_OFFLINE`` has the same effect.
    """

    cache_dir: str | Path | None = None
    revision: str | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    @property
    def offline(self) -> bool:
        """Whether the network is off limits."""
        return self.local_files_only or bool(constants.HF_HUB_OFFLINE)

    @property
    def hub_cache(self) -> Path:
        """Folder of the Hugging Face Hub cache."""
        return Path(self.cache_dir or constants.HF_HUB_CACHE)

    def own_cache(self, *parts: str) -> Path:
        """Path inside the cache of what this package converts or extracts itself."""
        return Path(self.cache_dir or constants.HF_HOME).joinpath(_CACHE_FOLDER, *parts)


def one_line(error: BaseException) -> str:
    """Return an error's kind and text without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
