"""The public names, the errors, and what a missing extra says."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch

import cosettle_adapter
from cosettle_adapter import errors
from cosettle_adapter.imports import require


def test_every_public_name_is_there() -> None:
    for package in ("", ".video", ".correspondence", ".closed_form"):
        module = importlib.import_module(f"cosettle_adapter{package}")
        assert all(getattr(module, name) is not None for name in module.__all__)
    assert (Path(cosettle_adapter.__path__[0]) / "py.typed").is_file()
    assert dir(cosettle_adapter) == sorted(cosettle_adapter.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'CoSettel'"):
        cosettle_adapter.CoSettel  # noqa: B018


def test_every_module_imports_and_has_a_docstring() -> None:
    prefix = cosettle_adapter.__name__ + "."
    for module in pkgutil.walk_packages(cosettle_adapter.__path__, prefix):
        assert importlib.import_module(module.name).__doc__, module.name


def test_every_error_is_ours_and_a_builtin_one() -> None:
    for name, error in inspect.getmembers(errors, inspect.isclass):
        if name != "CosettleError" and issubclass(error, Exception):
            assert issubclass(error, errors.CosettleError)
            assert issubclass(error, (ValueError, OSError, ImportError))


def test_close_names_are_suggested_and_a_missing_extra_gives_the_pip_command() -> None:
    known = ["dinov2-vitb14", "dino-vitb16"]
    assert "'dinov2-vitb14'" in errors.did_you_mean("dinov2-vit-b14", known)
    assert errors.did_you_mean("zzzz", known) == ""
    message = r"reading video files needs the package 'no_such_module'.*adapter\[video\]'"
    with pytest.raises(errors.MissingExtraError, match=message):
        require("no_such_module.sub", extra="video", purpose="reading video files")


def test_every_model_is_listed_published_ones_first() -> None:
    models = cosettle_adapter.list_models()
    order = ["in the package", "by the authors", "fitted, in your cache", "fitted on first use"]
    ranks = [order.index(model.projection) for model in models]
    assert ranks == sorted(ranks)
    assert ranks.count(1) == 8, "the paper's eight"
    assert {"dinov2-vitb14", "mae-vitl16"} <= {model.name for model in models}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("analysis", "feature_variants"),
        ("dino_tracker", "plan_settings"),
        ("feature_file", "read_features"),
        ("frames", "open_frames"),
        ("evaluation", "DavisClip"),
    ],
)
def test_names_of_version_0_1_warn(module: str, name: str) -> None:
    old = importlib.import_module(f"cosettle_adapter.{module}")
    with pytest.warns(DeprecationWarning, match=name):
        assert getattr(old, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        old.nothing  # noqa: B018
    if module == "evaluation":
        with pytest.raises(AttributeError, match="has davis_clips"):
            old.davis_sequences  # noqa: B018


def test_frame_keywords_of_version_0_1_make_a_selection() -> None:
    frames = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    with pytest.warns(DeprecationWarning, match=r"select=FrameSelection\((every|max_frames)"):
        (chunk,) = cosettle_adapter.video.open_frames(frames, every=2, max_frames=2)
    assert chunk.timestamps.tolist() == [0, 2]
    with pytest.raises(TypeError, match="put them into FrameSelection"):
        cosettle_adapter.video.open_frames(
            frames, select=cosettle_adapter.FrameSelection(), every=2
        )
