"""Checks an installed wheel that has the core dependencies alone; run outside the checkout."""

import subprocess
import sys

EXTRAS = {"av", "matplotlib", "onnx", "onnxruntime", "ray", "rich", "scipy", "skimage", "zarr"}
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

print("core install: ok")
