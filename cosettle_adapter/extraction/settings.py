"""Settings and errors of an extraction."""

# no `from __future__ import annotations`: the command line derives its options from the types

import dataclasses
from typing import Literal

import torch

from cosettle_adapter.adapter import DEFAULT_BATCH_SIZE, Size
from cosettle_adapter.correspondence.fusion import FusionMode
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.video import Fit

FormatName = Literal["safetensors", "zarr", "npy-memmap", "parquet", "dino-tracker"]
TOKENS = ("patch", "cls", "registers", "mean")
StorageName = Literal["float32", "bfloat16", "float16"]


class ExtractionError(CosettleError, RuntimeError):
    """An extraction that cannot be done with these settings."""


class FormatError(ExtractionError, ValueError):
    """Unknown format or tokens, or features that the format cannot hold."""


class OutputExistsError(ExtractionError, FileExistsError):
    """The output exists, or was started, with other settings."""


class OutputBusyError(ExtractionError, BlockingIOError):
    """Another run is writing this output."""


class EngineError(ExtractionError):
    """The Ray cluster failed."""


class DinoTrackerError(CosettleError, ValueError):
    """A backbone or features that DINO-Tracker cannot use."""


@dataclasses.dataclass(frozen=True)
class ExtractSettings:
    """How features are computed and stored.

    Attributes:
        format: file format; by default, from the suffix of the output.
        batch_size: frames per forward pass.
        size: size that frames are resized to: the shorter side, or height and width.
        fit: resize frames to whole patches, or pad them.
        settle: settle each frame by the statistics of the frames before it; by default, as the
            adapter does.
        temporal_fusion: average patches with their matches in neighbouring frames: past and
            future (symmetric), or past only (causal).
        storage: dtype on disk; by default, the adapter's.
        tokens: arrays to write, separated by commas: patch (the features); cls and registers (class
            and register tokens of the last layer, neither settled nor fused); mean (of a frame's
            features). Parquet holds either cls or mean, npy any one of them.
    """

    format: FormatName | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    size: Size | None = None
    fit: Fit = "resize"
    settle: bool | None = None
    temporal_fusion: FusionMode | None = None
    storage: StorageName | torch.dtype | None = None
    tokens: str = "patch"

    def __post_init__(self) -> None:
        if unknown := {*self.tokens.split(",")}.difference(TOKENS):
            raise FormatError(f"expected tokens among {', '.join(TOKENS)}, got {min(unknown)!r}")

    @property
    def kinds(self) -> list[str]:
        """The kinds of ``tokens``, in the order in which they are written."""
        return [kind for kind in TOKENS if kind in self.tokens.split(",")]
