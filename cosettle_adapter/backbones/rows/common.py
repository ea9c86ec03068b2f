"""Sizes, licences and notes that several rows share."""

from __future__ import annotations

SIZES = {  # letter: (timm name, width, depth)
    "s": ("small", 384, 12),
    "b": ("base", 768, 12),
    "l": ("large", 1024, 24),
    "h": ("huge", 1280, 32),
    "g": ("giant", 1536, 40),
}

NON_COMMERCIAL = "non-commercial weights"

DINOV3_LICENCE = "LicenseRef-DINOv3"
DINOV3_NOTE = "under Meta's DINOv3 licence"
