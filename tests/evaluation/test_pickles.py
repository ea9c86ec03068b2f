from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cosettle_adapter.evaluation.pickles import load_arrays
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cosettle_adapter.errors import FrameError


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_call_is_refused_and_not_made(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "was here"
    for function, arguments in [
        (Path.touch, (trace,)),
        (eval, (f"open({str(trace)!r}, 'w')",)),
        (__import__, ("os",)),
        (getattr, ("", "join")),
        (np.frombuffer, (b"1234",)),
        (pickle.loads, (b"",)),
    ]:
        content = {"goat": {"video": [Call(function, *arguments)]}}
        with pytest.raises(FrameError, match=r"was not loaded: it asks for .* do not trust it"):
            load_arrays(write(tmp_path / "evil.pkl", content, protocol))
    # the same file does it, if it is executed
    write(tmp_path / "evil.pkl", Call(Path.touch, trace), protocol)
    assert not trace.exists()
    pickle.loads((tmp_path / "evil.pkl").read_bytes())
    assert trace.exists()


def stream(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


RECONSTRUCT = named("numpy._core.multiarray", "_reconstruct")
ARRAY = RECONSTRUCT + named("numpy", "ndarray") + b"K\x00\x85U\x01b\x87R"
FLOAT = named("numpy", "dtype") + b"U\x02f8\x85R"
ENCODE = named("_codecs", "encode")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (stream(named("builtins", "list"), b")R"), "asks for builtins.list"),
        (stream(named("numpy", "ndarray"), b"K\x05\x85R"), "cannot be read .* TypeError"),
        (stream(named("numpy", "ndarray.tobytes")), "asks for numpy.ndarray.tobytes"),
        (stream(RECONSTRUCT, b"NK\x00\x85U\x01b\x87R"), "another class than numpy.ndarray"),
        (stream(ARRAY), "cannot be read .* not enough values"),
        (stream(RECONSTRUCT), "holds a function"),
        (stream(FLOAT), "holds a _Type"),
        (stream(named("numpy", "dtype"), b"U\x05O,f8,\x85R"), "an array of type 'O,f8,'"),
        (stream(named("numpy", "dtype"), b"U\x02V8\x85R"), "an array of type 'V8'"),
        (stream(FLOAT, b"(K\x03U\x01<U\x01aNNK\x00K\x00K\x00tb"), "of a compound type"),
        (stream(ENCODE, b"}U\x04evilK\x01sb"), "holds a function"),  # sets an attribute of it
        # a function that has been given the attributes of a type
        (stream(ARRAY, b"(K\x01K\x01", ENCODE, b"}U\x04codeU\x04f8,Osb\x89C\x00tb"), "is no type"),
        (stream(b"U\x01aQ"), "cannot be read .* persistent"),
        (b"", "cannot be read .* EOFError"),
        (b"PK\x03\x04", "cannot be read"),
        (pickle.dumps(np.arange(6, dtype=np.uint8), 2).replace(b"K\x06", b"K\x07"), "has 6 bytes"),
        (pickle.dumps(np.array([1, "a"], dtype=object)), "objects that are not bytes"),
        (pickle.dumps(np.ma.masked_array([1, 2])), "asks for numpy.ma"),
        (pickle.dumps(np.array(["2020"], dtype="datetime64[D]")), "an array of type 'M8'"),
        (pickle.dumps({1, 2}), "holds a set"),
    ],
)
def test_tampered_streams_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(content)
    with pytest.raises(FrameError, match=message):
        load_arrays(path)
    # nor has it changed how the next one is read
    assert load_arrays(write(path, {"a": b"\xff\x00"}, protocol=2)) == {"a": b"\xff\x00"}


def test_deep_and_endless_nesting_is_refused(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(12):
        deep = [deep]
    endless: list[Any] = []
    endless.append(endless)
    for content in (deep, endless):
        with pytest.raises(FrameError, match="nested more than 8 deep"):
            load_arrays(write(tmp_path / "a.pkl", content))
    many: list[Any] = []
    for _ in range(7):
        many = [many] * 1000  # 1000 to the power of 7 lists, if all are gone through
    assert len(load_arrays(write(tmp_path / "a.pkl", many))) == 1000


TYPES = st.one_of(
    arrays.boolean_dtypes(),
    arrays.integer_dtypes(endianness="?"),
    arrays.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    arrays.byte_string_dtypes(endianness="?", max_len=5),
    arrays.unicode_string_dtypes(endianness="?", max_len=5),
)


@given(
    arrays.arrays(TYPES, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0)),
    st.sampled_from([2, 3, 4, 5]),
    st.sampled_from("CF"),
)
def test_arrays_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, array: Any, protocol: int, order: Any
) -> None:
    array = np.asarray(array, order=order)
    path = tmp_path_factory.mktemp("p") / "a.pkl"
    content = {"array": array, "also": [np.float32(2.5), array.dtype.str, 3, None, (True, b"\xff")]}
    data = pickle.dumps(content, protocol)
    for old, new in [(b"numpy.core.", b"numpy._core."), (b"numpy._core.", b"numpy.core.")]:
        path.write_bytes(data.replace(old, new) if protocol == 2 else data)  # no lengths in it
        found = load_arrays(path)
        np.testing.assert_array_equal(found["array"], array)
        assert found["array"].dtype == array.dtype
        assert found["also"] == content["also"]
