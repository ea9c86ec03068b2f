"""Measures beside the functions of the peers' own code, on the same features.

    python tests/benchmarks/parity_metrics.py figure1 CO_SETTLE DAVIS
    python tests/benchmarks/parity_metrics.py tapvid TAPNET CHRONO

CO_SETTLE, TAPNET and CHRONO are checkouts of yafeng19/Co-Settle, google-deepmind/tapnet and
cvlab-kaist/Chrono. DAVIS is a folder of DAVIS; its first four clips of at least 40 frames are read.
"""

from __future__ import annotations

import ast
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.evaluation import queries_first, queries_strided, tapvid_metrics
from cosettle_adapter.evaluation.point_clips import POINT_PROTOCOLS
from cosettle_adapter.evaluation.points import track_queries
from cosettle_adapter.evaluation.representation import evaluate_representation
from cosettle_adapter.video.geometry import plan_geometry


def functions(path: Path, **names: Any) -> SimpleNamespace:
    """The top-level functions of a script, without its imports, which need a GPU or JAX."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function in tree.body:
        function.decorator_list = []  # type: ignore[attr-defined]
    future = compile("from __future__ import annotations", "", "exec").co_flags
    space = {"np": np, "torch": torch, "F": F, **vars(typing), **names}
    exec(compile(tree, str(path), "exec", flags=future), space)
    return SimpleNamespace(**space)


def figure1(peer: Path, davis: Path) -> None:
    """From frames on: the released data path is Resize(256), CenterCrop(224)."""
    adapter = CoSettleAdapter.from_pretrained("dinov2-vits14-pypi")
    clips = sorted((davis / "JPEGImages" / "480p").iterdir())
    clips = [clip for clip in clips if len(list(clip.iterdir())) >= 40][:4]
    load = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    )

    @torch.no_grad()
    def features(clip: Path) -> Tensor:
        images = [load(Image.open(path).convert("RGB")) for path in sorted(clip.iterdir())[:40]]
        return torch.cat([adapter(batch) for batch in torch.stack(images).split(8)])

    class Model:
        def eval(self) -> Model:
            return self

        def __call__(self, maps: Tensor, **_: Any) -> Tensor:
            return rearrange(maps, "t c h w -> t (h w) c")

    settings = SimpleNamespace(base_model="dino", use_adapter=True)
    script = functions(
        peer / "cal_metric.py", args=settings, tqdm=lambda loader, **_: loader, EPS=1e-6,
        print=lambda *_: None,
    )  # fmt: skip
    given = (Model(), [torch.stack([features(clip) for clip in clips])], "cpu")
    released = {
        "D_intra": script.compute_intra_video_metric(*given)["normalized_95"],
        "D_inter": script.compute_inter_video_metric(*given)["normalized_95"],
        "effective rank": script.compute_effective_rank(*given),
        "cycle accuracy": script.compute_cycle_accuracy(*given),
    }
    found = evaluate_representation(adapter, clips).results["adapted"].figures
    for name, value in released.items():
        print(f"{name:16} here {found[name]:.4f}, released {value:.4f}")


def tapvid(tapnet: Path, chrono: Path) -> None:
    """Largest differences: queries and measures of random videos, and tracks of random features."""
    official = functions(tapnet / "tapnet" / "tapvid" / "evaluation_datasets.py")
    tracker, rule = functions(chrono / "models" / "utils.py"), POINT_PROTOCOLS["chrono"]
    rng, geometry = np.random.default_rng(0), plan_geometry(896, 896, patch=14)
    worst = {"queries": 0.0, "measures": 0.0, "tracks of chrono, pixels of 256": 0.0}
    for case, mode in ((case, mode) for case in range(60) for mode in ("first", "strided")):
        count, frames = int(rng.integers(1, 8)), int(rng.integers(6, 14))
        points = rng.random((count, frames, 2)) * 256
        occluded = rng.random((count, frames)) > rng.choice([0.2, 0.6])
        ours = (queries_first if mode == "first" else queries_strided)(occluded, points)
        if not len(ours.points):
            continue
        sample = getattr(official, f"sample_queries_{mode}")
        theirs = sample(occluded, points, np.zeros((frames, 1)))
        pairs = {"queries": [(theirs["query_points"], ours.points)]}
        pairs["queries"] += [(theirs["target_points"], ours.tracks)]
        guess = ours.tracks + rng.normal(0, 5, ours.tracks.shape)
        hidden = rng.random(ours.occluded.shape) > 0.7
        asked = (theirs["query_points"], theirs["occluded"], theirs["target_points"])
        expected = official.compute_tapvid_metrics(*asked, hidden[None], guess[None], mode)
        found = tapvid_metrics(ours.points, ours.occluded, ours.tracks, hidden, guess, mode)
        pairs["measures"] = [
            (expected["average_pts_within_thresh"], found.delta_avg),
            (expected["occlusion_accuracy"], found.occlusion_accuracy),
            (expected["average_jaccard"], found.average_jaccard),
        ]
        if case < 3:
            noise = torch.Generator().manual_seed(case)
            maps = torch.randn(1, 32, 20, 20, generator=noise)
            smooth = F.interpolate(maps, (64, 64), mode="bicubic")[0]
            features = torch.stack([smooth.roll((t, 2 * t), (1, 2)) for t in range(frames)])
            features += 0.3 * torch.randn(features.shape, generator=noise)
            grid = F.normalize(rearrange(features, "t c h w -> 1 t h w c"), dim=-1)
            queries = torch.tensor(ours.points)[None].float()
            places = tracker.convert_grid_coordinates(
                queries, (frames, 256, 256), (frames, 64, 64), coordinate_format="tyx"
            )
            heat = torch.einsum("bnc,bthwc->bnthw", tracker.map_coordinates_3d(grid, places), grid)
            heat = (heat.flatten(3) * 20).softmax(-1).unflatten(3, (64, 64))
            tracks = tracker.heatmaps_to_points(heat, (1, frames, 256, 256, 3))
            at = torch.tensor(ours.points)
            xy, _ = track_queries(
                features, at[:, 0], at[:, 1:].flip(-1) * 3.5, geometry,
                radius_argmax=rule.radius_argmax, temperature=rule.temperature,
                unit_queries=rule.unit_queries,
            )  # fmt: skip
            pairs["tracks of chrono, pixels of 256"] = [(tracks[0].numpy(), xy.numpy() / 3.5)]
        for name, compared in pairs.items():
            for theirs, mine in compared:
                assert (np.isnan(theirs) == np.isnan(mine)).all()
                difference = float(np.nan_to_num(np.abs(theirs - mine)).max())
                worst[name] = max(worst[name], difference)
    for name, difference in worst.items():
        print(f"{name}: {difference:.1e}")


if __name__ == "__main__":
    part, *folders = sys.argv[1:]
    {"figure1": figure1, "tapvid": tapvid}[part](*map(Path, folders))
