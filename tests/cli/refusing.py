"""Files replaced by others, and the one line that refuses them."""

from __future__ import annotations

from pathlib import Path


def replaced(file: Path, content: bytes | str) -> None:
    """Another file of this name, which may have had hard links."""
    file.unlink()
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def refused(outcome: tuple[int, str, str], parts: tuple[str, ...]) -> None:
    code, out, err = outcome
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("libreflux: error: ")
    assert "; hint: " in err
    for part in parts:
        assert part in err
