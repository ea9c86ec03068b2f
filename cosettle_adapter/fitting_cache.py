"""Projections fitted on first use: fitted once and kept in the user's cache.

The key is the backbone's fingerprint and the version of the recipe.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub.utils.tqdm import tqdm  # off by HF_HUB_DISABLE_PROGRESS_BARS
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from cosettle_adapter.backbones import Backbone, HubOptions
from cosettle_adapter.errors import ProjectionFormatError, StatisticsError
from cosettle_adapter.io import atomic_path
from cosettle_adapter.projection import CONFIG_FILE, WEIGHTS_FILE, Projection

if TYPE_CHECKING:
    from cosettle_adapter.closed_form import TokenStatistics

RECIPE = 1  # the newest one of ``fitting.RECIPES``, and the default

_PARTIAL = "statistics.safetensors"
_SAVE_EVERY = 10.0  # seconds

logger = logging.getLogger(__name__)


def recipe_version(recipe: int | None) -> int:
    """Return the version of a recipe, the default one for ``None``; ValueError if it is unknown."""
    if recipe is not None and recipe not in range(1, RECIPE + 1):
        known = ", ".join(map(str, range(1, RECIPE + 1)))
        raise ValueError(f"unknown recipe {recipe!r}; this version knows {known}")
    return recipe or RECIPE


def cache_folder(name: str, fingerprint: str, options: HubOptions, version: int = RECIPE) -> Path:
    """Return the folder of the projection that is fitted on first use, whether it exists or not."""
    slug = re.sub(r"[^\w.-]+", "-", name)
    short = fingerprint.removeprefix("sha256:")[:12]
    return options.own_cache("projections", f"{slug}-{short}-recipe{version}")


def fitted_projection(
    backbone: Backbone,
    options: HubOptions,
    *,
    recipe: int | None = None,
    native: Callable[[], Backbone],
) -> Projection:
    """Return a backbone's projection from the cache, or fit it and put it there.

    Of processes that ask at once, one fits and the others wait. A fit that was killed resumes. If
    the cache cannot be written, the projection is fitted in memory, with a warning.

    Args:
        backbone: what the projection is for.
        options: whose cache.
        recipe: as in :func:`recipe_version`.
        native: loads the backbone in float32 at its native stride, for a fit, if ``backbone`` is
            not.

    Raises:
        StatisticsError: the backbone's features cannot be used.
    """
    version = recipe_version(recipe)
    folder = cache_folder(backbone.row.name, backbone.fingerprint, options, version)
    if (found := _cached(folder, backbone.fingerprint)) is not None:
        return found
    # brings solvers and the renderer, which only a first use needs
    from cosettle_adapter import fitting

    with contextlib.ExitStack() as held:
        progress = _Progress(folder, backbone.row.name)
        with progress.writing():
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(folder.with_name(f"{folder.name}.lock")))
        if (found := _cached(folder, backbone.fingerprint)) is not None:
            return found
        is_native = backbone.dtype == torch.float32 and backbone.stride == backbone.patch
        source, start = backbone if is_native else native(), progress.resumed()
        bar: Any = tqdm  # untyped
        done = start.clips if start else 0
        named = {"desc": f"fitting {backbone.row.name}", "unit": "clip"}
        with bar(total=fitting.CLIPS, initial=done, **named) as shown:

            def on_clip(statistics: TokenStatistics) -> None:
                shown.update()
                progress.on_clip(statistics, fitting.CLIPS)

            projection = fitting.fit_starter(source, recipe=version, start=start, on_clip=on_clip)
        with progress.writing():
            projection.save(folder)
            for path in folder.iterdir():
                if path.name not in (CONFIG_FILE, WEIGHTS_FILE):
                    path.unlink()
    return projection


class _Progress:
    """Saves the statistics of an unfinished fit; stops with one warning if it cannot write."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder: Path | None = folder
        self._name, self._clips = name, 0
        self._saved = self._clip_began = time.monotonic()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Run the block; if it cannot write, warn once and continue without the cache."""
        try:
            yield
        except OSError as error:
            if self._folder is not None:
                logger.warning(
                    "the projection cannot be kept in %s, so it is fitted in memory, and again "
                    "by the next process: %s",
                    self._folder,
                    error,
                )
            self._folder = None

    def resumed(self) -> TokenStatistics | None:
        """Statistics as a killed fit left them."""
        from cosettle_adapter.closed_form import TokenStatistics

        if self._folder is None or not (self._folder / _PARTIAL).is_file():
            return None
        try:
            statistics = TokenStatistics.from_tensors(load_file(self._folder / _PARTIAL))
        except (SafetensorError, StatisticsError, OSError) as error:
            logger.debug("%s cannot be used: %s", self._folder / _PARTIAL, error)
            return None
        return statistics

    def on_clip(self, statistics: TokenStatistics, total: int) -> None:
        """Announce the fit once, and save the statistics from time to time."""
        now = time.monotonic()
        self._clips += 1
        if self._clips == 2:  # the first is slower than the others
            # A warning, because a pause of this length needs a reason, and INFO is not seen.
            logger.warning(
                "fitting a projection for %s on the package's own photographs, once: about "
                "%.0f s; it is kept in %s",
                self._name,
                (now - self._clip_began) * (total - statistics.clips),
                self._folder or "memory",
            )
        self._clip_began = now
        if self._folder is not None and now - self._saved > _SAVE_EVERY:
            with self.writing(), atomic_path(self._folder / _PARTIAL) as path:
                path.write_bytes(to_safetensors(statistics.to_tensors()))
            self._saved = time.monotonic()


def _cached(folder: Path, fingerprint: str) -> Projection | None:
    try:
        if not (folder / CONFIG_FILE).is_file():
            return None
        found = Projection.load(folder)
    except (ProjectionFormatError, OSError) as error:
        logger.warning("%s cannot be used, so it is fitted anew: %s", folder, error)
        return None
    return found if found.config.fingerprint == fingerprint else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock, which ends with its process."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is fitting this projection; waiting for it (%s)", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
