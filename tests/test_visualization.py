from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.cli import common, demo
from cosettle_adapter.cli.tables import terminal_table
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.evaluation.tables import comparison
from cosettle_adapter.evaluation.variants import ADAPTED, CENTRED, RAW_LAST, RAW_SAME
from cosettle_adapter.visualization import (
    comparison_picture,
    feature_panels,
    fit_pca,
    pca_film,
    pca_frames,
    side_by_side,
    time_slice,
    write_film,
)

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven(frames: int = 3, h: int = 6, w: int = 7, channels: int = 8) -> torch.Tensor:
    """Features whose channels vary by 8, 7, ... 1, turned so that no channel is a component."""
    features = noise(frames, channels, h, w)
    scaled = features * rearrange(torch.arange(channels, 0, -1.0), "c -> c 1 1")
    turn = torch.linalg.qr(noise(channels, channels, seed=1))[0]
    return torch.einsum("dc,tchw->tdhw", turn, scaled) + 5


def film(frames: int = 6, height: int = 32, width: int = 48) -> torch.Tensor:
    """Smooth, moving colours that a codec keeps well."""
    t, y, x = torch.meshgrid(
        torch.arange(frames) * 4, torch.arange(height), torch.arange(width), indexing="ij"
    )
    colours = torch.stack([(x + t) * 4, y * 6, 250 - (x + t) * 2], dim=1)
    return colours.clamp(0, 255).to(torch.uint8)


def decoded(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return rearrange([torch.from_numpy(frame) for frame in frames], "t h w c -> t c h w")


# PCA


def test_components_are_the_principal_ones() -> None:
    features = uneven()
    basis = fit_pca(features)
    tokens = rearrange(features, "t c h w -> (t h w) c").double()
    centred = tokens - tokens.mean(dim=0)
    expected = torch.linalg.svd(centred, full_matrices=False)
    overlap = (basis.components.double() * expected.Vh[:3]).sum(dim=-1).abs()
    torch.testing.assert_close(overlap, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(basis.components @ basis.components.T, torch.eye(3))
    spread = rearrange(basis.scores(features), "t k h w -> (t h w) k").std(dim=0)
    assert spread[0] > spread[1] > spread[2]


@given(signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=8, max_size=8), seed=st.integers(0, 9))
@settings(max_examples=20)
def test_signs_and_colours_do_not_depend_on_the_run(signs: list[float], seed: int) -> None:
    features = uneven()
    basis = fit_pca(features, samples=10_000, seed=seed)  # more than there are: nothing is drawn
    again = fit_pca(features)
    torch.testing.assert_close(basis.components, again.components, atol=1e-5, rtol=1e-5)
    # a basis of mirrored features is the mirrored basis, up to the rule for the sign
    mirrored = fit_pca(features * rearrange(torch.tensor(signs), "c -> c 1 1"))
    largest = mirrored.components.gather(1, mirrored.components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


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


def test_a_sample_gives_nearly_the_same_components_and_repeats() -> None:
    features = uneven(frames=12, h=12, w=12)
    sampled = fit_pca(features, samples=800, seed=3)
    assert torch.equal(sampled.components, fit_pca(features, samples=800, seed=3).components)
    full = fit_pca(features)
    overlap = (sampled.components[0] * full.components[0]).sum().abs()
    assert 0.9 < overlap < 0.99999


def test_a_sample_is_drawn_from_the_whole_clip() -> None:
    features = noise(8, 4, 5, 5)
    features[6:, 0] *= 100  # what varies most does so at the end
    basis = fit_pca(features, samples=60)
    assert basis.components[0].argmax() == 0
    assert basis.components[0, 0] > 0.99
    half = fit_pca(features.half(), samples=60)
    torch.testing.assert_close(half.components, basis.components, atol=1e-2, rtol=0)


def test_clips_of_different_grids_can_share_a_basis() -> None:
    basis = fit_pca([uneven(2, 3, 4), uneven(3, 5, 2)])
    assert basis.colours(uneven(1, 7, 9)).shape == (1, 3, 7, 9)


def test_aligned_colours_undo_a_rotation_of_the_features() -> None:
    raw = uneven(frames=4)
    reference = fit_pca(raw)
    target = reference.scores(raw)
    turn = torch.linalg.qr(noise(8, 8, seed=5))[0]
    turned = torch.einsum("dc,tchw->tdhw", turn, raw)
    aligned = fit_pca(turned, align_to=target)
    torch.testing.assert_close(
        aligned.colours(turned), reference.colours(raw), atol=1e-3, rtol=1e-3
    )
    free = fit_pca(-turned).colours(-turned)
    assert (fit_pca(-turned, align_to=target).colours(-turned) - free).abs().max() > 0.1


def test_alignment_does_not_leave_the_span_of_the_components() -> None:
    features, other = uneven(), noise(3, 3, 6, 7, seed=9)
    aligned, free = fit_pca(features, align_to=other), fit_pca(features)
    projected = aligned.components @ free.components.T @ free.components
    torch.testing.assert_close(projected, aligned.components, atol=1e-5, rtol=1e-4)


def test_pictures_have_the_size_asked_for_and_show_cells() -> None:
    features = uneven(frames=2, h=2, w=3)
    basis = fit_pca(features)
    cells = pca_frames(features, basis, size=(20, 30))
    assert cells.shape == (2, 3, 20, 30)
    assert cells.dtype == torch.uint8
    assert (cells[:, :, :10, :10] == cells[:, :, :1, :1]).all()
    smooth = pca_frames(features, basis, size=(20, 30), mode="bilinear")
    assert not (smooth[:, :, :10, :10] == smooth[:, :, :1, :1]).all()


def test_pca_errors_say_what_was_got_and_what_to_do() -> None:
    features = uneven()
    basis = fit_pca(features)
    with pytest.raises(GeometryError, match=r"\(8, 6, 7\).*features\[None\]"):
        fit_pca(features[0])
    with pytest.raises(GeometryError, match="components=9 for 126 patches of 8 channels"):
        fit_pca(features, components=9)
    with pytest.raises(GeometryError, match="no features at all"):
        fit_pca([])
    with pytest.raises(GeometryError, match="4 and 8 channels"):
        fit_pca([features, uneven(channels=4)])
    with pytest.raises(FrameError, match="NaN or infinite"):
        fit_pca(features.masked_fill(features > 10, torch.nan))
    with pytest.raises(GeometryError, match=r"align_to of shape \[\(3, 8, 6, 7\)\]"):
        fit_pca(features, align_to=features)
    with pytest.raises(GeometryError, match="4 channels, but the basis was fitted on 8"):
        basis.scores(uneven(channels=4))
    with pytest.raises(GeometryError, match="basis of 2 components"):
        pca_frames(features, fit_pca(features, components=2), size=(6, 7))
    with pytest.raises(ValueError, match="mode='cubic'"):
        pca_frames(features, basis, size=(6, 7), mode="cubic")


# panels


def test_panels_stand_side_by_side_untouched_on_even_sides() -> None:
    left, right = film(2, 33, 41), film(2, 33, 30).flip(-1)
    joined = side_by_side({"left": left, "right": right})
    assert joined.dtype == torch.uint8
    assert joined.shape[-2] % 2 == joined.shape[-1] % 2 == 0
    strip = next(y for y in range(60) if torch.equal(joined[:, :, y : y + 33, :41], left))
    assert torch.equal(joined[:, :, strip : strip + 33, 49:79], right)


def test_captions_are_drawn_and_shrink_to_their_panel() -> None:
    panel = film(1, 64, 96)
    blank, short, long = (
        side_by_side({caption: panel})[0, :, :-64] for caption in ("", "frame", "frame " * 4)
    )
    assert blank.shape == short.shape == long.shape
    assert (short != blank).any()
    assert (long[:, :, -4:] == blank[:, :, -4:]).all()


def test_panels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FrameError, match="no panels"):
        side_by_side({})
    with pytest.raises(FrameError, match=r"'a': \(2, 32\), 'b': \(3, 32\)"):
        side_by_side({"a": film(2), "b": film(3)})
    with pytest.raises(FrameError, match=r"'a'.*torch\.float32"):
        side_by_side({"a": film(2) / 255})


@pytest.mark.parametrize("height", [None, 14, 3])
def test_a_time_slice_stacks_one_row_over_time(height: int | None) -> None:
    clip = film(7)
    picture = time_slice(clip, 5, height=height)
    assert picture.shape == (3, height or 7, 48)
    assert picture.dtype == torch.uint8
    for y in range(picture.shape[1]):
        assert torch.equal(picture[:, y], clip[y * 7 // picture.shape[1], :, 5])


def test_still_things_draw_straight_stripes_and_flicker_is_texture() -> None:
    still = film(1).expand(9, -1, -1, -1)
    assert (time_slice(still, 3) == time_slice(still, 3)[:, :1]).all()
    flickering = still.float() + noise(9, 1, 1, 1)
    assert time_slice(flickering, 3).std(dim=1).min() > 0.1


def test_a_time_slice_says_what_does_not_fit() -> None:
    with pytest.raises(FrameError, match=r"\(3, 32, 48\), expected \(T, C, H, W\)"):
        time_slice(film()[0], 0)
    for row in (-1, 32):
        with pytest.raises(ValueError, match=f"row={row}, expected 0 to 31"):
            time_slice(film(), row)
    with pytest.raises(ValueError, match="height=0"):
        time_slice(film(), 0, height=0)


def test_a_comparison_shows_moments_and_a_row_over_time() -> None:
    clip = film(8)
    picture = comparison_picture({"frame": clip, "again": clip}, row=5, moments=2)
    assert torch.equal(picture[:, -48:, :48], time_slice(clip, 5, height=48))
    assert torch.equal(picture[:, -48:, :48], picture[:, -48:, 56:104])
    marked = clip.clone()
    marked[:, :, 5] = 255
    last = picture[:, : -48 - 28, :48]
    assert torch.equal(last[:, -32:], marked[-1])
    assert torch.equal(last[:, -32 - 8 - 32 : -32 - 8], marked[0])
    noted = comparison_picture({"frame": clip, "again": clip}, row=5, notes={"again": "a\nb"})
    assert torch.equal(noted[:, -48 - 56 : -56, :48], time_slice(clip, 5, height=48))
    assert (noted[:, -56:, :48] == noted[:, -1:, :1]).all()
    assert not (noted[:, -56:, 56:] == noted[:, -1:, :1]).all()
    with pytest.raises(ValueError, match="moments=0"):
        comparison_picture({"frame": clip}, row=5, moments=0)
    with pytest.raises(ValueError, match="row=32"):
        comparison_picture({"frame": clip}, row=32)


def test_feature_panels_share_the_colours_of_shared_structure() -> None:
    frames, raw = film(3, 24, 28), uneven(3)
    panels = feature_panels(frames, {"raw": raw, "turned": raw.flip(1)})
    assert list(panels) == ["frame", "raw", "turned"]
    assert panels["frame"] is frames
    difference = (panels["raw"].int() - panels["turned"].int()).abs()
    assert panels["raw"].shape == frames.shape
    assert difference.max() <= 1


def test_a_pca_film_shows_the_clip_and_the_panels(tmp_path: Path) -> None:
    frames, raw = film(3, 24, 28), uneven(3)
    path = pca_film(frames, {"raw": raw, "turned": raw.flip(1)}, tmp_path / "film.png", fps=5)
    panels = feature_panels(frames, {"raw": raw, "turned": raw.flip(1)})
    with Image.open(path) as image:
        assert image.n_frames == 3
        assert image.size == tuple(side_by_side(panels).shape[:-3:-1])
    assert len(decoded(pca_film(frames, raw, tmp_path / "film.mp4", mode="bilinear"))) == 3
    with pytest.raises(FrameError, match=r"\(3, 24, 28\)"):
        pca_film(frames[0], raw, tmp_path / "film.mp4")
    with pytest.raises(FrameError, match="different length"):
        pca_film(frames[:2], raw, tmp_path / "film.mp4")


# films


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_a_film_comes_back_as_it_was_written(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = film(6, *size)
    path = write_film(iter(frames), tmp_path / "new" / "film.mp4", fps=12.5)
    back = decoded(path)
    assert back.shape[0] == 6
    assert all(side % 2 == 0 for side in back.shape[-2:])
    seen = back[..., : size[0], : size[1]]
    assert (seen.float() - frames.float()).abs().mean() < 6
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(12.5)
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert int(stream.codec_context.colorspace) == 1  # BT.709
    assert [file.name for file in path.parent.iterdir()] == ["film.mp4"]


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".PNG"])
def test_pictures_move_when_there_is_more_than_one_frame(tmp_path: Path, suffix: str) -> None:
    frames = film(5)
    with Image.open(write_film(frames, tmp_path / f"film{suffix}", fps=10)) as image:
        assert image.n_frames == 5
        image.seek(3)
        assert image.size == (48, 32)
    with Image.open(write_film(frames[:1], tmp_path / f"still{suffix}")) as image:
        assert getattr(image, "n_frames", 1) == 1


def test_a_still_picture_is_lossless(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (1, 3, 9, 11), dtype=torch.uint8)
    assert torch.equal(decoded(write_film(frames, tmp_path / "still.png")), frames)


def test_a_png_with_a_palette_has_nearly_the_same_colours(tmp_path: Path) -> None:
    (frame,) = film(1, 64, 96)
    with Image.open(write_film([frame], tmp_path / "small.png", palette=True)) as image:
        assert image.mode == "P"
        (back,) = decoded(tmp_path / "small.png")
    assert (back.float() - frame.float()).abs().mean() < 6


def test_still_colours_of_a_gif_stay_still(tmp_path: Path) -> None:
    frames = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    frames[:, 0, :, :8] = torch.arange(8, dtype=torch.uint8) * 30  # a ramp that does not change
    frames[:, 1, :, 8:] = rearrange(torch.arange(6) * 40, "t -> t 1 1").to(torch.uint8)
    with Image.open(write_film(frames, tmp_path / "film.gif")) as image:
        left = []
        for index in range(image.n_frames):
            image.seek(index)
            left.append(image.convert("RGB").crop((0, 0, 8, 16)).tobytes())
    assert len(left) == 6
    assert len(set(left)) == 1


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png", ".webp"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupt_leaves_what_was_there_before(
    tmp_path: Path, suffix: str, error: type[BaseException]
) -> None:
    def breaking() -> Iterator[torch.Tensor]:
        yield from film(3)
        raise error("stop")

    path = tmp_path / f"film{suffix}"
    with pytest.raises(error):
        write_film(breaking(), path)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"an earlier film")
    with pytest.raises(error):
        write_film(breaking(), path)
    assert path.read_bytes() == b"an earlier film"
    assert list(tmp_path.iterdir()) == [path]


def test_film_errors_say_what_was_got_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'film\.avi'.*\.mp4, \.gif, \.png, \.webp"):
        write_film(film(), tmp_path / "film.avi")
    with pytest.raises(ValueError, match="fps=0"):
        write_film(film(), tmp_path / "film.mp4", fps=0)
    with pytest.raises(FrameError, match="no frames"):
        write_film([], tmp_path / "film.mp4")
    with pytest.raises(FrameError, match=r"frame 0 .*torch\.float32"):
        write_film(film() / 255, tmp_path / "film.mp4")
    with pytest.raises(FrameError, match=r"frame 6 of shape \(3, 32, 40\)"):
        write_film(itertools.chain(film(), film(1, 32, 40)), tmp_path / "film.mp4")
    assert list(tmp_path.iterdir()) == []


# the report and its tables


def test_a_comparison_marks_the_best_and_leaves_out_what_was_not_measured() -> None:
    table = comparison(
        "clips",
        {
            "raw": {"drift@1": 0.16, "drift@4": 0.25, "matches@1": 0.9},
            "adapted": {"drift@1": 0.0512, "drift@4": 0.25, "matches@1": 0.8},
        },
        emphasis="adapted",
    )
    assert table.columns == [
        "features", "drift, next frame", "4 frames on", "right matches, next frame",
    ]  # fmt: skip
    assert table.rows == [
        ["raw", "16.0%", "25.0%", "90.0%"],
        ["adapted", "5.1%", "25.0%", "80.0%"],
    ]
    assert table.best == {0: [2, 3], 1: [1, 2]}  # a tie is two bests
    assert table.emphasis == 1
    unknown = comparison("video", {"raw": {"drift@1": 0.5}})
    assert unknown.columns == ["features", "drift, next frame"]
    assert "Right matches" not in unknown.note
    console = Console(file=io.StringIO(), width=80)
    console.print(terminal_table(table))
    assert isinstance(console.file, io.StringIO)
    assert "5.1%" in console.file.getvalue()


# the demo


def run_demo(
    monkeypatch: pytest.MonkeyPatch, adapter: CoSettleAdapter, **options: Any
) -> tuple[str, Path]:
    """What it prints, and the folder it writes."""
    told = io.StringIO()
    monkeypatch.setattr(demo, "console", lambda: Console(file=told, width=400))
    monkeypatch.setattr(common.ModelOptions, "load", lambda self: adapter)
    monkeypatch.setattr(demo, "_RENDERED_SIZE", (64, 96))
    demo.demo(size=48, **options)
    return told.getvalue(), options["output"]


def test_the_demo_writes_films_pictures_and_a_report(
    tmp_path: Path, tiny_adapter: CoSettleAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = write_film(film(8, 64, 96), tmp_path / "mine.mp4")
    told, output = run_demo(
        monkeypatch, tiny_adapter, output=tmp_path / "out", video=video, frames=3
    )
    names = ["film.mp4", "film.png", "rendered.mp4", "rendered.png", "report.html"]
    assert sorted(file.name for file in output.iterdir()) == names
    assert len(decoded(output / "film.mp4")) == len(decoded(output / "rendered.mp4")) == 3
    page = (output / "report.html").read_text()
    for row in (RAW_LAST, RAW_SAME, CENTRED, ADAPTED, "adapted, fused", "drift"):
        assert row in page
        assert row in told
    assert page.count("data:video/mp4;base64,") == page.count("data:image/png;base64,") == 2
    assert "right matches" in page
    assert tiny_adapter.backbone.fingerprint in page


def test_the_demo_continues_without_a_sample_it_cannot_get(
    tmp_path: Path, tiny_adapter: CoSettleAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = common.ModelOptions(offline=True, cache_dir=tmp_path)
    told, output = run_demo(
        monkeypatch, tiny_adapter, output=tmp_path / "out", frames=2, model=model
    )
    assert "continuing without the sample video: bikes.mp4" in told
    assert (output / "report.html").is_file()


def test_the_demo_needs_two_frames() -> None:
    with pytest.raises(ValueError, match="--frames 1, expected at least 2"):
        demo.demo(frames=1)
