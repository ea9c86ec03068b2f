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
_PLAIN = (type(None), bool, int, float, str, bytes, bytearray, np.generic)
_DEPTH = 8


def load_arrays(path: Path) -> Any:
    """Read a pickle of dicts, lists, tuples, strings, numbers and NumPy arrays, without running it.

    Arrays of numbers share the file's bytes and cannot be written to; arrays of objects, which may
    hold bytes alone, become lists.

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

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _TYPES.fullmatch(code):
            raise _RefusedError(f"has an array of type {code!r}")
        self.code: str = code
        self.order: Any = "="

    def __setstate__(self, state: Any) -> None:
        if any(state[2:5]):
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
        kind, data, shape, order = self.content  # fails where there was no state
        if not isinstance(kind, _Type):
            raise _RefusedError("describes an array by something that is no type")
        if kind.code.startswith("O"):
            if not isinstance(data, list) or not all(isinstance(item, bytes) for item in data):
                raise _RefusedError("has an array of objects that are not bytes")
            return data
        dtype = np.dtype(kind.code).newbyteorder(kind.order)
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} and type {dtype} has {len(data)} bytes")
        return np.ndarray(shape, dtype, data, order=order)  # a view, because videos are large


class _Unpickler(pickle.Unpickler):
    """Knows the names that NumPy's arrays need."""

    def find_class(self, module: str, name: str) -> Any:
        # functions are made anew each time: a pickle can set attributes of one it was given
        known = {
            "numpy.ndarray": _NDARRAY,
            "numpy.dtype": lambda *args: _Type(*args),
            "_codecs.encode": lambda text, _: str(text).encode("latin-1"),
            "__builtin__.bytes": lambda: b"",  # how old protocols write no bytes
            "numpy._core.multiarray._reconstruct": lambda *args: _reconstruct(*args),
            "numpy._core.multiarray.scalar": lambda *args: _Array(*args, (), "C").made()[()],
            "numpy._core.numeric._frombuffer": lambda data, *rest: _Array(rest[0], data, *rest[1:]),
        }
        full = f"{module}.{name}".replace("numpy.core.", "numpy._core.")  # before NumPy 2
        if full not in known:
            raise _RefusedError(f"asks for {module}.{name}")
        return known[full]


def _reconstruct(subtype: Any, *_: Any) -> _Array:
    if subtype is not _NDARRAY:  # what follows is replaced by the state
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
    if isinstance(value, _PLAIN):
        return value
    raise _RefusedError(f"holds a {type(value).__name__}")
