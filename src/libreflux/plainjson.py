"""JSON that others wrote: whatever is wrong with it is a ValueError, and every text in it can be written again."""

from __future__ import annotations

import json
from typing import Any

MOST_CHARACTERS = 2**26
"""Of one text. The largest that libreflux writes, an index of a million tensors, is a tenth of it."""


def parse(text: str) -> Any:
    """Plain values from JSON.

    Raises:
        ValueError: not JSON, nested too deeply, too long, or with half a surrogate pair (`"\\ud83d"` alone), which is
            no character and cannot be written as UTF-8.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text):,} characters are more than {MOST_CHARACTERS:,}")
    try:
        values = json.loads(text)
        if "\\ud" in text or "\\uD" in text or not is_text(text):
            _refuse_halves(values)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return values


def _refuse_halves(value: Any) -> None:
    if isinstance(value, str) and not is_text(value):
        raise ValueError(f"half a character in {value[:40]!r}")
    if isinstance(value, dict):
        for key, one in value.items():
            _refuse_halves(key)
            _refuse_halves(one)
    elif isinstance(value, list):
        for one in value:
            _refuse_halves(one)


def is_text(text: str) -> bool:
    """Whether every character of a text is one, so that it can be written as UTF-8: no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
