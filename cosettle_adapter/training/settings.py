"""How a projection is trained: every number that decides the result, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.projection import Activation, ProjectionConfig
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.objective import ObjectiveSettings

Head = Literal["linear", "mlp2", "mlp3", "affine"]
Precision = Literal["float32", "bfloat16", "float16"]

LR_SAMPLES = 256
"""Samples a step to which ``base_lr`` belongs; the learning rate grows in proportion."""


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How a projection is trained.

    The defaults are the paper's, with these differences: ``objective.pea`` (see there), ``squash``
    (whole frames are cropped, which keeps their aspect), 128 samples a step in one process where
    the paper has 512 in four, and on small corpora ``pairs_per_clip`` and ``base_lr``.

    Only the encoder runs in half precision, and no gradient passes through it: the head, its
    gradients and the losses are float32 throughout, so there is no loss to scale.

    Attributes:
        epochs: passes over the samples.
        batch_size: samples a process and forward pass; lowered where there are fewer samples.
        accumulation: forward passes a step. One step sees ``batch_size * processes *
            accumulation`` samples, and it is the same step however that product comes about.
        base_lr: learning rate for 256 samples a step; ``None`` for the paper's, raised on short
            runs as :func:`~cosettle_adapter.training.schedule.learning_rate` says.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        warmup_epochs: linear warm-up from 0, in epochs; ``None`` for one epoch, or a fifth of a
            run of fewer than five. A half cosine to 0 follows, both step by step.
        layers: 0-based blocks to read, negative from the end, concatenated along the channels;
            ``None`` for the backbone's default.
        norm: apply the final norm; ``None`` does as the backbone's row says for the last block,
            and does not for earlier ones.
        head: kind of the projection.
        activation: its nonlinearity.
        init: ``random`` (truncated normal of 0.02; an ``affine`` head starts as the identity),
            ``identity`` (nearly: see :func:`~cosettle_adapter.training.head.new_head`), or a
            projection folder to start from.
        frames: frames of a cycle; 2 is the paper's.
        size: side of the square frames in pixels.
        squash: squash frames to the square before cropping, as the paper's code does.
        pairs_per_clip: samples drawn from each clip in an epoch; ``None`` makes epochs of about
            2,000 samples.
        cache_views: encoded views of each clip that are kept on disk and used over and over; 0
            decodes and encodes new ones all the time.
        objective: temperatures, weights and the positional perturbation.
        precision: of the encoder's arithmetic.
        compile: run the encoder through ``torch.compile``.
        seed: of everything that is drawn at random.
        workers: processes that decode videos; 0 decodes between steps. Does not change a result.
        save_every: steps between checkpoints; there is one at least every five minutes and at
            the end of each epoch in any case.
        log_every: steps between lines of ``metrics.jsonl``.
    """

    epochs: int = 5
    batch_size: int = 128
    accumulation: int = 1
    base_lr: float | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_epochs: float | None = None
    layers: tuple[int, ...] | None = None
    norm: bool | None = None
    head: Head = "linear"
    activation: Activation = "tanh"
    init: str = "random"
    frames: int = 2
    size: int = 224
    squash: bool = False
    pairs_per_clip: int | None = None
    cache_views: int = 0
    objective: ObjectiveSettings = dataclasses.field(default_factory=ObjectiveSettings)
    precision: Precision = "float32"
    compile: bool = False
    seed: int = 0
    workers: int = 0
    save_every: int | None = None
    log_every: int = 1

    def __post_init__(self) -> None:
        at_least = {
            "epochs": 1, "batch_size": 1, "accumulation": 1, "frames": 2, "size": 1,
            "pairs_per_clip": 1, "cache_views": 0, "workers": 0, "log_every": 1, "save_every": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise TrainingError(f"{name} must be at least {least}, got {value}")
        if (self.base_lr is not None and not self.base_lr > 0) or not self.weight_decay >= 0:
            raise TrainingError(
                f"got base_lr={self.base_lr} and weight_decay={self.weight_decay}; "
                "expected a positive rate and a decay of at least 0"
            )
        if not all(0 <= beta < 1 for beta in self.betas) or len(self.betas) != 2:
            raise TrainingError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.warmup_epochs is not None and not 0 <= self.warmup_epochs <= self.epochs:
            raise TrainingError(
                f"warmup_epochs must be from 0 to the {self.epochs} epochs of the run, "
                f"got {self.warmup_epochs}"
            )
        for name, known in (("head", Head), ("activation", Activation), ("precision", Precision)):
            if getattr(self, name) not in get_args(known):
                raise TrainingError(
                    f"unknown {name} {getattr(self, name)!r}; "
                    f"expected one of {', '.join(get_args(known))}"
                )
        if self.layers is not None and not self.layers:
            raise TrainingError("layers must name at least one block, or be None")

    @property
    def warmup(self) -> float:
        """Epochs of warm-up."""
        return min(1.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a plain dictionary, tuples as lists."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    def record(self) -> dict[str, Any]:
        """Return what is told of the settings beside a projection: what decided its weights."""
        told = self.to_json() | {"warmup_epochs": self.warmup, **self.to_json()["objective"]}
        told["init"] = Path(self.init).name
        elsewhere = ("objective", "layers", "norm", "head", "activation", "pairs_per_clip")
        untold = (*elsewhere, "batch_size", "accumulation", "workers", "save_every", "log_every")
        return {name: value for name, value in told.items() if name not in untold}

    def head_config(self, backbone: Backbone) -> ProjectionConfig:
        """Return the config of the projection that is to be trained on ``backbone``.

        Raises:
            ValueError: no such block.
        """
        layers = (backbone.default_layer,) if self.layers is None else self.layers
        layers = tuple(backbone.block(layer) for layer in layers)
        norm = self.norm
        if norm is None:
            norm = layers == (backbone.depth - 1,) and backbone.row.final_norm
        width = sum(backbone.widths[layer] for layer in layers)
        return ProjectionConfig(
            backbone=backbone.row.name,
            fingerprint=backbone.fingerprint,
            backbone_revision=backbone.revision,
            layers=layers,
            norm=norm,
            in_width=width,
            out_width=width,
            kind=self.head,
            activation=self.activation,
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
