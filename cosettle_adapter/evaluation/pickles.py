"""Reading arrays out of a pickle without running it.

A pickle is a program: it names functions, and unpickling calls them. Here only the names that NumPy
writes for an array are known, none of them means NumPy's own function, and every other is refused
before anything is called. What stands in for NumPy's functions only takes down shape, type and
bytes; arrays are made of these afterwards, and checked.
"""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from cosettle_adapter.errors import FrameError

# plain numbers, booleans, fixed-length byte and text strings, and objects, which must be bytes
_TYPES = re.compile(r"b1|[iu][1248]|f[248]|[SU][0-9]{1,9}|O8?")
_NDARRAY = object()  # stands for the class numpy.ndarray, and can be neither called nor changed
_DEPTH = 8


def load_arrays(path: Path) -> Any:
    """Read a pickle of dicts, lists, tuples, strings, numbers and NumPy arrays.

    Arrays of numbers share the file's bytes and cannot be written to; arrays of objects, which may
    hold bytes alone, become lists.

    Args:
        path: a pickle; it is not executed.

    Raises:
        FrameError: the file is missing or damaged, or holds or calls anything else.
    """
    try:
        with path.open("rb") as file:
            return _finished(_Unpickler(file).load(), _DEPTH, {})
    except _RefusedError as error:
        raise FrameError(
            f"{path} was not loaded: it {error}, but a pickle of annotations holds only arrays, "
            "strings and numbers; do not trust it, and download the data set again from its authors"
        ) from error
    except Exception as error:  # damaged bytes can fail in any way
        raise FrameError(
            f"{path} cannot be read as a pickle of arrays: {type(error).__name__}: {error}"
        ) from error


class _RefusedError(Exception):
    pass


class _Type:
    """What a pickle says of an array's type."""

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or not _TYPES.fullmatch(code):
            raise _RefusedError(f"has an array of type {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        if len(state) < 8 or state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
            raise _RefusedError("has an array of a compound type")
        self.order = state[1]


class _Array:
    """What a pickle says of an array; its state comes with the call or after it."""

    def __init__(self, *content: Any) -> None:
        self.content = content  # type, bytes, shape, order

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        self.content = (kind, data, shape, "F" if fortran else "C")

    def made(self) -> Any:
        if not self.content:
            raise _RefusedError("has an array without content")
        kind, data, shape, order = self.content
        if not isinstance(kind, _Type) or order not in ("C", "F"):
            raise _RefusedError("describes an array by something that is no type")
        if kind.code.startswith("O"):
            if not isinstance(data, list) or not all(isinstance(item, bytes) for item in data):
                raise _RefusedError("has an array of objects that are not bytes")
            return data
        dtype = np.dtype(kind.code)
        dtype = dtype if kind.order == "|" else dtype.newbyteorder(kind.order)  # type: ignore[arg-type]
        if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} and type {dtype} has {len(data)} bytes")
        return np.ndarray(shape, dtype, data, order=order)  # a view, because videos are large


class _Unpickler(pickle.Unpickler):
    """Knows the names that NumPy's arrays need, made anew for every file.

    A pickle can set attributes of a function it was given, so none is handed out twice.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._names: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): lambda code, *_: _Type(code),
            ("_codecs", "encode"): lambda text, encoding: _encode(text, encoding),
            ("__builtin__", "bytes"): lambda: b"",  # how old protocols write no bytes
        }
        for package in ("numpy.core", "numpy._core"):  # before and since NumPy 2
            self._names |= {
                (f"{package}.multiarray", "_reconstruct"): lambda *args: _reconstruct(*args),
                (f"{package}.multiarray", "scalar"): lambda kind, data: _Array(
                    kind, data, (), "C"
                ).made()[()],
                (f"{package}.numeric", "_frombuffer"): lambda data, kind, shape, order: _Array(
                    kind, data, shape, order
                ),
            }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise _RefusedError(f"asks for {module}.{name}")
        return self._names[module, name]


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise _RefusedError(f"encodes as {encoding!r}")
    return text.encode("latin-1")


def _reconstruct(subtype: Any, shape: Any, code: Any) -> _Array:
    del shape, code  # NumPy writes (0,) and b'b' and gives the real ones in the state
    if subtype is not _NDARRAY:
        raise _RefusedError("has an array of another class than numpy.ndarray")
    return _Array()


def _finished(value: Any, depth: int, seen: dict[int, Any]) -> Any:
    """The value with its arrays made, if it holds nothing else than is allowed."""
    if depth < 0:
        raise _RefusedError(f"is nested more than {_DEPTH} deep")
    if isinstance(value, _Array):
        return value.made()
    if isinstance(value, (dict, list, tuple)):
        if id(value) not in seen:  # a small pickle can hold the same list a billion times
            items = [_finished(item, depth - 1, seen) for item in value]
            if isinstance(value, dict):
                held = [_finished(item, depth - 1, seen) for item in value.values()]
                seen[id(value)] = dict(zip(items, held, strict=True))
            else:
                seen[id(value)] = type(value)(items)
        return seen[id(value)]
    if value is None or isinstance(value, (bool, int, float, str, bytes, bytearray, np.generic)):
        return value
    raise _RefusedError(f"holds a {type(value).__name__}")
