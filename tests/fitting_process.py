"""Run in a process of its own: fit the tiny backbone on a small corpus, as its arguments say.

python fitting_process.py CACHE WEIGHTS [stop CLIPS | block]
"""

from __future__ import annotations

import os
import signal
import sys

from helpers import TINY, small_corpus


class _Blocked:
    """Lets nothing of the extras be imported."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in {"av", "rich", "accelerate", "skimage"}:
            raise ImportError(f"{name} is blocked")


def main(cache: str, weights: str, action: str = "", clips: str = "") -> None:
    if action == "block":
        sys.meta_path.insert(0, _Blocked())  # type: ignore[arg-type]
    from cosettle_adapter import CoSettleAdapter, fitting, fitting_cache
    from cosettle_adapter.backbones import registry

    registry.REGISTRY[TINY.name] = TINY
    small_corpus(setattr)
    collect = fitting._collect
    seen = []

    def counted(*given: object, **named: object) -> None:
        if action == "stop" and len(seen) == int(clips):
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(1)
        collect(*given, **named)  # type: ignore[arg-type]

    fitting._collect = counted
    fitting_cache._SAVE_EVERY = -1.0  # after each clip
    CoSettleAdapter.from_pretrained(TINY.name, backbone_weights=weights, cache_dir=cache)
    sys.stdout.write(str(len(seen)))


if __name__ == "__main__":
    main(*sys.argv[1:])
