"""Drawing and resampling on devices that have no float64, such as Apple's GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cosettle_adapter.video import plan_geometry, resample_to_points
from cosettle_adapter.visualization import (
    draw_tracks,
    fit_pca,
    overlay_masks,
    pca_frames,
    similarity_frames,
    similarity_maps,
    similarity_peaks,
)

GEOMETRY = plan_geometry(40, 60, patch=10)


class NoFloat64(Tensor):
    """A tensor that refuses to become float64 unless it moves to the CPU first."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return result.as_subclass(Tensor)
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        return result


def pca(frames: Tensor, features: Tensor) -> Tensor:
    reference = fit_pca(features)
    basis = fit_pca(features.flip(1), align_to=reference.scores(features))
    return pca_frames(features.flip(1), basis, size=GEOMETRY.frame)


@pytest.mark.parametrize(
    "draw",
    [
        lambda frames, features: draw_tracks(frames, 40 * features[:, 0, :, :2]),
        lambda frames, features: overlay_masks(frames, features.sigmoid() / 8, geometry=GEOMETRY),
        lambda frames, features: overlay_masks(frames, (frames[:, 0] > 99).long()),
        lambda frames, features: similarity_frames(
            frames, similarity_maps(features, GEOMETRY, (9, 20)), GEOMETRY
        ),
        lambda frames, features: similarity_peaks(features[:, 0], GEOMETRY),
        lambda frames, features: resample_to_points(features, GEOMETRY, GEOMETRY.cell_centers()),
        lambda frames, features: resample_to_points(features, GEOMETRY, 30 * features[0, 0, :, :2]),
        pca,
    ],
)  # fmt: skip
def test_nothing_becomes_float64_on_the_device(draw: Callable[[Tensor, Tensor], Tensor]) -> None:
    frames = torch.randint(0, 256, (3, 3, 40, 60), dtype=torch.uint8)
    features = torch.rand(3, 8, 4, 6)
    expected = draw(frames, features)
    drawn = draw(frames.as_subclass(NoFloat64), features.as_subclass(NoFloat64)).cpu()
    torch.testing.assert_close(drawn, expected)
