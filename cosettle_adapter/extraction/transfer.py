"""Features from the adapter's device to the CPU, without waiting for them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Transfer:
    """Features on their way; :meth:`wait` for them in another thread."""

    _features: Tensor
    _arrived: torch.cuda.Event | None = None

    @classmethod
    def start(cls, features: Tensor, dtype: torch.dtype) -> Transfer:
        """Convert features where they are and begin to copy them to the CPU."""
        features = features.to(dtype)
        if features.device.type != "cuda":
            return cls(features.cpu())
        target = torch.empty(features.shape, dtype=dtype, pin_memory=True)
        target.copy_(features, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(features.device))
        return cls(target, arrived)

    def wait(self) -> Tensor:
        """Return the features, on the CPU, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._features
