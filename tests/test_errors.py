from __future__ import annotations

import inspect

import pytest

from cosettle_adapter import errors
from cosettle_adapter.imports import require


def test_every_error_is_ours_and_a_builtin_one() -> None:
    for name, error in inspect.getmembers(errors, inspect.isclass):
        if name != "CosettleError" and issubclass(error, Exception):
            assert issubclass(error, errors.CosettleError)
            assert issubclass(error, (ValueError, OSError, ImportError))


def test_close_names_are_suggested_and_far_ones_are_not() -> None:
    known = ["dinov2-vitb14", "dino-vitb16"]
    assert "'dinov2-vitb14'" in errors.did_you_mean("dinov2-vit-b14", known)
    assert errors.did_you_mean("zzzz", known) == ""


def test_a_missing_extra_gives_the_pip_command() -> None:
    with pytest.raises(errors.MissingExtraError) as caught:
        require("no_such_module.sub", extra="video", purpose="reading video files")
    message = str(caught.value)
    assert "reading video files needs the package 'no_such_module'" in message
    assert "pip install 'cosettle-adapter[video]'" in message
