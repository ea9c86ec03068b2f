"""Renaming an image tower's tensors to timm's names, by tables.

A table says which module is which: ``#`` stands for the number of a block. A tensor no table knows
keeps the name it has in the file, so that the strict check of
:func:`cosettle_adapter.backbones.build_backbone` lists it; only what is known to lie behind the
patch tokens (projections, pooling) or beside the tower (text) is dropped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping

import torch
from einops import rearrange

from cosettle_adapter.backbones.layout import Layout, Tensors
from cosettle_adapter.errors import CorruptWeightsError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def table(
    outside: Mapping[str, str], inside: Mapping[str, str], blocks: tuple[str, ...]
) -> dict[str, str]:
    """Return names outside the blocks, and those inside each block, as one table to timm's."""
    return {
        **outside,
        **{
            f"{block}.#.{theirs}": f"blocks.#.{timms}"
            for block in blocks
            for theirs, timms in inside.items()
        },
    }


@dataclasses.dataclass(frozen=True)
class Tower:
    """How one family of models names its image tower.

    Attributes:
        marks: names only this tower has, any of them; what stands before one stands before all.
        names: tensors or modules, their first number written ``#``, to timm's names.
        dropped: beginnings of names inside the tower that patch tokens do not pass through.
        finish: what renaming does not settle, done in place on timm's names.
    """

    marks: tuple[str, ...]
    names: Mapping[str, str]
    dropped: tuple[str, ...]
    finish: Callable[[Tensors], None] = lambda _: None


def convert(tensors: Tensors, tower: Tower) -> Tensors:
    """Select a tower's tensors and give them timm's names and shapes.

    Raises:
        CorruptWeightsError: none of the tower's marks, or several towers in one file.
    """
    prefix = only_prefix(
        {
            name.removesuffix(mark)
            for name in tensors
            for mark in tower.marks
            if name == mark or name.endswith("." + mark)
        }
    )
    converted: Tensors = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(prefix)
        if name.startswith(prefix) and not inner.startswith(tower.dropped):
            converted[_renamed(inner, tower.names) or name] = tensor
    _join(converted, "attn.qkv", ("attn.q", "attn.k", "attn.v"))
    _join(converted, "mlp.fc1", ("mlp.gate", "mlp.up"))
    _give_shape(converted, "cls_token", 1, "c -> 1 1 c")
    _give_shape(converted, "pos_embed", 2, "n c -> 1 n c")
    tower.finish(converted)
    return converted


def only_prefix(found: set[str]) -> str:
    """Return what stands before a tower's names, if there is one such tower."""
    if len(found) != 1:
        listed = ", ".join(repr(prefix) for prefix in sorted(found))
        raise CorruptWeightsError(
            f"expected one image tower, found {len(found)}{f' ({listed})' if found else ''}; save "
            "the one that is meant alone"
        )
    return found.pop()


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    """Look a tensor up by its own name or by its module's; ``None`` when neither is known."""
    number = _NUMBER.search(name)
    general = name if number is None else f"{name[: number.start()]}#{name[number.end() :]}"
    module, _, leaf = general.rpartition(".")
    new = names.get(general) or (f"{names[module]}.{leaf}" if module in names else None)
    return new if new is None or number is None else new.replace("#", number.group())


def _join(tensors: Tensors, whole: str, parts: tuple[str, ...]) -> None:
    """Concatenate the outputs of linear layers that timm computes in one."""
    for name in list(tensors):
        block, found, leaf = name.rpartition(f".{parts[0]}.")
        names = [f"{block}.{part}.{leaf}" for part in parts]
        if found and all(part in tensors for part in names):
            tensors[f"{block}.{whole}.{leaf}"] = torch.cat([tensors.pop(part) for part in names])


def _give_shape(tensors: Tensors, name: str, ndim: int, pattern: str) -> None:
    if name in tensors and tensors[name].ndim == ndim:
        tensors[name] = rearrange(tensors[name], pattern)


def fold_class_position(tensors: Tensors) -> None:
    """Where there are registers, timm keeps positions for patches only.

    The class token's own position, which the authors' files have before the square of the
    patches', is added to the token, as timm's conversion does it.
    """
    if not tensors.keys() >= {"reg_token", "cls_token", "pos_embed"}:
        return
    positions = tensors["pos_embed"]
    if positions.ndim == 3 and math.isqrt(positions.shape[1] - 1) ** 2 == positions.shape[1] - 1:
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        tensors["pos_embed"] = positions[:, 1:]


def layouts(towers: Mapping[str, Tower]) -> tuple[Layout, ...]:
    """Return one layout a mark, in order: the first whose mark is found is meant."""
    return tuple(
        Layout(name, mark, functools.partial(convert, tower=tower))
        for name, tower in towers.items()
        for mark in tower.marks
    )
