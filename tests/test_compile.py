"""torch.compile takes ``forward`` as one graph; with backends that need no C++ compiler."""

from __future__ import annotations

import pytest
import torch
from export_fakes import ROWS, small_adapter
from torch import Tensor

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import FrameError

FRAMES = torch.randint(
    0, 256, (3, 3, 64, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def compiled(adapter: CoSettleAdapter, backend: str = "eager") -> CoSettleAdapter:
    torch._dynamo.reset()
    module: CoSettleAdapter = torch.compile(adapter, fullgraph=True, backend=backend)  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("name", ROWS)
def test_forward_is_one_graph(name: str) -> None:
    adapter = small_adapter(name)
    fast = compiled(adapter, "aot_eager" if name == "vit" else "eager")
    for frames in (FRAMES, FRAMES[:2]):
        torch.testing.assert_close(fast(frames), adapter(frames))


@pytest.mark.parametrize(
    ("frames", "options"),
    [
        (FRAMES / 255, {}),
        (FRAMES[None], {"normalize": True}),
        (FRAMES, {"size": 48}),
        (FRAMES[..., :-3], {"fit": "pad"}),
        (FRAMES, {"batch_size": 2}),
    ],
    ids=["floats", "a clip, normalised", "resized", "padded", "in two batches"],
)
def test_every_option_is_one_graph(frames: Tensor, options: dict[str, object]) -> None:
    adapter = small_adapter("vit")
    torch.testing.assert_close(
        compiled(adapter)(frames, **options),  # type: ignore[arg-type]
        adapter(frames, **options),  # type: ignore[arg-type]
    )


def test_tokens_come_along() -> None:
    adapter = small_adapter("vit")
    for found, expected in zip(
        compiled(adapter)(FRAMES, return_backbone=True),
        adapter(FRAMES, return_backbone=True),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_ordinary_calls_still_refuse_what_is_out_of_range() -> None:
    with pytest.raises(FrameError, match=r"must lie in \[0, 1\]"):
        small_adapter("vit")(FRAMES.float())
