from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cosettle_adapter.errors import FrameError
from cosettle_adapter.training.data import (
    Crop,
    apply_crop,
    augment,
    draw_crop,
    squash,
)


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


class TestDraw:
    @given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 10**6))
    def test_inside_the_frame(self, height: int, width: int, seed: int) -> None:
        crop = draw_crop(height, width, generator=torch.Generator().manual_seed(seed))
        assert crop.height >= 1
        assert crop.width >= 1
        assert crop.top >= 0
        assert crop.left >= 0
        assert crop.top + crop.height <= height
        assert crop.left + crop.width <= width

    def test_as_the_published_code_draws(self) -> None:
        """Area uniform, ratio log-uniform, sides cut to the frame, place uniform, half mirrored."""
        generator = torch.Generator().manual_seed(0)
        side, count = 224, 20_000
        crops = [draw_crop(side, side, generator=generator) for _ in range(count)]
        own = np.random.default_rng(0)
        area = side * side * own.uniform(0.5, 1.0, count)
        ratio = np.exp(own.uniform(math.log(3 / 4), math.log(4 / 3), count))
        for ours, theirs in (
            ([crop.width for crop in crops], np.minimum(np.round(np.sqrt(area * ratio)), side)),
            ([crop.height for crop in crops], np.minimum(np.round(np.sqrt(area / ratio)), side)),
        ):
            levels = np.linspace(0.02, 0.98, 25)
            assert np.abs(np.quantile(ours, levels) - np.quantile(theirs, levels)).max() <= 2
        free = [crop for crop in crops if crop.height <= side - 20]
        places = np.array([crop.top / (side - crop.height) for crop in free])
        assert np.histogram(places, bins=5, range=(0, 1))[0].min() > 0.17 * len(places)
        assert {crop.top for crop in crops if crop.height == side - 1} == {0, 1}
        assert sum(crop.flip for crop in crops) == pytest.approx(count / 2, rel=0.03)

    def test_wide_frames_are_narrowed_less_than_by_squashing(self) -> None:
        generator = torch.Generator().manual_seed(1)
        crops = [draw_crop(1080, 1920, generator=generator) for _ in range(3000)]
        shapes = [crop.width / crop.height for crop in crops]
        assert min(shapes) >= 0.74
        assert max(shapes) <= 1.545


class TestApply:
    def test_the_crop_of_equal_size_is_the_pixels_themselves(self) -> None:
        frames = noise(2, 3, 40, 50)
        out = apply_crop(frames, Crop(3, 7, 24, 24, flip=False), 24)
        assert torch.equal(out, frames[..., 3:27, 7:31] / 255)
        mirrored = apply_crop(frames, Crop(3, 7, 24, 24, flip=True), 24)
        assert torch.equal(mirrored, out.flip(-1))

    @pytest.mark.parametrize("side", [16, 40])
    def test_bicubic_with_antialiasing_as_pillow_does(self, side: int) -> None:
        frames = noise(1, 3, 37, 53)
        crop = Crop(2, 5, 31, 41, flip=False)
        out = apply_crop(frames, crop, side)
        for channel in range(3):
            picture = Image.fromarray(frames[0, channel].float().numpy())
            expected = np.asarray(
                picture.crop((5, 2, 46, 33)).resize((side, side), Image.Resampling.BICUBIC)
            )
            np.testing.assert_allclose(out[0, channel].numpy() * 255, expected, atol=0.01)

    def test_overshoot_is_kept(self) -> None:
        frames = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        frames[..., 16:] = 255
        out = apply_crop(frames, Crop(0, 0, 32, 32, flip=False), 48)
        assert float(out.min()) < -0.01
        assert float(out.max()) > 1.01


class TestAugment:
    @given(st.integers(8, 80), st.integers(8, 80), st.integers(1, 4), st.integers(0, 1000))
    def test_all_frames_alike(self, height: int, width: int, count: int, seed: int) -> None:
        frame = noise(3, height, width)
        frames = torch.stack([frame] * count)
        for first in (False, True):
            generator = torch.Generator().manual_seed(seed)
            out = augment(frames, 16, generator=generator, squash_first=first)
            assert out.shape == (count, 3, 16, 16)
            assert out.dtype == torch.float32
            assert out.is_contiguous()
            assert all(torch.equal(each, out[0]) for each in out)

    def test_the_same_seed_and_another(self) -> None:
        frames = noise(2, 3, 60, 90)
        one, two, other = (
            augment(frames, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(one, two)
        assert not torch.equal(one, other)

    def test_squashing_is_pillows_resize(self) -> None:
        frames = noise(1, 3, 61, 97)
        picture = Image.fromarray(frames[0].permute(1, 2, 0).numpy())
        expected = np.asarray(picture.resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
        ours = squash(frames, 48)[0].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(ours - expected).max() <= 1
        assert squash(frames[..., :48, :48], 48).shape == (1, 3, 48, 48)

    @pytest.mark.parametrize(
        "frames",
        [torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 8), torch.zeros(1, 1, 8, 8)],
    )
    def test_other_things_than_clips(self, frames: torch.Tensor) -> None:
        with pytest.raises(FrameError, match=r"expected \(T, 3, H, W\) of uint8"):
            augment(frames, 8, generator=torch.Generator())
