from __future__ import annotations

import argparse
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.backbones.checkpoints import read_checkpoint, save_tensors
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(torch.equal(found[k], TENSORS[k]) for k in found)


@pytest.mark.parametrize(
    ("key", "zipped"),
    [
        *((key, True) for key in ("model", "state_dict", "teacher", "encoder", "target_encoder")),
        ("module", False),
        (None, False),
    ],
)
def test_the_state_dict_is_found_where_training_codes_put_it(
    key: str | None, zipped: bool, tmp_path: Path
) -> None:
    content: dict[str, object] = {key: TENSORS, "epoch": 3, "student": {"a.bias": torch.zeros(2)}}
    content = dict(TENSORS) if key is None else content
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(tmp_path / "c.pth")
    assert same(checkpoint.tensors)
    assert checkpoint.epoch == (None if key is None else 3)


def test_settings_keep_plain_values_also_in_threads(tmp_path: Path) -> None:
    settings = argparse.Namespace(lr=0.5, name="x", betas=(0.9, 0.95), nothing=None, flag=True)
    torch.save({"model": TENSORS, "args": settings}, tmp_path / "c.pth")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: read_checkpoint(tmp_path / "c.pth"), range(32)))
    plain = {"lr": 0.5, "name": "x", "nothing": None, "flag": True}
    assert all(same(each.tensors) and each.arguments == plain for each in found)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ""])
def test_safetensors_are_known_by_content(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"c{suffix}"
    save_tensors({name: tensor.half() for name, tensor in TENSORS.items()}, path)
    assert same(read_checkpoint(path).tensors)


class Payload:
    """Creates a file when it is unpickled, by a function of pathlib or by the shell."""

    def __init__(self, target: Path, *, shell: bool = False) -> None:
        self.target, self.shell = target, shell

    def __reduce__(self) -> tuple[object, tuple[object]]:
        return (
            (os.system, (f"touch {self.target}",)) if self.shell else (Path.touch, (self.target,))
        )


@pytest.mark.parametrize(
    ("where", "shell"), [("args", True), ("args", False), ("model", True), ("top", False)]
)
def test_what_is_not_a_tensor_is_named_and_never_run(
    where: str, shell: bool, tmp_path: Path
) -> None:
    target = tmp_path / "payload"
    payload = Payload(target, shell=shell)
    content = {"args": {"model": TENSORS, "args": payload}, "model": {"a": payload}}
    for zipped in (True, False):
        file = tmp_path / f"{zipped}.pth"
        torch.save(content.get(where, payload), file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            CorruptWeightsError, match=r"more than tensors \(.*\); it was not executed"
        ):
            read_checkpoint(file)
    (tmp_path / "c.safetensors").write_bytes(pickle.dumps(payload))  # hidden by a suffix
    with pytest.raises(CorruptWeightsError, match="not a safetensors file"):
        read_checkpoint(tmp_path / "c.safetensors")
    assert not target.exists()
    torch.load(file, weights_only=False)
    assert target.exists(), "the payload itself works"


def test_files_that_hold_no_weights_give_one_line(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"x", b"hello world, this is text", b"\x80\x02}")):
        (tmp_path / f"{number}.pth").write_bytes(content)
    with tarfile.open(tmp_path / "tar.pth", "w") as archive:
        archive.add(tmp_path / "0.pth", "sys_info")
    torch.save([TENSORS], tmp_path / "list.pth")
    torch.save({"epoch": 3, "model": {}}, tmp_path / "empty.pth")
    onnx = pytest.importorskip("onnx")
    (tmp_path / "text.onnx").write_bytes(b"not a model")
    nothing = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    onnx.save(nothing, str(tmp_path / "other.onnx"))
    with pytest.raises(WeightsUnavailableError, match="does not exist"):
        read_checkpoint(tmp_path / "c.pth")
    messages = {}
    for path in tmp_path.glob("*.*"):
        with pytest.raises(CorruptWeightsError, match=path.name) as caught:
            read_checkpoint(path)
        messages[path.stem] = str(caught.value)
    assert not [message for message in messages.values() if "\n" in message]
    assert "it is a tar archive" in messages["tar"]
    assert "is not a readable ONNX file" in messages["text"]
    assert "not an exported DINOv2 encoder" in messages["other"]
    assert "holds a list, expected a dictionary" in messages["list"]
    assert "holds no tensors; its top-level keys are: epoch, model" in messages["empty"]


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
