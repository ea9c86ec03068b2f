"""Checks an installed wheel that has the core dependencies alone; run outside the checkout."""

import subprocess
import sys

EXTRAS = {
    "av", "matplotlib", "onnx", "onnxruntime", "pyarrow", "ray", "rich", "scipy", "skimage", "zarr",
}  # fmt: skip
LAZY = EXTRAS | {"open_clip", "torch", "timm"}


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that running ``code`` in a new interpreter loads."""
    script = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


heavy = loaded_by("import cosettle_adapter") & LAZY
if heavy:
    sys.exit(f"import cosettle_adapter loads {sorted(heavy)}")

extras = loaded_by("from cosettle_adapter import CoSettleAdapter, list_models; list_models()")
if extras & (EXTRAS | {"open_clip"}):
    sys.exit(f"CoSettleAdapter loads {sorted(extras & EXTRAS)}")

command = [sys.executable, "-c", "from cosettle_adapter.cli import main; raise SystemExit(main())"]
bare = subprocess.run([*command, "list"], capture_output=True, text=True, check=False)
if bare.returncode != 1 or "pip install 'cosettle-adapter[cli]'" not in bare.stderr:
    sys.exit(f"the command line without its extra says: {bare.stderr or bare.stdout}")

first_use = loaded_by(
    """
import tempfile
from pathlib import Path
import torch
from safetensors.torch import save_file
from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import lookup
from cosettle_adapter.backbones.architectures import meta_model
name = "timm:test_vit.r160_in1k"
tensors = meta_model(lookup(name)).state_dict()
with tempfile.TemporaryDirectory() as folder:
    weights = Path(folder) / "backbone.safetensors"
    save_file({key: torch.randn(value.shape) * 0.05 for key, value in tensors.items()}, weights)
    adapter = CoSettleAdapter.from_pretrained(
        name, backbone_weights=weights, cache_dir=folder, local_files_only=True
    )
assert adapter(torch.rand(2, 3, 64, 80)).shape == (2, 64, 4, 5)
"""
)
if first_use & (EXTRAS | {"accelerate"}):
    sys.exit(f"a first use loads {sorted(first_use & EXTRAS)}")

print("core install: ok")
