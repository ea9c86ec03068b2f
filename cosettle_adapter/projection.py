"""The projection g: the small head on top of a frozen backbone, trained or fitted.

The paper's head (section 3.3; ``ST_adapter.py`` of the official code) is
``Linear -> Tanh -> LayerNorm``. Its output replaces the patch tokens: there is no residual
connection, and features do not have unit length.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from cosettle_adapter.closed_form import AffineMap
from cosettle_adapter.correspondence import average_neighbours
from cosettle_adapter.errors import ProjectionFormatError
from cosettle_adapter.io import atomic_path

RECIPE = 1  # version of the fit on first use; raise it when any result changes
FORMAT_VERSION = 2  # version 1, without recipe and averaging, can still be read
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "projection.safetensors"

Kind = Literal["linear", "mlp2", "mlp3", "affine", "identity"]
Activation = Literal["tanh", "gelu", "relu"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU}
_MATRICES: dict[str, int] = {"linear": 1, "mlp2": 2, "mlp3": 3, "affine": 1, "identity": 0}
_PLAIN = ("affine", "identity")  # neither activation nor LayerNorm
_REQUIRED = {"backbone", "fingerprint", "layers", "norm", "in_width", "out_width"}


@dataclasses.dataclass(frozen=True)
class ProjectionConfig:
    """Everything known about a projection; written to ``config.json`` beside its weights."""

    backbone: str  # registry name of the backbone it was fitted on
    fingerprint: str  # of that backbone's tensors (``sha256:...``)
    layers: tuple[int, ...]  # 0-based layers to read, concatenated along the channels
    norm: bool  # whether the backbone's final norm is applied to their tokens
    in_width: int  # channels read, summed over ``layers``
    out_width: int  # channels returned
    # ``linear`` (the paper's), ``mlp2``, ``mlp3`` (its ablation), ``affine`` (closed-form weights,
    # neither activation nor LayerNorm) or ``identity`` (the tokens unchanged)
    kind: Kind = "linear"
    activation: Activation = "tanh"  # of ``linear``, ``mlp2`` and ``mlp3``
    backbone_revision: str | None = None  # commit of the Hub repository it came from, if it did
    # how the weights were computed: method, data, settings, seed, package version
    fit: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # measured figures, each with the command that printed it
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    licence: str = ""  # of the projection and of the backbone it depends on
    settled: bool = False  # whether an affine map settled on a clip is applied last
    recipe: int | None = None  # version of the recipe that fitted it, if any
    # weight in [0, 1) of the mean of each patch's most similar neighbours within the frame
    averaging: float = 0.0
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        widths, layers = (self.in_width, self.out_width), self.layers
        kinds, activations = get_args(Kind), get_args(Activation)
        problem = None
        if self.kind not in kinds:
            problem = f"unknown projection kind {self.kind!r}; expected one of {', '.join(kinds)}"
        elif self.activation not in activations:
            known = ", ".join(activations)
            problem = f"unknown activation {self.activation!r}; expected one of {known}"
        elif not all(isinstance(width, int) and width > 0 for width in widths):
            problem = f"in_width and out_width must be positive integers, got {widths}"
        elif self.kind == "identity" and self.in_width != self.out_width:
            problem = f"an identity has equal widths, got {self.in_width} and {self.out_width}"
        elif not (isinstance(layers, list | tuple) and layers) or any(
            not isinstance(layer, int) for layer in layers
        ):
            problem = f"layers must be a list of at least one layer number, got {layers!r}"
        elif not isinstance(self.averaging, int | float) or not 0 <= self.averaging < 1:
            problem = f"averaging must be in [0, 1), got {self.averaging!r}"
        if problem:
            raise ProjectionFormatError(problem)
        object.__setattr__(self, "layers", tuple(layers))

    def to_json(self) -> str:
        """Return the content of ``config.json``."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = CONFIG_FILE) -> ProjectionConfig:
        """Parse ``config.json``; a :class:`ProjectionFormatError` calls it ``source``."""
        try:
            values = dict(json.loads(text))
        except (TypeError, ValueError) as error:
            raise ProjectionFormatError(f"{source} is not a JSON object: {error}") from error
        version = values.get("format_version")
        if version not in (1, FORMAT_VERSION):
            raise ProjectionFormatError(
                f"{source} has format_version {version!r}, but this version of cosettle-adapter "
                f"reads 1 to {FORMAT_VERSION}. Upgrade with: pip install -U cosettle-adapter"
            )
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        missing = sorted(_REQUIRED - values.keys())
        if unknown or missing:
            raise ProjectionFormatError(
                f"{source}: missing fields {missing or 'none'}, unknown fields {unknown or 'none'}"
            )
        try:
            return cls(**{**values, "format_version": FORMAT_VERSION})
        except ProjectionFormatError as error:
            raise ProjectionFormatError(f"{source}: {error}") from error


class Projection(nn.Module):
    """The projection g over patch tokens, described by its :class:`ProjectionConfig`.

    A new projection is initialised as in the official code for most backbones (truncated normal
    with standard deviation 0.02, zero biases); an ``affine`` one starts as the identity.
    """

    def __init__(self, config: ProjectionConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.in_width] + [config.out_width] * _MATRICES[config.kind]
        layers = [nn.Linear(width, following) for width, following in pairwise(widths)]
        for layer in layers:
            if config.kind == "affine":
                nn.init.eye_(layer.weight)
            else:
                nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.linears = nn.ModuleList(layers)
        plain = config.kind in _PLAIN
        self.activation = nn.Identity() if plain else _ACTIVATIONS[config.activation]()
        self.norm = nn.Identity() if plain else nn.LayerNorm(config.out_width, eps=1e-5)
        self.settling = nn.Linear(config.out_width, config.out_width) if config.settled else None
        if self.settling is not None:
            nn.init.eye_(self.settling.weight)
            nn.init.zeros_(self.settling.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Projection:
        # at least float32, also after adapter.half(): what is saved must not be rounded
        def wide(tensor: Tensor) -> Tensor:
            like = fn(tensor[..., :0])
            return tensor.to(like.device, torch.promote_types(like.dtype, torch.float32))

        super()._apply(wide, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Project tokens ``(B, C, h, w)`` to ``(B, C', h, w)`` in the dtype of the weights."""
        if features.ndim != 4 or features.shape[1] != self.config.in_width:
            raise ValueError(
                f"expected features (B, {self.config.in_width}, h, w), got {tuple(features.shape)}"
            )
        tokens = self.project(rearrange(features, "b c h w -> b h w c"))
        if share := self.config.averaging:
            averaged = average_neighbours(rearrange(tokens, "b h w c -> b c h w"), share)
            tokens = rearrange(averaged, "b c h w -> b h w c")
        if self.settling is not None:
            tokens = self.settling(tokens.to(self.settling.weight.dtype))
        return rearrange(tokens, "b h w c -> b c h w").contiguous()

    def project(self, tokens: Tensor) -> Tensor:
        """Project tokens ``(..., C)`` to ``(..., C')``, without averaging and settling.

        The activation follows a single matrix or stands between several, as in ``ST_adapter.py``.
        """
        if not self.linears:
            return tokens
        first, *following = self.linears
        tokens = first(tokens.to(next(first.parameters()).dtype))
        if not following:
            tokens = self.activation(tokens)
        for linear in following:
            tokens = linear(self.activation(tokens))
        projected: Tensor = self.norm(tokens)
        return projected

    def followed_by(self, affine: AffineMap, fit: Mapping[str, Any]) -> Projection:
        """Return a new projection, on the CPU: this one followed by an affine map of its features.

        An affine or identity projection without averaging merges with the map into one ``affine``
        projection; otherwise the map is applied last. The figures of this projection are dropped.
        ``fit`` records how the map was computed.
        """
        record = {**fit, "base": dict(self.config.fit)}
        config = dataclasses.replace(self.config, figures={}, fit=record)
        if self.config.kind in _PLAIN and not (self.config.averaging or self.config.settled):
            config = dataclasses.replace(config, kind="affine")
            last, name = next(iter(self.linears), None), "linears.0"
        else:
            config = dataclasses.replace(config, settled=True)
            last, name = self.settling, "settling"
        before = AffineMap.identity(self.config.out_width)
        if isinstance(last, nn.Linear):
            before = AffineMap(
                last.weight.detach().cpu().double(), last.bias.detach().cpu().double()
            )
        merged = affine.to("cpu").after(before)
        projection = Projection(config)
        state = {f"{name}.weight": merged.weight.float(), f"{name}.bias": merged.bias.float()}
        projection.load_state_dict({**self.state_dict(), **state})
        return projection.requires_grad_(False).eval()

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``projection.safetensors`` into ``folder``, each atomically."""
        folder = Path(folder)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        # Not with safetensors' file writer, which hides that the disk is full.
        content = to_safetensors(tensors, metadata={"format_version": str(FORMAT_VERSION)})
        with atomic_path(folder / WEIGHTS_FILE) as path:
            path.write_bytes(content)
        with atomic_path(folder / CONFIG_FILE) as path:
            path.write_text(self.config.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Projection:
        """Read what :meth:`save` wrote; damaged or missing files are a ProjectionFormatError."""
        folder = Path(folder)
        config_file, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        for file in (config_file, weights):
            if not file.is_file():
                raise ProjectionFormatError(
                    f"{folder} is not a projection: it has no {file.name}. Expected a folder that "
                    f"save_pretrained wrote, with {CONFIG_FILE} and {WEIGHTS_FILE}"
                )
        config = ProjectionConfig.from_json(config_file.read_text("utf-8"), source=str(config_file))
        try:
            tensors = load_file(weights)
        except (SafetensorError, OSError) as error:
            message = f"{weights} is truncated or not a safetensors file: {error}"
            raise ProjectionFormatError(message) from error
        with torch.device("meta"):
            projection = cls(config)
        try:
            projection.load_state_dict(tensors, assign=True)
        except RuntimeError as error:  # it lists missing, unexpected and misshapen tensors
            raise ProjectionFormatError(
                f"{weights} does not fit its {CONFIG_FILE}: {error}"
            ) from error
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
                raise ProjectionFormatError(
                    f"{weights} does not fit its {CONFIG_FILE}: {name} is {tensor.dtype} or holds "
                    "values that are not finite; expected finite values in torch.float32"
                )
        return projection.requires_grad_(False).eval()
