"""``torch.compile`` for the frozen encoder."""

from __future__ import annotations

from cosettle_adapter.backbones import Backbone


def compile_encoder(backbone: Backbone, *, backend: str = "inductor") -> None:
    """Compile a backbone's blocks in place, each by itself.

    All blocks of a transformer share one compiled graph, so that this takes seconds rather than
    minutes; an encoder without blocks is compiled whole. It stays compiled afterwards, and what
    is compiled already is left as it is.

    Args:
        backbone: to compile; nothing happens before it runs.
        backend: of ``torch.compile``.
    """
    blocks = [
        block
        for module in backbone.modules()
        for name, group in module.named_children()
        if name == "blocks"
        for block in group.children()
    ]
    for module in blocks or backbone.children():
        if module._compiled_call_impl is None:
            module.compile(backend=backend)
