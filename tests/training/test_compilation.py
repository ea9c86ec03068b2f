from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training_fakes import QUICK, FakeData, small_backbone

from cosettle_adapter.training.distribution import make_accelerator
from cosettle_adapter.training.encoding import compile_encoder
from cosettle_adapter.training.metrics import read_metrics
from cosettle_adapter.training.train import train


def test_a_compiled_encoder_gives_the_same_tokens() -> None:
    backbone, plain = small_backbone(), small_backbone()
    compile_encoder(backbone, backend="eager")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(backbone.patch_tokens(images), plain.patch_tokens(images))
    compiled = [module for module in backbone.modules() if module._compiled_call_impl is not None]
    assert len(compiled) == backbone.depth


def test_an_encoder_is_compiled_once() -> None:
    backbone = small_backbone()
    compile_encoder(backbone, backend="eager")
    before = [module._compiled_call_impl for module in backbone.modules()]
    compile_encoder(backbone, backend="eager")
    after = [module._compiled_call_impl for module in backbone.modules()]
    assert all(one is other for one, other in zip(before, after, strict=True))


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """Accelerate keeps the device of a process; other tests took the CPU."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_trains_in_bfloat16(on_gpu: None, compiled: bool, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, precision="bfloat16", compile=compiled)
    backbone = small_backbone()
    trained = train(backbone, FakeData(), tmp_path, settings, accelerator=make_accelerator("cuda"))
    assert backbone.device.type == "cuda"
    assert {t.dtype for t in trained.projection.state_dict().values()} == {torch.float32}
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert sum(losses[-6:]) < sum(losses[:6])
    assert trained.projection.config.fit["device"] == "cuda"


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu(on_gpu: None, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, epochs=1)
    torch.backends.cuda.matmul.allow_tf32 = False
    train(
        small_backbone(), FakeData(), tmp_path / "gpu", settings,
        accelerator=make_accelerator("cuda"),
    )  # fmt: skip
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    train(
        small_backbone(), FakeData(), tmp_path / "cpu", settings,
        accelerator=make_accelerator("cpu"),
    )  # fmt: skip
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("gpu", "cpu")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
