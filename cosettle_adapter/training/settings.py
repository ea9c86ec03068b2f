"""Settings of training, as plain data."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.projection import Activation, ProjectionConfig
from cosettle_adapter.training.errors import TrainingError

Perturbation = Literal["batch", "sample", "off"]
RegLoss = Literal["kl", "mse"]
HeadKind = Literal["linear", "mlp2", "mlp3", "affine"]
Precision = Literal["float32", "bfloat16", "float16"]

LR_SAMPLES = 256  # samples per step at which the learning rate is ``base_lr``

_PAPER_LR = 1e-4
_PAPER_TRAVEL = 2344 * 2e-4  # steps (five epochs of 240,000 clips / 512) times highest rate
_SHORT_RUN_LR = 1e-3

_AT_LEAST = {
    "epochs": 1, "batch_size": 1, "accumulation": 1, "frames": 2, "size": 1, "pool": 1,
    "pairs_per_clip": 1, "cache_views": 0, "workers": 0, "log_every": 1, "save_every": 1,
    "separability_weight": 0, "pea_ratio": 0, "weight_decay": 0, "min_lr": 0, "clip_gap": 0,
}  # fmt: skip
_NOT_THE_RESULT = ("workers", "log_every", "save_every", "batch_size", "accumulation")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Settings of training; the loss is ``cycle + separability_weight * separability``.

    The defaults are the paper's, with these exceptions: ``pea`` and ``squash``; 128 samples per
    step in one process instead of 512 in four; on small corpora ``pairs_per_clip`` and ``base_lr``.
    ``pea="sample"`` estimates the same loss as ``"batch"`` with less gradient variance. Half
    precision applies to the encoder only.

    Attributes:
        temperatures: softmax temperatures of the cycle; loss and accuracy are means over them.
        separability_weight: weight of the separability loss, the paper's lambda; 0 removes it.
        reg_loss: the separability loss: kl, the paper's divergence, summed over the tokens; or mse,
            the mean squared error of unit tokens, which is hundreds of times smaller.
        pea: crop of the zoomed grid of positions: a different one for each sample, one per step for
            the whole batch (as in the official code), or off.
        pea_ratio: the grid of positions is zoomed by 1 + this ratio.
        pool: side of the windows of patches that are averaged before the cycle loss.
        epochs: passes over the samples.
        batch_size: samples per process and forward pass; lowered if there are fewer samples.
        accumulation: forward passes per step. A step sees batch_size x processes x accumulation
            samples; only this product affects the result.
        base_lr: learning rate for 256 samples per step; by default the paper's 1e-4, higher on
            short runs.
        min_lr: learning rate at the end of the run; not scaled with the samples per step.
        weight_decay: weight decay of AdamW, on matrices only.
        betas: betas of AdamW.
        warmup_epochs: epochs of linear warm-up from 0, followed by a half cosine to ``min_lr``; by
            default one epoch, or a fifth of a run of fewer than five.
        layers: 0-based layers to concatenate, negative from the end; the backbone's by default.
        norm: apply the final norm; by default if only the last layer is read and the backbone has
            a final norm, and for I-JEPA only to the views with perturbed positions, as in the
            official code.
        head: kind of the projection.
        activation: nonlinearity of the projection.
        init: initial weights: random (for an affine head the identity), identity, or a projection
            folder.
        frames: frames per cycle; 2 in the paper.
        clip_gap: distance between the frames of a cycle, as a share of the clip's frames.
        size: side of the square frames in pixels.
        squash: squash frames to a square before cropping, as the official code does.
        pairs_per_clip: samples drawn from each clip per epoch; by default about 2,000 samples per
            epoch in total, at least one from each clip.
        cache_views: encoded views per clip to cache on disk and reuse; 0 disables the cache.
        precision: precision of the encoder.
        compile: run the encoder through torch.compile.
        seed: seed of all random draws.
        workers: processes that decode videos; 0 decodes between steps. Does not affect the result.
        save_every: steps between checkpoints, in addition to one every epoch and five minutes.
        log_every: steps between lines of metrics.jsonl.
    """

    temperatures: tuple[float, ...] = (0.03,)
    separability_weight: float = 3.0
    reg_loss: RegLoss = "kl"
    pea: Perturbation = "sample"
    pea_ratio: float = 10.0
    pool: int = 2
    epochs: int = 5
    batch_size: int = 128
    accumulation: int = 1
    base_lr: float | None = None
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_epochs: float | None = None
    layers: tuple[int, ...] | None = None
    norm: bool | None = None
    head: HeadKind = "linear"
    activation: Activation = "tanh"
    init: str = "random"
    frames: int = 2
    clip_gap: float = 0.15
    size: int = 224
    squash: bool = False
    pairs_per_clip: int | None = None
    cache_views: int = 0
    precision: Precision = "float32"
    compile: bool = False
    seed: int = 0
    workers: int = 0
    save_every: int | None = None
    log_every: int = 1

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise TrainingError(f"{name} must be at least {least}, got {value}")
        for name, kind in get_type_hints(type(self)).items():
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            if choices and (value := getattr(self, name)) not in choices:
                known = ", ".join(choices)
                raise TrainingError(f"unknown {name} {value!r}; expected one of {known}")
        if not self.temperatures or not all(0 < value < math.inf for value in self.temperatures):
            raise TrainingError(
                f"temperatures must be one or more positive numbers, got {self.temperatures}"
            )
        if self.base_lr is not None and not 0 < self.base_lr < math.inf:
            raise TrainingError(f"base_lr must be a positive rate, got {self.base_lr}")
        if self.clip_gap >= 1:
            raise TrainingError(f"clip_gap must be below 1, got {self.clip_gap}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise TrainingError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.warmup_epochs is not None and not 0 <= self.warmup_epochs <= self.epochs:
            raise TrainingError(
                f"warmup_epochs must be from 0 to the {self.epochs} epochs of the run, "
                f"got {self.warmup_epochs}"
            )
        if self.layers is not None and not self.layers:
            raise TrainingError("layers must name at least one layer, or be None")

    @property
    def warmup(self) -> float:
        """Number of warm-up epochs."""
        return min(1.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the result, as JSON; a resumed run must have the same."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: value for name, value in plain.items() if name not in _NOT_THE_RESULT}

    def head_config(self, backbone: Backbone) -> ProjectionConfig:
        """Return the config of the projection to train on ``backbone``."""
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

    def perturbed_norm(self, backbone: Backbone) -> bool:
        """Return whether views with perturbed positions are read after the final norm."""
        config, released = self.head_config(backbone), backbone.row.perturbed_norm
        as_released = self.norm is None and config.layers == (backbone.depth - 1,)
        return released if as_released and released is not None else config.norm

    def highest_lr(self, samples: int, steps: int) -> float:
        """Return the highest learning rate of a run: ``base_lr`` * samples per step / 256.

        In a short run the paper's 1e-4 would hardly change a head. By default, steps * rate is
        therefore at least that of the paper's run, with a rate of at most 1e-3.
        """
        if self.base_lr is None:
            short = min(_PAPER_TRAVEL / steps, _SHORT_RUN_LR)
            highest = max(_PAPER_LR * samples / LR_SAMPLES, short)
        else:
            highest = self.base_lr * samples / LR_SAMPLES
        if self.min_lr > highest:
            raise TrainingError(
                f"min_lr must be at most the highest learning rate of this run, {highest:.3g}, got "
                f"{self.min_lr}"
            )
        return highest


def learning_rate(step: int, *, steps: int, warmup: float, highest: float, lowest: float) -> float:
    """Return the learning rate of a 0-based step.

    Linear from 0 to ``highest`` over ``warmup`` steps (may be fractional), then half a cosine to
    ``lowest`` (``util/lr_sched.py`` of the official code).
    """
    if step < warmup:
        return highest * step / warmup
    if step >= steps:
        return lowest
    descent = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    return lowest + (highest - lowest) * descent
