"""Figures beside those of the peers' own code, run on the same frames, labels and features.

    python tests/benchmarks/parity_protocols.py crw VIDEOWALK DAVIS_EVALUATION --data DAVIS
    python tests/benchmarks/parity_protocols.py cropmae CROPMAE DAVIS_EVALUATION --data DAVIS
    python tests/benchmarks/parity_protocols.py dino DINO DAVIS_EVALUATION --data DAVIS
    python tests/benchmarks/parity_protocols.py jhmdb CROPMAE --data JHMDB
    python tests/benchmarks/parity_protocols.py objects DAVIS_EVALUATION

The folders are checkouts of ajabri/videowalk, alexandre-eymael/CropMAE, facebookresearch/dino and
davisvideochallenge/davis2017-evaluation; they need opencv-python-headless (4), imageio, matplotlib,
pandas and tqdm. Their scripts run on the CPU with this package's backbone in place of their model:
``dinov2-vits14-pypi`` with its patches resampled to 16 pixels, which all their frame sizes fit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
import runpy
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter import CoSettleAdapter, evaluation
from cosettle_adapter.backbones import load_backbone
from cosettle_adapter.evaluation import Clip, Propagation
from cosettle_adapter.evaluation.joint_clips import read_keypoints
from cosettle_adapter.evaluation.masks import palette, save_labels
from cosettle_adapter.evaluation.variants import feature_variants
from cosettle_adapter.video.geometry import nearest_valid

PATCH = 16
Figures = dict[str, float]  # J&F or PCK in percent, by object or threshold


def patch16(folder: Path) -> CoSettleAdapter:
    """A ViT-S/16 without layer scale that computes what the ViT-S/14 does at its own patch size."""
    state = load_backbone("dinov2-vits14-pypi").state_dict()
    state = {name.removeprefix("vit."): value for name, value in state.items()}
    kernel = resample_patch_embed(state["patch_embed.proj.weight"], [PATCH, PATCH])
    state |= {
        "patch_embed.proj.weight": kernel,
        "pos_embed": resample_abs_pos_embed(state["pos_embed"], [14, 14]),
    }
    for name in [name for name in state if name.endswith(".gamma")]:
        scale = state.pop(name)
        layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        state[f"{layer}.weight"] = state[f"{layer}.weight"] * rearrange(scale, "c -> c 1")
        state[f"{layer}.bias"] = state[f"{layer}.bias"] * scale
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "s16.safetensors"
    )
    return CoSettleAdapter.raw(
        "timm:vit_small_patch16_224.dino", backbone_weights=folder / "s16.safetensors"
    )


class Peer:
    """This package's backbone behind the interfaces of the peers' models."""

    def __init__(self, adapter: CoSettleAdapter) -> None:
        self.adapter = adapter
        self.patch_embed = SimpleNamespace(patch_size=PATCH)
        self.last = torch.zeros(0), torch.zeros(0)  # image and its tokens

    def maps(self, images: Tensor) -> Tensor:
        return torch.stack([self.map(image) for image in images])

    @torch.no_grad()
    def map(self, image: Tensor) -> Tensor:
        """Tokens ``(C, h, w)``; videowalk's loader begins with 20 copies of one frame."""
        if not torch.equal(image, self.last[0]):
            size = [nearest_valid(side, PATCH, PATCH) for side in image.shape[-2:]]
            batch = F.interpolate(rearrange(image, "c h w -> 1 c h w"), size, mode="bilinear")
            (tokens,) = self.adapter.backbone.intermediate_tokens(batch, [11], norm=[True])
            self.last = image, tokens[0]
        return self.last[1]

    def __call__(self, images: Tensor) -> Tensor:
        """CropMAE's: tokens with one of a class before them, which it removes."""
        tokens = rearrange(self.maps(images), "n c h w -> n (h w) c")
        return torch.cat([tokens[:, :1], tokens], dim=1)

    def encoder(self, video: Tensor) -> Tensor:
        """videowalk's: ``(1, C, T, h, w)``."""
        return rearrange(
            self.maps(rearrange(video, "1 c t h w -> t c h w")), "t c h w -> 1 c t h w"
        )

    def get_intermediate_layers(self, image: Tensor, n: int) -> list[Tensor]:
        """DINO's."""
        return [self(image)]


def module(folder: Path, name: str) -> Any:
    """A module of a peer; ``folder`` is where its imports begin."""
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def write_davis(clips: Sequence[Clip[Any]], frames: int, root: Path) -> None:
    """The first frames of clips in the layout of DAVIS-2017, with its palette."""
    (root / "ImageSets" / "2017").mkdir(parents=True)
    names = [clip.name for clip in clips]
    (root / "ImageSets" / "2017" / "val.txt").write_text("\n".join(names) + "\n")
    for clip in clips:
        images, labels = (root / k / "480p" / clip.name for k in ("JPEGImages", "Annotations"))
        images.mkdir(parents=True)
        for index, mask in enumerate(clip.read_annotations()[:frames]):
            (images / f"{index:05d}.jpg").symlink_to(clip.frames[index].resolve())
            save_labels(mask, labels / f"{index:05d}.png")


def official(results: Path, root: Path, peer: Path) -> Figures:
    """J&F by object, by davis2017-evaluation."""
    evaluator = module(peer, "davis2017.evaluation").DAVISEvaluation
    scores = evaluator(str(root), "semi-supervised", "val").evaluate(str(results))
    j, f = (scores[name]["M_per_object"] for name in "JF")
    return {name: 50 * (j[name] + f[name]) for name in j}


def ours(protocol: Any, adapter: CoSettleAdapter) -> dict[str, evaluation.ClipScores]:
    variants = feature_variants(adapter)[:1]
    result = evaluation.evaluate(protocol, adapter, variants)
    return {name: clip.scores[variants[0].name] for name, clip in result.clips.items()}


def crw_or_cropmae(name: str, peer: Path, root: Path, work: Path, adapter: CoSettleAdapter) -> Path:
    """Label propagation of videowalk or CropMAE, and its conversion to label maps of DAVIS."""
    listed, inside, outside = work / "davis.txt", work / "in", work / "out"
    clips = (root / "ImageSets/2017/val.txt").read_text().split()
    folders = [f"{root}/JPEGImages/480p/{clip} {root}/Annotations/480p/{clip}\n" for clip in clips]
    options = Namespace(
        filelist=str(listed), save_path=str(inside), videoLen=20, video_len=20, batch_size=5,
        long_mem=[0], no_l2=False, norm_mask=False, device="cpu", visdom=False, pca_vis=False,
        texture=False, round=False, use_lab=False, model_type="vit",
    )  # fmt: skip
    inside.mkdir()
    if name == "crw":
        test, loader = module(peer / "code", "test"), importlib.import_module("data.vos").VOSDataset
        test.vis = None
        options.__dict__ |= {"topk": 10, "radius": 12, "temperature": 0.05, "imgSize": -1}
    else:
        test = module(peer, "downstreams.propagation.src.test")
        loader = importlib.import_module("downstreams.propagation.src.data.vos").VOSDataset
        options.__dict__ |= {"topk": 7, "radius": 20, "temperature": 0.7, "img_size": [480, 880]}
        options.map_scale = np.array([PATCH, PATCH])
    for number, folder in reversed([*enumerate(folders)]):  # each is written as number 0
        listed.write_text(folder)
        with Image.open(next(Path(folder.split()[0]).iterdir())) as image:
            sides = image.size[::-1]
        # the scale by which its loader rounds up to our grid
        options.mapScale = [
            side / nearest_valid(side, PATCH, PATCH) * PATCH + 1e-6 for side in sides
        ]
        options.save_path = str(inside)
        clip = torch.utils.data.DataLoader(loader(options), batch_size=1)
        test.test(clip, Peer(adapter), options)
        for path in inside.glob("0_*_mask.png"):
            path.rename(inside / f"{number}_{path.name[2:]}")
    if name == "crw":
        words = ["convert", "-o", f"{outside}/", "-i", f"{inside}/", "-d", str(root)]
        with mock.patch.object(sys, "argv", words):
            # imported, it would hold the lock of its import while its processes wait for that
            sys.path.insert(0, str(code := peer / "code" / "eval"))
            runpy.run_path(str(code / "convert_davis.py"), run_name="convert")
    else:
        convert = importlib.import_module("downstreams.propagation.src.eval.convert_davis")
        convert.main(
            Namespace(
                out_folder=f"{outside}/", in_folder=f"{inside}/", dataset=str(root), set="val"
            )
        )
    return outside


def dino(peer: Path, root: Path, work: Path, adapter: CoSettleAdapter) -> Path:
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    script = module(peer, "eval_video_segmentation")
    script.args = Namespace(
        output_dir=str(work / "out"), n_last_frames=7, size_mask_neighborhood=12, topk=5,
        patch_size=PATCH,
    )  # fmt: skip
    colours = np.frombuffer(palette(), dtype=np.uint8).reshape(-1, 3)
    for clip in (root / "ImageSets/2017/val.txt").read_text().split():
        folder = root / "JPEGImages" / "480p" / clip
        frames = script.read_frame_list(str(folder))
        first = frames[0].replace("JPEGImages", "Annotations").replace("jpg", "png")
        labels, mask = script.read_seg(first, PATCH)
        script.eval_video_tracking_davis(
            script.args, Peer(adapter), frames, str(folder), labels, mask, colours
        )
    return work / "out"


def masks(options: Namespace, work: Path) -> None:
    """J&F by object of a protocol and of its peer."""
    peer, measure = (folder.resolve() for folder in options.peers)
    if (options.data / "JPEGImages").is_dir():
        clips: Sequence[Clip[Any]] = evaluation.davis_clips(options.data, clips=options.clips)
    else:
        clips = evaluation.folder_clips(options.data, clips=options.clips, late_labels="keep")
    root, adapter = work / "davis", patch16(work)
    write_davis(clips, options.frames, root)
    protocol = evaluation.davis_protocol(root, propagation=Propagation(options.part))
    found = {
        f"{name}_{number}": 50 * (each["J mean"] + each["F mean"])
        for name, scores in ours(protocol, adapter).items()
        for number, each in enumerate(scores.counts["objects"], 1)
    }
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if options.part == "dino":
            results = dino(peer, root, work, adapter)
        else:
            results = crw_or_cropmae(options.part, peer, root, work, adapter)
        expected = official(results, root, measure)
    report(found, expected)


def jhmdb(options: Namespace, work: Path) -> None:
    """PCK with the published and the geometric rule, and that of CropMAE."""
    import scipy.io

    (peer,) = (folder.resolve() for folder in options.peers)
    adapter, lines = patch16(work), []
    for path in sorted(options.data.glob("*/keypoints.json")):
        joints, _, _ = read_keypoints(path)
        frames, mat = work / "frames" / path.parent.name, work / f"{path.parent.name}.mat"
        frames.mkdir(parents=True)
        for index, frame in enumerate(sorted((path.parent / "frames").iterdir())):
            with Image.open(frame) as image:
                image.convert("RGB").save(frames / f"{index + 1:05d}.png")
        scipy.io.savemat(mat, {"pos_img": rearrange(joints.xy, "t j two -> two j t")})
        lines.append(f"{mat} {frames}\n")
    (work / "jhmdb.txt").write_text("".join(lines))
    test, loader, score = (
        module(peer, f"downstreams.propagation.src.{name}")
        for name in ("test", "data.jhmdb", "eval.eval_pck")
    )
    settings = Namespace(
        filelist=str(work / "jhmdb.txt"), save_path=str(work), video_len=20, batch_size=5,
        long_mem=[0], no_l2=False, norm_mask=False, device="cpu", model_type="vit", topk=7,
        radius=20, temperature=0.7, img_size=[320, 320], map_scale=np.array([PATCH, PATCH]),
        texture=False, round=False,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        test.test(torch.utils.data.DataLoader(loader.JhmdbSet(settings)), Peer(adapter), settings)
        shares = score.main(
            Namespace(filelist=settings.filelist, src_folder=str(work), feat_res=[20, 20])
        )
    expected = {f"PCK@{threshold:g}": float(shares[threshold][0]) for threshold in (0.1, 0.2)}
    for rule in ("published", "geometric"):
        protocol = evaluation.jhmdb_protocol(
            options.data, joints=rule, propagation=Propagation("cropmae")
        )
        scores = protocol.totals(list(ours(protocol, adapter).values()))
        print(f"--joints {rule}")
        report({name: 100 * scores[name] for name in expected}, expected)


def objects(options: Namespace, work: Path) -> None:
    """J&F of constructed label maps: ids with gaps, late ids, void."""
    rng = np.random.default_rng(0)
    masks = np.zeros((8, 60, 80), dtype=np.uint8)
    for t in range(8):
        masks[t, 10:30, 5 + 3 * t : 25 + 3 * t], masks[t, 35:55, 50 - 2 * t : 70 - 2 * t] = 2, 5
    late, void = masks.copy(), masks.copy()
    late[3:, :8, :8], late[4:, :8, 70:] = 3, 9
    void[1:, 28:37] = 255
    void[0, :3] = 255
    features = torch.from_numpy(rng.standard_normal((32, 15, 20))).float().repeat(8, 1, 1, 1)
    for t in range(8):
        small = torch.from_numpy(masks[t, 2::4, 2::4].astype(np.int64))
        features[t] += F.one_hot(small, 6).permute(2, 0, 1).repeat(6, 1, 1)[:32] * 2
    for name, truth in (("gaps", masks), ("late", late), ("void", void)):
        root, out = work / name, work / f"{name}-results"
        (root / "frames").mkdir(parents=True)
        for t in range(8):
            Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(root / "frames" / f"{t:05d}.jpg")
        frames = tuple(sorted((root / "frames").iterdir()))
        write_davis([Clip(name, frames, lambda truth=truth: truth)], 8, root)

        def save(index: int, labels: Any, folder: Path = out / name) -> None:
            save_labels(labels, folder / f"{index:05d}.png")

        scores = evaluation.evaluate_sequence(features, truth, on_mask=save)
        found = {
            f"{name}_{number}": 100 * value
            for number, value in zip(scores.objects, scores.per_object, strict=True)
        }
        report(found, official(out, root, options.peers[0].resolve()))


def report(found: Figures, expected: Figures) -> None:
    print(f"{'':28}{'here':>9}{'peer':>9}{'difference':>12}")
    assert found.keys() == expected.keys(), (sorted(found), sorted(expected))
    rows = [*found.items(), ("mean", float(np.mean([*found.values()])))]
    peers = {**expected, "mean": float(np.mean([*expected.values()]))}
    for name, value in rows:
        print(f"{name:28}{value:9.2f}{peers[name]:9.2f}{value - peers[name]:+12.3f}")


def main() -> None:
    parts: dict[str, Callable[[Namespace, Path], None]] = {
        "crw": masks, "cropmae": masks, "dino": masks, "jhmdb": jhmdb, "objects": objects,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("part", choices=parts)
    parser.add_argument("peers", type=Path, nargs="+", help="checkouts, in the order shown above")
    parser.add_argument("--data", type=Path, help="folder of DAVIS, of clips, or of JHMDB")
    parser.add_argument("--clips", nargs="+", help="all by default")
    parser.add_argument("--frames", type=int, help="at most this many of a clip")
    options = parser.parse_args()
    multiprocessing.set_start_method("fork")  # their modules cannot be imported by name
    for unneeded in ("wandb", "visdom"):
        sys.modules.setdefault(unneeded, mock.MagicMock())
    with tempfile.TemporaryDirectory() as folder:
        parts[options.part](options, Path(folder))


if __name__ == "__main__":
    main()
