"""PCA colours: the right components, one range for a clip, colours shared where structure is."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from pictures import uneven

from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.visualization import fit_pca, pca, pca_frames

from helpers import noise


def test_components_are_the_principal_ones() -> None:
    features = uneven()
    basis = fit_pca(features)
    tokens = rearrange(features, "t c h w -> (t h w) c").double()
    expected = torch.linalg.svd(tokens - tokens.mean(dim=0), full_matrices=False)
    overlap = (basis.components.double() * expected.Vh[:3]).sum(dim=-1).abs()
    torch.testing.assert_close(overlap, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(basis.components @ basis.components.T, torch.eye(3))
    spread = rearrange(basis.scores(features), "t k h w -> (t h w) k").std(dim=0)
    assert spread[0] > spread[1] > spread[2]
    mirrored = fit_pca(features * torch.tensor([1.0, -1] * 4)[:, None, None])
    for each in (basis, mirrored):
        assert (each.components.gather(1, each.components.abs().argmax(1, keepdim=True)) > 0).all()


def test_one_range_serves_the_whole_clip() -> None:
    features = uneven(frames=4)
    features[2] *= 2  # a frame that stands out must look it, not be normalised away
    basis = fit_pca(features)
    whole = pca_frames(features, basis, size=(12, 14))
    single = torch.cat([pca_frames(frame[None], basis, size=(12, 14)) for frame in features])
    assert torch.equal(whole, single)
    colours = basis.colours(features)
    assert float((colours <= 0).float().mean()) == pytest.approx(0.01, abs=0.01)
    assert float((colours >= 1).float().mean()) == pytest.approx(0.01, abs=0.01)


def test_a_sample_is_drawn_from_the_whole_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pca, "_SAMPLES", 60)
    features = noise(8, 4, 5, 5)
    features[6:, 0] *= 100  # what varies most does so at the end
    basis = fit_pca(features)
    assert basis.components[0].argmax() == 0
    assert 0.99 < basis.components[0, 0] < 1 - 1e-6
    assert torch.equal(basis.components, fit_pca(features).components)
    half = fit_pca(features.half())
    torch.testing.assert_close(half.components, basis.components, atol=1e-2, rtol=0)


def test_aligned_colours_undo_a_rotation_within_the_components() -> None:
    raw = uneven(frames=4)
    reference = fit_pca(raw)
    target = reference.scores(raw)
    turned = torch.einsum("dc,tchw->tdhw", torch.linalg.qr(noise(8, 8, seed=5))[0], raw)
    aligned = fit_pca(turned, align_to=target)
    torch.testing.assert_close(
        aligned.colours(turned), reference.colours(raw), atol=1e-3, rtol=1e-3
    )
    free = fit_pca(-turned).colours(-turned)
    assert (fit_pca(-turned, align_to=target).colours(-turned) - free).abs().max() > 0.1
    aligned, alone = fit_pca(raw, align_to=noise(4, 3, 6, 7, seed=9)), fit_pca(raw)
    projected = aligned.components @ alone.components.T @ alone.components
    torch.testing.assert_close(projected, aligned.components, atol=1e-5, rtol=1e-4)


def test_pictures_have_the_size_asked_for_and_show_patches() -> None:
    features = uneven(frames=2, h=2, w=3)
    basis = fit_pca(features)
    patches = pca_frames(features, basis, size=(20, 30))
    assert (patches.shape, patches.dtype) == ((2, 3, 20, 30), torch.uint8)
    assert (patches[:, :, :10, :10] == patches[:, :, :1, :1]).all()
    smooth = pca_frames(features, basis, size=(20, 30), mode="bilinear")
    assert not (smooth[:, :, :10, :10] == smooth[:, :, :1, :1]).all()


def test_pca_errors_say_what_was_got_and_what_to_do() -> None:
    features = uneven()
    with pytest.raises(GeometryError, match=r"\(8, 6, 7\).*features\[None\]"):
        fit_pca(features[0])
    with pytest.raises(GeometryError, match="126 patches of 2 channels"):
        fit_pca(features[:, :2])
    with pytest.raises(FrameError, match="NaN or infinite"):
        fit_pca(features.masked_fill(features > 10, torch.nan))
    with pytest.raises(GeometryError, match=r"align_to of shape \(3, 8, 6, 7\)"):
        fit_pca(features, align_to=features)
    with pytest.raises(GeometryError, match="4 channels, but the basis was fitted on 8"):
        fit_pca(features).scores(uneven(channels=4))
