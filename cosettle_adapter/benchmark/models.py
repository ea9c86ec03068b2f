"""A model to measure: its own weights and projection, or the same architecture at random."""

from __future__ import annotations

import torch
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import (
    Backbone,
    BackboneRow,
    HubOptions,
    build_backbone,
    load_backbone,
    lookup,
)
from cosettle_adapter.backbones.architectures import meta_model
from cosettle_adapter.backbones.weights import fingerprint
from cosettle_adapter.projection import Projection
from cosettle_adapter.published import is_published
from cosettle_adapter.training.settings import TrainSettings

_SCALE = 0.02


def load_model(
    name: str,
    *,
    random_weights: bool,
    weights: str | None,
    device: torch.device,
    dtype: torch.dtype,
    options: HubOptions,
) -> CoSettleAdapter:
    """Load a backbone and its projection, or the paper's head where it has none.

    Args:
        name: as in :meth:`CoSettleAdapter.from_pretrained`.
        random_weights: of backbone and head, in place of loading any.
        weights: a file of the backbone's.
        device: where to put both.
        dtype: of the backbone.
        options: cache and network.
    """
    if random_weights:
        row = lookup(name)
        tensors = random_tensors(row)
        backbone = build_backbone(row, tensors, fingerprint=fingerprint(tensors), origin="random")
        return with_paper_head(backbone.to(device=device, dtype=dtype))
    if is_published(name):
        return CoSettleAdapter.from_pretrained(
            name,
            device=device,
            dtype=dtype,
            backbone_weights=weights,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
        )
    return with_paper_head(
        load_backbone(name, weights=weights, device=device, dtype=dtype, options=options)
    )


def with_paper_head(backbone: Backbone) -> CoSettleAdapter:
    """Put the paper's head, at random, on a backbone's default block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = Projection(TrainSettings().head_config(backbone))
    return CoSettleAdapter(backbone, head.requires_grad_(False).eval().to(backbone.device))


def random_tensors(row: BackboneRow) -> dict[str, Tensor]:
    """Return tensors of a row's architecture: small random numbers, norms that do nothing."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator) * _SCALE
        + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        if tensor.is_floating_point()
        else torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, tensor in meta_model(row).state_dict().items()
    }
