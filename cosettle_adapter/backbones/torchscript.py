"""Reading the tensors of TorchScript archives, such as OpenAI's CLIP files, without running them.

An archive is a zip file of storages, code, and a pickle of the module tree. The code is not read.
Unpickling creates tensors, containers, and a :class:`_Module` for each object of the archive's
classes, nothing else.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "BFloat16": torch.bfloat16, "Bool": torch.bool, "Byte": torch.uint8, "Char": torch.int8,
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "Int": torch.int32,
    "Long": torch.int64, "Short": torch.int16,
}  # fmt: skip


class _Module:
    """Stand-in for an object of a class in the archive; keeps its attributes."""

    attributes: Any = None

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}.pkl"))
        self._archive, self._root = archive, root
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__."):
            return type("_Module", (_Module,), {})
        known: dict[tuple[str, str], Any] = {  # new on each call: a pickle can modify them
            ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: _tensor(*arguments),
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
            ("collections", "OrderedDict"): dict,
        }
        for kind in ("bool", "double", "int", "tensor"):
            known["torch.jit._pickle", f"build_{kind}list"] = list
        for kind, dtype in _DTYPES.items():
            known["torch", f"{kind}Storage"] = dtype
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        if (key, dtype) not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}/{key}"))
            if len(content) != count * dtype.itemsize:
                raise ValueError(f"storage {key} has {len(content)} bytes, expected {count} values")
            empty = torch.empty(0, dtype=dtype)
            self._storages[key, dtype] = torch.frombuffer(content, dtype=dtype) if count else empty
        return self._storages[key, dtype]


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Read an archive's tensors by name; a hostile one can raise any error, but runs no code."""
    with zipfile.ZipFile(path) as archive:
        (root,) = [name[:-4] for name in archive.namelist() if name.endswith("/data.pkl")]
        members = [info for info in archive.infolist() if info.filename.startswith(root)]
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("its members are compressed or overlap")  # PyTorch's never do
        return dict(_named_tensors(_Unpickler(archive, root).load(), "", set()))


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    if math.prod(size) > storage.numel():
        raise ValueError(f"a tensor of size {tuple(size)} exceeds its storage")
    return storage.as_strided(size, stride, offset)  # raises beyond the storage


def _named_tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    attributes = module.attributes if isinstance(module, _Module) else None
    if not isinstance(attributes, dict) or id(module) in seen:
        return
    seen.add(id(module))  # a hostile pickle can contain cycles
    for name, value in attributes.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(name, str):
            yield from _named_tensors(value, f"{prefix}{name}.", seen)
