from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.backbones.onnx_weights import read_dinov2_onnx
from cosettle_adapter.errors import CorruptWeightsError

onnx = pytest.importorskip("onnx")


def test_a_file_that_is_not_onnx(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(CorruptWeightsError, match=r"model\.onnx"):
        read_dinov2_onnx(path, depth=12)


def test_an_export_without_the_encoder_names_what_is_missing(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph([], "empty", [], [])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph), str(path))
    with pytest.raises(CorruptWeightsError, match=r"has no weight backbone\.embeddings\.cls_token"):
        read_dinov2_onnx(path, depth=12)


def test_the_converted_backbone_equals_the_export_under_onnxruntime(
    real_backbone: VisionTransformerBackbone, exported_onnx: Path
) -> None:
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
