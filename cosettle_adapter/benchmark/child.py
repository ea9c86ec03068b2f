"""Functions in a process of their own: for peak memory, and for what an import costs.

``python -m cosettle_adapter.benchmark.child MODULE FUNCTION`` reads keyword arguments as JSON
from standard input and writes what the function returns as JSON on the last line.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cosettle_adapter.benchmark.errors import BenchmarkError

_STATUS = Path("/proc/self/status")
_REFERENCES = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_SHOWN = 800


def call(module: str, function: str, **arguments: Any) -> Any:
    """Call a function in a new process.

    Args:
        module: dotted name.
        function: its name there.
        **arguments: plain JSON.

    Returns:
        What it returned, plain JSON.

    Raises:
        BenchmarkError: the process failed; with the end of what it said.
    """
    command = [sys.executable, "-m", __name__, module, function]
    done = subprocess.run(
        command, input=json.dumps(arguments), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip()[-_SHOWN:]
        killed = " (killed: too little memory?)" if done.returncode < 0 else ""
        raise BenchmarkError(
            f"{module}.{function} failed in a process of its own{killed}: {said or 'no word'}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def resident_bytes() -> int:
    """Return the memory that this process holds."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the most that this process held since :func:`forget_peak`, or since it began.

    ``ru_maxrss`` is of no use here: a child inherits it from the process that started it.
    """
    return _status("VmHWM")


def forget_peak() -> None:
    """Begin anew to look for the peak.

    What was freed is handed back first: memory that the allocator keeps for later would hide what
    is taken from it.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)
    try:
        _REFERENCES.write_text(_RESET_PEAK)
    except OSError as error:
        raise BenchmarkError(f"memory is measured on Linux only ({error})") from error


def _status(field: str) -> int:
    try:
        lines = _STATUS.read_text("utf-8").splitlines()
    except OSError as error:
        raise BenchmarkError(f"memory is measured on Linux only ({error})") from error
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def _main() -> None:
    _, module, function = sys.argv
    arguments = json.load(sys.stdin)
    result = getattr(importlib.import_module(module), function)(**arguments)
    sys.stdout.write(f"\n{json.dumps(result)}\n")


if __name__ == "__main__":
    _main()
