"""Every benchmark with features that know the answer, and with features that know nothing.

Labels go to the single best patch (``topk=1``): the protocols' averages blur even perfect matches.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cosettle_adapter import evaluation
from cosettle_adapter.backbones.rows import BackboneRow
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import Clip, Joints, Propagation, Protocol, Tracks
from cosettle_adapter.evaluation.masks import palette, propagate_masks
from cosettle_adapter.evaluation.points import track_queries
from cosettle_adapter.evaluation.protocols import label_protocol
from cosettle_adapter.upsampling import upsample
from cosettle_adapter.video import as_frames
from cosettle_adapter.video.geometry import plan_geometry

FRAMES, PATCH, H, W = 5, 16, 8, 12
GEOMETRY = plan_geometry(H * PATCH, W * PATCH, patch=PATCH)


def drifting() -> Tensor:
    """Features ``(T, C, h, w)`` of a texture that moves one patch to the right a frame.

    What leaves on the right comes in on the left, so that every patch has a match.
    """
    texture = torch.randn(32, H, W, generator=torch.Generator().manual_seed(0))
    return torch.stack([texture.roll(t, dims=2) for t in range(FRAMES)])


KNOWS = drifting()
KNOWS_NOTHING = torch.randn(FRAMES, 32, H, W, generator=torch.Generator().manual_seed(1))
ALL = tuple(range(FRAMES))


def clip_of(annotations: Any, annotated: tuple[int, ...] = ALL) -> Clip[Any]:
    frames = tuple(Path(f"{t:05d}.jpg") for t in range(FRAMES))
    return Clip("clip", frames, lambda: annotations, annotated)


def masks(objects: int = 1, annotated: tuple[int, ...] = ALL) -> Clip[Any]:
    """Rectangles that move one patch to the right a frame."""
    drawn = np.zeros((FRAMES, H * PATCH, W * PATCH), dtype=np.uint8)
    for t in range(FRAMES):
        for index in range(objects):
            top, left = (1 + 4 * index) * PATCH, (1 + t) * PATCH
            drawn[t, top : top + 2 * PATCH, left : left + 3 * PATCH] = index + 1
    return clip_of(drawn[list(annotated)], annotated)


def joints(annotated: tuple[int, ...] = ALL) -> Clip[Joints]:
    first = np.array([[2.5, 1.5], [3.5, 4.5], [1.5, 6.5]]) * PATCH
    xy = np.stack([first + np.array([t * PATCH, 0]) for t in annotated])
    areas = np.full(len(annotated), 6.0 * PATCH**2)
    return clip_of(Joints(("a", "b", "c"), xy, np.ones(xy.shape[:2], dtype=bool), areas), annotated)


def tracks(occluded: NDArray[np.bool_] | None = None) -> Clip[Tracks]:
    points = joints().read_annotations().xy.transpose(1, 0, 2) / [W * PATCH, H * PATCH]
    hidden = np.zeros((3, FRAMES), dtype=bool) if occluded is None else occluded
    return clip_of(Tracks(points, hidden))


NEAREST = Propagation(topk=1, context=2, radius=4)
CASES: dict[str, tuple[Protocol[Any], Clip[Any]]] = {
    "davis": (evaluation.davis_protocol(Path(), propagation=NEAREST), masks(2)),
    "davis, dense": (
        evaluation.davis_protocol(Path(), propagation=dataclasses.replace(NEAREST, dense=2)),
        masks(2),
    ),
    "folder": (evaluation.folder_protocol(Path(), propagation=NEAREST), masks(1, (0, 2, 3))),
    "vip": (evaluation.vip_protocol(Path(), propagation=NEAREST), masks(2)),
    "jhmdb": (
        # the published rule moves every joint by up to half a patch
        evaluation.jhmdb_protocol(Path(), joints="geometric", propagation=NEAREST),
        joints(),
    ),
    "badja": (evaluation.badja_protocol(Path()), joints((0, 2, 4))),
    "tapvid": (evaluation.tapvid_protocol(Path()), tracks()),
    "tapvid strided": (evaluation.tapvid_protocol(Path(), mode="strided"), tracks()),
}


@pytest.mark.parametrize("name", CASES)
def test_features_that_know_the_answer_score_high_and_others_low(name: str, tmp_path: Path) -> None:
    protocol, clip = CASES[name]
    high, low, same = (
        protocol.totals([protocol.score(clip, features, GEOMETRY, folder)])
        for features, folder in (
            (KNOWS, tmp_path / "p"), (KNOWS_NOTHING, None), (torch.ones_like(KNOWS), None)
        )
    )  # fmt: skip
    assert list(high) == list(protocol.measures)
    first = protocol.measures[0]
    assert high[first] > 0.9, high
    assert low[first] < high[first] - 0.2, low
    assert all(0 <= value <= 1 for key, value in high.items() if "decay" not in key)
    # all joints may be lost where features are all equal, and lost ones do not count
    assert name == "jhmdb" or all(np.isfinite(list(same.values())))
    if name in ("jhmdb", "badja", "tapvid", "tapvid strided"):
        assert '"xy"' in (tmp_path / "p" / "positions.json").read_text()
        return
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert names == [f"{t:05d}.png" for t in range(len(names))]
    with Image.open(tmp_path / "p" / "00000.png") as picture:
        assert picture.mode == "P"
        assert bytes(picture.getpalette() or ()) == palette()
        drawn = np.asarray(picture)
    assert drawn.shape == (H * PATCH, W * PATCH)
    assert set(np.unique(drawn)) == ({0, 1} if name == "folder" else {0, 1, 2})


@pytest.mark.parametrize("upsampler", ["bilinear", "guided"])
def test_masks_are_propagated_on_a_finer_grid(upsampler: Any) -> None:
    size = (H * PATCH, W * PATCH, 3)
    frames = tuple(np.full(size, 10 * t, dtype=np.uint8) for t in range(FRAMES))
    clip = dataclasses.replace(masks(2), frames=frames)
    finer = Propagation("dino", dense=3, upsampler=upsampler)
    assert finer.on("davis").radius == 36
    maps = finer.maps(clip, KNOWS, GEOMETRY)
    for found, features, frame in zip(maps, KNOWS, frames, strict=True):
        guide = as_frames(frame[None])
        torch.testing.assert_close(
            found,
            upsample(features[None], GEOMETRY, (3 * H, 3 * W), frames=guide, upsampler=upsampler),
        )
    assert NEAREST.on("davis").radius == 4
    assert torch.equal(torch.cat([*NEAREST.maps(clip, KNOWS, GEOMETRY)]), KNOWS)
    with pytest.raises(ValueError, match="without dense; give dense=2"):
        Propagation(upsampler=upsampler)


def test_the_palette_is_that_of_davis() -> None:
    labels = [tuple(palette()[3 * label : 3 * label + 3]) for label in (0, 1, 2, 3, 4, 8)]
    assert labels == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (64, 0, 0)]


def test_sizes_follow_the_protocols() -> None:
    dino = evaluation.davis_protocol(Path(), propagation=Propagation("dino"))
    protocol: Protocol[Any]
    for protocol, sides, expected in (
        (CASES["davis"][0], (720, 1280), (480, 880)),
        (CASES["jhmdb"][0], (720, 1280), (320, 320)),
        (dino, (480, 880), (480, 832)),
        (dino, (880, 480), (832, 480)),
        (CASES["vip"][0], (720, 1280), (448, 880)),  # 495 floored to a multiple of 64
        (CASES["vip"][0], (1280, 720), (880, 448)),
        (CASES["vip"][0], (500, 500), (880, 832)),  # the published loader sets the height
        (evaluation.davis_protocol(Path(), propagation=Propagation("crw")), (501, 73), (501, 73)),
        (evaluation.vip_protocol(Path(), propagation=Propagation("crw")), (720, 1280), (560, 560)),
        (CASES["tapvid"][0], (720, 1280), (480, 853)),
    ):
        frame = np.zeros((*sides, 3), dtype=np.uint8)
        assert protocol.size(Clip("clip", [frame], lambda: None)) == expected
    assert evaluation.vip_protocol(Path()).settings["topk"] == 10


def sampled(old: int, new: int, *, centre: bool) -> NDArray[np.int64]:
    """The pixel that each new pixel copies: below its centre (Pillow) or its corner (OpenCV)."""
    return (2 * np.arange(new) + centre) * old // (2 * new)


def bilinear(images: NDArray[Any], size: tuple[int, ...]) -> NDArray[np.float64]:
    """``(..., H, W)`` with pixel centres at a half, without antialiasing, as OpenCV does."""
    for axis, new in zip((-2, -1), size, strict=True):
        old = images.shape[axis]
        place = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
        low = np.floor(place).astype(int).clip(max=max(old - 2, 0))
        share = (place - low).reshape((-1, 1) if axis == -2 else (-1,))
        high = np.minimum(low + 1, old - 1)
        images = images.take(low, axis) * (1 - share) + images.take(high, axis) * share
    return images


@pytest.mark.parametrize("name", ["dino", "crw", "cropmae", "tcore", "cosettle"])
def test_frames_are_resized_and_normalised_as_published(name: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 30, 41), dtype=np.uint8)
    resized = bilinear(frames / 255, (32, 48))
    if name == "dino":  # OpenCV rounds images of whole numbers
        resized = np.round(255 * resized + 1e-9) / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    std[0] = 0.228 if name == "dino" else std[0]
    other = BackboneRow("", "", "", 16, 8, 1, "", 224, mean=(0.5,) * 3, std=(0.5,) * 3)
    adapter: Any = SimpleNamespace(device="cpu", backbone=SimpleNamespace(row=other))
    got = label_protocol(name).preprocess(adapter, torch.from_numpy(frames), size=(32, 48))
    expected = (resized - mean[:, None, None]) / std[:, None, None]
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-2 if name == "dino" else 1e-4)
    # a value may round the other way where it is a half
    assert (abs(got.numpy() - expected) > 1e-4).mean() < 0.01


@pytest.mark.parametrize("name", ["best", "crw", "dino", "cropmae"])
def test_labels_come_to_the_grid_and_back_as_published(name: str) -> None:
    blobs = np.random.default_rng(1).random((3, 6, 8))
    mask = bilinear(blobs, (47, 61)).argmax(0).astype(np.uint8)
    frame, grid, nearest = (45, 63), (6, 8), name == "dino"  # no pixel is between two others

    def copied(labels: NDArray[Any], size: tuple[int, ...]) -> NDArray[Any]:
        pairs = zip(labels.shape, size, strict=True)
        return labels[np.ix_(*(sampled(old, new, centre=nearest) for old, new in pairs))]

    at = frame if name in ("dino", "cropmae") else mask.shape
    first = copied(mask, grid if nearest else at)
    soft = bilinear(np.stack([first == label for label in range(3)]) * 1.0, grid)
    soft = bilinear(soft, at)
    if nearest:
        low, high = (getattr(soft, end)((1, 2), keepdims=True) for end in ("min", "max"))
        soft = (soft - low) / (high - low)
    expected = copied(soft.argmax(0), mask.shape)
    (got,) = propagate_masks(torch.rand(1, 4, *grid), mask, range(3), protocol=name, size=frame)
    assert len(np.unique(got)) == 3
    second, best = np.sort(soft, axis=0)[-2:]
    clear = copied(best - second > 1e-5, mask.shape)  # the others are ties of two labels
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(got[clear], expected[clear])


@pytest.mark.parametrize("rule", ["published", "geometric"])
def test_joints_become_patches_and_pixels_by_their_rule(rule: Any, tmp_path: Path) -> None:
    """The published figures snap joints to patches and read patch k as pixel 16 k."""
    height, width, sides = 100, 150, np.array([150 / W, 100 / H])
    xy = np.random.default_rng(2).uniform(-20, 150, (99, 2))
    clip = clip_of(Joints(("",) * 99, np.stack([xy] * FRAMES), np.ones((FRAMES, 99), dtype=bool)))
    geometry = plan_geometry(height, width, patch=PATCH, size=(H * PATCH, W * PATCH))
    protocol = evaluation.jhmdb_protocol(
        Path(), joints=rule, propagation=Propagation(topk=1, context=0)
    )
    still = torch.randn(1, 32, H, W, generator=torch.Generator().manual_seed(0))
    protocol.score(clip, still.expand(FRAMES, -1, -1, -1), geometry, tmp_path)
    got = np.array(json.loads((tmp_path / "positions.json").read_text())["xy"])
    compared = 0
    for joint, position in enumerate(xy):
        # as the files count: pixel 1 is the centre of the first, ours is at 0.5
        place = (position + 0.5 - 1) / sides if rule == "published" else position / sides - 0.5
        heat = np.zeros((H, W))
        for row, column in np.ndindex(H, W):
            weight = 1.0
            for cell, p in ((column, place[0]), (row, place[1])):
                peak = int(p - 1.5) + 2 if rule == "published" else p
                near = int(p - 1.5) <= cell < int(p + 2.5) if rule == "published" else True
                near = near and abs(cell - peak) <= 2
                weight *= near * np.exp(-((cell - peak) ** 2) / (2 * 0.5**2))
            heat[row, column] = weight
        best = np.argsort(heat.ravel())[-5:]
        if np.isclose(*np.sort(heat.ravel())[-6:-4]):  # empty, or the fifth patch is not certain
            continue
        compared += 1
        rows, columns = np.divmod(best, W)
        share = heat.ravel()[best] / heat.ravel()[best].sum()
        cell = np.array([(share * columns).sum(), (share * rows).sum()])
        expected = cell * sides + 0.5 if rule == "published" else (cell + 0.5) * sides
        np.testing.assert_allclose(got[-1, joint], expected, atol=1e-3)
    assert compared > 10


def test_the_frame_of_a_query_counts_in_published_figures_of_badja() -> None:
    given = joints((0, 2, 4)).read_annotations()
    given.visible[0, 1:] = False  # two joints are first annotated in the second annotated frame
    clip = clip_of(given, (0, 2, 4))
    published, strict = (
        evaluation.badja_protocol(Path(), **rule).score(clip, KNOWS_NOTHING, GEOMETRY, None)
        for rule in ({}, {"query_frames": "strict"})
    )
    wrong = 4 * (1 - strict.values["delta_seg"])  # of 2 + 1 + 1 later positions
    assert wrong > 0
    assert published.values["delta_seg"] == pytest.approx(1 - wrong / 6)


def test_totals_count_every_object_and_pixel_once() -> None:
    protocol, _ = CASES["davis"]
    one = protocol.score(masks(1), KNOWS, GEOMETRY, None)
    two = protocol.score(masks(2), KNOWS_NOTHING, GEOMETRY, None)
    total = protocol.totals([one, two])
    objects = [*one.counts["objects"], *two.counts["objects"]]
    assert len(objects) == 3
    assert total["J mean"] == pytest.approx(np.mean([each["J mean"] for each in objects]))
    assert total["J&F"] == pytest.approx((total["J mean"] + total["F mean"]) / 2)
    protocol, clip = CASES["vip"]
    scores = [protocol.score(clip, maps, GEOMETRY, None) for maps in (KNOWS, KNOWS_NOTHING)]
    matrix = sum(np.array(each.counts["matrix"]) for each in scores)
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    expected = (np.diag(matrix) / np.where(union, union, 1))[union > 0].mean()
    assert protocol.totals(scores)["mIoU"] == pytest.approx(expected)


def test_frames_without_masks_are_propagated_through_and_not_scored() -> None:
    protocol, clip = CASES["folder"]
    some = protocol.score(clip, KNOWS, GEOMETRY, None)
    assert some.values != protocol.score(masks(), KNOWS, GEOMETRY, None).values
    for name in ("folder", "vip"):
        with pytest.raises(FrameError):
            CASES[name][0].score(masks(1, (1, 2)), KNOWS, GEOMETRY, None)
    bare = clip_of(joints().read_annotations()._replace(areas=None))
    with pytest.raises(FrameError, match="'clip' has no areas of its animal"):
        CASES["badja"][0].score(bare, KNOWS, GEOMETRY, None)


def test_a_point_is_called_hidden_where_its_way_back_misses_it() -> None:
    """Half of the frames show another scene."""
    features = torch.cat([KNOWS[:2], KNOWS_NOTHING[2:]])
    hidden = np.zeros((3, FRAMES), dtype=bool)
    hidden[:, 2:] = True
    protocol, _ = CASES["tapvid"]
    told, untold = (
        protocol.score(tracks(hidden), maps, GEOMETRY, None).values["OA"]
        for maps in (features, KNOWS)
    )
    assert told > untold


def test_queries_are_tracked_both_ways_in_pixels() -> None:
    geometry = plan_geometry(80, 120, patch=16, size=(128, 192))
    points = torch.tensor([[55.0, 35.0], [45.0, 25.0]], dtype=torch.float64)
    xy, error = track_queries(KNOWS, [2, 4], points, geometry, radius_argmax=0)
    for t in ALL:  # a patch is 10 pixels of the original frame
        expected = torch.stack([points[:, 0] + 10 * (t - torch.tensor([2, 4])), points[:, 1]], 1)
        torch.testing.assert_close(xy[:, t], expected)
        assert float(error[0, t]) == 0
    outside = torch.tensor([[-30.0, 500.0]])
    edge, _ = track_queries(KNOWS, [0], outside, GEOMETRY, radius_argmax=0)
    assert edge[0, 0].tolist() == [8.0, 120.0], "moved to the edge"
    assert track_queries(KNOWS, [], torch.zeros(0, 2), GEOMETRY)[0].shape == (0, 5, 2)
