"""Short trainings: recipes/emoji.yaml on another look, and the same on a tiny FLUX with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gpu.alone import ON_CARD, TESTS

EMOJI = TESTS.parent / "recipes" / "emoji.yaml"
KINDS: dict[str, dict[str, Any]] = {
    "lokr": {"kind": "lokr", "targets": [{"layers": "**", "factor": 2}]},
    "lora": {"kind": "lora", "rank": 8, "targets": [{"layers": "**"}]},
}
SIZES: dict[str, dict[str, Any]] = {  # on a CPU in seconds
    "emoji": {"resolution": 128, "batch": 16} if ON_CARD else {"resolution": 64, "batch": 2},
    "tiny": {"resolution": 32, "batch": 4},
}
RATES = {"emoji": 1e-3, "tiny": 1e-2}
STEPS = 20 if ON_CARD else 5


def tree(
    layout: str, kind: str, base: str, optimizer: str, places: dict[str, Path], rate: float = 0.0, **changes: Any
) -> dict[str, Any]:
    """A recipe as plain values; keywords replace its keys.

    Args:
        layout: "emoji" or "tiny".
        kind: of the adapter.
        base: its precision.
        optimizer: its kind.
        places: the folders "tiny", a model, "photos", and "out" for the run, beside which its cache comes.
        rate: of learning; 0: at which the loss falls within the first steps.
    """
    out = places["out"]
    return {
        **yaml.safe_load(EMOJI.read_text(encoding="utf-8")),
        **SIZES[layout],
        **({"model": str(places["tiny"])} if layout == "tiny" else {}),
        "data": [{"path": str(places["photos"]), "caption_dropout": 0.1}],
        "base": base,
        "adapter": KINDS[kind],
        "optimizer": {"kind": optimizer, "learning_rate": rate or RATES[layout]},
        "steps": STEPS,
        "samples": {"every": 0},
        "held_out": {"share": 0.2, "pictures": 8},
        "save": {"every": 1000},
        "out": str(out),
        "cache": str(out.parent / "cache"),
        **changes,
    }
