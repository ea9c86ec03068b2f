"""What a run was asked for, in words that can be stored and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones.weights import fingerprint
from cosettle_adapter.extraction.identity import identify, source_name
from cosettle_adapter.extraction.settings import Settings
from cosettle_adapter.version import __version__

# What may change the last bits of features and nothing else: a finished file is good whatever
# these are, but the two halves of one file must agree in them.
_MANNER = ("batch_size", "device", "versions")


def make_record(
    adapter: CoSettleAdapter, source: Any, settings: Settings, format: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Describe a run, JSON-ready: source, model, settings, and what computes it."""
    config = adapter.config
    asked = dataclasses.asdict(settings)
    asked["settle"] = adapter.settles if settings.settle is None else settings.settle
    asked["size"] = list(settings.size) if isinstance(settings.size, tuple) else settings.size
    batch_size = asked.pop("batch_size")
    del asked["storage"]
    return {
        "source": source_name(source),
        "source_identity": identify(source),
        "backbone": adapter.backbone.row.name,
        "fingerprint": adapter.backbone.fingerprint,
        "layers": list(config.layers),
        "norm": config.norm,
        "patch": adapter.backbone.patch,
        "stride": adapter.backbone.stride,
        "projection": _describe_projection(adapter),
        "dtype": _told(adapter.dtype),
        "format": format,
        "storage": _told(dtype),
        "settings": asked,
        "batch_size": batch_size,
        "device": adapter.device.type,
        "versions": {"cosettle_adapter": __version__, "torch": torch.__version__},
    }


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, manner: bool = True
) -> list[str]:
    """Return how two runs differ, as ``size was 280 and is 476``.

    Args:
        before: the record of the one.
        now: the record of the other.
        manner: whether differences that move only the last bits count.
    """
    before, now = _flat(before), _flat(now)
    told: list[str] = []
    for name in {**before, **now}:
        if before.get(name) == now.get(name) or not (manner or name.split(".")[0] not in _MANNER):
            continue
        if name in ("source_identity", "fingerprint", "projection.fingerprint"):
            told.append(_CONTENTS[name])
        elif name != "source":  # a renamed file is the same
            short = name.removeprefix("settings.").replace("_", "-").replace(".", " ")
            told.append(f"{short} was {_shown(before.get(name))} and is {_shown(now.get(name))}")
    return told


_CONTENTS = {
    "source_identity": "the source's content has changed",
    "fingerprint": "the backbone's weights are others",
    "projection.fingerprint": "the projection's weights are others",
}


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _describe_projection(adapter: CoSettleAdapter) -> dict[str, Any]:
    tensors = adapter.projection.state_dict()
    return {
        "kind": adapter.config.kind,
        "method": str(adapter.config.fit.get("method", "")),
        "fingerprint": fingerprint(tensors) if tensors else None,
        "averaging": adapter.config.averaging,
        "recipe": adapter.config.recipe,
    }


def _told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
