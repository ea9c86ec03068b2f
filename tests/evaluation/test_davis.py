from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.evaluation import (
    Clip,
    SequenceScores,
    boundary_f,
    davis_sequences,
    evaluate_sequence,
    mean_over_objects,
    region_similarity,
)
from cosettle_adapter.evaluation.tasks import Davis

from helpers import shared_data

CELL = 8


def moving_squares(frames: int = 5, h: int = 6, w: int = 10) -> tuple[Tensor, NDArray[np.uint8]]:
    """Two objects that move one cell a frame, and features that know which cell is which."""
    generator = torch.Generator().manual_seed(0)
    ground = torch.randn(32, h, w, generator=generator)
    objects = torch.randn(2, 32, 2, 2, generator=generator)
    features = ground.repeat(frames, 1, 1, 1)
    masks = np.zeros((frames, h * CELL, w * CELL), dtype=np.uint8)
    for t in range(frames):
        for index, (row, column) in enumerate([(0, t), (4, w - 2 - t)]):
            features[t, :, row : row + 2, column : column + 2] = objects[index]
            rows = slice(row * CELL, (row + 2) * CELL)
            columns = slice(column * CELL, (column + 2) * CELL)
            masks[t, rows, columns] = index + 1
    return features, masks


def write_davis(root: Path, clips: dict[str, NDArray[np.uint8]], *, year: str = "2017") -> Path:
    for name, masks in clips.items():
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / "480p" / name).mkdir(parents=True)
        for t, mask in enumerate(masks):
            frame = Image.fromarray(np.full((*mask.shape, 3), t, dtype=np.uint8))
            frame.save(root / "JPEGImages" / "480p" / name / f"{t:05d}.jpg")
            palette = Image.fromarray(mask, mode="P")
            palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            palette.save(root / "Annotations" / "480p" / name / f"{t:05d}.png")
    (root / "ImageSets" / year).mkdir(parents=True)
    (root / "ImageSets" / year / "val.txt").write_text("\n".join(clips) + "\n")
    return root


@pytest.mark.parametrize("protocol", ["crw", "dino"])
def test_features_that_know_the_motion_score_perfectly(protocol: str) -> None:
    features, masks = moving_squares()
    scores = evaluate_sequence(features, masks, protocol=protocol, topk=1)  # type: ignore[arg-type]
    assert scores.objects == (1, 2)
    assert [len(values) for values in scores.j] == [3, 3]
    assert scores.j_and_f > 0.8  # corners are rounded on the way through the grid


def test_still_features_score_what_the_first_mask_scores() -> None:
    _, masks = moving_squares()
    still = torch.randn(1, 8, 6, 10).expand(5, -1, -1, -1)
    scores = evaluate_sequence(still, masks, topk=1)
    for index, object_id in enumerate(scores.objects):
        first = masks[0] == object_id
        assert scores.j[index] == pytest.approx(
            [region_similarity(masks[t] == object_id, first) for t in (1, 2, 3)], abs=0.1
        )
        assert scores.f[index] == pytest.approx(
            [boundary_f(masks[t] == object_id, first) for t in (1, 2, 3)], abs=0.1
        )


def test_first_and_last_frame_do_not_count() -> None:
    features, masks = moving_squares()
    expected = evaluate_sequence(features, masks)
    masks[-1] = 0
    assert evaluate_sequence(features, masks) == expected


def test_maps_may_stream() -> None:
    features, masks = moving_squares()
    stream = (frame[None] for frame in features)
    assert evaluate_sequence(stream, masks) == evaluate_sequence(features, masks)


def test_void_pixels_do_not_count() -> None:
    features, masks = moving_squares()
    spoiled = masks.copy()
    spoiled[2, 3 * CELL : 4 * CELL] = 2  # a stripe that no prediction has
    with_stripe = evaluate_sequence(features, spoiled)
    spoiled[2, 3 * CELL : 4 * CELL] = 255
    assert with_stripe.j[1][1] < 0.5
    assert evaluate_sequence(features, spoiled).j == evaluate_sequence(features, masks).j


def test_the_mean_is_over_objects_not_over_clips() -> None:
    one = SequenceScores((1,), j=((1.0,),), f=((1.0,),))
    three = SequenceScores((1, 2, 5), j=((0.0,), (0.0,), (0.4,)), f=((0.0,), (0.0,), (0.0,)))
    assert three.per_object == pytest.approx([0.0, 0.0, 0.2])
    assert mean_over_objects([one, three]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("maps", "message"),
    [(4, "but 4 feature maps"), (7, "but more feature maps")],
)
def test_every_mask_needs_a_map(maps: int, message: str) -> None:
    features, masks = moving_squares(frames=7)
    with pytest.raises(FrameError, match=message):
        evaluate_sequence(features[:maps], masks[:5])


def test_wrong_masks_say_what_was_expected() -> None:
    features, masks = moving_squares()
    with pytest.raises(FrameError, match=r"a clip of 2 frame\(s\) cannot be scored"):
        evaluate_sequence(features[:2], masks[:2])
    with pytest.raises(FrameError, match="int64 masks"):
        evaluate_sequence(features, masks.astype(np.int64))  # type: ignore[arg-type]
    with pytest.raises(FrameError, match="first mask has no object"):
        evaluate_sequence(features, masks * 0)
    with pytest.raises(GeometryError, match="expected \\(C, h, w\\)"):
        evaluate_sequence([torch.rand(2, 3, 6, 10)] * 5, masks)


def test_the_official_2017_layout(tmp_path: Path) -> None:
    _, masks = moving_squares()
    root = write_davis(tmp_path, {"walk": masks, "run": masks[::-1]})
    sequences = davis_sequences(root)
    assert [sequence.name for sequence in sequences] == ["walk", "run"]
    np.testing.assert_array_equal(sequences[0].read_masks(), masks)
    assert all(isinstance(sequence, Clip) and len(sequence) == 5 for sequence in sequences)
    assert sequences[1].read_frame(3).shape == (48, 80, 3)
    assert abs(int(sequences[1].read_frame(3).mean()) - 3) <= 1


def test_the_2016_layout_merges_objects(tmp_path: Path) -> None:
    _, masks = moving_squares()
    masks[masks == 2] = 255  # the 2016 release draws its one object in white
    root = write_davis(tmp_path, {"walk": masks}, year="2016")
    np.testing.assert_array_equal(davis_sequences(root)[0].read_masks(), (masks > 0) * 1)


def test_lists_of_paths_name_their_clips(tmp_path: Path) -> None:
    root = write_davis(tmp_path, {"walk": moving_squares()[1]}, year="480p")
    lines = [
        f"/JPEGImages/480p/walk/{t:05d}.jpg /Annotations/480p/walk/{t:05d}.png" for t in range(5)
    ]
    (root / "ImageSets" / "480p" / "val.txt").write_text("\n".join(lines))
    assert [sequence.name for sequence in davis_sequences(root, year="2016")] == ["walk"]


def test_a_folder_with_the_list_of_train_alone(tmp_path: Path) -> None:
    root = write_davis(tmp_path, {"walk": moving_squares()[1]})
    lists = root / "ImageSets" / "2017"
    (lists / "val.txt").rename(lists / "train.txt")
    assert [sequence.name for sequence in davis_sequences(root)] == ["walk"]


def test_several_folders_are_parts_of_one_evaluation(tmp_path: Path) -> None:
    masks = moving_squares()[1]
    one = write_davis(tmp_path / "one", {"walk": masks, "run": masks})
    two = write_davis(tmp_path / "two", {"walk": masks})
    clips = Davis(one, two, every=[2, 1]).clips()
    assert [(c.name, len(c)) for c in clips] == [("one/walk", 3), ("one/run", 3), ("two/walk", 5)]
    for wanted, found in (("walk", ["one/walk", "two/walk"]), ("two/walk", ["two/walk"])):
        assert [clip.name for clip in Davis(one, two, clips=[wanted]).clips()] == found
    settings = Davis(one, two, every=[2, 1]).settings()
    assert (settings["parts"], settings["every"]) == (["one", "two"], [2, 1])
    with pytest.raises(FrameError, match=r"no clip 'wlak'.* Did you mean 'walk'"):
        Davis(one, two, clips=["wlak"]).clips()
    for folders, every in (((one, one), 1), ((one, two), [1, 2, 3])):
        with pytest.raises(ValueError, match="one number for all or one for each"):
            Davis(*folders, every=every)


def test_frames_can_be_thinned_and_cut(tmp_path: Path) -> None:
    root = write_davis(tmp_path, {"walk": moving_squares()[1]})
    sequence = davis_sequences(root, every=2, max_frames=2)[0]
    assert [path.stem for path in sequence.frames] == ["00000", "00002"]
    assert [path.stem for path in sequence.annotations] == ["00000", "00002"]
    with pytest.raises(ValueError, match="every=0"):
        davis_sequences(root, every=0)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FrameError, match="expected JPEGImages, Annotations, ImageSets in it, found"
    ):
        davis_sequences(tmp_path)
    root = write_davis(tmp_path / "DAVIS", {"walk": moving_squares()[1]})
    with pytest.raises(FrameError, match=r"found DAVIS\. Did you mean .*DAVIS\?"):
        davis_sequences(tmp_path)
    with pytest.raises(FrameError, match=r"DAVSI does not exist, .* Did you mean 'DAVIS'\?"):
        davis_sequences(tmp_path / "DAVSI")
    with pytest.raises(FrameError, match=r"val.txt is a file, expected the folder of DAVIS"):
        davis_sequences(root / "ImageSets" / "2017" / "val.txt")
    with pytest.raises(FrameError, match=r"no DAVIS-2017 train list in .*train.txt"):
        davis_sequences(root, subset="train")
    with pytest.raises(FrameError, match=r"no DAVIS-2017 vall list in .* Did you mean 'val'\?"):
        davis_sequences(root, subset="vall")
    with pytest.raises(FrameError, match=r"expected .*ImageSets.2016.val.txt or"):
        davis_sequences(root, year="2016")
    with pytest.raises(FrameError, match=r"no clip 'wlak'.* Did you mean 'walk'"):
        davis_sequences(root, sequences=["wlak"])
    with pytest.raises(FrameError, match=r"no 1080p folder in .*JPEGImages.* '480p'"):
        davis_sequences(root, resolution="1080p")


def test_one_bad_clip_does_not_lose_the_others(tmp_path: Path) -> None:
    masks = moving_squares()[1]
    root = write_davis(tmp_path, {"run": masks, "walk": masks, "gone": masks})
    (root / "Annotations" / "480p" / "walk" / "00003.png").unlink()
    shutil.rmtree(root / "JPEGImages" / "480p" / "gone")
    good, unannotated, gone = davis_sequences(root)
    assert good.problem is None
    assert good.read_masks().shape == masks.shape
    assert unannotated.annotated == (0, 1, 2, 3, 4)
    for read in (unannotated.read_masks, lambda: unannotated.read_frame(0)):
        with pytest.raises(FrameError, match=r"'walk' is not complete: no .*00003.png"):
            read()
    assert len(gone) == 0
    with pytest.raises(FrameError, match=r"'gone' is not complete: no .*gone.\*.jpg"):
        gone.read_masks()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    root = write_davis(tmp_path, {"walk": moving_squares()[1]})
    (root / "JPEGImages" / "480p" / "walk" / "00001.jpg").write_bytes(b"not a picture")
    (root / "Annotations" / "480p" / "walk" / "00002.png").write_bytes(b"not a picture")
    clip = davis_sequences(root)[0]
    assert clip.read_frame(0).dtype == np.uint8
    with pytest.raises(FrameError, match=r"00001.jpg cannot be read as an image"):
        clip.read_frame(1)
    with pytest.raises(FrameError, match=r"00002.png cannot be read as a mask"):
        clip.read_masks()


def test_masks_of_another_kind_are_refused(tmp_path: Path) -> None:
    root = write_davis(tmp_path, {"walk": moving_squares()[1]})
    path = root / "Annotations" / "480p" / "walk" / "00001.png"
    Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(path)
    with pytest.raises(FrameError, match=r"00001.png is 9 x 9, but .* 48 x 80"):
        davis_sequences(root)[0].read_masks()
    Image.fromarray(np.zeros((48, 80, 3), dtype=np.uint8)).save(path)
    with pytest.raises(FrameError, match=r"00001.png is a RGB image, expected a palette"):
        davis_sequences(root)[0].read_masks()


@pytest.mark.shared
def test_the_development_clips_are_read() -> None:
    sequences = davis_sequences(shared_data() / "davis_dev")
    assert len(sequences) == 10
    assert sum(len(sequence.frames) for sequence in sequences) == 645
    assert set(np.unique(sequences[0].read_masks())) == {0, 1}
