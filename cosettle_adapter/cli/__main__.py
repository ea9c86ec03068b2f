"""``python -m cosettle_adapter.cli``, for launchers such as torchrun."""

from __future__ import annotations

import sys

from cosettle_adapter.cli import main

if __name__ == "__main__":
    sys.exit(main())
