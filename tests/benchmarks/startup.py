"""What it costs to begin: imports, loading, the first feature, a first use."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from bench import Figure, Options, figure, in_process, interleaved, ratios, seconds
from safetensors.torch import save_file

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import lookup


def load(options: Options) -> Iterator[Figure]:
    adapter = options.adapter()
    row = adapter.backbone.row
    with tempfile.TemporaryDirectory() as name:
        file = str(Path(name) / "weights.safetensors")
        model: Any = timm.create_model(row.architecture, num_classes=0, **row.options)
        save_file(model.state_dict(), file)
        found = interleaved(
            {
                "ours": lambda: CoSettleAdapter.from_pretrained(
                    options.model, local_files_only=True
                ),
                "timm": lambda: timm.create_model(
                    row.architecture, num_classes=0, checkpoint_path=file, **row.options
                ),
            },
            rounds=options.rounds,
        )
        whole = interleaved(
            {
                "ours": lambda: in_process(_FIRST, options.model),
                "timm": lambda: in_process(
                    _TIMM_FIRST, row.architecture, file, json.dumps(row.options)
                ),
            },
            rounds=options.pick(5, 1),
        )
    yield figure(
        "`from_pretrained`, warm cache, time against timm's loading of the same architecture",
        ratios(found["ours"], found["timm"]),
        at_most=0.6,
    )
    yield figure(
        "first feature (224 x 224), process start to exit, time against timm's",
        ratios(whole["ours"], whole["timm"]),
    )
    yield figure("first feature (224 x 224), process start to exit", whole["ours"], unit="s")
    for code in ("import cosettle_adapter", "from cosettle_adapter import CoSettleAdapter"):
        added = [in_process(_IMPORT, code) for _ in range(options.pick(7, 1))]
        yield figure(f"`{code}`, on top of what it must import", added, unit="ms", at_most=50)
    added = [in_process(_HELP) for _ in range(options.pick(7, 1))]
    yield figure(
        "`cosettle-adapter --help`, on top of the interpreter", added, unit="s", at_most=0.5
    )


_FIRST = """
import sys, torch
from cosettle_adapter import CoSettleAdapter
adapter = CoSettleAdapter.from_pretrained(sys.argv[1], local_files_only=True)
print(float(adapter(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).sum()))
"""
_TIMM_FIRST = """
import json, sys, timm, torch
architecture, file, options = sys.argv[1:]
options = json.loads(options) | {"dynamic_img_size": True}
model = timm.create_model(architecture, num_classes=0, checkpoint_path=file, **options).eval()
with torch.inference_mode():
    print(float(model.forward_features(torch.zeros(1, 3, 224, 224)).sum()))
"""
_IMPORT = """
import sys, time, torch, timm, huggingface_hub, safetensors.torch, einops
start = time.perf_counter()
exec(sys.argv[1])
print(1e3 * (time.perf_counter() - start))
"""
_HELP = """
import contextlib, io, time
start = time.perf_counter()
from cosettle_adapter.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    main(["--help"])
print(time.perf_counter() - start)
"""


def first_use(options: Options) -> Iterator[Figure]:
    """A first use with random weights, which cost what real ones cost."""
    for name, most in (("dinov2-vits14", 30), ("dinov2-vitb14", 90)):
        with tempfile.TemporaryDirectory() as folder:
            row = lookup(name)
            model: Any = timm.create_model(row.architecture, num_classes=0, **row.options)
            file = Path(folder) / "weights.safetensors"
            save_file(model.state_dict(), file)
            work = functools.partial(
                CoSettleAdapter.from_pretrained,
                name,
                projection="fit",
                backbone_weights=file,
                cache_dir=folder,
            )
            taken = seconds(work)
        yield figure(f'`from_pretrained("{name}")` on first use', [taken], unit="s", at_most=most)
