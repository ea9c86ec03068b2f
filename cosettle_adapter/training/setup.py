"""What a run is made of: everything that does not change while it goes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.training.batches import Plan, TrainingData
from cosettle_adapter.training.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

_FREE = ("workers", "log_every", "save_every", "batch_size", "accumulation")
"""Settings that may change between the parts of a run: the steps stay the same."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run is made of.

    Attributes:
        accelerator: of this process.
        backbone: the frozen encoder.
        data: samples.
        folder: where it is written.
        plan: which samples each step sees.
        settings: how it is trained.
        validation_digest: of the validation clips; ``None`` without.
        about_data: to record.
        command: words of the command line, to record.
    """

    accelerator: Accelerator
    backbone: Backbone
    data: TrainingData
    folder: Path
    plan: Plan
    settings: TrainSettings
    validation_digest: str | None = None
    about_data: str = ""
    command: tuple[str, ...] = ()

    def config(self) -> dict[str, Any]:
        """Return what decides the result, and so must be the same to go on with a run."""
        settings = self.settings.to_json()
        return {
            "backbone": self.backbone.row.name,
            "fingerprint": self.backbone.fingerprint,
            "backbone_dtype": str(self.backbone.dtype),
            "stride": self.backbone.stride,
            "settings": {name: value for name, value in settings.items() if name not in _FREE},
            "samples_per_step": self.plan.samples_per_step,
            "data": self.data.digest,
            "validation": self.validation_digest,
        }
