from __future__ import annotations

import argparse
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.backbones.checkpoints import read_checkpoint
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(torch.equal(found[k], TENSORS[k]) for k in found)


@pytest.mark.parametrize(
    "key", ["model", "state_dict", "teacher", "encoder", "target_encoder", "module", None]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_state_dict_is_found_where_training_codes_put_it(
    key: str | None, zipped: bool, tmp_path: Path
) -> None:
    content: dict[str, object] = dict(TENSORS) if key is None else {key: TENSORS, "epoch": 3}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(tmp_path / "c.pth")
    assert same(checkpoint.tensors)
    assert checkpoint.epoch == (None if key is None else 3)


def test_the_teacher_is_taken_and_not_the_student(tmp_path: Path) -> None:
    student = {name: tensor + 1 for name, tensor in TENSORS.items()}
    torch.save({"student": student, "teacher": TENSORS}, tmp_path / "c.pth")
    assert same(read_checkpoint(tmp_path / "c.pth").tensors)


def test_arguments_keep_plain_values(tmp_path: Path) -> None:
    arguments = argparse.Namespace(lr=0.5, name="x", betas=(0.9, 0.95), nothing=None, flag=True)
    torch.save({"model": TENSORS, "args": arguments}, tmp_path / "c.pth")
    assert read_checkpoint(tmp_path / "c.pth").arguments == {
        "lr": 0.5,
        "name": "x",
        "nothing": None,
        "flag": True,
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ""])
def test_safetensors_are_known_by_content(suffix: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / f"c{suffix}")
    assert same(read_checkpoint(tmp_path / f"c{suffix}").tensors)


class Payload:
    """Creates a file when it is unpickled, by a function of pathlib or by the shell."""

    def __init__(self, target: Path, *, shell: bool = False) -> None:
        self.target, self.shell = target, shell

    def __reduce__(self) -> tuple[object, tuple[object]]:
        return (
            (os.system, (f"touch {self.target}",)) if self.shell else (Path.touch, (self.target,))
        )


@pytest.mark.parametrize("shell", [True, False])
@pytest.mark.parametrize("where", ["args", "model", "top"])
def test_what_is_not_a_tensor_is_named_and_never_run(
    where: str, shell: bool, tmp_path: Path
) -> None:
    target = tmp_path / "payload"
    payload = Payload(target, shell=shell)
    content = {"args": {"model": TENSORS, "args": payload}, "model": {"a": payload}}
    torch.save(content.get(where, payload), tmp_path / "c.pth")
    with pytest.raises(CorruptWeightsError, match=r"more than tensors \(.*\); it was not run"):
        read_checkpoint(tmp_path / "c.pth")
    assert not target.exists()


def test_an_evil_file_cannot_hide_behind_a_suffix(tmp_path: Path) -> None:
    target = tmp_path / "payload"
    (tmp_path / "c.safetensors").write_bytes(pickle.dumps(Payload(target)))
    with pytest.raises(CorruptWeightsError, match="not a safetensors file"):
        read_checkpoint(tmp_path / "c.safetensors")
    assert not target.exists()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_archive_is_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "c.pt"))
    with pytest.raises(CorruptWeightsError, match=r"TorchScript archive.*safetensors"):
        read_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("content", [b"", b"x", b"hello world, this is a text file", b"\x80\x02}"])
def test_files_that_are_no_checkpoints_give_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(CorruptWeightsError) as caught:
        read_checkpoint(tmp_path / "c.pth")
    assert "\n" not in str(caught.value)
    assert "c.pth" in str(caught.value)


@pytest.mark.parametrize("content", [[TENSORS], {"epoch": 3, "model": {}}, {}])
def test_a_file_without_tensors_says_what_it_holds(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CorruptWeightsError, match=r"holds a list|holds no tensors; at its top are"):
        read_checkpoint(tmp_path / "c.pth")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailableError, match="does not exist"):
        read_checkpoint(tmp_path / "c.pth")


def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "args": argparse.Namespace(lr=1.0)}, tmp_path / "c.pth")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: read_checkpoint(tmp_path / "c.pth"), range(64)))
    assert all(same(checkpoint.tensors) for checkpoint in found)


# ONNX


def test_a_file_that_is_not_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(CorruptWeightsError, match=r"model\.onnx"):
        read_checkpoint(path)


def test_an_export_without_the_encoder_names_what_is_missing(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "empty", [], [])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph), str(path))
    with pytest.raises(CorruptWeightsError, match=r"has no weight backbone\.embeddings\.cls_token"):
        read_checkpoint(path)


def test_the_converted_backbone_equals_the_export_under_onnxruntime(
    real_backbone: VisionTransformerBackbone, exported_onnx: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = onnx.load(str(exported_onnx))
    normed = next(
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Add" and "backbone.layernorm.bias" in node.input
    )
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(normed, onnx.TensorProto.FLOAT, None)
    )
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (tokens,) = session.run([normed], {"input_image": images.numpy()})
    expected = torch.from_numpy(tokens)[:, 1:].unflatten(1, (16, 16)).movedim(-1, 1)
    torch.testing.assert_close(real_backbone.patch_tokens(images), expected, atol=5e-5, rtol=1e-4)
