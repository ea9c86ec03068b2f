from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from training_fakes import small_backbone

from cosettle_adapter import Projection
from cosettle_adapter.errors import ProjectionFormatError
from cosettle_adapter.projection import ProjectionConfig
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.head import Head, new_head
from cosettle_adapter.training.settings import TrainSettings

WIDTH = 32


def config(**changes: object) -> ProjectionConfig:
    return TrainSettings(**changes).head_config(small_backbone())  # type: ignore[arg-type]


def closed_form(folder: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """An affine projection as ``fit`` writes one, and tokens it gives unit variance."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(500, WIDTH, generator=generator) * 3 + 5
    weight = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0] / 3
    projection = Projection(dataclasses.replace(config(), kind="affine"))
    bias = -(weight @ tokens.mean(0))
    projection.load_state_dict({"linears.0.weight": weight, "linears.0.bias": bias})
    projection.save(folder)
    return folder, tokens, tokens @ weight.T + bias


def test_a_random_start_is_the_seeds_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (new_head(config(), init="random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [head.linears[0].weight for head in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float(weights[0].detach().std()) == pytest.approx(0.02, rel=0.1)
    assert all(parameter.requires_grad for parameter in first.parameters())


@pytest.mark.parametrize("kind", ["linear", "mlp2", "mlp3"])
def test_the_identity_gives_tokens_back_normalised(kind: str) -> None:
    tokens = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(0))
    head = new_head(config(head=kind), init="identity", seed=0)
    expected = F.layer_norm(tokens, (WIDTH,))
    assert float(F.cosine_similarity(head.project(tokens), expected).detach().min()) > 0.998
    exact = new_head(config(head="affine"), init="identity", seed=0)
    assert torch.equal(exact.project(tokens), tokens)


@pytest.mark.parametrize("kind", ["linear", "mlp2", "mlp3"])
def test_a_closed_form_starts_a_head_of_another_kind(kind: str, tmp_path: Path) -> None:
    folder, tokens, projected = closed_form(tmp_path)
    head = new_head(config(head=kind), init=str(folder), seed=0)
    expected = F.layer_norm(projected, (WIDTH,))
    assert float(F.cosine_similarity(head.project(tokens), expected).detach().min()) > 0.998
    exact = new_head(config(head="affine"), init=str(folder), seed=0)
    torch.testing.assert_close(exact.project(tokens), projected)


def test_a_trained_head_starts_one_of_its_kind(tmp_path: Path) -> None:
    trained = new_head(config(head="mlp2"), init="random", seed=5)
    trained.save(tmp_path)
    head = new_head(config(head="mlp2"), init=str(tmp_path), seed=0)
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name])
    assert all(parameter.requires_grad for parameter in head.parameters())


def test_another_projection_is_refused_by_name_of_what_differs(tmp_path: Path) -> None:
    new_head(config(head="mlp2", layers=(0,)), init="random", seed=0).save(tmp_path)
    with pytest.raises(TrainingError) as caught:
        new_head(config(), init=str(tmp_path), seed=0)
    for part in ("layers (0,) in place of (1,)", "norm False in place of True", "kind 'mlp2'"):
        assert part in str(caught.value)
    assert "fingerprint" not in str(caught.value)


def test_a_start_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="'nowhere' is no start: give 'random', 'identity', or"):
        new_head(config(), init="nowhere", seed=0)
    with pytest.raises(ProjectionFormatError, match="is not a projection"):
        new_head(config(), init=str(tmp_path), seed=0)
    with pytest.raises(TrainingError, match="relu cannot start from identity"):
        new_head(config(activation="relu"), init="identity", seed=0)


def test_a_head_takes_tokens_of_any_shape() -> None:
    head = Head(new_head(config(), init="random", seed=0))
    assert head(torch.randn(2, 3, 16, WIDTH, dtype=torch.bfloat16)).dtype == torch.float32
    assert head(torch.randn(2, 3, 16, WIDTH)).shape == (2, 3, 16, WIDTH)
