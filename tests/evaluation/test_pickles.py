from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.pickles import load_arrays


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
        (open, (str(trace), "w")),
        (eval, (f"open({str(trace)!r}, 'w')",)),
        (exec, (f"open({str(trace)!r}, 'w')",)),
        (__import__, ("os",)),
        (getattr, ("", "join")),
        (np.save, (str(trace), 1)),
        (np.load, (str(trace),)),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (stream(named("builtins", "list"), b")R"), "asks for builtins.list"),
        (stream(named("numpy", "ndarray"), b"K\x05\x85R"), "cannot be read .* TypeError"),
        (stream(named("numpy", "ndarray.tobytes")), "asks for numpy.ndarray.tobytes"),
        (stream(named("numpy", "memmap")), "asks for numpy.memmap"),
        (stream(RECONSTRUCT, b"NK\x00\x85U\x01b\x87R"), "another class than numpy.ndarray"),
        (stream(ARRAY), "has an array without content"),
        (stream(RECONSTRUCT), "holds a function"),
        (stream(FLOAT), "holds a _Type"),
        (stream(named("numpy", "dtype"), b"U\x05O,f8,\x85R"), "an array of type 'O,f8,'"),
        (stream(named("numpy", "dtype"), b"U\x02V8\x85R"), "an array of type 'V8'"),
        (stream(FLOAT, b"(K\x03U\x01<FNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb"), "cannot be"),
        (
            stream(named("_codecs", "encode"), b"X\x01\x00\x00\x00aU\x03zip\x86R"),
            "encodes as 'zip'",
        ),
        (stream(named("_codecs", "encode"), b"}X\x01\x00\x00\x00ak\x73b"), "cannot be read"),
        (stream(b"U\x01aQ"), "cannot be read .* persistent"),
        (b"", "cannot be read .* EOFError"),
        (b"PK\x03\x04", "cannot be read"),
    ],
)
def test_tampered_streams_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(content)
    with pytest.raises(FrameError, match=message):
        load_arrays(path)


def test_a_stream_cannot_change_the_next_one(tmp_path: Path) -> None:
    tampered = stream(named("_codecs", "encode"), b"}U\x04evilK\x01sb")  # sets an attribute
    path = tmp_path / "evil.pkl"
    path.write_bytes(tampered)
    with pytest.raises(FrameError, match="holds a function"):
        load_arrays(path)
    path.write_bytes(stream(named("_codecs", "encode"), b"}b"))
    with pytest.raises(FrameError, match="holds a function"):
        load_arrays(path)
    content = write(path, {"a": b"\xff\x00"}, protocol=2)
    assert load_arrays(content) == {"a": b"\xff\x00"}


def test_arrays_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for array in (
        np.zeros(2, dtype=[("a", "f8"), ("b", "O")]),
        np.ma.masked_array([1, 2]),
        np.rec.array([(1,), (2,)], dtype=[("a", "i4")]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        np.zeros(2, dtype=complex),
    ):
        with pytest.raises(FrameError, match="was not loaded: it"):
            load_arrays(write(tmp_path / "a.pkl", array))


def test_bytes_that_do_not_fill_the_shape_are_refused(tmp_path: Path) -> None:
    data = pickle.dumps(np.arange(6, dtype=np.uint8), protocol=2)
    path = tmp_path / "a.pkl"
    path.write_bytes(data.replace(b"K\x06", b"K\x07"))
    assert data != path.read_bytes()
    with pytest.raises(FrameError, match=r"shape \(7,\) and type uint8 has 6 bytes"):
        load_arrays(path)


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
    content = {"array": array, "also": [array, array.dtype.str, 3, None, 2.5, (True, b"\xff")]}
    found = load_arrays(write(path, content, protocol))
    np.testing.assert_array_equal(found["array"], array)
    assert found["array"].dtype == array.dtype
    assert found["also"][1:] == content["also"][1:]


def test_what_numpy_names_is_what_is_known(tmp_path: Path) -> None:
    """Both the old and the new names of NumPy's modules are understood."""
    content = {"a": np.arange(4.0), "b": np.float32(2.5)}
    data = pickle.dumps(content, protocol=2)
    path = tmp_path / "a.pkl"
    for old, new in [(b"numpy.core.", b"numpy._core."), (b"numpy._core.", b"numpy.core.")]:
        path.write_bytes(data.replace(old, new))
        named = [str(arg) for op, arg, _ in pickletools.genops(path.read_bytes()) if arg]
        assert any(new.decode() in name for name in named)
        found = load_arrays(path)
        np.testing.assert_array_equal(found["a"], content["a"])
        assert found["b"] == content["b"]
