"""What decided a result that is kept: its key, and how it differs from what would decide it today.

Keys are only added to. A result of an older version, whose key lacks something, is read as of the value that this had
then; where nobody knows that value, it is taken for today's, and the result is kept under today's key from then on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """SHA-256 over plain values, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differing(known: Mapping[str, Any], wanted: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """The names whose values differ; what either lacks is what `then` says of it, and None where that says nothing."""
    known, wanted = {**then, **known}, {**then, **wanted}
    return [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]


def adopt(path: Path, older: Path) -> None:
    """Names the file of a result after today's key, if there is only one that an older version named after its own."""
    if not path.exists() and older.is_file():
        os.replace(older, path)
