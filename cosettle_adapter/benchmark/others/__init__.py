"""The other sides: what this package is compared with, each written plainly from its definition.

Nothing here is slowed down on purpose, and nothing is sped up beyond what the definition says.
"""

from __future__ import annotations
