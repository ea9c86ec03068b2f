from __future__ import annotations

import contextlib
import errno
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fakes import small_adapter
from torch import Tensor

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import GeometryError, MissingExtraError
from cosettle_adapter.export import ExportError, onnx, program, to_onnx, to_torch_export
from cosettle_adapter.export.program import Traced, frames_to_compare
from cosettle_adapter.starter import starter_photographs
from cosettle_adapter.video.geometry import resize

SLOW = pytest.mark.slow
SIZE = {"dinov2": (56, 70), "clip": (64, 80), "rotary": (64, 80), "convnext": (64, 96)}


def photos(size: tuple[int, int], count: int) -> Tensor:
    """Real pictures, uint8."""
    pictures = [resize(photo[None], size) for photo in starter_photographs().values()]
    return torch.cat(pictures)[:count].round().to(torch.uint8)


def onnx_features(path: Path, inputs: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    return torch.from_numpy(session.run(["features"], {name: inputs.numpy()})[0])


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@functools.cache
def made_once() -> tuple[Traced, Any]:
    traced = Traced(small_adapter("vit"), (64, 80), normalize=True, unfused=True)
    return traced, onnx._translate(traced)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare tests of what becomes of a program the seconds of tracing it."""
    traced, _ = made_once()
    for module in (onnx, program):
        monkeypatch.setattr(module, "Traced", lambda *_, **__: traced)


@pytest.fixture
def translated(traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for tests of what becomes of an ONNX model."""
    _, translated = made_once()
    monkeypatch.setattr(onnx, "_translate", lambda _: translated)


@pytest.mark.parametrize(
    "name", ["convnext", *(pytest.param(kind, marks=SLOW) for kind in ("dinov2", "clip", "rotary"))]
)
def test_onnx_runtime_equals_pytorch_on_photographs(name: str, tmp_path: Path) -> None:
    adapter, size = small_adapter(name), SIZE[name]
    exported = to_onnx(adapter, tmp_path / "model.onnx", size, check_on=photos(size, 4))
    assert exported.parity is not None
    assert exported.parity.frames == 4
    assert exported.parity.difference < 1e-4
    for count in (1, 5):  # neither the batch that was traced nor the one that was compared
        frames = photos(size, count)
        torch.testing.assert_close(
            onnx_features(exported.path, frames), adapter(frames), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize(
    ("name", "stride"),
    [("vit", 8), *(pytest.param(*kind, marks=SLOW) for kind in (("clip", None), ("dinov2", None)))],
)
def test_one_onnx_file_takes_any_size(name: str, stride: int | None, tmp_path: Path) -> None:
    adapter = small_adapter(name, stride=stride)
    patch, step = adapter.backbone.patch, adapter.backbone.stride
    exported = to_onnx(adapter, tmp_path / "any.onnx")
    overlap = f" + {patch - step}" if stride else ""
    assert exported.input == f"frames uint8 (batch, 3, {step} h{overlap}, {step} w{overlap})"
    assert exported.metadata["size"] is exported.metadata["grid"] is None
    assert exported.parity is not None
    assert len(exported.parity.sizes) == 3
    session = pytest.importorskip("onnxruntime").InferenceSession(exported.path)
    ((*_, height, width),) = (each.shape for each in session.get_inputs())
    assert (height, width) == tuple(f"{step}*{side}{overlap}" for side in "hw")
    assert session.get_outputs()[0].shape == ["batch", adapter.width, "h", "w"]
    for count, (h, w) in ((1, (3, 9)), (5, (8, 4))):
        frames = photos((patch + (h - 1) * step, patch + (w - 1) * step), count)
        torch.testing.assert_close(
            onnx_features(exported.path, frames), adapter(frames), atol=1e-4, rtol=0
        )


@pytest.mark.slow
def test_one_program_takes_any_size_with_rotary_positions(tmp_path: Path) -> None:
    adapter = small_adapter("rotary")
    path = to_torch_export(adapter, tmp_path / "any.pt2", static_batch=2, check=False).path
    program = torch.export.load(path).module()
    for size in ((48, 112), (256, 256), (80, 64)):
        frames = photos(size, 2)
        torch.testing.assert_close(program(frames), adapter(frames), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_size_that_tracing_fixed_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "_symbolic_floats", contextlib.nullcontext)
    with pytest.raises(ExportError, match=r"cannot run the file, .* of 256 x 256: .* give the"):
        to_torch_export(small_adapter("rotary"), tmp_path / "any.pt2")
    assert not list(tmp_path.iterdir())


def test_equal_neighbours_may_be_chosen_differently_but_not_often() -> None:
    adapter = small_adapter("dinov2")
    traced = Traced.__new__(Traced)  # only what comparing needs
    traced.model, traced.count = program._Exported(adapter, True, False), None
    traced.sizes = [(14 * 18, 14 * 28)]  # 3 * 504 patches: three may differ

    def changed(patches: int) -> Any:
        def run(inputs: Tensor) -> Tensor:
            features = traced.model(inputs)
            features[0, :, 0, :patches] += 1
            return features

        return run

    assert traced.compare(changed(3), "a runtime", None).difference < 1e-4
    with pytest.raises(ExportError, match=r"differs from PyTorch by 1 .*frames of 252 x 392"):
        traced.compare(changed(4), "a runtime", None)


@pytest.mark.slow
def test_the_real_backbone_too(real_adapter: CoSettleAdapter, tmp_path: Path) -> None:
    size = (112, 168)
    exported = to_onnx(real_adapter, tmp_path / "real.onnx", size, check_on=photos(size, 2))
    frames = photos(size, 3)
    found = onnx_features(exported.path, frames)
    torch.testing.assert_close(found, real_adapter(frames), atol=1e-4, rtol=0)
    layer = CoSettleAdapter.raw(real_adapter.backbone, layer=7)
    shorter = to_onnx(layer, tmp_path / "layer.onnx", size, check=False)
    unread = 2 * 384 * 384 * 12 * 4  # layers 8 and 9
    assert shorter.size < exported.size - unread


@pytest.mark.usefixtures("translated")
def test_an_onnx_model_has_metadata_and_no_paths_of_this_machine(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = to_onnx(small_adapter("vit"), tmp_path / "model.onnx", (64, 80), check=False)
    other = to_torch_export(small_adapter("vit"), tmp_path / "model.pt2", (64, 80), check=False)
    assert model.parity is other.parity is None
    stored = runtime.InferenceSession(model.path).get_modelmeta().custom_metadata_map
    assert stored["backbone"] == "small-vit16"
    assert stored["fingerprint"] == small_adapter("vit").backbone.fingerprint
    assert {key: json.loads(stored[key]) for key in ("layers", "patch", "grid", "normalized")} == {
        "layers": [0], "patch": 16, "grid": [4, 5], "normalized": True,
    }  # fmt: skip
    check_no_paths(model.path)


def check_no_paths(file: Path) -> None:
    content = file.read_bytes()
    assert b"site-packages" not in content
    assert str(Path(__file__).parents[1]).encode() not in content


def test_a_program_runs_without_this_package_and_holds_what_it_reads(tmp_path: Path) -> None:
    adapter, frames = small_adapter("vit", stride=8), photos((64, 80), 3)
    exported = to_torch_export(adapter, tmp_path / "model.pt2", (64, 80))
    assert exported.output == "features float32 (batch, 32, 7, 9)"
    assert exported.parity is not None
    extra = {"cosettle_adapter.json": ""}
    loaded = torch.export.load(exported.path, extra_files=extra)
    assert json.loads(extra["cosettle_adapter.json"]) == exported.metadata
    read = {name.partition("blocks.")[2][:1] for name in loaded.state_dict}
    assert read == {"", "0"}, "of two layers the first is read"
    assert adapter.backbone.vit.blocks[1].norm1.weight is not None, "the adapter is left alone"
    check_no_paths(exported.path)
    torch.save(frames, tmp_path / "frames.pt")
    script = (
        "import sys, torch; sys.modules['cosettle_adapter'] = sys.modules['timm'] = None\n"
        "features = torch.export.load('model.pt2').module()(torch.load('frames.pt'))\n"
        "torch.save(features.detach(), 'features.pt')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "features.pt"), adapter(frames))


def test_half_precision_and_images_as_preprocess_returns_them(tmp_path: Path) -> None:
    adapter = small_adapter("clip", dtype=torch.float16)
    path = tmp_path / "half.onnx"
    exported = to_onnx(adapter, path, (32, 32), preprocessing=False, normalize=True, static_batch=1)
    assert exported.input == "images float32 (1, 3, 32, 32)"
    assert exported.output == "features float16 (1, 48, 2, 2)"
    assert exported.parity is not None
    frames = photos((32, 32), 1)
    torch.testing.assert_close(
        onnx_features(path, adapter.preprocess(frames)),
        adapter(frames, normalize=True),
        atol=1e-2,
        rtol=0,
    )


@pytest.mark.usefixtures("translated")
def test_weights_beyond_two_gigabytes_go_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "_LARGEST_FILE", 0)
    exported = to_onnx(small_adapter("vit"), tmp_path / "model.onnx", (64, 80))
    assert files(tmp_path) == {"model.onnx", "model.onnx.data"}
    assert exported.size == sum(file.stat().st_size for file in tmp_path.iterdir())
    moved = exported.path.parent.rename(tmp_path.with_name("elsewhere")) / "model.onnx"
    frames = photos((64, 80), 1)
    torch.testing.assert_close(
        onnx_features(moved, frames), small_adapter("vit")(frames, normalize=True)
    )


@pytest.mark.usefixtures("translated")
@pytest.mark.parametrize("kind", ["wrong", "misshapen", "unloadable"])
def test_a_file_that_does_not_compute_the_same_is_not_kept(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")

    class Wrong:
        def __init__(self, *_: Any, **__: Any) -> None:
            if kind == "unloadable":
                raise RuntimeError("Opset 18 is under development")

        def run(self, _: Any, inputs: dict[str, Any]) -> list[Any]:
            side = 4 if kind == "wrong" else 3
            return [torch.zeros(len(inputs["frames"]), 32, side, 5).numpy()]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    (tmp_path / "model.onnx").write_bytes(b"an earlier one")
    told = {
        "wrong": r"differs from PyTorch by .* was not kept",
        "misshapen": r"returns \(3, 32, 3, 5\), PyTorch \(3, 32, 4, 5\)",
        "unloadable": r"cannot load .* Opset 18 .*install -U onnxruntime",
    }
    with pytest.raises(ExportError, match=told[kind]):
        to_onnx(small_adapter("vit"), tmp_path / "model.onnx", (64, 80))
    assert files(tmp_path) == {"model.onnx"}
    assert (tmp_path / "model.onnx").read_bytes() == b"an earlier one"


@pytest.mark.usefixtures("translated")
def test_without_onnx_runtime_the_file_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    exported = to_onnx(small_adapter("vit"), tmp_path / "model.onnx", (64, 80))
    assert exported.parity is None
    assert exported.path.is_file()
    assert "onnxruntime" in caplog.text


@pytest.mark.usefixtures("traced")
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        to_torch_export(small_adapter("vit"), tmp_path / "model.pt2", (64, 64))
    assert files(tmp_path) == set()


def test_what_cannot_be_exported_says_what_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, size = small_adapter("vit"), (64, 64)
    model, program = tmp_path / "model.onnx", tmp_path / "model.pt2"
    settling = CoSettleAdapter.raw(adapter.backbone)
    settling.settles = True
    half = small_adapter("vit", dtype=torch.bfloat16)
    for export, message in (
        (lambda: to_onnx(settling, model, size), r"Export adapter\.settle\(clip\)"),
        (lambda: to_onnx(adapter, program, size), r"ends in \.onnx, got"),
        (lambda: to_onnx(half, model, size), r"dtype=torch\.float16 or .* \.pt2"),
        (lambda: to_torch_export(adapter, program, size, static_batch=0), "must be at least 1"),
        (lambda: to_onnx(small_adapter("convnext"), model), r"arranges stages .* \(--size\)"),
    ):
        with pytest.raises(ExportError, match=message):
            export()
    with pytest.raises(GeometryError, match=r"65 x 90 .* nearest size that does is 64 x 96"):
        to_torch_export(adapter, program, (65, 90))
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    with pytest.raises(ExportError, match=r"needs torch 2\.6 or newer, this is 2\.4\.1"):
        onnx.check_exporter()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"cosettle-adapter\[export\]"):
        onnx.check_exporter()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exporter", [to_onnx, to_torch_export])
def test_what_torch_cannot_trace_says_why(
    exporter: Any, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exporter is to_onnx:
        request.getfixturevalue("traced")

    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("\n  no kernel for this\nmore") from ValueError("\n deeper\n")

    place = torch.onnx if exporter is to_onnx else torch.export
    monkeypatch.setattr(place, "export", failing)
    path = tmp_path / ("model.onnx" if exporter is to_onnx else "model.pt2")
    with pytest.raises(ExportError, match=r"cannot (export|trace) .*ValueError: deeper"):
        exporter(small_adapter("vit"), path, (64, 64))


def test_frames_to_compare_on() -> None:
    rendered = frames_to_compare(None, (32, 48), None)
    assert (rendered.shape, rendered.dtype) == ((3, 3, 32, 48), torch.uint8)
    frames = frames_to_compare(torch.rand(2, 3, 40, 40), (32, 48), 5)
    assert (frames.shape, frames.dtype) == ((5, 3, 32, 48), torch.uint8)
    assert frames.max() > 200
    assert torch.equal(frames[1], frames[4])
