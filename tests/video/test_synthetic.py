from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cosettle_adapter.errors import FrameError, GeometryError, MissingExtraError
from cosettle_adapter.video import RenderedClip, photographs, render_clip

MOTIONS = ("pan", "zoom", "rotate", "mixed")


def smooth_photo(height: int = 200, width: int = 300, phase: float = 0.0) -> torch.Tensor:
    """(3, H, W) uint8 of broad waves, which interpolation hardly changes."""
    y = torch.linspace(0, 1.5, height)[:, None]
    x = torch.linspace(0, 2, width)
    waves = [torch.sin(2.1 * x + y + phase), torch.cos(1.7 * y - x), torch.sin(x + 1.3 * y + 2)]
    return (127.5 + 110 * torch.stack(waves)).round().to(torch.uint8)


def colours(frames: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(T, 3, N) colours of (T, 3, H, W) frames at (T, N, 2) pixels."""
    sides = torch.tensor([frames.shape[-1], frames.shape[-2]], dtype=torch.float64)
    grid = (2 * positions / sides - 1).float()[:, None]
    sampled = F.grid_sample(frames.float(), grid, "bilinear", "border", align_corners=False)
    return sampled[:, :, 0]


def differences(clip: RenderedClip, points: torch.Tensor) -> torch.Tensor:
    """(M,) differences of colour to frame 0, of all visible points at all times."""
    positions, visible = clip.track(points)
    seen = colours(clip.frames, positions)
    # half a pixel from the edge there is nothing to interpolate with
    sides = torch.tensor([clip.frames.shape[-1], clip.frames.shape[-2]])
    visible &= ((positions >= 0.5) & (positions <= sides - 0.5)).all(-1)
    return (seen - seen[:1]).abs().amax(1)[visible]


def points_in(height: int, width: int, margin: float = 1.0, count: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    extent = torch.tensor([width, height], dtype=torch.float64) - 2 * margin
    return margin + extent * torch.rand(count, 2, generator=generator, dtype=torch.float64)


@settings(max_examples=12)
@given(
    motion=st.sampled_from(MOTIONS),
    amount=st.floats(0, 0.8),
    seed=st.integers(0, 10**6),
    height=st.integers(40, 90),
    width=st.integers(40, 90),
)
def test_colours_stay_with_their_points(
    motion: str, amount: float, seed: int, height: int, width: int
) -> None:
    clip = render_clip(
        smooth_photo(), frames=4, size=(height, width), motion=motion, amount=amount, seed=seed
    )  # type: ignore[call-overload]
    assert clip.frames.shape == (4, 3, height, width)
    assert clip.frames.dtype == torch.uint8
    off = differences(clip, points_in(height, width))
    assert off.max() <= 2.5
    assert off.mean() <= 0.7


def test_sub_pixel_positions_are_exact() -> None:
    """Where the colour is a linear function of place, it tells the place to a hundredth."""
    y, x = torch.meshgrid(torch.arange(255.0), torch.arange(255.0), indexing="ij")
    photo = torch.stack([x, y, 0 * x]).to(torch.uint8)
    clip = render_clip(photo, frames=6, size=(100, 100), motion="mixed", amount=0.2, seed=3)
    positions, _ = clip.track(points_in(100, 100, margin=4))
    inside = ((positions > 3) & (positions < 97)).all(-1)
    told = colours(clip.frames, positions)[:, :2]
    for t in range(1, 6):
        # rounding to bytes averages out over many points, a shift of the sampling would not
        assert inside[t].sum() > 50
        assert (told[t] - told[0])[:, inside[t]].mean(-1).abs().max() < 0.05


def test_amounts_mean_what_they_say() -> None:
    photo = smooth_photo()
    centre = torch.tensor([[45.0, 30.0], [50.0, 30.0]])

    def ends(motion: str, amount: float) -> tuple[torch.Tensor, torch.Tensor]:
        clip = render_clip(photo, frames=9, size=(60, 90), motion=motion, amount=amount)  # type: ignore[arg-type]
        positions, _ = clip.track(centre)
        return positions[0], positions[-1]

    before, after = ends("pan", 0.5)
    assert (after - before).norm(dim=-1).tolist() == pytest.approx([30, 30])
    before, after = ends("zoom", 0.5)
    growth = (after[1] - after[0]).norm() / (before[1] - before[0]).norm()
    assert float(max(growth, 1 / growth)) == pytest.approx(1.5)
    before, after = ends("rotate", 0.5)
    (x0, y0), (x1, y1) = (before[1] - before[0]).tolist(), (after[1] - after[0]).tolist()
    assert abs(x0 * y1 - y0 * x1) / 25 == pytest.approx(torch.sin(torch.tensor(0.5)).item())
    for motion in MOTIONS:
        before, after = ends(motion, 0.0)
        torch.testing.assert_close(before, after)


@pytest.mark.parametrize("photometric", [0.0, 0.5])
def test_equal_arguments_give_equal_clips(photometric: float) -> None:
    def render(seed: int) -> RenderedClip:
        return render_clip(
            smooth_photo(),
            frames=3,
            size=(40, 50),
            seed=seed,
            cutout=smooth_photo(phase=1),
            photometric=photometric,
        )

    first, again, other = render(7), render(7), render(8)
    assert torch.equal(first.frames, again.frames)
    assert torch.equal(first.homographies, again.homographies)
    assert not torch.equal(first.homographies, other.homographies)


@pytest.fixture(scope="module")
def clip() -> RenderedClip:
    """An object before a panned background."""
    return render_clip(
        smooth_photo(),
        frames=8,
        size=(120, 160),
        motion="pan",
        amount=0.5,
        seed=5,
        cutout=smooth_photo(120, 160, phase=2.5),
    )


def test_points_ride_on_what_they_lie_on(clip: RenderedClip) -> None:
    assert clip.object_mask is not None
    assert clip.object_homographies is not None
    assert (clip.object_homographies[-1] - clip.homographies[-1])[:2, 2].norm() > 5
    points = points_in(120, 160, count=3000)
    inner = ~_near_edge(clip.object_mask)
    positions, visible = clip.track(points)
    col, row = points.floor().long().unbind(-1)
    on_object = clip.object_mask[0, row, col]
    assert 0 < on_object.sum() < len(points)
    seen = colours(clip.frames, positions)
    for t in range(8):
        col, row = positions[t].floor().long().unbind(-1)
        col, row = col.clamp(0, 159), row.clamp(0, 119)
        clear = visible[t] & inner[t, row, col] & inner[0][points[:, 1].long(), points[:, 0].long()]
        assert (seen[t] - seen[0])[:, clear].abs().max() <= 3
        # what is seen on the object came from the object, and nothing else is on it
        assert torch.equal(clip.object_mask[t, row, col][clear], on_object[clear])
    assert visible[:, on_object].all()
    x, y = positions[-1].unbind(-1)
    inside = (x >= 0) & (x < 160) & (y >= 0) & (y < 120)
    covered = visible[0] & inside & ~visible[-1]  # the background, behind the object
    assert covered.any()
    assert clip.object_mask[-1, y[covered].long(), x[covered].long()].all()


def _near_edge(mask: torch.Tensor) -> torch.Tensor:
    """Pixels within four of the object's soft rim."""
    value = mask.float()
    return F.max_pool2d(value, 9, 1, 4) != -F.max_pool2d(-value, 9, 1, 4)


def test_points_outside_the_frame_are_invisible_but_followed() -> None:
    clip = render_clip(smooth_photo(), frames=3, size=(60, 90), motion="pan", amount=0.5)
    positions, visible = clip.track(torch.tensor([[-1.0, 5.0], [90.0, 5.0], [89.9, 59.9]]))
    assert visible[0].tolist() == [False, False, True]
    assert positions.dtype == torch.float64
    torch.testing.assert_close(positions[0, 0], torch.tensor([-1.0, 5.0], dtype=torch.float64))
    with pytest.raises(FrameError, match=r"points of shape \(2, 3\), expected \(N, 2\)"):
        clip.track(torch.zeros(2, 3))
    clip = render_clip(smooth_photo(20, 24), frames=1, size=(70, 110), cutout=smooth_photo(9, 7))
    assert clip.frames.shape == (1, 3, 70, 110), "a small photograph, and one frame"
    assert clip.track(points_in(70, 110))[1].all()


def test_photometric_drift_changes_colours_and_no_positions() -> None:
    def render(strength: float) -> RenderedClip:
        return render_clip(smooth_photo(), frames=6, size=(60, 90), photometric=strength)

    plain, drifting = render(0.0), render(1.0)
    assert torch.equal(plain.homographies, drifting.homographies)
    off = (drifting.frames.float() - plain.frames.float()).abs().mean((1, 2, 3))
    assert (off > 2).all()
    assert off.max() < 40


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"frames": 0}, GeometryError, "frames must be a whole number of at least 1, got 0"),
        ({"size": (0, 5)}, GeometryError, "size height must be a whole number"),
        ({"motion": "pam"}, FrameError, "got motion='pam', expected one of pan, .*mixed"),
        ({"amount": 3}, FrameError, "amount must be from 0 to 2, got 3"),
        ({"photometric": 1.5}, FrameError, "photometric must be from 0 to 1"),
        ({"photo": torch.rand(3, 9, 9)}, FrameError, r"photo must be one \(3, h, w\) uint8 image"),
        ({"cutout": torch.zeros(2, 3, 9, 9)}, FrameError, r"cutout must be one .* \(2, 3, 9, 9\)"),
        ({"photo": torch.zeros(9, 9, 3)}, FrameError, "pass the numpy array"),
    ],
)
def test_errors(options: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"photo": smooth_photo(), "frames": 2, "size": (20, 30), **options}
    with pytest.raises(error, match=message):
        render_clip(arguments.pop("photo"), **arguments)  # type: ignore[arg-type]


def test_photographs_come_from_the_installed_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetchers = pytest.importorskip("skimage.data._fetchers")
    monkeypatch.setattr(fetchers, "_fetch", lambda *_, **__: pytest.fail("it fetches"))
    photos = photographs()
    assert {"astronaut", "chelsea", "coffee", "rocket"} <= set(photos)
    assert photos["chelsea"].shape == (3, 300, 451)
    for photo in photos.values():
        assert photo.dtype == torch.uint8
        assert photo.float().std() > 10
    monkeypatch.setattr(sys.modules["skimage.data"], "__path__", [str(tmp_path)])
    with pytest.raises(FrameError, match=r"astronaut\.png cannot be read as an image"):
        photographs()
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(MissingExtraError, match=r"demo photographs .*\[demo\]"):
        photographs()
