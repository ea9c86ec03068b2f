"""What importing a module of this package costs beyond the libraries it must have.

A plain script rather than :mod:`child`, whose own imports would be paid for already.
"""

from __future__ import annotations

import subprocess
import sys

from cosettle_adapter.benchmark.errors import BenchmarkError

NEEDED = ("torch", "timm", "huggingface_hub", "safetensors.torch", "einops")

_SCRIPT = """
import importlib, sys, time
for name in sys.argv[2:]:
    importlib.import_module(name)
began = time.perf_counter()
importlib.import_module(sys.argv[1])
print(time.perf_counter() - began)
"""


def added_in_a_child(module: str) -> float:
    """Return the seconds that importing ``module`` takes after :data:`NEEDED`.

    Raises:
        BenchmarkError: it cannot be imported.
    """
    command = [sys.executable, "-c", _SCRIPT, module, *NEEDED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"importing {module} failed: {done.stderr.strip()[-400:]}")
    return float(done.stdout)
