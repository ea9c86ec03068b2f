from __future__ import annotations

import pytest
from training_fakes import small_backbone

from cosettle_adapter import CoSettleAdapter

from helpers import projection_for


@pytest.fixture
def small_adapter() -> CoSettleAdapter:
    """Two blocks and a projection, so that frames cost next to nothing."""
    backbone = small_backbone()
    return CoSettleAdapter(backbone, projection_for(backbone, layers=(1,)))
