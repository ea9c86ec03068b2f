from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import classification
from cosettle_adapter.evaluation.classification import LINEAR, classify, linear_probe, nearest_votes
from cosettle_adapter.evaluation.localisation import Segment, localise, read_segments
from cosettle_adapter.evaluation.variants import ADAPTED, CENTRED, RAW_LAST, RAW_SAME
from cosettle_adapter.evaluation.videos import LabelledVideo, PooledVideos, VideoFrames

from helpers import noise

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


@given(n=st.integers(1, 9), k=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_votes_equal_their_definition(n: int, k: int, seed: int) -> None:
    train, queries = noise(n, 4, seed=seed).double(), noise(3, 4, seed=seed + 100).double()
    labels = torch.arange(n) % 3
    votes = nearest_votes(train, labels, queries, ks=[k], classes=3)[k]
    for query, row in zip(queries, votes.tolist(), strict=True):
        cosine = F.cosine_similarity(train, query[None]).tolist()
        nearest = sorted(range(n), key=lambda i: -cosine[i])[:k]
        weights = {i: math.exp(cosine[i] / 0.07) for i in nearest}
        for label, found in enumerate(row):
            own = sum(weight for i, weight in weights.items() if labels[i] == label)
            assert found == pytest.approx(own / sum(weights.values()))


def test_of_equally_near_neighbours_the_earlier_counts() -> None:
    labels, queries = torch.tensor([1, 0, 0, 0]), torch.ones(1, 3)
    votes = nearest_votes(torch.ones(4, 3), labels, queries, ks=[1, 3], classes=2)
    assert votes[1].argmax() == 1
    assert votes[3].tolist() == [pytest.approx([2 / 3, 1 / 3])]
    for ks in ([], [0]):
        with pytest.raises(ValueError, match="at least 1"):
            nearest_votes(noise(2, 3), labels[:2], queries, ks=ks, classes=2)


def blobs(classes: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(classes).repeat(12)
    return (0.7 * noise(classes, 5, seed=9)[labels] + noise(len(labels), 5)).double(), labels


@pytest.mark.parametrize(("classes", "penalty"), [(2, 10.0), (3, 1e-3)])
def test_a_probe_minimises_its_objective(
    classes: int, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = blobs(classes)
    monkeypatch.setattr(classification, "_DEFAULT_PENALTY", penalty)
    logits, chosen = linear_probe(features, labels, features, [])
    assert chosen == penalty
    # mean cross entropy + penalty / 2 |W|^2, one weight vector a class, by Newton's method
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    design = torch.cat([standard, torch.ones(len(labels), 1)], dim=1)

    def objective(flat: Tensor) -> Tensor:
        weights = flat.reshape(6, classes)
        return F.cross_entropy(design @ weights, labels) + penalty / 2 * weights[:5].square().sum()

    flat = torch.zeros(6 * classes, dtype=torch.float64)
    for _ in range(20):
        gradient = torch.func.grad(objective)(flat)
        hessian = torch.func.hessian(objective)(flat) + 1e-9 * torch.eye(len(flat))
        flat = flat - torch.linalg.solve(hessian, gradient)
    expected = torch.softmax(design @ flat.reshape(6, classes), dim=1)
    torch.testing.assert_close(torch.softmax(logits, 1), expected, atol=1e-5, rtol=0)


def test_a_probe_does_not_depend_on_scale_shift_and_constant_channels() -> None:
    features, labels = blobs(3)
    plain, _ = linear_probe(features, labels, features, [])
    rounding = torch.full((len(labels), 1), 0.1) + 1e-9 * noise(len(labels), 1)
    moved = torch.cat([features * 1e3 - 7, rounding], dim=1)
    found, _ = linear_probe(moved, labels, moved, [])
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


def test_the_penalty_is_chosen_on_what_was_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # 40 channels of noise and few videos: a weak penalty remembers them
    labels = torch.arange(2).repeat(12)
    signal = 0.8 * (labels[:, None] * 2.0 - 1) + noise(24, 1)
    features = torch.cat([signal, noise(24, 40, seed=3)], dim=1)
    logits, chosen = linear_probe(features, labels, features, list(range(12)))
    scores = {}
    for penalty in classification.PENALTIES:
        monkeypatch.setattr(classification, "_DEFAULT_PENALTY", penalty)
        judged, _ = linear_probe(features[12:], labels[12:], features[:12], [])
        right = float((judged.argmax(1) == labels[:12]).double().mean())
        scores[penalty] = (right, -float(F.cross_entropy(judged, labels[:12])))
    assert chosen == max(scores, key=lambda penalty: scores[penalty])
    monkeypatch.setattr(classification, "_DEFAULT_PENALTY", chosen)
    torch.testing.assert_close(logits, linear_probe(features, labels, features, [])[0])


def pooled(apart: float, *, offset: float = 0.0, each: int = 12) -> PooledVideos:
    """Three classes ``apart`` standard deviations from one another; adapted ones far apart."""
    names = [f"{label}/{i}.mp4" for label in ("jump", "run", "walk") for i in range(each)]
    videos = tuple(LabelledVideo(Path(name), name.split("/")[0], name) for name in names)
    centres = torch.linalg.qr(noise(8, 3)).Q.T[torch.arange(3).repeat_interleave(each)]
    around = noise(len(videos), 8, seed=5)
    same = apart * centres + around + offset
    features = {RAW_LAST: around + offset, RAW_SAME: same, ADAPTED: 9 * centres + around}
    return PooledVideos(videos, features, {})


def test_centring_takes_a_common_offset_away_from_neighbours() -> None:
    plain, moved = classify(pooled(1.0), ks=(1,)), classify(pooled(1.0, offset=200.0), ks=(1,))
    assert moved[RAW_SAME]["1-NN"].predicted != plain[RAW_SAME]["1-NN"].predicted
    assert moved[CENTRED]["1-NN"].predicted == plain[CENTRED]["1-NN"].predicted
    assert moved[CENTRED][LINEAR] is moved[RAW_SAME][LINEAR]


def test_neighbours_and_figures_equal_a_reference_on_the_same_split() -> None:
    data = pooled(1.5)
    train, val = classification.split_videos(data.videos)
    unit = F.normalize(data.features[RAW_SAME], dim=1)
    expected = [data.videos[train[int((unit[train] @ unit[row]).argmax())]].label for row in val]
    results = classify(data, ks=(1,))
    assert list(results) == [RAW_LAST, RAW_SAME, CENTRED, ADAPTED]
    assert results[ADAPTED][LINEAR].accuracy == 1.0
    found = results[RAW_SAME]["1-NN"]
    assert list(found.predicted) == expected
    assert list(found.names) == [data.videos[row].name for row in val]
    right = [a == b for a, b in zip(found.labels, expected, strict=True)]
    assert found.accuracy == pytest.approx(sum(right) / len(right))
    assert classify(data, ks=(1,)) == results
    assert classify(data, seed=1, ks=(1,))[ADAPTED]["1-NN"].names != found.names
    few = {name: values[:3] for name, values in data.features.items()}
    only = classify(PooledVideos(data.videos[:3], few, {}), ks=(1,))
    assert list(only[ADAPTED]) == ["1-NN"], "one class leaves nothing to probe"


def videos_of(labels: str, part: str | None = None) -> tuple[LabelledVideo, ...]:
    names = [f"{part}/{i}.mp4" for i in range(len(labels))]
    made = zip(names, labels, strict=True)
    return tuple(LabelledVideo(name, label, name, part) for name, label in made)  # type: ignore[arg-type]


def search(features: Tensor, labels: str, **options: tuple[int, ...]) -> classification.Retrieval:
    given = PooledVideos(videos_of(labels), {ADAPTED: features}, {})
    return classification.retrieve(given, **options)[ADAPTED]


@given(labels=st.text("abc", min_size=4, max_size=14), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_figures_equal_their_definitions(labels: str, seed: int) -> None:
    assume(any(labels.count(label) > 1 for label in labels))
    features, ks = noise(len(labels), 3, seed=seed), (1, 2, 5)
    found = search(features, labels, ks=ks)
    unit = F.normalize(features.double(), dim=1)
    hits, precisions = {k: [] for k in ks}, []
    for i in range(len(labels)):
        others = sorted((j for j in range(len(labels)) if j != i), key=lambda j: -unit[i] @ unit[j])
        right = [labels[j] == labels[i] for j in others]
        if any(right):
            for k in ks:
                hits[k].append(any(right[:k]))
            ranks = [rank for rank, hit in enumerate(right, start=1) if hit]
            precisions.append(sum(sum(right[:rank]) / rank for rank in ranks) / len(ranks))
    count = len(precisions)
    expected = {f"R@{k}": sum(row) / count for k, row in hits.items()}
    assert found.figures == pytest.approx({**expected, "mAP": sum(precisions) / count})
    counted = [f"None/{i}.mp4" for i, label in enumerate(labels) if labels.count(label) > 1]
    assert list(found.queries) == counted, "those without another of their class do not count"


def test_of_equally_near_videos_the_earlier_comes_first() -> None:
    # each a finds b, b, a, a or its like, and each b finds a, b, a, a
    found = search(torch.ones(5, 2), "abbaa")
    assert found.figures["R@1"] == pytest.approx(2 / 5)
    first, later = (1 / 3 + 2 / 4) / 2, (1 / 1 + 2 / 4) / 2
    assert found.per_class == pytest.approx({"a": (first + 2 * later) / 3, "b": 1 / 2})
    with pytest.raises(FrameError, match="no query has another video of its class to find"):
        search(noise(3, 2), "abc")
    with pytest.raises(ValueError, match=r"ks=\(0,\)"):
        search(noise(3, 2), "aab", ks=(0,))


def test_every_variant_is_searched_and_a_given_split_is_kept() -> None:
    videos = (*videos_of("aabb", "train"), *videos_of("ab", "val"))
    plain = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.05], [0.05, 1]])
    features = {RAW_LAST: plain + 1000, ADAPTED: plain}
    results = classification.retrieve(PooledVideos(videos, features, {}))
    assert list(results) == [RAW_LAST, CENTRED, ADAPTED]
    for found in (results[CENTRED], results[ADAPTED]):
        assert (found.searched, found.queries) == (4, ("val/0.mp4", "val/1.mp4"))
        assert found.figures["mAP"] == 1.0
        assert found.per_class == {"a": 1.0, "b": 1.0}


RUN, JUMP, REST = torch.eye(4)[:3]
SEGMENTS = [
    Segment("a", 0, 2, "run"), Segment("a", 2, 4, "jump"),
    Segment("b", 1, 3, "jump"), Segment("b", 3, 5, "run"),
]  # fmt: skip


def frames(name: str, *shown: torch.Tensor, noise: float = 0.0, offset: float = 0.0) -> VideoFrames:
    """One frame a second."""
    generator = torch.Generator().manual_seed(len(shown))
    rows = torch.stack(shown) + noise * torch.randn(len(shown), 4, generator=generator)
    times = torch.arange(len(shown)).double()
    return VideoFrames(name, times, {RAW_LAST: rows + offset, ADAPTED: rows})


def two_videos() -> list[VideoFrames]:
    return [frames("a", RUN, RUN, JUMP, JUMP, REST), frames("b", REST, JUMP, JUMP, RUN, RUN)]


def test_frames_are_what_the_nearest_segments_of_other_videos_are() -> None:
    videos = two_videos()
    videos[1].features[ADAPTED][1] = RUN  # b's first jump looks like running
    results = localise(videos, SEGMENTS, ks=(1,))
    assert list(results) == [RAW_LAST, CENTRED, ADAPTED]
    found = results[ADAPTED][1]
    assert found.names == ("a",) * 5 + ("b",) * 5
    assert found.labels[:5] == ("run", "run", "jump", "jump", "background")
    assert found.predicted[5:] == ("background", "run", "jump", "run", "run")
    assert found.accuracy == 9 / 10
    assert found.per_class == {"background": 1, "jump": 3 / 4, "run": 1}


def test_centring_takes_off_what_all_segments_share() -> None:
    videos = [frames(v, RUN, RUN, JUMP, JUMP, JUMP, noise=0.05, offset=100.0) for v in "ab"]
    spans = ((0, 2, "run"), (2, 3, "jump"), (3, 4, "jump"), (4, 5, "jump"))
    results = localise(videos, [Segment(v, *span) for v in "ab" for span in spans], ks=(4,))
    assert results[CENTRED][4].accuracy == 1.0
    # under a large common offset all segments are equally near, and the commoner label wins
    assert set(results[RAW_LAST][4].predicted) == {"jump"}
    everywhere = [Segment(v, 0, 9, "jump") for v in "ab"]
    assert localise(videos, everywhere)[ADAPTED][1].accuracy == 1.0


def test_background_of_one_video_is_left_out_and_what_cannot_be_learnt_is_described() -> None:
    results = localise(two_videos(), [*SEGMENTS, Segment("a", 4, 9, "run")], ks=(1,))
    assert list(results[ADAPTED][1].per_class) == ["jump", "run"]
    late = [Segment(s.video, s.start + 90, s.end + 90, s.label) for s in SEGMENTS]
    dive = [*SEGMENTS, Segment("b", 0, 1, "dive")]
    for videos, segments, message in (
        (two_videos()[:1], SEGMENTS, "only one readable video shows jump, run"),
        (two_videos(), dive, "only one readable video shows dive"),
        (two_videos(), late, "no frame lies within a segment"),
    ):
        with pytest.raises(FrameError, match=message):
            localise(videos, segments)


def test_segments_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text(
        "\ufefflabel,video,end,start,comment\nrun,b.mp4,3,1.5,\njump, a.mp4 ,2,0,ok\n\n"
        '"run, fast",b.mp4,1.5,0,\njump,a.mp4,3,1,touching and equal segments do not overlap\n',
        encoding="utf-8",
    )
    assert read_segments(path) == [
        Segment("b.mp4", 0.0, 1.5, "run, fast"),
        Segment("b.mp4", 1.5, 3.0, "run"),
        Segment("a.mp4", 0.0, 2.0, "jump"),
        Segment("a.mp4", 1.0, 3.0, "jump"),
    ]


def test_a_table_that_cannot_be_meant_is_described(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="does not exist; expected a CSV file"):
        read_segments(tmp_path / "none.csv")
    head, path = "video,start,end,label\n", tmp_path / "s.csv"
    for text, message in (
        ("video,start,end\na,0,1\n", "lacks label; its first line must be video,start,end,label"),
        ("", "has the columns none"),
        ("\xff", r"\.csv cannot be read as text"),
        (head, "has no segments below its header"),
        (head + "a,0,1,x\na,2,1,y\n", "line 3: got video 'a', start '2', end '1'"),
        (head + "a,zero,1,x\n", "line 2: .*expected a video, a label and seconds"),
        (head + "a,0\n", "line 2"),
        (head + "a,0,1,\n", "line 2"),
        (head + "a,0,9,x\na,1,2,x\na,5,6,y\n", "'x' and 'y' overlap in a at 5 s"),
    ):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(FrameError, match=message):
            read_segments(path)
