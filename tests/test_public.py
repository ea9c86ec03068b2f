from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

import cosettle_adapter


def test_every_public_name_is_there() -> None:
    for name in cosettle_adapter.__all__:
        assert getattr(cosettle_adapter, name) is not None
    assert dir(cosettle_adapter) == sorted(cosettle_adapter.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'CoSettel'"):
        cosettle_adapter.CoSettel  # noqa: B018


def test_every_module_imports_and_has_a_docstring() -> None:
    prefix = cosettle_adapter.__name__ + "."
    names = [module.name for module in pkgutil.walk_packages(cosettle_adapter.__path__, prefix)]
    assert len(names) > 20
    for name in names:
        assert importlib.import_module(name).__doc__, name


def test_the_types_are_shipped() -> None:
    assert (Path(cosettle_adapter.__path__[0]) / "py.typed").is_file()
