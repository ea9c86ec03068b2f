"""What importing a module of this package costs beyond the libraries it must have.

A plain script rather than :mod:`child`, whose own imports would be paid for already.
"""

from __future__ import annotations

import os
import subprocess
import sys

from cosettle_adapter.benchmark.errors import BenchmarkError

NEEDED = ("torch", "timm", "huggingface_hub", "safetensors.torch", "einops")

_NO_BYTE_CODE = "PYTHONDONTWRITEBYTECODE"
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

    Byte code is written where it may be, so that a second call finds it.

    Raises:
        BenchmarkError: it cannot be imported.
    """
    command = [sys.executable, "-c", _SCRIPT, module, *NEEDED]
    ours = {name: value for name, value in os.environ.items() if name != _NO_BYTE_CODE}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ours)
    if done.returncode:
        raise BenchmarkError(f"importing {module} failed: {done.stderr.strip()[-400:]}")
    return float(done.stdout)
