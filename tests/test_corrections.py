"""docs/corrections.md names tests that exist, and those of its first eight rows hold the original behaviour too."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_row_names_a_test_and_the_first_eight_an_original() -> None:
    lines = (ROOT / "docs/corrections.md").read_text("utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    assert len(rows) >= 8
    for number, row in enumerate(rows):
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", row)
        assert named, row
        texts = [(ROOT / path).read_text("utf-8") for path, _ in named]
        for text, (_, name) in zip(texts, named, strict=True):
            assert not name or f"def {name}(" in text, name
        assert number >= 8 or "def original_" in texts[0], row
