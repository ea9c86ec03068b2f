# shim: removed at integration
"""Old place of what is now in ``vit.py``, ``backbone.py`` and ``training/positions.py``."""

import importlib

from cosettle_adapter.backbones.backbone import Positions
from cosettle_adapter.backbones.vit import resize_positions

_training = importlib.import_module("cosettle_adapter.training.positions")
join_positions = _training.join_positions
perturb_positions = _training.perturb_positions

__all__ = ["Positions", "join_positions", "perturb_positions", "resize_positions"]
