"""Wrapper of timm's transformers of one resolution: ViT, and Eva for rotary positions."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from einops import rearrange
from timm.layers import Format
from torch import Tensor, nn
from torch.nn import functional as F

from cosettle_adapter.backbones.backbone import Backbone, Grid, Positions, Read
from cosettle_adapter.backbones.rows import BackboneRow, PositionInterpolation

_CACHED_GRIDS = 16


class VisionTransformerBackbone(Backbone):
    """A vision transformer with any grid and stride, with or without class and register tokens.

    Positions are absolute (learned or sinusoidal), rotary, both, or none. timm runs the model
    (``forward_intermediates``); only the step from patches to tokens with positions is replaced,
    because authors resize positions in different ways and timm in one.
    """

    def __init__(self, vit: Any, row: BackboneRow, **loaded: Any) -> None:
        """Wrap a timm model whose parameters are loaded; ``loaded`` goes to :class:`Backbone`."""
        widths = (row.width,) * row.depth
        super().__init__(row, widths=widths, default_layer=row.depth - 1, **loaded)
        self.vit = vit
        self._cls = int(vit.cls_token is not None)
        registers = vit.num_prefix_tokens > self._cls
        self.special = ("cls",) * self._cls + ("registers",) * registers
        embed = vit.patch_embed
        embed.proj.stride = (self.stride, self.stride)
        embed.img_size = None  # any size; ``grid`` checks it
        embed.flatten, embed.output_fmt = False, Format.NHWC
        vit._pos_embed = self._embed
        self._given: Positions | None = None
        # Learned positions stay float32 on the CPU, where bicubic resizing is exact and always
        # available; only the result is moved to the device.
        learned = vit.pos_embed
        self._learned = None if learned is None else learned.detach().float().cpu()
        # The same holds for rotary embeddings; in a tuple, they are not cast with the model.
        rope = getattr(vit, "rope", None)
        self.rope = None if rope is None else (copy.deepcopy(rope).float().cpu(),)
        self._positions: dict[tuple[Grid, torch.device], Positions] = {}
        self.requires_grad_(False).train()

    @property
    def prefix_positions(self) -> int:
        """Number of class and register tokens that have positions; these precede the patches'."""
        return 0 if self.vit.no_embed_class else int(self.vit.num_prefix_tokens)

    def positions(self, grid: Grid) -> Positions:
        """Return the positions of a grid in float32; ``None`` for kinds that the model lacks."""
        if type(grid[0]) is not int:  # symbolic: the exported graph computes them
            return self._positions_of(grid)
        key = (grid, self.device)
        if key not in self._positions:
            if len(self._positions) >= _CACHED_GRIDS:
                self._positions.pop(next(iter(self._positions)))
            # A later pass with gradients could not use inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                self._positions[key] = self._positions_of(grid)
        return self._positions[key]

    def _positions_of(self, grid: Grid) -> Positions:
        absolute = rotary = None
        if self._learned is not None:
            absolute = resize_positions(
                self._learned,
                grid,
                source_grid=(self.row.image_size // self.patch,) * 2,
                prefix=self.prefix_positions,
                interpolation=self.row.interpolation,
            )
        if self.rope is not None:
            rotary = self.rope[0].get_embed(shape=list(grid))
        return Positions(absolute, rotary).to(self.device)

    def _maps(
        self, images: Tensor, reads: frozenset[Read], positions: Positions | None
    ) -> dict[Read, Tensor]:
        h, _ = self.grid(images.shape[-2], images.shape[-1])
        layers = sorted({read.layer for read in reads})
        kinds = {read.kind for read in reads}
        if missing := kinds - {"patch", "attention", *self.special}:
            raise ValueError(f"{self.row.name} has no {' or '.join(sorted(missing))} tokens")
        special = not kinds.isdisjoint(self.special)
        self._given = None if positions is None else positions.to(self.device)
        try:
            with self._attention(r.layer for r in reads if r.kind == "attention") as attention:
                outputs = self.vit.forward_intermediates(
                    images,
                    indices=layers,
                    return_prefix_tokens=special,
                    stop_early=True,
                    output_fmt="NLC",
                    intermediates_only=True,
                )
        finally:
            self._given = None
        by_layer = dict(zip(layers, outputs, strict=True))

        def tensor(read: Read) -> Tensor:
            if read.kind == "attention":
                return attention[read.layer]
            output: Any = by_layer[read.layer]
            if special:  # patches and prefix
                output = output[0 if read.kind == "patch" else 1]
            tokens = self._normed(output, read.layer, read.norm)
            if read.kind == "patch":
                return rearrange(tokens, "b (h w) c -> b c h w", h=h)
            return tokens[:, 0] if read.kind == "cls" else tokens[:, self._cls :]

        return {read: tensor(read) for read in reads}

    @contextlib.contextmanager
    def _attention(self, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
        """Collect the attention of layers during a forward pass, by layer."""
        matrices: dict[int, Tensor] = {}
        with contextlib.ExitStack() as undo:
            for layer in layers:
                modules = [m for m in self.vit.blocks[layer].modules() if hasattr(m, "fused_attn")]
                if len(modules) != 1:
                    raise ValueError(f"{self.row.name} has no single attention in layer {layer}")
                (module,) = modules
                # the input of the dropout is the matrix, which a fused kernel does not form
                undo.callback(setattr, module, "fused_attn", module.fused_attn)
                module.fused_attn = False
                hook = module.attn_drop.register_forward_hook(
                    lambda _module, _inputs, output, layer=layer: matrices.update({layer: output})
                )
                undo.callback(hook.remove)
            yield matrices

    def _embed(self, patches: Tensor) -> Any:
        """Replace timm's step from patches ``(B, h, w, C)`` to tokens with prefix and positions."""
        batch, h, w, _ = patches.shape
        positions = self._given or self.positions((h, w))
        absolute = positions.added()
        added = 0.0 if absolute is None else absolute
        tokens = rearrange(patches, "b h w c -> b (h w) c")
        special = (self.vit.cls_token, self.vit.reg_token)
        prefix = [token.expand(batch, -1, -1) for token in special if token is not None]
        if self.prefix_positions:
            tokens = torch.cat([*prefix, tokens], dim=1) + added
        else:
            tokens = torch.cat([*prefix, (tokens + added).to(tokens.dtype)], dim=1)
        tokens = tokens.to(self.dtype)
        return (tokens, positions.rotations()) if hasattr(self.vit, "rope") else tokens

    def _normed(self, tokens: Tensor, layer: int, norm: bool | None) -> Tensor:
        if norm or (norm is None and layer == self.depth - 1 and self.row.final_norm):
            if isinstance(self.vit.norm, nn.Identity):
                raise ValueError(f"{self.row.name} has no final norm; omit norm=True")
            tokens = self.vit.norm(tokens)
        return tokens


def resize_positions(
    positions: Tensor,
    grid: Grid,
    *,
    source_grid: Grid,
    prefix: int,
    interpolation: PositionInterpolation,
) -> Tensor:
    """Resize positions ``(1, prefix + h0 * w0, C)`` to another grid, in float32."""
    # Authors differ in details that change features: scale+0.1 is the official code of DINO, MAE
    # and DINOv2; size+antialias that of DINOv2 with registers, CLIP and BLIP, and timm's default.
    leading, patches = positions.float().tensor_split([prefix], dim=1)
    patches = rearrange(patches, "1 (h w) c -> 1 c h w", h=source_grid[0])
    symbolic = type(grid[0]) is not int
    if not symbolic and grid == source_grid:
        return positions.float()
    if interpolation != "scale+0.1":
        mode = "bilinear" if interpolation == "bilinear+antialias" else "bicubic"
        antialias = interpolation.endswith("+antialias")
        patches = F.interpolate(patches, grid, mode=mode, antialias=antialias)
    elif symbolic:
        patches = _rescaled_in_graph(patches, grid)
    else:
        # The 0.1 keeps floor(h0 * scale) from falling one short of h (sides such as 546 and 602).
        scale = tuple((side + 0.1) / source for side, source in zip(grid, source_grid, strict=True))
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([leading, rearrange(patches, "1 c h w -> 1 (h w) c")], dim=1)


def _rescaled_in_graph(patches: Tensor, grid: Grid) -> Tensor:
    """Resize ``(1, C, h0, w0)`` as ``scale+0.1`` does, to a symbolic ``(h, w)``.

    ``F.interpolate`` would turn the scales of such a grid into constants.
    """
    sides = [torch.scalar_tensor(side) for side in grid]
    other = torch.stack([a != b for a, b in zip(sides, patches.shape[-2:], strict=True)]).any()
    rows, columns = (  # centres of the new patches, in [-1, 1]
        (2 * torch.arange(side) + 1) / (length + 0.1 * other) - 1
        for side, length in zip(grid, sides, strict=True)
    )
    points = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).to(patches.dtype)
    points = rearrange(points, "h w xy -> 1 h w xy")
    return F.grid_sample(patches, points, "bicubic", "border", align_corners=False)
