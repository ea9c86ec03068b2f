"""How a projection is trained: every number that decides the result, as plain data."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal, get_args

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.projection import Activation, ProjectionConfig
from cosettle_adapter.training.errors import TrainingError

Perturbation = Literal["batch", "sample", "off"]
HeadKind = Literal["linear", "mlp2", "mlp3", "affine"]
Precision = Literal["float32", "bfloat16", "float16"]

LR_SAMPLES = 256  # samples per step to which ``base_lr`` belongs

_PAPER_LR = 1e-4
_PAPER_TRAVEL = 2344 * 2e-4  # steps (five epochs of 240,000 clips by 512) times highest rate
_SHORT_RUN_LR = 1e-3

_AT_LEAST = {
    "epochs": 1, "batch_size": 1, "accumulation": 1, "frames": 2, "size": 1, "pool": 1,
    "pairs_per_clip": 1, "cache_views": 0, "workers": 0, "log_every": 1, "save_every": 1,
    "separability_weight": 0, "pea_ratio": 0, "weight_decay": 0,
}  # fmt: skip
_CHOICES: dict[str, Any] = {
    "pea": Perturbation, "head": HeadKind, "activation": Activation, "precision": Precision,
}  # fmt: skip
_NOT_THE_RESULT = ("workers", "log_every", "save_every", "batch_size", "accumulation")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How a projection is trained, by ``cycle + separability_weight * separability``.

    The defaults are the paper's, with these differences: ``pea`` and ``squash``, 128 samples per
    step in one process where the paper has 512 in four, and on small corpora ``pairs_per_clip``
    and ``base_lr``. ``pea="sample"`` estimates the same loss as ``"batch"`` with a gradient that
    varies less. Only the encoder runs in half precision.

    Attributes:
        temperatures: of the softmaxes in the cycle; its loss and accuracy are means over them.
        separability_weight: weight of the separability (KL) loss, the paper's lambda; 0 removes it.
        pea: where the zoomed grid of positions is cropped: at a place of its own for each sample,
            at one place per step for the whole batch (as in the official code), or off.
        pea_ratio: the grid of positions is zoomed by one plus this.
        pool: patches averaged along each side before cycles are walked.
        epochs: passes over the samples.
        batch_size: samples per process and forward pass; lowered where there are fewer samples.
        accumulation: forward passes per step. A step sees batch_size x processes x accumulation
            samples, and it is the same step however that product is divided.
        base_lr: learning rate for 256 samples per step; the paper's 1e-4 by default, higher on
            short runs.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        warmup_epochs: linear warm-up from 0, in epochs, followed by a half cosine to 0; by default
            one epoch, or a fifth of a run of fewer than five.
        layers: 0-based layers to read together, negative from the end; the backbone's by default.
        norm: apply the final norm; by default to the last layer, where the backbone's row says so.
        head: kind of the projection.
        activation: its nonlinearity.
        init: random (of an affine head the identity), identity, or a projection folder.
        frames: frames of a cycle; the paper's is 2.
        size: side of the square frames in pixels.
        squash: squash frames to the square before cropping, as the official code does.
        pairs_per_clip: samples drawn from each clip in an epoch; by default as many as make epochs
            of about 2,000 samples.
        cache_views: encoded views per clip that are kept on disk and repeat; 0 keeps none.
        precision: of the encoder's arithmetic.
        compile: run the encoder through torch.compile.
        seed: of everything that is drawn at random.
        workers: processes that decode videos; 0 decodes between steps. Does not change a result.
        save_every: steps between checkpoints; every five minutes and epoch there is one anyway.
        log_every: steps between lines of metrics.jsonl.
    """

    temperatures: tuple[float, ...] = (0.03,)
    separability_weight: float = 3.0
    pea: Perturbation = "sample"
    pea_ratio: float = 10.0
    pool: int = 2
    epochs: int = 5
    batch_size: int = 128
    accumulation: int = 1
    base_lr: float | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_epochs: float | None = None
    layers: tuple[int, ...] | None = None
    norm: bool | None = None
    head: HeadKind = "linear"
    activation: Activation = "tanh"
    init: str = "random"
    frames: int = 2
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
        for name, kind in _CHOICES.items():
            if (value := getattr(self, name)) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise TrainingError(f"unknown {name} {value!r}; expected one of {known}")
        if not self.temperatures or not all(0 < each < math.inf for each in self.temperatures):
            raise TrainingError(
                f"temperatures must be one or more positive numbers, got {self.temperatures}"
            )
        if self.base_lr is not None and not 0 < self.base_lr < math.inf:
            raise TrainingError(f"base_lr must be a positive rate, got {self.base_lr}")
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
        """Epochs of warm-up."""
        return min(1.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the result, as JSON: they must not change on resuming."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: value for name, value in plain.items() if name not in _NOT_THE_RESULT}

    def head_config(self, backbone: Backbone) -> ProjectionConfig:
        """Return the config of the projection that is to be trained on ``backbone``."""
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

    def highest_lr(self, samples: int, steps: int) -> float:
        """Return the highest learning rate of a run: ``base_lr`` times the step's samples / 256.

        With the paper's 1e-4, for 240,000 clips, a head would hardly move in a short run. So by
        default steps times rate is at least what it is in the paper, up to a rate of 1e-3.
        """
        if self.base_lr is not None:
            return self.base_lr * samples / LR_SAMPLES
        return max(_PAPER_LR * samples / LR_SAMPLES, min(_PAPER_TRAVEL / steps, _SHORT_RUN_LR))


def learning_rate_factor(step: int, *, steps: int, warmup: float) -> float:
    """Return the share of the highest learning rate that a 0-based step uses.

    From 0 in a straight line over ``warmup`` steps, which need not be whole, then half a cosine to
    0 (``util/lr_sched.py`` of the official code).
    """
    if step < warmup:
        return step / warmup
    if step >= steps:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
