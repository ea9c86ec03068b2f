"""Cache of projections fitted on first use, by fingerprint and recipe."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub.utils.tqdm import tqdm  # off by HF_HUB_DISABLE_PROGRESS_BARS
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from cosettle_adapter.backbones import Backbone, HubOptions
from cosettle_adapter.errors import ProjectionFormatError, StatisticsError
from cosettle_adapter.io import atomic_path
from cosettle_adapter.projection import CONFIG_FILE, RECIPE, WEIGHTS_FILE, Projection

_PARTIAL = "statistics.safetensors"
_SAVE_EVERY = 10.0  # seconds

logger = logging.getLogger(__name__)


def cache_folder(name: str, fingerprint: str, options: HubOptions) -> Path:
    """Return the cache folder of a backbone's fitted projection, which need not exist."""
    slug = re.sub(r"[^\w.-]+", "-", name)[-100:]  # folder names can be long
    short = fingerprint.removeprefix("sha256:")[:12]
    return options.own_cache("projections", f"{slug}-{short}-recipe{RECIPE}")


def fitted_projection(
    backbone: Backbone, options: HubOptions, *, native: Callable[[], Backbone]
) -> Projection:
    """Return a projection from the cache, or fit it, with the ``native`` backbone if needed."""
    name = backbone.row.name
    folder = cache_folder(name, backbone.fingerprint, options)
    if (cached := _cached(folder, backbone.fingerprint)) is not None:
        return cached
    # they import solvers and the renderer, which only a first use needs
    from cosettle_adapter import fitting, starter
    from cosettle_adapter.closed_form import TokenStatistics

    writable = True
    partial = folder / _PARTIAL
    lock = FileLock(f"{folder}.lock")
    saved = time.monotonic()

    @contextlib.contextmanager
    def writing() -> Iterator[None]:
        """Continue without the cache if it is not writable, after one warning."""
        nonlocal writable
        try:
            yield
        except OSError as error:
            if writable:
                logger.warning(
                    "cannot write to the cache %s, so the projection is fitted in memory, and "
                    "again by the next process: %s",
                    folder,
                    error,
                )
            writable = False

    def on_clip(statistics: TokenStatistics) -> None:
        nonlocal saved
        bar.update()
        if writable and time.monotonic() - saved > _SAVE_EVERY:
            with writing(), atomic_path(partial) as path:
                path.write_bytes(to_safetensors(statistics.to_tensors()))
            saved = time.monotonic()

    try:
        with writing():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.warning("waiting for another process that is fitting %s", folder)
                lock.acquire()
        if (cached := _cached(folder, backbone.fingerprint)) is not None:
            return cached
        # A warning: INFO is hidden by default, and a pause of a minute needs an explanation.
        logger.warning(
            "fitting a projection for %s on the package's photographs, once, in about a minute; it "
            "is stored in %s",
            name,
            folder if writable else "memory",
        )
        is_native = backbone.dtype == torch.float32 and backbone.stride == backbone.patch
        source = backbone if is_native else native()
        start: TokenStatistics | None = None
        with contextlib.suppress(SafetensorError, StatisticsError, OSError):  # usually none exists
            start = TokenStatistics.from_tensors(load_file(partial))
        progress: Any = tqdm  # untyped
        done = start.clips if start else 0
        with progress(
            total=starter.CLIPS, initial=done, desc=f"fitting {name}", unit="clip"
        ) as bar:
            projection = fitting.fit_starter(source, start=start, on_clip=on_clip)
        with writing():
            projection.save(folder)
            for path in folder.iterdir():
                if path.name not in (CONFIG_FILE, WEIGHTS_FILE):
                    path.unlink()
    finally:
        lock.release()
    return projection


def _cached(folder: Path, fingerprint: str) -> Projection | None:
    try:
        if not (folder / CONFIG_FILE).is_file():
            return None
        cached = Projection.load(folder)
    except (ProjectionFormatError, OSError) as error:
        logger.warning("cannot read the projection in %s, so it is fitted again: %s", folder, error)
        return None
    return cached if cached.config.fingerprint == fingerprint else None
