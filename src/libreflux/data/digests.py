"""SHA-256 of files, remembered by (path, size, modification time), so that a second run reads none of them again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from libreflux import files

VAE_PARTS = ("vae",)
TEXT_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
DECIDING = frozenset({".json", ".safetensors", ".model", ".txt"})


class Digests:
    """A memory of digests in one JSON file.

    Args:
        path: where; need not exist. A damaged one is forgotten, it holds nothing that cannot be computed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = False
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            self._known = {str(name): (int(row[0]), int(row[1]), str(row[2])) for name, row in known["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            self._known = {}

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file, as 64 hexadecimal digits."""
        path = path.resolve()
        stat = path.stat()
        size, mtime, digest = self._known.get(str(path), (-1, -1, ""))
        if (size, mtime) != (stat.st_size, stat.st_mtime_ns):
            digest = files.sha256_file(path)
            self._known[str(path)] = (stat.st_size, stat.st_mtime_ns, digest)
            self._changed = True
        return digest

    def save(self) -> None:
        """Writes what is new, if anything is."""
        if self._changed:
            files.atomic_write_json(self._path, {"schema": 1, "files": self._known})
            self._changed = False


def encoder_digests(model: Path, digests: Digests) -> dict[str, str]:
    """What decides latents and what decides text conditioning: a SHA-256 over each one's files in a model folder."""
    return {
        "vae": _parts_digest(model, VAE_PARTS, digests),
        "text_encoders": _parts_digest(model, TEXT_PARTS, digests),
    }


def _parts_digest(model: Path, parts: tuple[str, ...], digests: Digests) -> str:
    total = hashlib.sha256()
    for part in parts:
        for path in sorted((model / part).rglob("*")):
            if path.is_file() and path.suffix in DECIDING and not path.name.startswith("."):
                total.update(f"{path.relative_to(model).as_posix()}\0{digests.sha256(path)}\n".encode())
    return total.hexdigest()
