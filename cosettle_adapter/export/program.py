"""Export an adapter with ``torch.export``, and check it against PyTorch."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from timm.layers import pos_embed_sincos
from torch import Tensor, nn

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.errors import CosettleError, GeometryError
from cosettle_adapter.io import atomic_path
from cosettle_adapter.starter import starter_photographs
from cosettle_adapter.version import __version__
from cosettle_adapter.video import as_frames, render_clip
from cosettle_adapter.video.geometry import resize

METADATA_FILE = "cosettle_adapter.json"
_FRAMES = 3  # to compare on
_LEAST = 3  # patches per side in files for any size: every patch needs neighbours to average
_TRACED = (7, 5)  # grid at which files for any size are traced
# largest difference as a share of the largest feature: a wrong graph differs by far more
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


_GIVE_SIZE = "give the (height, width) of the frames as size= (--size)"


class ExportError(CosettleError, ValueError):
    """A model that cannot be exported, or whose file computes different features."""


@dataclasses.dataclass(frozen=True)
class Parity:
    """A comparison of an exported file with the model in PyTorch."""

    runtime: str  # name and version of the software that ran the file
    frames: int  # of each size
    sizes: tuple[tuple[int, int], ...]  # (H, W)
    # largest absolute difference of any feature; if the projection averages neighbours, without one
    # patch in 500, because rounding decides between equally similar neighbours
    difference: float
    largest: float  # largest absolute feature

    def __str__(self) -> str:
        return (
            f"{self.runtime} is within {self.difference:.1e} of PyTorch on {self.frames} frame(s) "
            f"of {', '.join(f'{height} x {width}' for height, width in self.sizes)} (largest "
            f"feature {self.largest:.3g})"
        )


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported file: its input, output and metadata."""

    path: Path
    size: int  # bytes, including a ``.data`` file
    # "frames uint8 (batch, 3, H, W)", RGB in [0, 255]; without preprocessing "images float32 ...",
    # normalised with the ``mean`` and ``std`` of the metadata; for any size, H is like "14 h"
    input: str
    output: str  # "features float32 (batch, C, h, w)"
    metadata: Mapping[str, Any]  # origin of the model, geometry of its patches
    parity: Parity | None  # comparison with PyTorch, if it was made


def to_torch_export(
    adapter: CoSettleAdapter,
    path: str | Path,
    size: tuple[int, int] | None = None,
    *,
    preprocessing: bool = True,
    normalize: bool = False,
    static_batch: int | None = None,
    check: bool = True,
    check_on: Any = None,
) -> Exported:
    """Write an adapter as a ``torch.export`` program.

    ``torch.export.load(path).module()`` returns a function of one tensor on the device of the
    export. Metadata is stored in the file as ``cosettle_adapter.json``: pass a dictionary to
    ``torch.export.load(path, extra_files={"cosettle_adapter.json": ""})``, which fills it in.

    Args:
        adapter: frozen backbone and projection; the file has their device and dtype.
        path: a ``.pt2`` file.
        size: ``(H, W)`` of the frames, whole patches; position embeddings are stored at this size.
            By default, the file accepts any size of at least 3 x 3 whole patches and resizes them;
            only for transformers of one resolution (ViT, DINOv3, EVA).
        preprocessing: take uint8 frames; otherwise images as ``adapter.preprocess`` returns them.
        normalize: scale every patch's feature to unit length.
        static_batch: a fixed number of frames per call; ``None`` allows any number.
        check: run the file on a few frames, and keep it only if it computes the same features; for
            any size, on three sizes other than the traced one.
        check_on: frames to check on, of any kind and size that the adapter takes; by default,
            rendered frames.

    Raises:
        GeometryError: ``size`` is not made of whole patches.
        ExportError: torch cannot trace this model, or not for any size, or the file computes
            different features.
    """
    path = check_suffix(path, ".pt2")
    traced = Traced(adapter, size, preprocessing, normalize, static_batch)
    # written via memory: torch's own writer hides the reason when a disk is full
    content = io.BytesIO()
    metadata = {METADATA_FILE: json.dumps(traced.metadata)}
    torch.export.save(traced.program, content, extra_files=metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())
        parity = None
        if check:
            loaded = torch.export.load(temporary).module()
            parity = traced.compare(loaded, f"torch.export ({torch.__version__})", check_on)
    return traced.exported(path, path.stat().st_size, parity)


class _Exported(nn.Module):
    """The exported function: frames, or normalised images, to features."""

    def __init__(self, adapter: CoSettleAdapter, preprocessing: bool, normalize: bool) -> None:
        super().__init__()
        self.adapter = adapter
        self.preprocessing = preprocessing
        self.normalize = normalize
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to ``(N, C, h, w)`` in one pass."""
        adapter = self.adapter
        if self.preprocessing:
            inputs = adapter.backbone.normalize(inputs, to_255=True)
        return adapter._finished(adapter._encode_images(inputs)[1], self.normalize)


class Traced:
    """An adapter traced for one or any size, without tensors that its features do not depend on.

    ``unfused`` computes attention in elementary operations: the ONNX exporter supports the fused
    operator for four axes only, and Hiera needs five.
    """

    @torch.no_grad()
    def __init__(
        self,
        adapter: CoSettleAdapter,
        size: tuple[int, int] | None,
        preprocessing: bool = True,
        normalize: bool = False,
        static_batch: int | None = None,
        *,
        unfused: bool = False,
    ) -> None:
        _check(adapter, size, static_batch)
        backbone, config = adapter.backbone, adapter.config
        grid = adapter.geometry(*size).grid if size else None
        count = static_batch or "batch"
        dtype = str(adapter.dtype).removeprefix("torch.")
        self.name, kind = ("frames", "uint8") if preprocessing else ("images", "float32")
        patch, stride = backbone.patch, backbone.stride
        overlap = f" + {patch - stride}" if patch > stride else ""
        height, width = size or (f"{stride} {side}{overlap}" for side in "hw")
        self.input = f"{self.name} {kind} ({count}, 3, {height}, {width})"
        h, w = grid or "hw"
        self.output = f"features {dtype} ({count}, {adapter.width}, {h}, {w})"
        self.metadata: dict[str, Any] = {
            "cosettle_adapter": __version__,
            "backbone": backbone.row.name,
            "fingerprint": backbone.fingerprint,
            "licence": config.licence,
            "layers": list(config.layers),
            "projection": config.kind,
            "patch": patch,
            "stride": stride,
            "size": size and list(size),
            "grid": grid and list(grid),
            "preprocessing": preprocessing,
            "mean": list(backbone.row.mean),
            "std": list(backbone.row.std),
            "normalized": normalize,
        }
        self.count = static_batch
        self.model = _Exported(adapter, preprocessing, normalize)
        # torch 2.6 requires a bound below the largest integer
        dynamic: dict[int, Any] = {}
        if not static_batch:
            dynamic[0] = torch.export.Dim("batch", max=2**20)
        self.sizes = [size] if size else _sizes_to_compare(backbone)
        if not size:
            for axis, side in ((2, "h"), (3, "w")):
                steps = stride * torch.export.Dim(side, min=_LEAST, max=2**12)
                dynamic[axis] = steps + (patch - stride) if patch > stride else steps
        self.dynamic_shapes: Any = {"inputs": dynamic} if dynamic else None
        # torch.export would make a batch of one a constant
        example = torch.zeros(
            (static_batch or 2, 3, *(size or _size_of(backbone, _TRACED))),
            dtype=getattr(torch, kind),
            device=adapter.device,
        )
        self.model(example)  # caches position embeddings of this size, to be stored as constants
        plain = _plain_attention(self.model) if unfused else contextlib.nullcontext()
        with plain, _symbolic_floats():
            unused = _unused(_trace(self.model, example, None))
            # encoders read their dtype from their first parameter
            unused.discard(next(name for name, _ in self.model.named_parameters()))
            self.program = _trace(_without(self.model, unused), example, self.dynamic_shapes)
        for node in self.program.graph.nodes:  # stack traces contain paths of this machine
            node.meta.pop("stack_trace", None)

    @torch.no_grad()
    def compare(self, run: Callable[[Tensor], Tensor], runtime: str, check_on: Any) -> Parity:
        """Compare the model with its exported file, executed by ``run``; raise if they differ."""
        parities = [self._compare_at(size, run, runtime, check_on) for size in self.sizes]
        worst = max(parities, key=lambda parity: parity.difference)
        return dataclasses.replace(worst, sizes=tuple(self.sizes))

    def _compare_at(
        self, size: tuple[int, int], run: Callable[[Tensor], Tensor], runtime: str, check_on: Any
    ) -> Parity:
        frames = frames_to_compare(check_on, size, self.count)
        inputs = frames if self.model.preprocessing else self.model.adapter.preprocess(frames)
        inputs = inputs.to(self.model.adapter.device)
        try:
            actual = run(inputs).detach().cpu()
        except Exception as error:  # of any type; tracing may have fixed the size
            raise ExportError(
                f"{runtime} cannot run the file, which was not kept, on frames of {size[0]} x "
                f"{size[1]}: {reason(error)}; {_GIVE_SIZE}"
            ) from error
        expected = self.model(inputs).detach().cpu()
        if actual.shape != expected.shape:
            raise ExportError(
                f"{runtime} returns {tuple(actual.shape)}, PyTorch {tuple(expected.shape)}: the "
                "file was not kept"
            )
        differences = (actual.double() - expected.double()).abs().amax(dim=1).flatten()
        averages = self.model.adapter.config.averaging and bool(differences.isfinite().all())
        excluded = len(differences) // 500 if averages else 0
        difference = float(differences.sort().values[-1 - excluded])
        parity = Parity(runtime, len(expected), (size,), difference, float(expected.abs().max()))
        dtype = str(expected.dtype).removeprefix("torch.")
        if not difference <= _TOLERANCE[dtype] * max(parity.largest, 1e-6):
            raise ExportError(
                f"{runtime} differs from PyTorch by {difference:.3g} with features up to "
                f"{parity.largest:.3g} on frames of {size[0]} x {size[1]}, more than rounding "
                f"explains in {dtype}: the file was not kept. To examine it, keep it with "
                "check=False (--no-check)"
            )
        return parity

    def exported(self, path: Path, size: int, parity: Parity | None) -> Exported:
        """Return the description of the written file."""
        return Exported(path, size, self.input, self.output, self.metadata, parity)


def frames_to_compare(given: Any, size: tuple[int, int], count: int | None) -> Tensor:
    """Return ``(N, 3, H, W)`` uint8 frames, resized: ``count`` of those given, or rendered ones."""
    if given is None:
        photo = next(iter(starter_photographs().values()))
        frames = render_clip(photo, frames=count or _FRAMES, size=size).frames
    else:
        frames = rearrange(as_frames(given), "... c h w -> (...) c h w")
        scale = 1 if frames.dtype == torch.uint8 else 255
        if frames.shape[-2:] != size:
            frames = resize(frames, size)
        frames = (frames.float() * scale).round().to(torch.uint8)
    return frames if count is None else frames[torch.arange(count).clamp(max=len(frames) - 1)]


def check_suffix(path: str | Path, suffix: str) -> Path:
    """Return the path if it has the suffix, or raise :class:`ExportError`."""
    if Path(path).suffix != suffix:
        raise ExportError(f"expected a file name that ends in {suffix}, got {path}")
    return Path(path)


def reason(error: BaseException) -> str:
    """Return the type and the first line of an error's root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"


def _size_of(backbone: Backbone, grid: tuple[int, int]) -> tuple[int, int]:
    height, width = (backbone.patch + (side - 1) * backbone.stride for side in grid)
    return height, width


def _sizes_to_compare(backbone: Backbone) -> list[tuple[int, int]]:
    """Return the size of the stored positions, a wide size and a narrow one."""
    own = backbone.row.image_size // backbone.patch
    grids = ((own, own), (max(_LEAST, own // 2), own + own // 4 + 1), (own + 2, _LEAST))
    return [_size_of(backbone, grid) for grid in grids]


def _check(
    adapter: CoSettleAdapter, size: tuple[int, int] | None, static_batch: int | None
) -> None:
    if adapter.settles:
        raise ExportError(
            "this adapter settles on every clip, which an exported model cannot do. Export "
            "adapter.settle(clip), which is settled on one clip permanently, or a fitted projection"
        )
    if static_batch is not None and static_batch < 1:
        raise ExportError(f"static_batch must be at least 1, or None for any, got {static_batch}")
    if size is None:
        if adapter.backbone.row.kind != "vit":
            raise ExportError(
                f"{adapter.backbone.row.name} arranges stages or windows for a fixed input size; "
                f"{_GIVE_SIZE}"
            )
        return
    padded = adapter.geometry(*size).padded
    if padded != tuple(size):
        raise GeometryError(
            f"an exported model takes frames of one exact size, and {size[0]} x {size[1]} (height "
            f"x width) does not fit patch {adapter.backbone.patch} at stride "
            f"{adapter.backbone.stride}; the nearest size that does is {padded[0]} x {padded[1]}"
        )


@contextlib.contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Turn off the fused attention of timm's encoders during the block."""
    # copies of encoders for other window sizes are not submodules
    copies = getattr(model.adapter.backbone, "_fitted", {}).values()  # type: ignore[union-attr]
    modules = itertools.chain(model.modules(), *(encoder.modules() for encoder in copies))
    fused = [module for module in modules if getattr(module, "fused_attn", False) is True]
    try:
        for module in fused:
            module.fused_attn = False
        yield
    finally:
        for module in fused:
            module.fused_attn = True


@contextlib.contextmanager
def _symbolic_floats() -> Iterator[None]:
    """Keep the sides by which timm divides rotary coordinates symbolic despite ``float()``."""
    pos_embed_sincos.float = torch.sym_float
    try:
        yield
    finally:
        del pos_embed_sincos.float


def _trace(model: nn.Module, example: Tensor, shapes: Any) -> Any:
    try:
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises errors of many types
        remedy = "" if shapes is None else "; try static_batch= (--static-batch)"
        if shapes is not None and 2 in shapes["inputs"]:
            remedy = f"; {_GIVE_SIZE}"
        raise ExportError(
            f"torch {torch.__version__} cannot trace this model: {reason(error)}{remedy}"
        ) from error


def _unused(program: Any) -> set[str]:
    """Return the names of parameters and buffers that a program does not read."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {
        names[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names and not node.users
    }


def _without(model: nn.Module, names: set[str]) -> nn.Module:
    """Copy a model without the named tensors; the copy shares all others."""
    tensors = (*model.parameters(), *model.buffers())
    reduced: nn.Module = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name in names:
        module, _, leaf = name.rpartition(".")
        setattr(reduced.get_submodule(module), leaf, None)
    return reduced
