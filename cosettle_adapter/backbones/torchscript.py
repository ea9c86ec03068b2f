"""Reading the tensors of a TorchScript archive, such as OpenAI's CLIP files, without running it.

The archive is a zip file: a pickle of the module tree, the storages, and code. The code is not
read. The pickle can only name tensors, lists and the archive's own classes; for the latter it gets
:class:`_Module`, which keeps the attributes and does nothing else.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_OWN = "__torch__."  # module of the classes that an archive defines
_DTYPES = {
    "BFloat16": torch.bfloat16, "Bool": torch.bool, "Byte": torch.uint8, "Char": torch.int8,
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "Int": torch.int32,
    "Long": torch.int64, "Short": torch.int16,
}  # fmt: skip
_LISTS = ("build_boollist", "build_doublelist", "build_intlist", "build_tensorlist")


class _Module:
    """Stands for an object of a class that the archive defines; keeps its attributes."""

    attributes: Any = None

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _Unpickler(pickle.Unpickler):
    """Unpickler of one archive that finds nothing but what :meth:`find_class` makes."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(_stored(archive, f"{root}.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for; new objects, because a pickle could alter shared ones."""
        if module.startswith(_OWN):
            return type("_Module", (_Module,), {})
        if module == "torch" and name.removesuffix("Storage") in _DTYPES:
            return _DTYPES[name.removesuffix("Storage")]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _view(storage, offset, size, stride)
        if module == "torch.jit._pickle" and name in _LISTS:
            return lambda items: items
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return lambda value, _: value
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")

    def persistent_load(self, pid: Any) -> Tensor:
        """Return a storage as a vector; each is read once."""
        _, dtype, key, _, count = pid
        if (key, dtype) not in self._storages:
            content = bytearray(_stored(self._archive, f"{self._root}/{key}"))
            if len(content) != count * dtype.itemsize:
                raise ValueError(f"storage {key} has {len(content)} bytes, expected {count} values")
            empty = torch.empty(0, dtype=dtype)
            self._storages[key, dtype] = torch.frombuffer(content, dtype=dtype) if count else empty
        return self._storages[key, dtype]


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a TorchScript archive by their names in the module tree.

    Anything can be raised for a damaged or hostile archive; none of its code runs.
    """
    with zipfile.ZipFile(path) as archive:
        # True of stored members that do not overlap: nothing can be larger in memory than on disk.
        if sum(info.compress_size for info in archive.infolist()) > path.stat().st_size:
            raise ValueError("its members overlap")
        roots = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"it has {len(roots)} members called data.pkl, expected one")
        module = _Unpickler(archive, roots[0].removesuffix(".pkl")).load()
    return dict(_named_tensors(module, "", set()))


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read a member, which PyTorch never compresses."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed")
    return archive.read(info)


def _view(storage: Tensor, offset: int, size: Any, stride: Any) -> Tensor:
    """View a storage as a tensor; torch checks that it lies inside."""
    if math.prod(size) > storage.numel():
        raise ValueError(f"a tensor of size {tuple(size)} exceeds its storage")
    return torch.as_strided(storage, size, stride, offset)


def _named_tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    attributes = module.attributes if isinstance(module, _Module) else None
    if not isinstance(attributes, dict) or id(module) in seen:
        return
    seen.add(id(module))  # a pickle can hold circles
    for name, value in attributes.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(name, str):
            yield from _named_tensors(value, f"{prefix}{name}.", seen)
