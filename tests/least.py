"""The least that a recipe says."""

from __future__ import annotations

LEAST = ["data.0.path=photos", "resolution=512", "steps=10", "out=runs/a"]
